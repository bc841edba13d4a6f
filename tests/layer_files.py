"""Layers with content, made without QEMU: what each cluster of the disk holds, given as a dict."""

from __future__ import annotations

import os
import struct
from collections.abc import Mapping
from pathlib import Path

from capsem.hypervisor.qemu.qcow2 import CLUSTER, create_layer
from capsem.hypervisor.qemu.qcow2_map import COPIED, SLOTS, Kind, LayerMap

L1_OFFSET = 3 * CLUSTER  # of a new layer whose disk is smaller than 4 TiB

Content = Mapping[int, int | None]  # guest cluster -> the byte that fills it, or None for a zero cluster


def write_layer(path: Path, content: Content, *, size_mb: int, layer_id: str) -> None:
    """A layer whose clusters were written in the order of `content`. Refcounts are left as they were when it was empty."""
    create_layer(path, size_mb=size_mb, vm_id="box", layer_id=layer_id)
    tables: dict[int, int] = {}
    fd = os.open(path, os.O_RDWR)

    def append(data: bytes) -> int:
        return os.pwrite(fd, data, end := os.fstat(fd).st_size) and end

    for number, byte in content.items():
        index, slot = divmod(number, SLOTS)
        if index not in tables:
            tables[index] = append(bytes(CLUSTER))
            os.pwrite(fd, struct.pack(">Q", tables[index] | COPIED), L1_OFFSET + 8 * index)
        entry = 1 if byte is None else append(bytes([byte]) * CLUSTER) | COPIED
        os.pwrite(fd, struct.pack(">Q", entry), tables[index] + 8 * slot)
    os.close(fd)


def read_layer(path: Path) -> dict[int, int | None]:
    """The content again; fails for a cluster that is not all one byte."""
    content: dict[int, int | None] = {}
    with LayerMap(path) as layer:
        for number, kind, host in layer.clusters():
            if kind is Kind.ZERO:
                content[number] = None
                continue
            data = os.pread(layer.fd, CLUSTER, host)
            assert data == data[:1] * CLUSTER
            content[number] = data[0]
    return content
