"""Reading a chain of layers without QEMU: for the files of a VM that does not run.

Format: see qcow2.py. Only what QEMU writes into layers of ours is understood: anything else in a header (encryption,
compression, external data, subclusters, internal snapshots' tables) is refused, never guessed at. Backing names in
headers are not looked at: the chain is what the caller says it is.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

from capsem.hypervisor.driver import Layer
from capsem.hypervisor.qemu.qcow2 import HEADER_BYTES, MAGIC, VERSION
from capsem.model.errors import Corrupt

_HEAD: Final = struct.Struct(">4sIQIIQIIQQIIQQ")  # up to and including the incompatible features
_DIRTY: Final = 1  # reference counts may be wrong, mappings are not; all other incompatible features are refused
_L1_LIMIT: Final = 32 << 20  # bytes, as in QEMU
_TABLES_KEPT: Final = 64  # of 64 KiB each
_OFFSET: Final = 0x00FFFFFFFFFFFE00
_COMPRESSED: Final = 1 << 62
_ZERO: Final = 1

Run = tuple[int | None, int]  # where in the file, or _BELOW, or None for zeroes; how many bytes
_BELOW: Final = -1


class Chain:
    """The bytes of a volume as its guest would read them."""

    def __init__(self, layers: Sequence[Layer]) -> None:
        """Open `layers`, base first. Raises OSError, Corrupt."""
        self._layers: list[_Raw] = []
        try:
            for layer in layers:
                self._layers.append((_Raw if layer.format == "raw" else _Qcow2)(layer.path))
        except BaseException:
            self.close()
            raise

    def read(self, offset: int, size: int) -> bytes:
        """Bytes of the volume; zeroes where nothing was ever written. Raises OSError, Corrupt."""
        return self._read(len(self._layers) - 1, offset, size)

    def _read(self, place: int, offset: int, size: int) -> bytes:
        if place < 0:
            return bytes(size)
        layer, pieces = self._layers[place], []
        for where, length in layer.runs(offset, size):
            if where == _BELOW:
                pieces.append(self._read(place - 1, offset, length))
            else:
                pieces.append(bytes(length) if where is None else layer.pread(where, length))
            offset += length
        return b"".join(pieces)

    def close(self) -> None:
        """Let go of the files."""
        for layer in self._layers:
            os.close(layer.fd)
        self._layers = []


class _Raw:
    """A base: what it does not hold is zero."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            self._open()
        except BaseException:
            os.close(self.fd)
            raise

    def _open(self) -> None:
        """Read what there is to know first."""

    def runs(self, offset: int, size: int) -> Iterator[Run]:
        """Where the bytes from `offset` on are, in order."""
        yield offset, size

    def pread(self, offset: int, size: int) -> bytes:
        """Bytes of the file, zeroes after its end."""
        data = os.pread(self.fd, size, offset)
        while data and len(data) < size and (more := os.pread(self.fd, size - len(data), offset + len(data))):
            data += more
        return data.ljust(size, b"\0")


class _Qcow2(_Raw):
    def _open(self) -> None:
        head = os.pread(self.fd, HEADER_BYTES, 0).ljust(HEADER_BYTES, b"\0")
        magic, version, _, _, self._bits, size, encrypted, entries, table, *_, features = _HEAD.unpack_from(head)
        compression = head[104]
        if magic != MAGIC or version != VERSION or not 9 <= self._bits <= 21:
            raise self._corrupt("its header is not of the kind that we write")
        if encrypted or features & ~_DIRTY or compression:
            raise self._corrupt(f"it uses features of qcow2 that no layer of ours has ({features:#x})")
        if entries * 8 > _L1_LIMIT or entries << (2 * self._bits - 3) < size:
            raise self._corrupt(f"a disk of {size} bytes does not have {entries} tables")
        self._l1 = struct.unpack(f">{entries}Q", self._table(table, entries * 8))
        self._tables: dict[int, tuple[int, ...]] = {}

    def _table(self, offset: int, size: int) -> bytes:
        data = os.pread(self.fd, size, offset)
        if len(data) != size:
            raise self._corrupt("a table lies beyond its end")
        return data

    def runs(self, offset: int, size: int) -> Iterator[Run]:
        """See _Raw; neighbours are joined."""
        cluster = 1 << self._bits
        where: int | None = 0
        length = 0
        while size:
            inside = offset & (cluster - 1)
            step = min(size, cluster - inside)
            found = self._find(offset)
            if found is not None and found != _BELOW:
                found += inside
            follows = found == (where if where is None or where == _BELOW else where + length)
            if length and not follows:
                yield where, length
            if not length or not follows:
                where, length = found, 0
            length += step
            offset += step
            size -= step
        if length:
            yield where, length

    def _find(self, offset: int) -> int | None:
        """Where the cluster that holds `offset` is."""
        high, low = divmod(offset >> self._bits, 1 << (self._bits - 3))
        at = self._l1[high] & _OFFSET if high < len(self._l1) else 0
        if not at:
            return _BELOW
        table = self._tables.get(at)
        if table is None:
            if len(self._tables) >= _TABLES_KEPT:
                self._tables.clear()
            data = self._table(at, 1 << self._bits)
            table = self._tables[at] = struct.unpack(f">{len(data) // 8}Q", data)
        entry = table[low]
        if entry & _COMPRESSED:
            raise self._corrupt("it holds compressed data, which no layer of ours does")
        if entry & _ZERO:
            return None
        return entry & _OFFSET or _BELOW

    def _corrupt(self, what: str) -> Corrupt:
        return Corrupt(f"{self._path} is not a layer of ours: {what}", hint="it was damaged or exchanged")
