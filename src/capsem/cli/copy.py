"""`capsem cp`: files and directories between this host and a VM.

A file of the workspace goes over the files API, which is the fastest way, and out of a VM that does not run the only
one. What that refuses or cannot name goes over one command's stream: any path of the guest, any size, in constant
memory; a directory travels as a tar archive. What comes from a guest is not trusted: `capsem.cli.unpack` takes regular
files and directories below the target, and links that stay inside it.
"""

from __future__ import annotations

import contextlib
import os
import select
import shlex
import stat
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Final

import click

from capsem.api import stream
from capsem.cli.context import SESSION, Context
from capsem.cli.terminal import PATIENCE, Line, printable
from capsem.model.errors import (
    AlreadyExists,
    GuestFailed,
    Interrupted,
    InvalidInput,
    NotFound,
    NotRunning,
    PermissionDenied,
)

if TYPE_CHECKING:
    from capsem.client.sync import Client

_MISSING, _NO_FILE = 66, 67  # exit codes of our scripts
_HEAD_LIMIT: Final = 200
_ERROR_LIMIT: Final = 4096
_PIECE: Final = 256 * 1024
# What the files API refuses, and a command may be able to do: a directory, a link, a path elsewhere.
_REFUSED: Final = (NotFound, InvalidInput, PermissionDenied)

# One line that says what it is, then the content.
_READ: Final = """
if [ -d "$p" ]; then echo directory; exec tar --hard-dereference --sort=name -C "$p" -cf - .
elif [ -f "$p" ]; then stat -L -c 'file %a %s' -- "$p" && exec cat -- "$p"
elif [ -e "$p" ]; then exit 67
else exit 66; fi
"""
# `clear FILE` removes it when this script is killed before it has said that all is well: a session of its own is not.
_CLEAR: Final = """
set -e
clear() {
    coproc CLEAR { exec setsid bash -c 'read -r well; [ -n "$well" ] || rm -rf -- "$0"' "$1" >/dev/null 2>&1; }
}
"""
_WRITE: Final = f"""{_CLEAR}
if [ -d "$p" ]; then p="${{p%/}}/$n"; fi
if [ -d "$p" ]; then echo "is a directory" >&2; exit 1; fi
case "$p" in ?*/*) mkdir -p -- "${{p%/*}}"; t="${{p%/*}}" ;; /*) t=/ ;; *) t=. ;; esac
t="${{t%/}}/.capsem-$$-$RANDOM$RANDOM"
clear "$t"
trap 'rm -f -- "$t"' EXIT
(umask 077; exec dd bs=1M iflag=fullblock oflag=nofollow conv=fsync,excl status=none of="$t")
chmod -- "$m" "$t"
mv -fT -- "$t" "$p"
echo well >&"${{CLEAR[1]}}"
"""
_UNPACK: Final = f"""{_CLEAR}
if [ -d "$p" ] && [ -n "$n" ]; then p="${{p%/}}/$n"; fi
if [ -e "$p" ]; then exec tar --no-same-owner -C "$p" -xpf -; fi
clear "$p"
mkdir -p -- "$p"
tar --no-same-owner -C "$p" -xpf - || {{ code=$?; rm -rf -- "$p"; exit $code; }}
echo well >&"${{CLEAR[1]}}"
"""


@click.command(
    "cp",
    epilog="\b\nExamples:\n  capsem cp notes.txt box:            into /root of the VM\n"
    "  capsem cp box:/etc/os-release .\n  capsem cp -- src box:src            a directory, with all that is in it\n"
    "  capsem cp box:out.csv - | head",
)
@click.argument("source", metavar="SRC")
@click.argument("destination", metavar="DST")
@click.pass_obj
def cp_command(obj: Context, source: str, destination: str) -> None:
    """Copy a file or a directory into a VM or out of it.

    One of SRC and DST is SESSION:PATH, with a PATH relative to /root; "-" is standard input or output, for a directory
    as a tar archive. A DST that is a directory gets the copy inside it. Modes are kept; a file is replaced at once, or
    not at all.
    """
    there, here = _remote(source), _remote(destination)
    if (there is None) == (here is None):
        raise click.UsageError("exactly one of SRC and DST has to be SESSION:PATH; a file's name with a colon: ./a:b")
    with _Progress() as progress:
        if there is not None:
            _download(obj.client(), *there, destination, progress)
        elif here is not None:
            _upload(obj.client(), source, *here, progress)


