"""The workspace of a VM for programs on the host: listing, reading and writing of any size (interface.md 2.2, 7.3).

What a path may be is decided twice: `clean_path` leaves nothing in it that leads out, nor, unless it is meant exactly,
that could mean something on the way; and the agent, inside the guest, refuses whatever leads out of the workspace. No
byte of a file is kept here longer than it takes to hand it on.
"""

from __future__ import annotations

import asyncio
import contextlib
import mimetypes
import posixpath
import re
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from typing import Final, NamedTuple

import msgspec

from capsem.api.file_types import FileEntry, FilesResponse, FileWrittenResponse, ReadFileRequest, ReadFileResponse
from capsem.control.channel import Stream
from capsem.model.errors import GuestFailed, InvalidInput, NotFound, PayloadTooLarge, PermissionDenied, TimedOut
from capsem.offline.workspace import GUEST_PATH
from capsem.service.commands import TEXT_FILE_LIMIT, Commands
from capsem.service.create import Maker
from capsem.service.offline import Offline, pieces_of
from capsem.wire.messages import STDIN, STDOUT, DirListed, FileFound, FileWritten, ListDir, ReadFile, WriteFile
from capsem.wire.schema import Message

CONTENT_LIMIT: Final = 10 * 1024 * 1024  # bytes of a file in one answer
DEEPEST: Final = 6
IDLE_LIMIT: Final = 30.0  # seconds without any progress on the guest's side
_HIDDEN: Final = "system"  # at the top of the workspace
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
    """A file on its way out. `size` and `mode` are None for an agent that is too old to announce them.
    `pieces` is to be closed.
    """

    name: str
    mime: str
    size: int | None
    mode: int | None
    pieces: AsyncGenerator[bytes | memoryview, None]


def clean_path(path: str, *, directory: bool = False, exact: bool = False) -> str:
    """A path relative to the workspace; "" is the workspace itself. Unless it is meant `exact`, it is one of harmless
    characters: the others are dropped. Raises InvalidInput."""
    if exact and "\0" in path:
        raise InvalidInput("path: holds a NUL character", hint="remove it")
    parts = [part for part in (path if exact else _STRIPPED.sub("", path)).split("/") if part not in ("", ".")]
    if any(part == ".." if exact else ".." in part for part in parts):
        raise InvalidInput("path: '..' is not allowed", hint="a path is relative to the workspace, /root")
    if not parts and not directory:
        raise InvalidInput("path: is empty", hint="a path is relative to the workspace, /root")
    return "/".join(parts)


def inside_workspace(path: str) -> str:
    """A guest's path, absolute or relative to the workspace, as one relative to it. Raises InvalidInput, PermissionDenied."""
    if not path or "\0" in path or ".." in path.split("/"):
        raise InvalidInput(
            f"path: {path[:200]!r} is empty, or holds '..' or NUL", hint=f"use a path inside {GUEST_PATH}"
        )
    full = posixpath.normpath(posixpath.join(GUEST_PATH, path)).replace("//", "/")
    if full != GUEST_PATH and not full.startswith(GUEST_PATH + "/"):
        raise PermissionDenied(f"{path}: outside of {GUEST_PATH}", hint=f"use a path inside {GUEST_PATH}")
    return full[len(GUEST_PATH) + 1 :]


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

    _maker: Maker

    async def list_files(self, vm_id: str, path: str, depth: int, *, exact: bool = False) -> FilesResponse:
        """What is in a directory of the workspace."""
        where = clean_path(path, directory=True, exact=exact)
        if depth < 1:
            raise InvalidInput(f"depth is {depth}", hint=f"1 to {DEEPEST}")
        depth = min(depth, DEEPEST)
        vm = self._vm("list_files", vm_id)
        with _missing():
            if not vm.running and (found := await Offline(self._maker).list_files(vm, where, depth)) is not None:
                return FilesResponse(entries=tree(found[0], where), truncated=found[1])
            stream = (await vm.ready_link()).open(ListDir(path=where or ".", depth=depth))
            text = bytearray()
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

    async def get_file(self, vm_id: str, path: str, *, whole: bool = False, exact: bool = False) -> Content:
        """The content of a file, from its first bytes on: what is wrong is known before the answer begins."""
        where = clean_path(path, exact=exact)
        name = where.rpartition("/")[2]
        mime = kind_of(name)[0] or "application/octet-stream"
        vm = self._vm("get_file", vm_id)
        with _missing():
            if not vm.running:
                limit = vm.record.spec.disk_mb << 20 if whole else CONTENT_LIMIT
                if (found := await Offline(self._maker).get_file(vm, where, limit)) is not None:
                    return Content(name, mime, found[0].size, found[0].mode, pieces_of(found[1]))
            link = await vm.ready_link()
            stream = link.open(ReadFile(path=where, limit=None if whole else CONTENT_LIMIT, announce=True))
            stream.widen(STDOUT)
            announced: list[Message] = []
            stream.on_message = announced.append
            pieces = _pieces(stream, f"reading {where}")
            try:
                first = await anext(pieces, b"")
            except BaseException:
                await pieces.aclose()
                raise
        file = announced[0] if announced else None
        size, mode = (file.size, file.mode) if isinstance(file, FileFound) else (None, None)
        return Content(name, mime, size, mode, _joined(first, pieces))

    async def read_file(self, vm_id: str, request: ReadFileRequest) -> ReadFileResponse:
        """A text file of the workspace, as the agent would read it."""
        vm = self._vm("read_file", vm_id)
        if not vm.running:
            path = inside_workspace(request.path)
            found = await Offline(self._maker).get_file(vm, path, TEXT_FILE_LIMIT)
            if found is not None:
                with found[1] as copy:
                    return ReadFileResponse(content=copy.read().decode("utf-8", "replace"))
        return await super().read_file(vm_id, request)

    async def put_file(
        self, vm_id: str, path: str, body: AsyncIterator[bytes], *, mode: int = 0o644, exact: bool = False
    ) -> FileWrittenResponse:
        """Replace a file by what `body` yields; what was there stays until all of it has come, and is durable."""
        where = clean_path(path, exact=exact)
        link = await self._vm("put_file", vm_id).ready_link()
        stream = link.open(WriteFile(path=where, mode=mode))
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


async def _pieces(stream: Stream, what: str) -> AsyncGenerator[bytes | memoryview, None]:
    """What the guest sends on a stream, to its end. Raises what it was refused with."""
    try:
        while True:
            async with _moving(what):
                data = await stream.take(STDOUT)
            if not data:
                break
            yield data
        await stream.result()
    finally:
        stream.reset()


async def _joined(
    first: bytes | memoryview, rest: AsyncGenerator[bytes | memoryview, None]
) -> AsyncGenerator[bytes | memoryview, None]:
    async with contextlib.aclosing(rest):
        if first:
            yield first
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
