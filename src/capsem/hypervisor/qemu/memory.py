"""The guest's RAM from outside the VMM: which pages it has changed, and their content.

RAM is a private mapping of a file, and what has changed in it the kernel knows (pagemap.py). The content is copied with
process_vm_readv(2), into memory that is there already: then it runs at the speed of memcpy, and a machine that is to go
on stands still for little longer than that.
"""

from __future__ import annotations

import array
import ctypes
import mmap
import os
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Final

from capsem.hypervisor.qemu.pagemap import changed
from capsem.store.ram import CHUNK, PAGE, Runs

_IOV_MAX: Final = 1024  # IOV_MAX, limits.h
Pieces = Generator[tuple[int, memoryview], None, None]  # (offset, bytes), ascending; to be closed

_libc = ctypes.CDLL(None, use_errno=True)
_libc.process_vm_readv.restype = ctypes.c_ssize_t


class _IoVec(ctypes.Structure):
    _fields_ = (("base", ctypes.c_void_p), ("length", ctypes.c_size_t))


class GuestMemory:
    """The RAM of a running VMM, whose vCPUs should be stopped while it is read."""

    def __init__(self, pid: int, ram_file: Path, size: int) -> None:
        """Find the mapping of `ram_file`, `size` bytes. Raises OSError."""
        self._pid = pid
        self.size = size
        self._start = self._find(ram_file.stat())

    def _find(self, file: os.stat_result) -> int:
        device = f"{os.major(file.st_dev):02x}:{os.minor(file.st_dev):02x}"
        end = start = 0
        with Path(f"/proc/{self._pid}/maps").open(encoding="utf-8", errors="replace") as maps:
            for line in maps:  # start-end permissions offset device inode path, proc(5)
                span, _, offset, where, inode = line.split(maxsplit=5)[:5]
                if where == device and int(inode) == file.st_ino and int(offset, 16) < self.size:
                    low, high = (int(each, 16) for each in span.split("-"))
                    start = start or low - int(offset, 16)
                    end = high
        if not start or end - start < self.size:
            raise OSError(f"process {self._pid} does not map its RAM file as one piece")
        return start

    def changed(self) -> Runs:
        """What was written to since the mapping was made, as (offset, length), ascending. Raises OSError."""
        return changed(self._pid, self._start, self.size)

    def read(self, runs: Runs, into: memoryview) -> None:
        """Copy the RAM in `runs`, one after the other. Raises OSError, among others when the process is gone."""
        address, at = ctypes.addressof(ctypes.c_char.from_buffer(into)), 0
        for first in range(0, len(runs), _IOV_MAX):
            group = runs[first : first + _IOV_MAX]
            remote = array.array("Q", (each for offset, length in group for each in (self._start + offset, length)))
            total = sum(length for _, length in group)
            local = _IoVec(address + at, total)
            size = _libc.process_vm_readv(
                self._pid, ctypes.byref(local), 1, ctypes.c_void_p(remote.buffer_info()[0]), len(group), 0
            )
            if size != total:
                number = ctypes.get_errno() if size < 0 else 0
                raise OSError(number, f"the memory of process {self._pid} cannot be read: {os.strerror(number)}")
            at += total


class Snapshot:
    """A copy of changed pages in our own memory, taken in one go so that the machine can run on."""

    def __init__(self, memory: GuestMemory, expected: int) -> None:
        """Room for `expected` bytes, touched now rather than while the machine stands still. Raises OSError."""
        self._memory = memory
        self._buffer = _touched(expected)
        self._runs: Runs = []

    def take(self) -> int:
        """Copy what has changed; returns how many bytes that is. Raises OSError."""
        self._runs = self._memory.changed()
        total = sum(length for _, length in self._runs)
        if total > len(self._buffer):
            self._buffer.close()
            self._buffer = _touched(total)
        with memoryview(self._buffer) as view:
            self._memory.read(list(_chunks(self._runs)), view)
        return total

    def pieces(self) -> Pieces:
        """What was copied, at most CHUNK at a time; each is good until the next is asked for."""
        at = 0
        with memoryview(self._buffer) as view:
            for offset, length in _chunks(self._runs):
                with view[at : at + length] as piece:
                    yield offset, piece
                at += length

    def close(self) -> None:
        """Give the memory back."""
        self._runs = []
        self._buffer.close()


def stream(memory: GuestMemory) -> Pieces:
    """What has changed, read as it is asked for: for a machine that will not run on."""
    with _touched(CHUNK) as buffer, memoryview(buffer) as view:
        for group in _groups(memory.changed()):
            memory.read(group, view)
            at = 0
            for offset, length in group:
                with view[at : at + length] as piece:
                    yield offset, piece
                at += length


def _groups(runs: Runs) -> Iterator[Runs]:
    """As many runs at a time as a call reads and CHUNK bytes hold."""
    group: Runs = []
    size = 0
    for offset, length in _chunks(runs):
        if size + length > CHUNK or len(group) == _IOV_MAX:
            yield group
            group, size = [], 0
        group.append((offset, length))
        size += length
    if group:
        yield group


def _touched(size: int) -> mmap.mmap:
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | mmap.MAP_POPULATE
    return mmap.mmap(-1, max(size, PAGE), flags=flags)


def _chunks(runs: Runs) -> Iterator[tuple[int, int]]:
    for offset, length in runs:
        for start in range(offset, offset + length, CHUNK):
            yield start, min(CHUNK, offset + length - start)
