"""The workspace of a VM for programs on the host: listing, reading and writing of any size (interface.md 2.2, 7.3).

What a path may be is decided twice: `clean_path` leaves nothing in it that could mean something on the way, and the
agent, inside the guest, refuses whatever leads out of the workspace. No byte of a file is kept here longer than it
takes to hand it on.
"""

from __future__ import annotations

import asyncio
import contextlib
import mimetypes
import re
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from typing import Final, NamedTuple

import msgspec

from capsem.api.types import FileEntry, FilesResponse, FileWrittenResponse
from capsem.control.channel import Stream
from capsem.model.errors import GuestFailed, InvalidInput, NotFound, PayloadTooLarge, TimedOut
from capsem.service.commands import Commands
from capsem.service.link import Link
from capsem.wire.messages import STDIN, STDOUT, DirListed, FileWritten, ListDir, ReadFile, WriteFile

CONTENT_LIMIT: Final = 10 * 1024 * 1024  # bytes of a file in one answer
DEEPEST: Final = 6
IDLE_LIMIT: Final = 30.0  # seconds without any progress on the guest's side
_HIDDEN: Final = "system"  # at the top of the workspace
_AHEAD: Final = 256 * 1024  # bytes read before the answer begins: a file that ends within them has a known length
_LISTING_LIMIT: Final = 64 * 1024 * 1024  # bytes of the agent's answer; it lists at most 50,000 entries

_STRIPPED: Final = re.compile(r"[^A-Za-z0-9._/-]")
_TYPES: Final = mimetypes.MimeTypes()  # what Python knows, not what this host is configured to say
_MORE_TEXT: Final = frozenset(
    "cfg conf css env go h hpp ini jsonl lock log md rs rst sql toml ts tsx yaml yml gitignore dockerfile makefile".split()
)
_TEXT_TYPES: Final = frozenset(
    ["application/json", "application/javascript", "application/xml", "application/x-sh", "application/toml"]
)

_entries = msgspec.json.Decoder(list[tuple[str, str, int, int]])


class Content(NamedTuple):
    """A file on its way out. `size` is None when it is not known before the end; `pieces` is to be closed."""

    name: str
    mime: str
    size: int | None
    pieces: AsyncGenerator[bytes, None]


def clean_path(path: str, *, directory: bool = False) -> str:
    """A path relative to the workspace, of harmless characters; "" is the workspace itself. Raises InvalidInput."""
    parts = [part for part in _STRIPPED.sub("", path).split("/") if part not in ("", ".")]
    if any(".." in part for part in parts):
        raise InvalidInput("path: '..' is not allowed", hint="a path is relative to the workspace, /root")
    if not parts and not directory:
        raise InvalidInput("path: is empty", hint="a path is relative to the workspace, /root")
    return "/".join(parts)


def kind_of(name: str) -> tuple[str | None, bool | None]:
    """The media type that a file's name tells of, and whether that is text; None where it tells nothing."""
    mime, encoding = _TYPES.guess_type(name)
    if encoding is not None:
        return f"application/{encoding}", False
    suffix = name.lower().rpartition(".")[2]
    if suffix in _MORE_TEXT:  # before what Python says, to which .ts is a film
        return (mime if mime is not None and mime.startswith("text/") else "text/plain"), True
    if mime is None:
        return None, None
    return mime, mime.startswith("text/") or mime in _TEXT_TYPES or mime.endswith(("+xml", "+json"))


def tree(listed: list[tuple[str, str, int, int]], directory: str) -> list[FileEntry]:
    """The agent's flat list as entries, directories first, then by name."""
    below: dict[str, list[tuple[str, str, int, int]]] = {}
    for entry in listed:
        parent, _, name = entry[0].rpartition("/")
        if not (not directory and not parent and name == _HIDDEN):
            below.setdefault(parent, []).append(entry)

    def level(parent: str, depth: int) -> list[FileEntry]:
        found = []
        for path, kind, size, mtime in sorted(
            below.get(parent, ()), key=lambda each: (each[1] != "directory", each[0])
        ):
            name = path.rpartition("/")[2]
            mime, is_text = kind_of(name) if kind == "file" else (None, None)
            found.append(
                FileEntry(
                    name=name,
                    path=f"{directory}/{path}" if directory else path,
                    type=kind,
                    size=size,
                    mtime=mtime,
                    mime=mime,
                    is_text=is_text,
                    children=level(path, depth + 1) if path in below and depth < DEEPEST else None,
                )
            )
        return found

    return level("", 1)


