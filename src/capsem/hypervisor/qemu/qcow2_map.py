"""Where a layer keeps which cluster of the disk, all at once or one at a time. Nothing that the file says is trusted.

A guest cluster's number leads through two tables: the L1 table names an L2 table for each 512 MiB of the disk (or none),
and that one has an entry for each of its 8192 clusters:

    0                    not in this layer: the layer below decides
    host offset          data
    1, or 1 | offset     reads as zeros, whatever lies below; a host cluster kept for later does not matter

Bit 63 says that the host cluster has no other user, which is always so without internal snapshots. All other bits are
zero: those of compressed clusters, encryption and subclusters are of features that layers of ours never have.

Bounds come from the file itself: every table and every cluster begins within it, and, where all of a map is read, none
has two users, so that it leads to no more work or data than there are clusters in the file. Refcounts are not read:
they are for writers.
"""

from __future__ import annotations

import os
import stat
import sys
from array import array
from collections.abc import Iterator
from enum import Enum
from functools import cached_property
from pathlib import Path
from typing import Final, Self

from capsem.hypervisor.qemu.qcow2 import (
    CLUSTER,
    CLUSTER_BITS,
    HEADER,
    HEADER_BYTES,
    REFCOUNT_ORDER,
    Identity,
    corrupt,
    l1_entries,
    parse_identity,
)
from capsem.model.errors import Corrupt

COPIED: Final = 1 << 63
ABSENT: Final = 0  # not in this layer: an entry of that, or the lack of a table that would hold one
ZEROES: Final = 1  # the flag of a zero cluster; alone, a whole entry. No cluster of data lies at offset 1.
SLOTS: Final = CLUSTER // 8  # entries of an L2 table
SIZE_LIMIT: Final = 16 << 40  # bytes of a disk: the largest ext4 file system
SLACK: Final = 1 << 30  # bytes: how much longer than its disk, all of it written, a file may be

_OFFSET: Final = 0x00FF_FFFF_FFFF_0000  # of a whole cluster
_NEVER_IN_L1: Final = ~(_OFFSET | COPIED)
_NEVER_IN_L2: Final = ~(_OFFSET | COPIED | ZEROES)
_TABLES_KEPT: Final = 64  # by `find`, of 64 KiB each

Table = list[tuple[int, int]]  # (slot, host offset or ZEROES), slots ascending, those that the layer leaves out missing


class Kind(Enum):
    """What a layer says about a cluster that it does not leave to the layers below."""

    DATA = "data"
    ZERO = "zero"