def _remote(word: str) -> tuple[str, str] | None:
    """SESSION and PATH; None for a path of this host."""
    session, colon, path = word.partition(":")
    if not colon or "/" in session:
        return None
    if "\0" in path:
        raise InvalidInput("the path holds a NUL character")
    SESSION.convert(session, None, None)
    return session, f"./{path}" if path.startswith("-") else path or "."


def _plain(path: str) -> str | None:
    """A guest's path as one relative to the workspace that the files API takes as it is; None if it does not."""
    inner = path.removeprefix("/root/").removeprefix("./")
    if inner in ("", ".") or inner[0] in "/~" or inner.endswith("/") or ".." in inner.split("/"):
        return None
    try:
        inner.encode()
    except UnicodeEncodeError:  # bytes that are no UTF-8: a query cannot hold them
        return None
    return inner


def _script(text: str, **variables: str) -> dict[str, Any]:
    settings = "".join(f"{name}={shlex.quote(value)}\n" for name, value in variables.items())
    return {"command": settings + text}


# -- out of a VM


class _Output:
    """The command's standard output as a file to read; its last bytes come only when it has ended well."""

    def __init__(self, pieces: Iterator[tuple[int, bytes]], progress: _Progress) -> None:
        self.errors = bytearray()
        self._pieces = pieces
        self._progress = progress
        self._held = b""

    def piece(self) -> bytes:
        """What comes next; b"" at the end."""
        if self._held:
            data, self._held = self._held, b""
            return data
        for channel, data in self._pieces:
            if channel == stream.STDOUT and data:
                self._progress.add(len(data))
                return data
            self.errors += data[: _ERROR_LIMIT - len(self.errors)]
        return b""

    def line(self) -> str:
        """The first line, without its end."""
        text = b""
        while b"\n" not in text and len(text) < _HEAD_LIMIT and (data := self.piece()):
            text += data
        line, _, self._held = text.partition(b"\n")
        return line[:_HEAD_LIMIT].decode("ascii", "replace")

    def read(self, size: int, /) -> bytes:
        """As of a file."""
        data = self.piece()
        while 0 < len(data) < size and (more := self.piece()):
            data += more
        self._held = data[size:]
        return data[:size]


def _download(client: Client, session: str, path: str, destination: str, progress: _Progress) -> None:
    plain = _plain(path)
    if plain is None:
        _download_by_command(client, session, path, destination, progress)
        return
    from capsem.client.transfer import Download

    try:
        with contextlib.closing(Download(client, session, plain)) as file:
            progress.total = file.size or 0
            _receive_file(progress.counted(file), destination, Path(path).name, file.mode)
    except _REFUSED as refusal:
        try:
            _download_by_command(client, session, path, destination, progress)
        except NotRunning:
            hint = f"without a start only files can be had: capsem resume {session}"
            raise type(refusal)(f"{session}:{refusal.message}", hint=hint) from None


def _download_by_command(client: Client, session: str, path: str, destination: str, progress: _Progress) -> None:
    name = Path(path).name
    if name in ("", ".."):
        name = session
    where = f"{session}:{path}"
    with client.stream(session, _script(_READ, p=path)) as command:
        output = _Output(iter(command), progress)
        kind, *numbers = output.line().split() or [""]

        def finish() -> None:
            while output.piece():
                pass
            _check(command.result, output.errors, where)

        def content() -> Iterator[bytes]:
            yield from iter(output.piece, b"")
            finish()

        if not kind:
            finish()
            raise Interrupted(f"{where}: the VM sent nothing")
        progress.total = int(numbers[1]) if len(numbers) == 2 and numbers[1].isdecimal() else 0
        if kind == "directory" and destination != "-":
            _receive_directory(output, finish, _target(destination, name))
        else:
            mode = int(numbers[0], 8) & 0o777 if numbers and numbers[0].isdecimal() else None
            _receive_file(content(), destination, name, mode)


