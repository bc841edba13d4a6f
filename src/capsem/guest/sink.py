"""A new file written past the page cache.

What the host sends is read again by somebody else, if at all: pages for it would be allocated, cleared, filled, and
written out at the fsync, which under emulation costs as much as the transfer. So full pieces go straight from one
aligned buffer to the disk, and only what is left at the end, like any small file, the ordinary way.
"""

from __future__ import annotations

import fcntl
import os

_SIZE = 256 * 1024


class Sink:
    """Takes a file's bytes in order. `fd` stays the caller's."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._buffer = memoryview(b"")  # none before there is enough for one piece to be worth it
        self._waiting: list[bytes] = []
        self._filled = 0
        self._direct = False

    def write(self, data: bytes) -> None:
        """Take bytes; they are in the file once `flush` has returned. Raises OSError."""
        if self._buffer:
            self._fill(data)
            return
        self._waiting.append(data)
        self._filled += len(data)
        if self._filled >= _SIZE:
            self._begin()

    def _begin(self) -> None:
        import mmap  # small files do not pay for it

        self._buffer = memoryview(mmap.mmap(-1, _SIZE))  # page-aligned, as a direct write needs it
        try:
            self._set_direct(os.O_DIRECT)
        except OSError:
            pass  # a file system that cannot: the bytes get there all the same
        waiting, self._waiting, self._filled = self._waiting, [], 0
        for data in waiting:
            self._fill(data)

    def _fill(self, data: bytes) -> None:
        view = memoryview(data)
        while view:
            size = min(len(view), _SIZE - self._filled)
            self._buffer[self._filled : self._filled + size] = view[:size]
            self._filled += size
            view = view[size:]
            if self._filled == _SIZE:
                self._filled = 0
                self._write(self._buffer)

    def flush(self) -> None:
        """Write what is left; call it once, at the end. Raises OSError."""
        if self._buffer:
            self._set_direct(0)  # what is left has no size that could be written directly
            self._write(self._buffer[: self._filled])
        for data in self._waiting:
            self._write(memoryview(data))

    def _set_direct(self, flag: int) -> None:
        flags = fcntl.fcntl(self._fd, fcntl.F_GETFL)
        fcntl.fcntl(self._fd, fcntl.F_SETFL, flags & ~os.O_DIRECT | flag)
        self._direct = bool(flag)

    def _write(self, view: memoryview) -> None:
        while view:
            try:
                view = view[os.write(self._fd, view) :]
            except OSError as error:
                # A write that a limit or a disk all but full would cut short is not aligned any more.
                if error.errno != 22 or not self._direct:  # EINVAL
                    raise
                self._set_direct(0)
