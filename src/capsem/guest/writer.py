"""Writing a file of the workspace: whole or not at all, durable before it is acknowledged.

The content goes into a file without a name, which gets the target's when all has come. So an agent that is killed in
the middle leaves nothing behind. A link cannot replace a file: it is made beside the target and renamed over it, at the
very end; an agent that is killed between the two has written down its name, and the next one removes it.

What comes is collected in a ring of memory, of which full parts are written by a thread, past the page cache. Under
emulation that is a third of the work: no page is looked for, cleared, kept, found dirty and written back. Nor is what a
host sends part of the memory that the next checkpoint has to save. What is left at the end, of a small file all, goes
through the cache; of much that is left, its last bytes.
"""

from __future__ import annotations

import mmap
import os
import stat

from capsem.guest.files import Refused, open_parent, refusal
from capsem.guest.loop import Loop
from capsem.guest.servant import Servant
from capsem.wire.messages import STDIN, FileWritten, WriteFile
from capsem.wire.streams import WINDOW

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from capsem.wire.streams import Mux

_PREFIX = ".capsem-"
_PARTS = 2  # of a ring: while one is written, the other one fills
LARGE_RING = 4 * 1024 * 1024  # bytes: half of it is one write, and what a disk takes per write does not count then
_LARGE_RINGS = 4  # at once; further files get along with a window's worth of memory each
_PAST_CACHE = 512 * 1024  # bytes left at the end from which on they are worth a write of their own
_BLOCK = 4096  # bytes; of its multiples are the writes past the cache
_NO_TMPFILE = (21, 22, 95)  # EISDIR, EINVAL, EOPNOTSUPP: a file system that knows no files without a name
_NO_DIRECT = (22, 95)  # EINVAL, EOPNOTSUPP: one that does not write past the page cache


class Rings:
    """How large a ring the next file gets."""

    def __init__(self) -> None:
        self._large = _LARGE_RINGS  # that are left

    def take(self) -> int:
        """Bytes."""
        if not self._large:
            return WINDOW
        self._large -= 1
        return LARGE_RING

    def give_back(self, size: int) -> None:
        """One that was taken."""
        self._large += size == LARGE_RING


class Temporary:
    """Names that files have for a moment, each noted for the case that the agent is killed in it."""

    def __init__(self, directory: str) -> None:
        """`directory` holds the notes; what an agent before noted, and did not finish, is removed. Raises OSError."""
        self._directory = directory
        for name in os.listdir(directory):
            if name.startswith(_PREFIX):
                self._remove(os.readlink(f"{directory}/{name}"))
                self.forget(name)

    def note(self, parent: int, name: str) -> None:
        """There is going to be a file of this name in the open directory `parent`. Raises OSError."""
        os.symlink(os.readlink(f"/proc/self/fd/{parent}") + "/" + name, f"{self._directory}/{name}")

    def forget(self, name: str) -> None:
        """It is gone, or never was."""
        self._remove(f"{self._directory}/{name}")

    def _remove(self, path: str) -> None:
        try:
            os.unlink(path)
        except (FileNotFoundError, NotADirectoryError):
            pass