def _target(destination: str, name: str) -> Path:
    target = Path(destination)
    if target.is_dir():
        return target / name
    if not target.parent.is_dir():
        raise NotFound(f"{target.parent} is no directory", hint=f"mkdir -p {shlex.quote(str(target.parent))}")
    return target


def _receive_file(pieces: Iterable[bytes], destination: str, name: str, mode: int | None) -> None:
    """Write a file, or standard output, from pieces that raise when something is missing."""
    if destination == "-":
        for data in pieces:
            sys.stdout.buffer.write(data)
        sys.stdout.buffer.flush()
        return
    target = _target(destination, name)
    if target.is_dir():
        raise AlreadyExists(f"{target} is a directory", hint="give another name")
    fd, temporary = tempfile.mkstemp(prefix=".capsem-", dir=target.parent)
    try:
        with os.fdopen(fd, "wb", buffering=0) as file:
            for data in pieces:
                _write_all(file, data)
            os.fchmod(file.fileno(), 0o644 if mode is None else mode)
        os.replace(temporary, target)
    except BaseException:
        Path(temporary).unlink()
        raise


def _receive_directory(output: _Output, finish: Callable[[], None], target: Path) -> None:
    from capsem.cli.unpack import remove_tree, unpack

    if target.exists() or target.is_symlink():
        raise AlreadyExists(f"{target} exists", hint="remove it, or give another name")
    temporary = tempfile.mkdtemp(prefix=".capsem-", dir=target.parent)
    try:
        left_out = unpack(output, Path(temporary))
        finish()
        os.rename(temporary, target)
    except BaseException:
        remove_tree(Path(temporary))
        raise
    _tell(left_out)


def _tell(left_out: Sequence[str]) -> None:
    for line in left_out[:10]:
        click.echo(f"note: left out {printable(line)}", err=True)
    if len(left_out) > 10:
        click.echo(f"note: left out {len(left_out) - 10} more", err=True)


