"""Files of the workspace for the host: confined, race-free, durable before they are acknowledged (interface.md 6.4).

A path is resolved once, its real directory must lie inside the workspace, and is then opened component by component
without following links: what is swapped in between is refused, not followed.
"""

from __future__ import annotations

import json
import os
import stat

from capsem.guest.loop import Loop
from capsem.guest.servant import Servant
from capsem.wire import frames
from capsem.wire.messages import (
    STDIN,
    STDOUT,
    DirListed,
    Failed,
    FileFound,
    FileRead,
    FileWritten,
    ListDir,
    ReadFile,
    WriteFile,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from capsem.wire.streams import Mux

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
MAX_ENTRIES = 50_000  # of one listing
_PIECE = frames.MAX_DATA  # a frame's worth: cut nowhere, and of a size that the allocator has at hand
_QUOTED = 1000  # characters of what was asked for that an answer repeats
_NO_TMPFILE = (21, 22, 95)  # EISDIR, EINVAL, EOPNOTSUPP: a file system that knows no files without a name
_TOO_LONG = (7, 36)  # E2BIG, ENAMETOOLONG


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
        return Failed(code="guest_failed", message=f"{path}: {os.strerror(error.errno or 5)}")
    return Failed(code="guest_failed", message=f"{path}: {type(error).__name__}: {error}")


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
    """Serves a ReadFile request."""

    def __init__(self, mux: Mux, stream: int, request: ReadFile, workspace: str, done: Callable[[int], None]) -> None:
        """Open the file; `credit` then sends it. Raises Refused, OSError."""
        self._mux = mux
        self._stream = stream
        self._done = done
        directory, name = open_parent(workspace, request.path, create=False)
        try:
            # O_NONBLOCK: opening a FIFO must not wait for its writer
            self._fd = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=directory)
        except OSError as error:
            if error.errno == 40:  # ELOOP
                raise Refused("permission_denied", f"{request.path}: is a symbolic link") from None
            raise
        finally:
            os.close(directory)
        info = os.fstat(self._fd)
        self._mode = stat.S_IMODE(info.st_mode)
        self._size = 0
        problem = None
        if not stat.S_ISREG(info.st_mode):
            problem = Refused("invalid_input", f"{request.path}: not a regular file")
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

    def credit(self, channel: int) -> None:
        """Send as much as the host takes. Raises OSError."""
        while self._fd >= 0 and (room := self._mux.room(self._stream, STDOUT)):
            data = os.read(self._fd, min(room, _PIECE) if self._left is None else min(room, _PIECE, self._left))
            self._size += len(data)
            if self._left is not None:
                if not data and self._left:
                    raise Refused("guest_failed", "the file shrank while it was read")
                self._left -= len(data)  # what it has grown by since is another reading's
            elif self._limit is not None and self._size > self._limit:
                raise Refused("payload_too_large", "the file grew while it was read")
            if not data:
                self.cancelled()
                self._mux.close(self._stream, FileRead(size=self._size, mode=self._mode))
                self._done(self._stream)
                return
            self._mux.send(self._stream, STDOUT, data)

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
        self._text = memoryview(b"")
        self._result: DirListed | None = None
        fd = open_directory(workspace, request.path)
        loop.offload(lambda: list_directory(fd, request.depth), self._listed)

    def _listed(self, result: list[tuple[str, str, int, int]] | BaseException) -> None:
        if isinstance(result, BaseException):
            self._mux.close(self._stream, refusal(result, self._path))
            self._done(self._stream)
            return
        entries = result[:MAX_ENTRIES]
        self._text = memoryview(json.dumps(entries).encode("ascii"))
        self._result = DirListed(entries=len(entries), truncated=len(result) > MAX_ENTRIES)
        self.credit(STDOUT)

    def credit(self, channel: int) -> None:
        """Send as much as the host takes."""
        if self._result is None:
            return
        while self._text and (room := self._mux.room(self._stream, STDOUT)):
            self._mux.send(self._stream, STDOUT, self._text[:room])
            self._text = self._text[room:]
        if not self._text:
            self._mux.close(self._stream, self._result)
            self._done(self._stream)


class Writer(Servant):
    """Serves a WriteFile request: a file without a name, which gets the target's when all has come.

    So an agent that is killed in the middle leaves nothing behind. A link cannot replace a file: it is made beside the
    target and renamed over it, at the very end.
    """

    def __init__(
        self, loop: Loop, mux: Mux, stream: int, request: WriteFile, workspace: str, done: Callable[[int], None]
    ) -> None:
        """Open the file. Raises Refused, OSError."""
        self._loop = loop
        self._mux = mux
        self._stream = stream
        self._path = request.path
        self._done = done
        self._size = 0
        self._directory, self._name = open_parent(workspace, request.path, create=True)
        self._temporary = f".capsem-{stream}-{os.urandom(8).hex()}"
        self._nameless = False
        self._created = False
        self._fd = -1
        try:
            self._check_target()
            self._open()
            os.fchmod(self._fd, request.mode & 0o777)
        except BaseException:
            self.cancelled()
            raise

    def _open(self) -> None:
        flags = os.O_WRONLY | os.O_CLOEXEC
        try:
            self._fd = os.open(".", flags | os.O_TMPFILE, 0o600, dir_fd=self._directory)
            self._nameless = True
        except OSError as error:
            if error.errno not in _NO_TMPFILE:
                raise
            flags |= os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
            self._fd = os.open(self._temporary, flags, 0o600, dir_fd=self._directory)

    def _check_target(self) -> None:
        try:
            mode = os.stat(self._name, dir_fd=self._directory, follow_symlinks=False).st_mode
        except FileNotFoundError:
            self._created = True
            return
        if stat.S_ISLNK(mode):
            raise Refused("permission_denied", f"{self._path}: is a symbolic link", "write to the file it points to")
        if not stat.S_ISREG(mode):
            raise Refused("invalid_input", f"{self._path}: exists and is not a regular file")

    def feed(self, data: bytes) -> None:
        """Bytes of the file. Raises OSError."""
        view = memoryview(data)
        while view:
            view = view[os.write(self._fd, view) :]
        self._size += len(data)
        self._mux.consumed(self._stream, STDIN, len(data))

    def feed_end(self) -> None:
        """All has come: make it durable, then say so."""
        self._loop.offload(self._commit, self._committed)

    def _commit(self) -> None:
        os.fsync(self._fd)
        if self._nameless:
            os.link(f"/proc/self/fd/{self._fd}", self._temporary, dst_dir_fd=self._directory)
            self._nameless = False
        os.rename(self._temporary, self._name, src_dir_fd=self._directory, dst_dir_fd=self._directory)
        self._temporary = ""
        os.fsync(self._directory)

    def _committed(self, error: BaseException | None) -> None:
        self.cancelled()
        result = refusal(error, self._path) if error else FileWritten(size=self._size, created=self._created)
        self._mux.close(self._stream, result)
        self._done(self._stream)

    def cancelled(self) -> None:
        """Let go, and remove the temporary file if it is still there."""
        if self._temporary and self._fd >= 0 and not self._nameless:
            try:
                os.unlink(self._temporary, dir_fd=self._directory)
            except FileNotFoundError:
                pass
            self._temporary = ""
        for fd in (self._fd, self._directory):
            if fd >= 0:
                os.close(fd)
        self._fd = self._directory = -1
