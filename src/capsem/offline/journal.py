"""Replaying an ext4 journal in memory, for a volume whose guest was killed.

Format: the kernel's "jbd2" (https://docs.kernel.org/filesystems/ext4/journal.html), big-endian. The volume itself is
not touched: the outcome is a map of the blocks whose newest content lies in the journal. A transaction counts once its
commit block is there; the disk below never reorders a commit before what it commits, so checksums would add nothing.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from typing import Final

from capsem.model.errors import Corrupt

MAGIC: Final = 0xC03B3998
_DESCRIPTOR, _COMMIT, _SUPERBLOCK_1, _SUPERBLOCK_2, _REVOKE = range(1, 6)
_HEADER: Final = struct.Struct(">III")  # magic, type, sequence
_HAS_REVOKE, _64BIT, _ASYNC_COMMIT, _CHECKSUM_2, _CHECKSUM_3 = 1, 2, 4, 8, 16
_KNOWN: Final = _HAS_REVOKE | _64BIT | _CHECKSUM_2 | _CHECKSUM_3
_ESCAPED, _SAME_UUID, _LAST = 1, 2, 8
_UUID_BYTES: Final = 16

Replayed = dict[int, tuple[int, bool]]  # block -> block of the journal, and whether its first four bytes were masked


def replay(read: Callable[[int], bytes], block_size: int) -> Replayed:
    """What the journal's complete transactions say of the file system's blocks. `read` returns one of its blocks.

    Raises Corrupt, and what `read` raises.
    """
    return _Journal(read, block_size).replay()


class _Journal:
    def __init__(self, read: Callable[[int], bytes], block_size: int) -> None:
        self._read = read
        self._block_size = block_size
        head = read(0)
        magic, kind, _, size, self._length, self._first, self._sequence, self._start = struct.unpack_from(">8I", head)
        self._features = struct.unpack_from(">I", head, 40)[0] if kind == _SUPERBLOCK_2 else 0
        if magic != MAGIC or kind not in (_SUPERBLOCK_1, _SUPERBLOCK_2) or size != block_size:
            raise Corrupt("the volume's journal has no superblock")
        if self._features & ~_KNOWN:
            raise Corrupt(f"the volume's journal is of an unknown kind ({self._features:#x})")
        if not 0 < self._first < self._length or (self._start and not self._first <= self._start < self._length):
            raise Corrupt("the volume's journal begins outside of itself")

    def replay(self) -> Replayed:
        found: Replayed = {}
        if self._start:
            for logged, revoked in self._transactions():
                for block, place, escaped in logged:
                    found[block] = place, escaped
                for block in revoked:  # freed, and perhaps a file's data since: what was logged of it no longer counts
                    found.pop(block, None)
        return found

    def _transactions(self) -> Iterator[tuple[list[tuple[int, int, bool]], list[int]]]:
        """Complete transactions, oldest first: logged (block, place in the journal, masked), revoked."""
        at, sequence = self._start, self._sequence
        logged: list[tuple[int, int, bool]] = []
        revoked: list[int] = []
        steps = 0
        while steps < self._length:
            data = self._read(at)
            magic, kind, number = _HEADER.unpack_from(data)
            if magic != MAGIC or number != sequence:
                return
            at, steps = self._after(at), steps + 1
            if kind == _DESCRIPTOR:
                for block, flags in self._tags(data):
                    logged.append((block, at, bool(flags & _ESCAPED)))
                    at, steps = self._after(at), steps + 1
            elif kind == _REVOKE:
                revoked += self._revoked(data)
            elif kind == _COMMIT:
                yield logged, revoked
                logged, revoked = [], []
                sequence = (sequence + 1) & 0xFFFFFFFF
            else:
                return

    def _after(self, block: int) -> int:
        return block + 1 if block + 1 < self._length else self._first

    def _tags(self, data: bytes) -> Iterator[tuple[int, int]]:
        """(block, flags) of each block that follows a descriptor."""
        third = self._features & _CHECKSUM_3
        wide = self._features & _64BIT
        size = 16 if third else 8 + (4 if wide else 0) + (2 if self._features & _CHECKSUM_2 else 0)
        end = self._block_size - (4 if self._features & (_CHECKSUM_2 | _CHECKSUM_3) else 0)
        at = _HEADER.size
        while at + size <= end:
            block, flags = struct.unpack_from(">II", data, at)
            if not third:
                flags &= 0xFFFF  # a checksum is in the other half
            if wide:
                block |= struct.unpack_from(">I", data, at + 8)[0] << 32
            yield block, flags
            at += size + (0 if flags & _SAME_UUID else _UUID_BYTES)
            if flags & _LAST:
                return

    def _revoked(self, data: bytes) -> list[int]:
        (used,) = struct.unpack_from(">I", data, _HEADER.size)
        start, width = _HEADER.size + 4, "Q" if self._features & _64BIT else "I"
        count = max(0, min(used, self._block_size) - start) // struct.calcsize(width)
        return list(struct.unpack_from(f">{count}{width}", data, start))