class Files(Commands):
    """See service.manager.Manager."""

    async def _workspace(self, operation: str, vm_id: str) -> Link:
        """The link to the guest whose workspace it is. Raises WrongState when it does not run."""
        return await self._vm(operation, vm_id).ready_link()

    async def list_files(self, vm_id: str, path: str, depth: int) -> FilesResponse:
        """What is in a directory of the workspace."""
        where = clean_path(path, directory=True)
        if depth < 1:
            raise InvalidInput(f"depth is {depth}", hint=f"1 to {DEEPEST}")
        link = await self._workspace("list_files", vm_id)
        stream = link.open(ListDir(path=where or ".", depth=min(depth, DEEPEST)))
        text = bytearray()
        with _missing():
            async with contextlib.aclosing(_pieces(stream, f"listing {where or '/root'}")) as pieces:
                async for piece in pieces:
                    text += piece
                    if len(text) > _LISTING_LIMIT:
                        raise GuestFailed("the guest's list of files does not end", hint="list a smaller directory")
            result = await stream.result()
        try:
            entries = tree(_entries.decode(text), where)
        except (msgspec.DecodeError, RecursionError) as error:
            raise GuestFailed(f"the guest's list of files makes no sense: {error}") from error
        return FilesResponse(entries=entries, truncated=isinstance(result, DirListed) and result.truncated)

    async def get_file(self, vm_id: str, path: str) -> Content:
        """The content of a file, from its first bytes on: what is wrong is known before the answer begins."""
        where = clean_path(path)
        link = await self._workspace("get_file", vm_id)
        stream = link.open(ReadFile(path=where, limit=CONTENT_LIMIT))
        pieces = _pieces(stream, f"reading {where}")
        name = where.rpartition("/")[2]
        head: list[bytes] = []
        size: int | None = 0
        try:
            with _missing():
                while (size := sum(map(len, head))) < _AHEAD:
                    piece = await anext(pieces, None)
                    if piece is None:
                        break
                    head.append(piece)
                else:
                    size = None
        except BaseException:
            await pieces.aclose()
            raise
        return Content(name, kind_of(name)[0] or "application/octet-stream", size, _joined(head, pieces))

    async def put_file(self, vm_id: str, path: str, body: AsyncIterator[bytes]) -> FileWrittenResponse:
        """Replace a file by what `body` yields; what was there stays until all of it has come, and is durable."""
        where = clean_path(path)
        link = await self._workspace("put_file", vm_id)
        stream = link.open(WriteFile(path=where))
        what = f"writing {where}"
        try:
            async for data in body:
                async with _moving(what):
                    await stream.write(STDIN, data)
                if stream.over:  # refused: the rest has nobody to go to
                    break
            if not stream.over:
                stream.end(STDIN)
            async with _moving(what):
                result = await stream.result()
        finally:
            stream.reset()
        assert isinstance(result, FileWritten)
        return FileWrittenResponse(success=True, size=result.size)


async def _pieces(stream: Stream, what: str) -> AsyncGenerator[bytes, None]:
    """What the guest sends on a stream, to its end. Raises what it was refused with."""
    try:
        while True:
            async with _moving(what):
                data = await stream.read(STDOUT)
            if not data:
                break
            yield data
        await stream.result()
    finally:
        stream.reset()


async def _joined(head: list[bytes], rest: AsyncGenerator[bytes, None]) -> AsyncGenerator[bytes, None]:
    async with contextlib.aclosing(rest):
        for piece in head:
            yield piece
        head.clear()
        async for piece in rest:
            yield piece


@contextlib.asynccontextmanager
async def _moving(what: str) -> AsyncIterator[None]:
    try:
        async with asyncio.timeout(IDLE_LIMIT):
            yield
    except TimeoutError:
        raise TimedOut(f"{what} timed out: the guest did nothing for {IDLE_LIMIT:.0f}s") from None


@contextlib.contextmanager
def _missing() -> Iterator[None]:
    """What is there but of another kind is as good as missing."""
    try:
        yield
    except PayloadTooLarge:
        raise
    except InvalidInput as error:
        raise NotFound(error.message, hint=error.hint) from error
