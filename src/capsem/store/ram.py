"""RAM files: a guest's memory, page by page, with a checksum for each page and an identity behind the last.

    0 .. size            the pages (4 KiB); those that are all zero are holes, but for few that have become so
    size .. size + 4096  the identity: JSON, padded with zeroes; QEMU maps the pages alone

The table of checksums is a file of its own: for each page a 32-bit number, little-endian, the page's CRC-32 xor that of
a zero page, so that zero pages are zero here too and both files are holes where nothing is.

A new file begins as a copy of the one that the machine's memory is mapped from: a clone where the file system shares
extents, otherwise the data alone, copied ahead of time while the machine runs. The save then writes the pages that
the guest has changed since, and nothing else.
"""

from __future__ import annotations

import array
import contextlib
import ctypes
import errno
import fcntl
import hashlib
import json
import os
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

from capsem.model.errors import Corrupt

PAGE: Final = 4096
TRAILER: Final = 4096
ZERO: Final = bytes(PAGE)
CHUNK: Final = 4 << 20  # bytes handled at once
WORTH_A_HOLE: Final = 1 << 20  # bytes of zeroes where there was data
_COPY: Final = 16 << 20
_SYNC: Final = 16 << 20  # bytes of a copy that wait for the disk together: who gives it up waits for no more
_ZERO_CRC: Final = zlib.crc32(ZERO)
_SUM: Final = 4  # bytes
_FICLONE: Final = 0x40049409  # ioctl_ficlone(2)
_PUNCH_HOLE: Final = 0x02 | 0x01  # FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, fallocate(2)
_libc = ctypes.CDLL(None, use_errno=True)

Runs = list[tuple[int, int]]  # (offset, length) in bytes, multiples of PAGE


@dataclass(frozen=True, slots=True)
class RamIdentity:
    """Whose memory it is, and of which checkpoint."""

    vm_id: str
    checkpoint_id: str
    size: int  # bytes

    def to_bytes(self) -> bytes:
        """The trailer."""
        data = json.dumps({"format": 1, **asdict(self)}, separators=(",", ":")).encode()
        return data.ljust(TRAILER, b"\0")


def sums_size(size: int) -> int:
    """Bytes of the table of checksums for `size` bytes of RAM."""
    return size // PAGE * _SUM


def read_identity(path: Path, size: int) -> RamIdentity:
    """The identity behind `size` bytes of RAM. Raises Corrupt, OSError."""
    with path.open("rb", buffering=0) as file:
        if os.fstat(file.fileno()).st_size != size + TRAILER:
            raise Corrupt(
                f"{path} has not the size of the memory that it should hold", hint="the VM can be resumed cold"
            )
        data = os.pread(file.fileno(), TRAILER, size).rstrip(b"\0")
    try:
        body = json.loads(data)
        if body.pop("format") != 1:
            raise ValueError("unknown format")
        return RamIdentity(**body)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise Corrupt(f"{path} does not say whose memory it is: {error}", hint="the VM can be resumed cold") from error


