"""Files of the workspace for the host: confined and race-free (interface.md 6.4); writer.py has how they are written.

A path is resolved once, its real directory must lie inside the workspace, and is then opened component by component
without following links: what is swapped in between is refused, not followed.
"""

from __future__ import annotations

import json
import os
import stat

from capsem.guest.loop import Loop
from capsem.guest.servant import Servant
from capsem.wire.messages import (
    STDOUT,
    DirListed,
    Failed,
    FileFound,
    FileRead,
    ListDir,
    ReadFile,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from capsem.wire.schema import Message
    from capsem.wire.streams import Mux

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
MAX_ENTRIES = 50_000  # of one listing
_QUOTED = 1000  # characters of what was asked for that an answer repeats
_TOO_LONG = (7, 36)  # E2BIG, ENAMETOOLONG
_FULL = 28  # ENOSPC


class Refused(Exception):
    """The request cannot be done; becomes a Failed message."""

    def __init__(self, code: str, message: str, hint: str | None = None) -> None:
        super().__init__(message)
        self.failed = Failed(code=code, message=message[:_QUOTED], hint=hint)


def refusal(error: BaseException, path: str) -> Failed:
    """The message for an error met while serving a request for `path`."""
    if isinstance(error, Refused):
        return error.failed
    if isinstance(error, FileNotFoundError):
        return Failed(code="not_found", message=f"{path}: no such file or directory")
    if isinstance(error, (NotADirectoryError, IsADirectoryError)) or getattr(error, "errno", None) in _TOO_LONG:
        return Failed(code="invalid_input", message=f"{path}: {os.strerror(getattr(error, 'errno', None) or 0)}")
    if isinstance(error, OSError):
        hint = "the VM's own disk is full: remove something in it" if error.errno == _FULL else None
        return Failed(code="guest_failed", message=f"{path}: {os.strerror(error.errno or 5)}", hint=hint)
    return Failed(code="guest_failed", message=f"{path}: {type(error).__name__}: {error}")


def _irregular(path: str) -> Refused:
    return Refused("invalid_input", f"{path}: not a regular file")


def open_parent(workspace: str, path: str, *, create: bool) -> tuple[int, str]:
    """Open the directory that holds `path` (absolute, or relative to the workspace); returns it and the last component.

    With `create`, missing parents are made. Raises Refused, OSError.
    """
    if not path or "\0" in path or len(path) > os.pathconf("/", "PC_PATH_MAX"):
        raise Refused("invalid_input", "the path is empty, too long or contains NUL")
    if ".." in path.split("/"):
        raise Refused("invalid_input", f"{path}: '..' is not allowed", "use a path inside /root")
    full = os.path.normpath(os.path.join(workspace, path))
    directory, name = os.path.split(full)
    base, real = os.path.realpath(workspace), os.path.realpath(directory)
    if not name or full == os.path.normpath(workspace):
        raise Refused("invalid_input", f"{path}: is a directory")
    if real != base and not real.startswith(base + "/"):
        raise Refused("permission_denied", f"{path}: outside of {workspace}", "use a path inside /root")
    fd = os.open(base, _DIRECTORY)
    try:
        for part in real[len(base) + 1 :].split("/"):
            if part:
                fd = _descend(fd, part, create=create)
    except BaseException:
        os.close(fd)
        raise
    return fd, name


def _descend(fd: int, part: str, *, create: bool) -> int:
    """Open a subdirectory and close its parent, unless it raises."""
    try:
        inner = os.open(part, _DIRECTORY, dir_fd=fd)
    except FileNotFoundError:
        if not create:
            raise
        try:
            os.mkdir(part, 0o755, dir_fd=fd)
        except FileExistsError:  # a command of the guest was faster; it is still opened with care
            pass
        os.fsync(fd)
        inner = os.open(part, _DIRECTORY, dir_fd=fd)
    os.close(fd)
    return inner


class Reader(Servant):
    """Serves a ReadFile request: reads no more than what goes out at once."""

    def __init__(
        self,
        mux: Mux,
        stream: int,
        request: ReadFile,
        workspace: str,
        buffer: memoryview,
        done: Callable[[int], None],
    ) -> None:
        """Open the file, and begin to send it. Raises Refused, OSError. `buffer` may be all readers' of one connection:
        what it holds is written before any is asked for more.
        """
        self._buffer = buffer
        self._mux = mux
        self._stream = stream
        self._path = request.path
        self._done = done
        directory, name = open_parent(workspace, request.path, create=False)
        try:
            # O_NONBLOCK: opening a FIFO must not wait for its writer
            self._fd = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=directory)
        except OSError as error:
            if error.errno == 40:  # ELOOP
                raise Refused("permission_denied", f"{request.path}: is a symbolic link") from None
            if error.errno == 6:  # ENXIO: a socket
                raise _irregular(request.path) from None
            raise
        finally:
            os.close(directory)
        info = os.fstat(self._fd)
        self._mode = stat.S_IMODE(info.st_mode)
        self._size = 0
        problem = None
        if not stat.S_ISREG(info.st_mode):
            problem = _irregular(request.path)
        elif request.limit is not None and info.st_size > request.limit:
            problem = Refused(
                "payload_too_large",
                f"{request.path}: {info.st_size} bytes, more than {request.limit}",
                "copy it with `capsem cp`",
            )
        if problem:
            self.cancelled()
            raise problem
        self._limit = request.limit
        self._left: int | None = None  # of what was announced
        if request.announce:
            self._left = info.st_size
            mux.message(stream, FileFound(size=info.st_size, mode=self._mode))
        mux.pour(stream, STDOUT, self._next)

    def _next(self, room: int) -> memoryview:
        """The next bytes; the stream is closed where there are no more, or none to be had."""
        size = 0
        if self._fd >= 0:
            result: Message
            try:
                size = self._read(room)
                result = FileRead(size=self._size, mode=self._mode)
            except (Refused, OSError) as error:
                result = refusal(error, self._path)
            if not size:
                self.cancelled()
                self._mux.close(self._stream, result)
                self._done(self._stream)
        return self._buffer[:size]

    def _read(self, room: int) -> int:
        room = min(room, len(self._buffer))
        size = os.readv(self._fd, [self._buffer[: room if self._left is None else min(room, self._left)]])
        self._size += size
        if self._left is not None:
            if not size and self._left:
                raise Refused("guest_failed", "the file shrank while it was read")
            self._left -= size  # what it has grown by since is another reading's
        elif self._limit is not None and self._size > self._limit:
            raise Refused("payload_too_large", "the file grew while it was read")
        return size

    def cancelled(self) -> None:
        """Let go of the file."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def open_directory(workspace: str, path: str) -> int:
    """Open a directory of the workspace, which may itself be named ("", ".", "/"). Raises Refused, OSError."""
    if os.path.normpath(os.path.join(workspace, path)) == os.path.normpath(workspace):
        return os.open(os.path.realpath(workspace), _DIRECTORY)
    parent, name = open_parent(workspace, path, create=False)
    try:
        return os.open(name, _DIRECTORY, dir_fd=parent)
    finally:
        os.close(parent)


def list_directory(fd: int, depth: int) -> list[tuple[str, str, int, int]]:
    """What ListDir describes, up to one more than MAX_ENTRIES. Takes `fd` over. What vanishes meanwhile is left out."""
    found: list[tuple[str, str, int, int]] = []
    pending = [(fd, "", depth)]
    while pending:
        here, prefix, levels = pending.pop()
        try:
            for entry in os.scandir(here):
                try:
                    info = entry.stat(follow_symlinks=False)
                    if stat.S_ISREG(info.st_mode):
                        found.append((prefix + entry.name, "file", info.st_size, int(info.st_mtime)))
                    elif stat.S_ISDIR(info.st_mode):
                        found.append((prefix + entry.name, "directory", 0, int(info.st_mtime)))
                        if levels > 1 and len(found) <= MAX_ENTRIES:
                            inner = os.open(entry.name, _DIRECTORY, dir_fd=here)
                            pending.append((inner, f"{prefix}{entry.name}/", levels - 1))
                except FileNotFoundError:
                    continue
                if len(found) > MAX_ENTRIES:
                    break
        finally:
            os.close(here)
        if len(found) > MAX_ENTRIES:
            for rest, _, _ in pending:
                os.close(rest)
            break
    return found


class Lister(Servant):
    """Serves a ListDir request: collects on a thread, then sends as there is credit."""

    def __init__(
        self, loop: Loop, mux: Mux, stream: int, request: ListDir, workspace: str, done: Callable[[int], None]
    ) -> None:
        """Open the directory. Raises Refused, OSError."""
        self._mux = mux
        self._stream = stream
        self._path = request.path
        self._done = done
        fd = open_directory(workspace, request.path)
        loop.offload(lambda: list_directory(fd, request.depth), self._listed)

    def _listed(self, result: list[tuple[str, str, int, int]] | BaseException) -> None:
        if isinstance(result, BaseException):
            self._mux.close(self._stream, refusal(result, self._path))
            self._done(self._stream)
            return
        entries = result[:MAX_ENTRIES]
        text = json.dumps(entries).encode("ascii")
        listed = DirListed(entries=len(entries), truncated=len(result) > MAX_ENTRIES)
        self._mux.send(self._stream, STDOUT, text)
        self._mux.close(self._stream, listed)
        self._done(self._stream)
