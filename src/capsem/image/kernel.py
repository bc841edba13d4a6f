"""From Debian's compressed kernel to the image QEMU starts directly.

A bzImage is a small loader with the real kernel, an ELF file, compressed inside. Unpacking it once, here, saves every
boot of every guest the decompression, which under emulation costs seconds. QEMU enters the ELF through its PVH note,
so that note is checked: without it the guest would never start and never say why.

The place of the payload stands in the header of the x86 boot protocol: sectors of setup code at 0x1F1, offset and
length of the payload, relative to the protected-mode code, at 0x248 and 0x24C. For every compression but gzip, Linux
appends the unpacked size as four bytes, which serves as a check.
"""

from __future__ import annotations

import gzip
import lzma
import struct
import zlib
from collections.abc import Callable, Iterator
from typing import Final

from capsem.image.host import Host
from capsem.model.errors import Corrupt

_SECTOR: Final = 512
_SETUP_SECTS: Final = 0x1F1
_HEADER_MAGIC: Final = (0x202, b"HdrS")
_PROTOCOL_VERSION: Final = 0x206
_PAYLOAD: Final = 0x248
_ARM64_MAGIC: Final = (0x38, b"ARM\x64")

_PT_NOTE: Final = 4
_PVH_NOTE: Final = (b"Xen\0", 18)  # XEN_ELFNOTE_PHYS32_ENTRY

GZIP, XZ, ZSTD, LZ4 = b"\x1f\x8b", b"\xfd7zXZ\0", b"\x28\xb5\x2f\xfd", b"\x02\x21\x4c\x18"


def find_payload(image: bytes) -> bytes:
    """The compressed kernel inside a bzImage, with its appended size. Raises Corrupt for anything else."""
    offset, magic = _HEADER_MAGIC
    if image[offset : offset + 4] != magic or len(image) < _PAYLOAD + 8:
        raise Corrupt("the kernel is no bzImage")
    (version,) = struct.unpack_from("<H", image, _PROTOCOL_VERSION)
    if version < 0x208:  # the first protocol that names the payload
        raise Corrupt(f"the kernel's boot protocol {version >> 8}.{version & 0xFF:02d} is too old")
    sectors = image[_SETUP_SECTS] or 4
    start, length = struct.unpack_from("<II", image, _PAYLOAD)
    start += (sectors + 1) * _SECTOR
    if length < 8 or start + length > len(image):
        raise Corrupt("the kernel's payload lies outside its file")
    return image[start : start + length]


def unpack(image: bytes, host: Host) -> bytes:
    """The kernel as QEMU starts it directly: an ELF file with a PVH entry (x86), or an uncompressed Image (arm64).

    Raises Corrupt when `image` is no such kernel, HostNotReady when the tool for its compression is missing.
    """
    if image[:2] == GZIP or _is_arm64(image):
        kernel = decompress(image, host)
        if not _is_arm64(kernel):
            raise Corrupt("the kernel is compressed, but is no arm64 Image inside")
        return kernel
    payload = find_payload(image)
    if payload[:2] == GZIP:
        kernel = decompress(payload, host)
    else:
        kernel = decompress(payload[:-4], host)
        (size,) = struct.unpack_from("<I", payload, len(payload) - 4)
        if len(kernel) != size:
            raise Corrupt(f"the kernel unpacks to {len(kernel)} bytes, its header says {size}")
    if not has_pvh_entry(kernel):
        raise Corrupt("the kernel has no PVH entry, so QEMU cannot start it directly")
    return kernel


def decompress(data: bytes, host: Host) -> bytes:
    """Unpack what its first bytes say it is; data of no known compression is returned as it is.

    Raises Corrupt, HostNotReady (zstd and lz4 are not in Python's library).
    """
    try:
        if data[:2] == GZIP:
            return zlib.decompressobj(wbits=31).decompress(data)  # unlike gzip.decompress, ignores what follows
        if data[:6] == XZ:
            return lzma.decompress(data)
    except (zlib.error, gzip.BadGzipFile, lzma.LZMAError, EOFError) as exc:
        raise Corrupt(f"compressed data cannot be unpacked: {exc}") from exc
    if data[:4] == ZSTD:
        host.require("zstd")
        return host.run(["zstd", "-dcq"], stdin=data)
    if data[:4] == LZ4:
        host.require("lz4")
        return host.run(["lz4", "-dcq"], stdin=data)
    return data


def has_pvh_entry(kernel: bytes) -> bool:
    """Whether `kernel` is a 64-bit little-endian ELF file with the note by which QEMU finds its PVH entry."""
    if kernel[:6] != b"\x7fELF\x02\x01" or len(kernel) < 64:
        return False
    return any((name, kind) == _PVH_NOTE for name, kind in _notes(kernel))


def _notes(kernel: bytes) -> Iterator[tuple[bytes, int]]:
    """Name and type of each ELF note; a malformed table just ends."""
    (table,) = struct.unpack_from("<Q", kernel, 32)
    entry_size, entries = struct.unpack_from("<HH", kernel, 54)
    align: Callable[[int], int] = lambda size: (size + 3) & ~3  # noqa: E731
    for index in range(entries):
        header = table + index * entry_size
        if header + 56 > len(kernel):
            return
        (kind,) = struct.unpack_from("<I", kernel, header)
        (offset,) = struct.unpack_from("<Q", kernel, header + 8)
        (size,) = struct.unpack_from("<Q", kernel, header + 32)
        end = min(offset + size, len(kernel))
        while kind == _PT_NOTE and offset + 12 <= end:
            name_size, content_size, note = struct.unpack_from("<III", kernel, offset)
            yield kernel[offset + 12 : offset + 12 + name_size], note
            offset += 12 + align(name_size) + align(content_size)


def _is_arm64(image: bytes) -> bool:
    offset, magic = _ARM64_MAGIC
    return image[offset : offset + 4] == magic