class Writer(Servant):
    """Serves a WriteFile request."""

    def __init__(
        self,
        loop: Loop,
        mux: Mux,
        stream: int,
        request: WriteFile,
        workspace: str,
        rings: Rings,
        temporary: Temporary,
        done: Callable[[int], None],
    ) -> None:
        """Open the file. Raises Refused, OSError."""
        self._loop = loop
        self._mux = mux
        self._stream = stream
        self._path = request.path
        self._rings = rings
        self._names = temporary
        self._done = done
        self._received = self._written = 0  # bytes
        self._ended = self._busy = self._cancelled = False
        self._directory, self._name = open_parent(workspace, request.path, create=True)
        self._temporary = f"{_PREFIX}{stream}-{os.urandom(8).hex()}"
        self._nameless = False
        self._created = False
        self._fd = self._direct = -1
        self._size = 0  # of the ring
        try:
            self._check_target()
            self._open()
            os.fchmod(self._fd, request.mode & 0o777)
        except BaseException:
            self._release()
            raise
        self._size = rings.take()
        self._part = self._size // _PARTS
        self._ring = memoryview(mmap.mmap(-1, self._size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))
        mux.widen(stream, STDIN, self._size)

    def _open(self) -> None:
        flags = os.O_WRONLY | os.O_CLOEXEC
        try:
            self._fd = os.open(".", flags | os.O_TMPFILE, 0o600, dir_fd=self._directory)
            self._nameless = True
        except OSError as error:
            if error.errno not in _NO_TMPFILE:
                raise
            self._names.note(self._directory, self._temporary)
            named = flags | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
            self._fd = os.open(self._temporary, named, 0o600, dir_fd=self._directory)

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

    def feed(self, data: bytes | memoryview) -> None:
        """Bytes of the file; no more come than the ring has room for."""
        at = self._received % self._size
        before = min(len(data), self._size - at)
        self._ring[at : at + before] = data[:before]
        self._ring[: len(data) - before] = data[before:]
        self._received += len(data)
        self._go_on()

    def feed_end(self) -> None:
        """All has come: write the rest, make it durable, then say so."""
        self._ended = True
        self._go_on()

    def _go_on(self) -> None:
        if self._busy:
            return
        if self._received - self._written >= self._part:
            self._busy = True
            self._loop.offload(self._write_part, self._part_written)
        elif self._ended:
            self._busy = True
            self._loop.offload(self._commit, self._committed)

    def _write_part(self) -> None:
        self._write_past_cache(self._part)

    def _write_past_cache(self, size: int) -> None:
        if self._direct < 0:
            self._direct = self._open_direct()
        self._write(self._direct, size)

    def _open_direct(self) -> int:
        path = f"/proc/self/fd/{self._fd}"
        try:
            return os.open(path, os.O_WRONLY | os.O_DIRECT | os.O_CLOEXEC)
        except OSError as error:
            if error.errno not in _NO_DIRECT:
                raise
            return os.open(path, os.O_WRONLY | os.O_CLOEXEC)

    def _write(self, fd: int, size: int) -> None:
        """The next `size` bytes of the file. They lie in the ring in one piece: no more than a part's."""
        at = self._written % self._size
        end = at + size
        while at < end:
            try:
                done = os.pwrite(fd, self._ring[at:end], self._written)
            except OSError as error:
                if fd == self._fd or error.errno not in _NO_DIRECT:
                    raise
                done = 0
            at += done
            self._written += done
            fd = self._fd  # what cannot be written past the cache, or not all of it, goes through it, or tells why not

    def _part_written(self, error: BaseException | None) -> None:
        self._busy = False
        if self._cancelled:
            self._release()
        elif error is not None:
            self._finish(error)
        else:
            self._mux.consumed(self._stream, STDIN, self._part)
            self._go_on()

    def _commit(self) -> None:
        if (left := self._received - self._written) >= _PAST_CACHE:
            self._write_past_cache(left - left % _BLOCK)
        self._write(self._fd, self._received - self._written)
        os.fsync(self._fd)
        if self._cancelled:
            return
        if self._nameless:
            self._names.note(self._directory, self._temporary)
            os.link(f"/proc/self/fd/{self._fd}", self._temporary, dst_dir_fd=self._directory)
            self._nameless = False
        os.rename(self._temporary, self._name, src_dir_fd=self._directory, dst_dir_fd=self._directory)
        self._names.forget(self._temporary)
        self._temporary = ""
        os.fsync(self._directory)

    def _committed(self, error: BaseException | None) -> None:
        self._busy = False
        if self._cancelled:
            self._release()
        else:
            self._finish(error)

    def _finish(self, error: BaseException | None) -> None:
        result = refusal(error, self._path) if error else FileWritten(size=self._received, created=self._created)
        self._release()
        self._mux.close(self._stream, result)
        self._done(self._stream)

    def cancelled(self) -> None:
        """Let go, as soon as no thread is at it, and remove the temporary file if it is still there."""
        self._cancelled = True
        if not self._busy:
            self._release()

    def _release(self) -> None:
        if self._temporary and self._fd >= 0 and not self._nameless:
            try:
                os.unlink(self._temporary, dir_fd=self._directory)
            except FileNotFoundError:
                pass
        if self._temporary:
            self._names.forget(self._temporary)
            self._temporary = ""
        for fd in (self._fd, self._direct, self._directory):
            if fd >= 0:
                os.close(fd)
        self._fd = self._direct = self._directory = -1
        self._rings.give_back(self._size)
        self._size, self._ring = 0, memoryview(b"")