class RamFile:
    """A finished RAM file, held open: its content stays even if its checkpoint is removed."""

    def __init__(self, path: Path, sums: Path) -> None:
        """Raises OSError."""
        self.fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            self.sums_fd = os.open(sums, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except BaseException:
            os.close(self.fd)
            raise

    def close(self) -> None:
        """Let go of it."""
        os.close(self.fd)
        os.close(self.sums_fd)


class RamWriter:
    """A RAM file in the making. All methods block; use them from one thread at a time, but for `sync`, `sync_sums` and
    `digest`, which go together."""

    def __init__(self, path: Path, sums: Path, size: int) -> None:
        """Make both files, which must not exist, mode 0600; `size` is the RAM's, in bytes. Raises OSError."""
        self.size = size
        self._fd = self._sums_fd = -1
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        try:
            self._fd = os.open(path, flags, 0o600)
            os.ftruncate(self._fd, size + TRAILER)
            self._sums_fd = os.open(sums, flags, 0o600)
            os.ftruncate(self._sums_fd, sums_size(size))
        except BaseException:
            self.close()
            raise

    def copy(self, base: RamFile, cancelled: Callable[[], bool] = lambda: False) -> bool:
        """Begin with the content of another RAM file of the same size; returns False when it was cancelled half-way.

        Raises OSError.
        """
        for source, target in ((base.fd, self._fd), (base.sums_fd, self._sums_fd)):
            if not _copy_file(source, target, cancelled):
                return False
        # What is written now need not be written at the save.
        os.fsync(self._fd)
        return True

    def patch(self, pieces: Iterable[tuple[int, memoryview]], *, compare: bool) -> tuple[Runs, int]:
        """Write changed memory: (offset, bytes) in ascending order, whole pages, at most CHUNK at a time.

        With `compare`, pages that are here already are left alone. Returns what was written or zeroed, and how many
        bytes of that were data. Raises OSError; the file is then to be thrown away.
        """
        runs: Runs = []
        written = 0
        sums = _SumsPatch(self._sums_fd)
        for offset, view in pieces:
            data = bytes(view)
            old = os.pread(self._fd, len(data), offset) if compare else b""
            for start, end, zero in _segments(data, old, offset, sums):
                if zero:
                    _zero(self._fd, offset + start, offset + end)
                else:
                    written += _write(self._fd, memoryview(data)[start:end], offset + start)
                _extend(runs, offset + start, end - start)
        sums.flush()
        return runs, written

    def identify(self, identity: RamIdentity) -> None:
        """Say whose memory it is. Raises OSError."""
        _write(self._fd, memoryview(identity.to_bytes()), self.size)

    def digest(self) -> str:
        """The SHA-256 of the table of checksums. Raises OSError."""
        return digest_sums(self._sums_fd)

    def sync(self) -> None:
        """Make the RAM durable. Raises OSError."""
        os.fsync(self._fd)

    def sync_sums(self) -> None:
        """Make the table of checksums durable. Raises OSError."""
        os.fsync(self._sums_fd)

    def finish(self, identity: RamIdentity) -> str:
        """All of that, one after the other; returns the digest. Raises OSError."""
        self.identify(identity)
        self.sync()
        self.sync_sums()
        return self.digest()

    def close(self) -> None:
        """Close both files; calling again is no error."""
        for fd in (self._fd, self._sums_fd):
            if fd >= 0:
                os.close(fd)
        self._fd = self._sums_fd = -1


class _SumsPatch:
    """Changes to the table of checksums, written one run of pages at a time."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._first = 0
        self._values = array.array("I")

    def put(self, page: int, value: int) -> None:
        if page != self._first + len(self._values) or len(self._values) >= PAGE:
            self.flush()
            self._first = page
        self._values.append(value)

    def flush(self) -> None:
        if self._values:
            if sys.byteorder != "little":
                self._values.byteswap()
            _write(self._fd, memoryview(self._values.tobytes()), self._first * _SUM)
            self._values = array.array("I")


def _segments(data: bytes, old: bytes, offset: int, sums: _SumsPatch) -> Iterator[tuple[int, int, bool]]:
    """Runs of pages in `data` that are to be written, or punched out: (start, end, all zero)."""
    start, kind = 0, 0  # 0: leave alone, 1: data, 2: zero
    crc32, zero, page_size = zlib.crc32, ZERO, PAGE
    for at in range(0, len(data), page_size):
        page = data[at : at + page_size]
        if old and old[at : at + page_size] == page:
            new = 0
        elif page == zero:
            new = 2
            sums.put((offset + at) // page_size, 0)
        else:
            new = 1
            sums.put((offset + at) // page_size, crc32(page) ^ _ZERO_CRC)
        if new != kind:
            if kind:
                yield start, at, kind == 2
            start, kind = at, new
    if kind:
        yield start, len(data), kind == 2


def _extend(runs: Runs, offset: int, length: int) -> None:
    if runs and runs[-1][0] + runs[-1][1] == offset:
        runs[-1] = (runs[-1][0], runs[-1][1] + length)
    else:
        runs.append((offset, length))


def _write(fd: int, view: memoryview, offset: int) -> int:
    done = 0
    while done < len(view):
        done += os.pwrite(fd, view[done:], offset + done)
    return done


def _zero(fd: int, start: int, end: int) -> None:
    """Have zeroes there. Most often they are: it is a hole. Making one takes a file system milliseconds (ext4 waits until what is
    written nearby is on the disk), so a short run keeps its place.
    """
    for at, until in data_extents(fd, end, start):
        if until - at < WORTH_A_HOLE:
            _write(fd, memoryview(bytes(until - at)), at)
        else:
            _punch(fd, at, until - at)


def _punch(fd: int, offset: int, length: int) -> None:
    result = _libc.fallocate(fd, _PUNCH_HOLE, ctypes.c_int64(offset), ctypes.c_int64(length))
    if result != 0:
        number = ctypes.get_errno()
        if number not in (errno.EOPNOTSUPP, errno.ENOSYS):
            raise OSError(number, os.strerror(number))
        for at in range(offset, offset + length, CHUNK):
            _write(fd, memoryview(bytes(min(CHUNK, offset + length - at))), at)


def data_extents(fd: int, limit: int, end: int = 0) -> Iterator[tuple[int, int]]:
    """(start, end) of what is not a hole, from `end` up to `limit`."""
    while end < limit:
        try:
            start = os.lseek(fd, end, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:  # nothing but a hole up to the end
                return
            raise
        end = min(os.lseek(fd, start, os.SEEK_HOLE), limit)
        if start < end:
            yield start, end


def _copy_file(source: int, target: int, cancelled: Callable[[], bool]) -> bool:
    size = os.fstat(target).st_size
    with contextlib.suppress(OSError):  # not on this file system: copy
        fcntl.ioctl(target, _FICLONE, source)
        os.ftruncate(target, size)
        return True
    waiting = 0
    for start, end in data_extents(source, min(os.fstat(source).st_size, size)):
        at = start
        while at < end:
            if cancelled():
                return False
            done = os.copy_file_range(source, target, min(_COPY, end - at), at, at)
            at += done
            waiting += done
            if waiting >= _SYNC:
                os.fsync(target)
                waiting = 0
    return True


def digest_sums(fd: int) -> str:
    """SHA-256 of a table of checksums."""
    digest = hashlib.sha256()
    offset = 0
    while data := os.pread(fd, CHUNK, offset):
        digest.update(data)
        offset += len(data)
    return digest.hexdigest()


def verify(path: Path, sums: Path, size: int, digest: str) -> None:
    """Read all of a RAM file and hold it against its checksums, and those against their digest. Raises Corrupt, OSError."""
    with path.open("rb", buffering=0) as file, sums.open("rb", buffering=0) as table:
        if digest_sums(table.fileno()) != digest:
            raise Corrupt(f"{sums} is not what was written", hint="the VM can be resumed cold")
        for offset in range(0, size, CHUNK):
            data = os.pread(file.fileno(), min(CHUNK, size - offset), offset)
            expected = array.array("I", os.pread(table.fileno(), len(data) // PAGE * _SUM, offset // PAGE * _SUM))
            if sys.byteorder != "little":
                expected.byteswap()
            for number, value in enumerate(expected):
                page = data[number * PAGE : (number + 1) * PAGE]
                if (0 if page == ZERO else zlib.crc32(page) ^ _ZERO_CRC) != value:
                    raise Corrupt(
                        f"{path} is not what was written: its page {offset // PAGE + number} has changed",
                        hint="the VM can be resumed cold",
                    )
