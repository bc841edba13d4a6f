"""Our own writer of empty qcow2 layers, and the reader of the identity that they carry. What lies where in a layer that
QEMU has written to is read by `qcow2_map`.

Format: QEMU's docs/interop/qcow2.txt (https://www.qemu.org/docs/master/interop/qcow2.html), version 3, big-endian.
A new layer is five clusters of 64 KiB or a few more, most of them holes:

    cluster 0   header, then header extensions: ours, feature names (none), end
    cluster 1   refcount table: one entry, cluster 2
    cluster 2   refcount block: 16-bit counts, 1 for each cluster of this list
    cluster 3.. L1 table: 8 bytes for each 512 MiB of the disk, all zero (nothing is allocated)

There is never a backing file name: the chain is given on QEMU's command line, by node. Our header extension holds the
VM's and the layer's id; QEMU keeps extensions that it does not know whenever it rewrites a header.
"""

from __future__ import annotations

import json
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from capsem.model.errors import Corrupt
from capsem.store import durable

MAGIC: Final = b"QFI\xfb"
VERSION: Final = 3
CLUSTER_BITS: Final = 16
CLUSTER: Final = 1 << CLUSTER_BITS
REFCOUNT_ORDER: Final = 4  # 16-bit refcounts
HEADER_BYTES: Final = 112  # as QEMU >= 5.1 writes it: up to and including the compression type
IDENTITY_EXTENSION: Final = 0x43505349  # "CPSI"
IDENTITY_LIMIT: Final = 512  # bytes
END_OF_EXTENSIONS: Final = 0
BYTES_PER_L1_ENTRY: Final = CLUSTER * (CLUSTER // 8)  # an L2 table of 8-byte entries, one cluster each: 512 MiB

# magic, version, backing name offset and size, cluster bits, disk bytes, encryption, L1 entries and offset, refcount table
# offset and clusters, snapshots and their offset, incompatible, compatible and autoclear features, refcount order,
# header bytes, compression type and padding
HEADER: Final = struct.Struct(">4sIQIIQIIQQIIQQQQIIQ")
_EXTENSION = struct.Struct(">II")
assert HEADER.size == HEADER_BYTES


@dataclass(frozen=True, slots=True)
class Identity:
    """Whose layer this is."""

    vm_id: str
    layer_id: str


def header(size: int, identity: Identity, *, l1_offset: int = 3 * CLUSTER, refcount_table_clusters: int = 1) -> bytes:
    """The first cluster of an image of `size` bytes, up to the end of its extensions; the refcount table is next to it."""
    fields = HEADER.pack(
        MAGIC,
        VERSION,
        *(0, 0),  # no backing file
        CLUSTER_BITS,
        size,
        0,  # not encrypted
        *(l1_entries(size), l1_offset),
        *(1 * CLUSTER, refcount_table_clusters),
        *(0, 0),  # no internal snapshots
        *(0, 0, 0),  # no optional features
        REFCOUNT_ORDER,
        HEADER_BYTES,
        0,  # zlib, not that we compress
    )
    data = json.dumps(
        {"format": 1, "vm_id": identity.vm_id, "layer_id": identity.layer_id}, separators=(",", ":")
    ).encode()
    if len(data) > IDENTITY_LIMIT:
        raise ValueError(f"an identity of {len(data)} bytes")
    padding = bytes(-len(data) % 8)
    return (
        fields + _EXTENSION.pack(IDENTITY_EXTENSION, len(data)) + data + padding + _EXTENSION.pack(END_OF_EXTENSIONS, 0)
    )


def create_layer(path: Path, *, size_mb: int, vm_id: str, layer_id: str, sync: bool = True) -> None:
    """Write a new, empty layer of `size_mb` MiB at `path`, which must not exist, mode 0600; durable on return, if `sync`.

    Raises OSError, among others FileExistsError; then there is no file (or the one that was there).
    """
    size = size_mb << 20
    l1_clusters = -(-l1_entries(size) * 8 // CLUSTER)
    clusters = 3 + l1_clusters
    if clusters > CLUSTER // 2:
        raise ValueError(f"a disk of {size_mb} MiB needs more than one refcount block")
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        try:
            os.ftruncate(fd, clusters * CLUSTER)
            os.pwrite(fd, header(size, Identity(vm_id, layer_id)), 0)
            os.pwrite(fd, struct.pack(">Q", 2 * CLUSTER), 1 * CLUSTER)
            os.pwrite(fd, struct.pack(">H", 1) * clusters, 2 * CLUSTER)
            if sync:
                os.fsync(fd)
        finally:
            os.close(fd)
    except BaseException:
        path.unlink(missing_ok=True)
        raise
    if sync:
        durable.sync_directory(path.parent)


def read_identity(path: Path) -> Identity:
    """Whose layer `path` is. Any content is safe to read: a header is untrusted input. Raises Corrupt, OSError."""
    with path.open("rb") as file:
        return parse_identity(path, file.read(CLUSTER))


def parse_identity(path: Path, start: bytes) -> Identity:
    """Whose layer begins with `start`, its first cluster; `path` is for the message. Raises Corrupt."""
    if len(start) < HEADER_BYTES or start[:4] != MAGIC:
        raise corrupt(path, "it is not a qcow2 image")
    _, version, *_ = HEADER.unpack_from(start)
    (header_bytes,) = struct.unpack_from(">I", start, 100)
    if version != VERSION or header_bytes < 104 or header_bytes % 8:
        raise corrupt(path, "its qcow2 header is not of the kind that we write")
    offset = header_bytes
    while offset + _EXTENSION.size <= len(start):
        kind, length = _EXTENSION.unpack_from(start, offset)
        offset += _EXTENSION.size
        if kind == END_OF_EXTENSIONS:
            break
        if kind == IDENTITY_EXTENSION and length <= IDENTITY_LIMIT and offset + length <= len(start):
            return _parse_identity(path, start[offset : offset + length])
        offset += length + -length % 8
    raise corrupt(path, "it does not say which VM it belongs to")


def _parse_identity(path: Path, data: bytes) -> Identity:
    try:
        fields = json.loads(data)
        known, vm_id, layer_id = fields["format"] == 1, fields["vm_id"], fields["layer_id"]
    except (ValueError, TypeError, KeyError, RecursionError):
        raise corrupt(path, "its identity cannot be read") from None
    if not (known and isinstance(vm_id, str) and isinstance(layer_id, str)):
        raise corrupt(path, "its identity is of an unknown form")
    return Identity(vm_id, layer_id)


def corrupt(path: Path, what: str) -> Corrupt:
    """The error to raise for a file that is not, or no longer, a layer of ours."""
    return Corrupt(
        f"{path} is not a layer of ours: {what}", hint="it was damaged or exchanged; nothing was done with it"
    )


def l1_entries(size: int) -> int:
    """How many L2 tables a disk of `size` bytes needs when all of it is written."""
    return -(-size // BYTES_PER_L1_ENTRY)
