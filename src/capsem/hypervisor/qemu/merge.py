"""Merges adjacent frozen layers of a volume into one new layer that says the same.

For each cluster of the disk the topmost source that knows it decides: its data is copied, its zeros stay zeros (below the
merged layers there is always more, which they hide), and what no source knows is left to the layers below.

The tables are read twice: once to count, so that the place of everything is known before the first byte is written,
and once to copy. The new file is compact and in the order of the disk:

    header | refcount table | refcount blocks | L1 table | L2 tables | data

Its first cluster is written last, after all else has reached the disk: a file without its whole content is no layer.
"""

from __future__ import annotations

import contextlib
import errno
import heapq
import os
import struct
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Final

from capsem.hypervisor.driver import Merged
from capsem.hypervisor.qemu.qcow2 import CLUSTER, Identity, corrupt, header, l1_entries
from capsem.hypervisor.qemu.qcow2_map import COPIED, SLOTS, ZEROES, LayerMap, Table, swapped
from capsem.store import durable

RESERVE: Final = 64 << 20  # bytes that a merge leaves free on the disk
PIECE: Final = 16 << 20  # bytes copied between two looks at `cancelled`
SYNC_EVERY: Final = 256 << 20  # bytes: the running VMs' own flushes must not wait for gigabytes of ours
REFCOUNTS: Final = CLUSTER // 2  # in a refcount block
NO_KERNEL_COPY: Final = frozenset({errno.EXDEV, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL})


class Cancelled(Exception):
    """`cancelled` said so; nothing is left of the merge."""


def merge(
    sources: Sequence[Path],
    target: Path,
    *,
    vm_id: str,
    layer_id: str,
    size_mb: int | None = None,
    cancelled: Callable[[], bool] = lambda: False,
) -> Merged:
    """Write the layer `target`, which must not exist, mode 0600, with what `sources` say, the lowest first; durable on return.

    Blocks for as long as copying takes; `cancelled` is called often, from this thread. Sources are never written to.
    Raises Corrupt, OSError (among others FileExistsError, and ENOSPC, if it can be foreseen before anything is written)
    and Cancelled; then there is no `target`, or the one that was there. A crash may leave one that is not a layer, or,
    at the very end, a complete one.
    """

    def check() -> None:
        if cancelled():
            raise Cancelled

    with contextlib.ExitStack() as stack:
        layers = [stack.enter_context(LayerMap(path)) for path in sources]
        if not layers:
            raise ValueError("nothing to merge")
        size = layers[0].size
        if size_mb not in (None, size >> 20) or size % (1 << 20):
            raise corrupt(layers[0].path, f"its disk has {size} bytes, not {size_mb} MiB")
        for layer in layers:
            if layer.size != size:
                raise corrupt(layer.path, f"its disk has {layer.size} bytes, that of {layers[0].path} {size}")
        plan = _plan(layers, check)
        _check_room(target, plan.total * CLUSTER)
        fd = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            try:
                copied = _write(_Copier(fd, plan.data * CLUSTER, check), layers, plan)
                os.fsync(fd)
                start = header(
                    size,
                    Identity(vm_id, layer_id),
                    l1_offset=plan.l1 * CLUSTER,
                    refcount_table_clusters=plan.refcount_blocks - 1,
                )
                _write_all(fd, start, 0)
                os.fsync(fd)
            finally:
                os.close(fd)
            durable.sync_directory(target.parent)
        except BaseException:
            target.unlink(missing_ok=True)
            raise
    return Merged(copied_bytes=copied, file_bytes=plan.total * CLUSTER)


@dataclass(frozen=True, slots=True)
class Plan:
    """Where each part of the new file begins, in clusters; the refcount table is cluster 1."""

    refcount_blocks: int
    l1: int
    l2: int
    data: int
    total: int