def _write_all(file: IO[bytes], data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[file.write(view) :]


# -- into a VM


class _Source:
    """What is sent, counted on its way."""

    def __init__(self, fd: int, progress: _Progress) -> None:
        self._fd = fd
        self._progress = progress
        self.on_failure: Callable[[], None] = lambda: None
        self.failure: OSError | None = None

    def read(self, size: int, /) -> bytes:
        """See client.sync.Input."""
        try:
            data = os.read(self._fd, size)
        except BlockingIOError:
            select.select([self._fd], [], [])
            return self.read(size)
        except OSError as error:  # not the end of the file: the other side must not take it for that
            self.failure = error
            self.on_failure()
            raise
        self._progress.add(len(data))
        return data


def _upload(client: Client, source: str, session: str, path: str, progress: _Progress) -> None:
    where = f"{session}:{path}"
    if source == "-":
        if path == "." or path.endswith("/"):
            raise InvalidInput("what comes from standard input has no name", hint=f"write {session}:NAME")
        _send(client, session, _script(_WRITE, p=path, n="", m="644"), _Source(0, progress), where)
        return
    name = Path(source).name
    if name in ("", ".."):
        name = Path(source).resolve().name
    if path.endswith("/") and path.strip("/"):
        path = path.rstrip("/") + "/" + name
    try:
        fd = os.open(source, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        raise NotFound(f"{source}: no such file or directory") from None
    try:
        info = os.fstat(fd)
        if stat.S_ISDIR(info.st_mode):
            with _packed(source) as (end, failure, left_out):
                _send(client, session, _script(_UNPACK, p=path, n=name), _Source(end, progress), where, failure)
                _tell(left_out)
        elif stat.S_ISREG(info.st_mode):
            progress.total = info.st_size
            if _upload_plain(client, fd, info, session, path, name, progress):
                return
            mode = f"{stat.S_IMODE(info.st_mode) & 0o777:o}"
            _send(client, session, _script(_WRITE, p=path, n=name, m=mode), _Source(fd, progress), where)
        else:
            raise InvalidInput(f"{source} is neither a file nor a directory", hint='"-" reads standard input')
    finally:
        os.close(fd)


def _upload_plain(
    client: Client, fd: int, info: os.stat_result, session: str, path: str, name: str, progress: _Progress
) -> bool:
    """Over the files API; False when it refuses, as it does where a directory or a link is in the way."""
    plain = _plain(f"./{name}" if path in (".", "/root", "/root/") else path)
    if plain is None:
        return False
    from capsem.client.transfer import upload

    try:
        upload(client, session, plain, fd, info.st_size, stat.S_IMODE(info.st_mode), progress.add)
    except _REFUSED:
        progress.restart()
        return False
    return True


@contextlib.contextmanager
def _packed(directory: str) -> Iterator[tuple[int, list[OSError], list[str]]]:
    """A pipe to read a tar archive of the directory from, what went wrong while it was made, and what is not in it."""
    import tarfile

    reader, writer = os.pipe2(os.O_CLOEXEC)
    failure: list[OSError] = []
    left_out: list[str] = []

    class Archive(tarfile.TarFile):
        """Of files, directories and links."""

        def gettarinfo(self, name: Any = None, arcname: Any = None, fileobj: Any = None) -> Any:  # None: it is left out
            entry: tarfile.TarInfo | None = super().gettarinfo(name, arcname, fileobj)
            if entry is None or not (entry.isfile() or entry.isdir() or entry.issym() or entry.islnk()):
                left_out.append(f"{os.path.relpath(arcname)}: neither a file nor a directory")
                return None
            entry.uid = entry.gid = 0
            entry.uname = entry.gname = ""
            return entry

    def pack() -> None:
        try:
            with os.fdopen(writer, "wb") as file, Archive.open(fileobj=file, mode="w|", bufsize=_PIECE) as archive:
                archive.add(directory, arcname=".")
        except BrokenPipeError:
            pass  # nobody wants the rest
        except OSError as error:
            failure.append(error)

    thread = threading.Thread(target=pack, name="tar", daemon=True)
    thread.start()
    try:
        yield reader, failure, left_out
    finally:
        os.close(reader)
        thread.join()


def _send(
    client: Client, session: str, body: dict[str, Any], source: _Source, where: str, broken: list[OSError] | None = None
) -> None:
    errors = bytearray()
    with client.stream(session, body, stdin=source) as command:
        source.on_failure = command.hang_up
        try:
            for _channel, data in command:
                errors += data[: _ERROR_LIMIT - len(errors)]
        except Interrupted:
            if source.failure is not None:
                raise source.failure from None
            raise
    if broken:
        raise broken[0]
    _check(command.result, errors, where)


# -- both ways


def _check(result: dict[str, Any], errors: bytearray, where: str) -> None:
    """Raises what a script's exit code stands for."""
    if result.get("truncated"):
        raise Interrupted(f"{where}: part of the data was lost on the way", hint="copy it again")
    code = result["exit_code"]
    if code == 0:
        return
    if code == _MISSING:
        raise NotFound(f"{where}: no such file or directory")
    if code == _NO_FILE:
        raise InvalidInput(f"{where} is neither a file nor a directory")
    text = errors.decode("utf-8", "replace").strip()
    hint = "the VM's own disk is full: remove something in it" if "No space left on device" in text else None
    line = text.splitlines()[-1] if text else f"the VM could not do it, exit code {code}"
    raise GuestFailed(f"{where}: {line}", hint=hint)


class _Progress:
    """How much has gone by, on a terminal, once it takes longer than a moment."""

    def __init__(self) -> None:
        self.total = 0
        self._done = 0
        self._next = time.monotonic() + PATIENCE
        self._line = Line()
        self._shown = sys.stderr.isatty()

    def __enter__(self) -> _Progress:
        return self

    def __exit__(self, *_exc: object) -> None:
        self._shown = False
        self._line.clear()

    def restart(self) -> None:
        """It goes another way, from the beginning."""
        self._done = 0

    def counted(self, pieces: Iterable[bytes]) -> Iterator[bytes]:
        """The pieces, counted on their way."""
        for data in pieces:
            self.add(len(data))
            yield data

    def add(self, size: int) -> None:
        """So many bytes more."""
        self._done += size
        now = time.monotonic()
        if self._shown and now >= self._next:
            self._next = now + 0.2
            share = f" of {self.total / 1e6:.1f}" if self.total else ""
            self._line.show(f"{self._done / 1e6:.1f}{share} MB")
