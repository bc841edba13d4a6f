"""Reading a chain of layers without QEMU: for the files of a VM that does not run.

What lies where in a layer `qcow2_map` says, which refuses all that no layer of ours has. Backing names in headers are
not looked at: the chain is what the caller says it is.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

from capsem.hypervisor.driver import Layer
from capsem.hypervisor.qemu.qcow2 import CLUSTER
from capsem.hypervisor.qemu.qcow2_map import ABSENT, ZEROES, LayerMap

Run = tuple[int | None, int]  # where in the file, or _BELOW, or None for zeroes; how many bytes
_BELOW: Final = -1


class Chain:
    """The bytes of a volume as its guest would read them."""

    def __init__(self, layers: Sequence[Layer]) -> None:
        """Open `layers`, base first. Raises OSError, Corrupt."""
        self._layers: list[_Raw | _Qcow2] = []
        try:
            for layer in layers:
                self._layers.append(_Raw(layer.path) if layer.format == "raw" else _Qcow2(layer.path))
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
                pieces.append(bytes(length) if where is None else _pread(layer.fd, where, length))
            offset += length
        return b"".join(pieces)

    def close(self) -> None:
        """Let go of the files."""
        for layer in self._layers:
            layer.close()
        self._layers = []


def _pread(fd: int, offset: int, size: int) -> bytes:
    """Bytes of a file, zeroes after its end."""
    data = os.pread(fd, size, offset)
    while data and len(data) < size and (more := os.pread(fd, size - len(data), offset + len(data))):
        data += more
    return data.ljust(size, b"\0")


class _Raw:
    """A base: what it does not hold is zero."""

    def __init__(self, path: Path) -> None:
        self.fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def runs(self, offset: int, size: int) -> Iterator[Run]:
        """Where the bytes from `offset` on are, in order."""
        yield offset, size

    def close(self) -> None:
        """Close the file."""
        os.close(self.fd)


class _Qcow2(LayerMap):
    def runs(self, offset: int, size: int) -> Iterator[Run]:
        """See _Raw; neighbours are joined."""
        where: int | None = 0
        length = 0
        while size:
            inside = offset % CLUSTER
            step = min(size, CLUSTER - inside)
            host = self.find(offset // CLUSTER)
            found = _BELOW if host == ABSENT else None if host == ZEROES else host + inside
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
