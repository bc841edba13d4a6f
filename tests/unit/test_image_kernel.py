"""Unpacking a kernel: made-up ones, for the real one is several megabytes."""

from __future__ import annotations

import gzip
import lzma
import struct

import pytest

from capsem.image import kernel
from capsem.image.host import Host
from capsem.model.errors import Corrupt, HostNotReady


def elf(*, note_name: bytes = b"Xen\0", note_type: int = 18) -> bytes:
    """A 64-bit ELF header, one program header for a note segment, an unrelated note, and the given one."""
    note = struct.pack("<III", 4, 4, 1) + b"GNU\0" + bytes(4)
    note += struct.pack("<III", len(note_name), 8, note_type) + note_name + bytes(8)
    header = b"\x7fELF\x02\x01\x01".ljust(32, b"\0") + struct.pack("<Q", 64) + bytes(14) + struct.pack("<HH", 56, 1)
    program = struct.pack("<IIQQQQQQ", 4, 0, 120, 0, 0, len(note), len(note), 4)
    return header.ljust(64, b"\0") + program + note + b"code"


def bz_image(payload: bytes, *, setup_sectors: int = 3, version: int = 0x20F, offset: int = 16) -> bytes:
    image = bytearray((setup_sectors + 1) * 512 if setup_sectors else 5 * 512)
    image[0x1F1] = setup_sectors
    image[0x202:0x206] = b"HdrS"
    image[0x206:0x208] = struct.pack("<H", version)
    image[0x248:0x250] = struct.pack("<II", offset, len(payload))
    return bytes(image) + bytes(offset) + payload + b"what follows"


def with_size(compressed: bytes, plain: bytes) -> bytes:
    return compressed + struct.pack("<I", len(plain))


@pytest.mark.parametrize("sectors", [0, 1, 3, 30])
def test_payload_is_where_the_header_says(sectors: int) -> None:
    assert kernel.find_payload(bz_image(b"the payload", setup_sectors=sectors)) == b"the payload"


def test_gzip_and_xz_payloads_become_the_kernel() -> None:
    plain = elf()
    assert kernel.unpack(bz_image(gzip.compress(plain, mtime=0)), Host()) == plain
    assert kernel.unpack(bz_image(with_size(lzma.compress(plain), plain)), Host()) == plain


@pytest.mark.parametrize(("magic", "tool"), [(kernel.ZSTD, "zstd"), (kernel.LZ4, "lz4")])
def test_zstd_and_lz4_are_unpacked_by_the_hosts_tools(magic: bytes, tool: str) -> None:
    class Tools(Host):
        def require(self, *tools: str) -> None:
            assert tools == (tool,)

        def run(self, argv, **keywords):  # type: ignore[no-untyped-def, override]
            assert (argv[0], keywords["stdin"]) == (tool, magic + b"data")
            return elf()

    assert kernel.unpack(bz_image(with_size(magic + b"data", elf())), Tools()) == elf()


def test_a_missing_tool_says_what_to_install() -> None:
    class Bare(Host):
        def require(self, *tools: str) -> None:
            raise HostNotReady("no tools", hint="install")

    with pytest.raises(HostNotReady):
        kernel.decompress(kernel.ZSTD + b"data", Bare())


@pytest.mark.parametrize(
    ("image", "words"),
    [
        (b"", "no bzImage"),
        (bytes(2000), "no bzImage"),
        (bz_image(b"x", version=0x207), "2.07 is too old"),
        (bz_image(gzip.compress(elf()))[:2100], "outside its file"),
        (bz_image(gzip.compress(elf())[:40]), "PVH"),
        (bz_image(with_size(lzma.compress(elf())[:-9], elf())), "cannot be unpacked"),
        (bz_image(with_size(lzma.compress(elf()), elf() + b"x")), "its header says"),
        (bz_image(gzip.compress(elf(note_type=17))), "PVH"),
        (bz_image(gzip.compress(elf(note_name=b"Xenon\0\0\0"))), "PVH"),
        (bz_image(gzip.compress(b"no ELF at all", mtime=0)), "PVH"),
        (gzip.compress(b"neither an arm64 kernel", mtime=0), "arm64"),
    ],
)
def test_what_cannot_boot_is_refused(image: bytes, words: str) -> None:
    with pytest.raises(Corrupt, match=words):
        kernel.unpack(image, Host())


def test_arm64_images_are_taken_plain_or_compressed() -> None:
    image = bytes(0x38) + b"ARM\x64" + bytes(100)
    assert kernel.unpack(image, Host()) == image
    assert kernel.unpack(gzip.compress(image, mtime=0), Host()) == image


def test_an_elf_with_a_wild_note_table_has_no_entry() -> None:
    wild = bytearray(elf())
    wild[32:40] = struct.pack("<Q", 1 << 60)
    assert not kernel.has_pvh_entry(bytes(wild))