def lay_out(size: int, tables: int, data: int) -> Plan:
    """The plan of a file for a disk of `size` bytes with that many L2 tables and clusters of data."""
    l1 = -(-8 * l1_entries(size) // CLUSTER)
    table = blocks = 0
    while True:  # blocks count themselves; both numbers only grow, and soon stand still
        total = 1 + table + blocks + l1 + tables + data
        before = table, blocks
        blocks = -(-total // REFCOUNTS)
        table = -(-blocks // SLOTS)
        if (table, blocks) == before:
            break
    first = 1 + table
    return Plan(first, first + blocks, first + blocks + l1, first + blocks + l1 + tables, total)


def _plan(layers: Sequence[LayerMap], check: Callable[[], None]) -> Plan:
    tables = data = 0
    for _, table in _combined(layers, check):
        tables += 1
        data += sum(host != ZEROES for _, _, host in table)
    return lay_out(layers[0].size, tables, data)


def _combined(
    layers: Sequence[LayerMap], check: Callable[[], None]
) -> Iterator[tuple[int, list[tuple[int, LayerMap, int]]]]:
    """Each L2 table of the result: its place in the L1 table, and (slot, layer that decides, its host offset or ZEROES)."""

    def of(layer: LayerMap) -> Iterator[tuple[int, LayerMap, Table]]:
        return ((index, layer, table) for index, table in layer.tables())

    place = itemgetter(0)
    for index, several in groupby(heapq.merge(*map(of, layers), key=place), key=place):
        check()
        decided: list[tuple[int, LayerMap, int] | None] = [None] * SLOTS
        for _, layer, table in several:  # lowest first: what is equal stays in order
            for slot, host in table:
                decided[slot] = slot, layer, host
        if result := [each for each in decided if each]:
            yield index, result


def _check_room(target: Path, wanted: int) -> None:
    disk = os.statvfs(target.parent)
    free = disk.f_bavail * disk.f_frsize
    if free < wanted + RESERVE:
        raise OSError(
            errno.ENOSPC,
            f"merging layers takes up to {wanted >> 20} MiB and leaves {RESERVE >> 20} MiB alone; free are {free >> 20} MiB",
            str(target),
        )


def _write(copier: _Copier, layers: Sequence[LayerMap], plan: Plan) -> int:
    """Write everything but the header; return the bytes of data copied."""
    fd = copier.fd
    l1 = array("Q", bytes(8 * l1_entries(layers[0].size)))
    next_table, next_data = plan.l2, plan.data
    for index, table in _combined(layers, copier.check):
        entries = array("Q", bytes(CLUSTER))
        for slot, layer, host in table:
            if host == ZEROES:
                entries[slot] = ZEROES
            else:
                entries[slot] = COPIED | next_data * CLUSTER
                next_data += 1
                copier.add(layer, host)
        _write_all(fd, swapped(entries), next_table * CLUSTER)
        l1[index] = COPIED | next_table * CLUSTER
        next_table += 1
        if next_table > plan.data or next_data > plan.total:
            break
    if (next_table, next_data) != (plan.data, plan.total):
        raise corrupt(layers[-1].path, "it, or a layer below it, changed while it was read")
    copier.flush()
    _write_all(fd, swapped(l1), plan.l1 * CLUSTER)
    blocks = range(plan.refcount_blocks, plan.l1)
    _write_all(fd, swapped(array("Q", (block * CLUSTER for block in blocks))), CLUSTER)
    _write_all(fd, struct.pack(">H", 1) * plan.total, plan.refcount_blocks * CLUSTER)
    os.ftruncate(fd, plan.total * CLUSTER)  # a source may end within its last cluster; the rest reads as zeros
    return copier.copied


class _Copier:
    """Copies clusters to consecutive places of `fd`, from offset `to` on: whole runs where the source is consecutive too."""

    def __init__(self, fd: int, to: int, check: Callable[[], None]) -> None:
        self.fd = fd
        self.copied = 0
        self._to = to
        self.check = check
        self._layer: LayerMap | None = None
        self._start = self._end = 0  # the run in `_layer` that is not copied yet
        self._unsynced = 0
        self._transfer = _in_kernel

    def add(self, layer: LayerMap, host: int) -> None:
        """Copy the cluster at `host`, now or with the next ones."""
        if layer is not self._layer or host != self._end:
            self.flush()
            self._layer, self._start = layer, host
        self._end = host + CLUSTER

    def flush(self) -> None:
        """Copy what has been added."""
        layer, start, to = self._layer, self._start, self._to
        self._to += self._end - start
        self._start = self._end
        if layer is None:
            return
        end = min(self._end, layer.length)
        while start < end:
            self.check()
            done = self._move(layer.fd, start, to, min(PIECE, end - start))
            if not done:
                raise corrupt(layer.path, "it became shorter while it was read")
            start, to = start + done, to + done
            self.copied += done
            self._unsynced += done
            if self._unsynced >= SYNC_EVERY:
                os.fdatasync(self.fd)
                self._unsynced = 0

    def _move(self, source: int, start: int, to: int, count: int) -> int:
        try:
            return self._transfer(source, start, self.fd, to, count)
        except OSError as error:
            if self._transfer is not _in_kernel or error.errno not in NO_KERNEL_COPY:
                raise
        self._transfer = _by_sendfile  # an old kernel or a file system without; the offsets are as they were
        return self._transfer(source, start, self.fd, to, count)


def _in_kernel(source: int, start: int, fd: int, to: int, count: int) -> int:
    """Where the file system can, both files then share the extents, and nothing is copied at all."""
    return os.copy_file_range(source, fd, count, start, to)


def _by_sendfile(source: int, start: int, fd: int, to: int, count: int) -> int:
    os.lseek(fd, to, os.SEEK_SET)
    return os.sendfile(fd, source, start, count)


def _write_all(fd: int, data: bytes | array[int], offset: int) -> None:
    view = memoryview(data).cast("B")
    while view:
        done = os.pwrite(fd, view, offset)
        view, offset = view[done:], offset + done