class LayerMap:
    """A layer open for reading; a context manager. Raises Corrupt and OSError, at once and in every method.

    It takes no lock: others may have the file open to read, and nobody writes to it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._kept: dict[int, array[int]] = {}
        self.fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)  # a FIFO must not stop us
        try:
            info = os.fstat(self.fd)
            if not stat.S_ISREG(info.st_mode):
                raise corrupt(path, "it is not a regular file")
            self.length = info.st_size
            self._read_header()
        except BaseException:
            self.close()
            raise

    def _read_header(self) -> None:
        start = os.pread(self.fd, CLUSTER, 0)
        self.identity: Identity = parse_identity(self.path, start)
        if len(start) < HEADER_BYTES:
            raise corrupt(self.path, "it ends within its header")
        fields = HEADER.unpack_from(start)
        # backing names are never followed, and QEMU's autoclear and compatible features may be ignored by definition
        _, _, _, _, bits, size, encryption, entries, l1, _, _, snapshots, _, incompatible, _, _, order, _, _ = fields
        if (bits, encryption, snapshots, incompatible, order) != (CLUSTER_BITS, 0, 0, 0, REFCOUNT_ORDER):
            raise corrupt(self.path, "it uses features of qcow2 that ours do without")
        if not 0 < size <= SIZE_LIMIT or size % 512:
            raise corrupt(self.path, f"its disk has {size} bytes")
        if self.length > 2 * size + SLACK:
            raise corrupt(self.path, "it is much longer than its disk")
        wanted = l1_entries(size)
        if entries < wanted or l1 % CLUSTER or not CLUSTER <= l1 <= self.length - 8 * wanted:
            raise corrupt(self.path, "its L1 table is not within the file")
        self.size: int = size  # bytes of the disk
        self._l1_offset: int = l1

    @cached_property
    def _l1(self) -> array[int]:
        return self._read(self._l1_offset, l1_entries(self.size))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file. Safe to call again."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def tables(self) -> Iterator[tuple[int, Table]]:
        """Each L2 table there is: its place in the L1 table, ascending, and what it says."""
        used = bytearray(-(-self.length // CLUSTER))  # host clusters that have a user; untouched pages cost nothing
        used[0] = 1
        wanted = l1_entries(self.size)
        first = self._l1_offset // CLUSTER
        used[first : first + -(-8 * wanted // CLUSTER)] = b"\1" * -(-8 * wanted // CLUSTER)
        clusters = -(-self.size // CLUSTER)
        for index, entry in enumerate(self._l1):
            offset = self._table_offset(index, entry)
            if offset == ABSENT:
                continue
            if used[offset >> CLUSTER_BITS]:
                raise self._bad_entry("L1", index, entry)
            used[offset >> CLUSTER_BITS] = 1
            yield index, self._entries(index, self._read(offset, min(SLOTS, clusters - index * SLOTS)), used)

    def _entries(self, index: int, entries: array[int], used: bytearray) -> Table:
        table: Table = []
        for slot, entry in enumerate(entries):
            if not entry:
                continue
            found = self._cluster(index * SLOTS + slot, entry)
            if host := entry & _OFFSET:
                if used[host >> CLUSTER_BITS]:
                    raise self._bad_entry("L2", index * SLOTS + slot, entry)
                used[host >> CLUSTER_BITS] = 1
            table.append((slot, found))
        return table

    def find(self, number: int) -> int:
        """Where the guest's cluster of that number is: its host offset, ZEROES or ABSENT."""
        index, slot = divmod(number, SLOTS)
        table = self._kept.get(index)
        if table is None:
            offset = self._table_offset(index, self._l1[index]) if index < len(self._l1) else ABSENT
            table = self._read(offset, SLOTS) if offset != ABSENT else array("Q")
            if len(self._kept) >= _TABLES_KEPT:
                self._kept.clear()
            self._kept[index] = table
        return self._cluster(number, table[slot]) if table else ABSENT

    def _table_offset(self, index: int, entry: int) -> int:
        """Where the L2 table that this entry of the L1 table names begins, or ABSENT."""
        offset = entry & _OFFSET
        if entry and (entry & _NEVER_IN_L1 or not offset or offset + CLUSTER > self.length):
            raise self._bad_entry("L1", index, entry)
        return offset

    def _cluster(self, number: int, entry: int) -> int:
        """What this entry of an L2 table says of the guest's cluster of that number."""
        host = entry & _OFFSET
        if entry and (entry & _NEVER_IN_L2 or host >= self.length or not (host or entry == ZEROES)):
            raise self._bad_entry("L2", number, entry)
        return ZEROES if entry & ZEROES else host

    def clusters(self) -> Iterator[tuple[int, Kind, int]]:
        """(number of the guest cluster, kind, host offset in bytes; 0 for zeros), ascending."""
        for index, table in self.tables():
            for slot, host in table:
                if host == ZEROES:
                    yield index * SLOTS + slot, Kind.ZERO, 0
                else:
                    yield index * SLOTS + slot, Kind.DATA, host

    def allocated_bytes(self) -> int:
        """Bytes of the disk whose data lies in this layer."""
        return CLUSTER * sum(kind is Kind.DATA for _, kind, _ in self.clusters())

    def _read(self, offset: int, entries: int) -> array[int]:
        data = os.pread(self.fd, 8 * entries, offset)
        if len(data) != 8 * entries:
            raise corrupt(self.path, "it ends within a table")
        return swapped(array("Q", data))

    def _bad_entry(self, table: str, place: int, entry: int) -> Corrupt:
        return corrupt(self.path, f"entry {place} of its {table} tables is {entry:#x}, which leads nowhere or too far")


def swapped(table: array[int]) -> array[int]:
    """The same array, between the file's byte order and this machine's."""
    if sys.byteorder == "little":
        table.byteswap()
    return table
