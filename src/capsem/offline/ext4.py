"""Reading an ext4 file system that nobody has mounted.

Format: https://docs.kernel.org/filesystems/ext4/, little-endian. It is made by `image.volume`, so only those features
have to be understood; any other, and whatever makes no sense, is refused as Corrupt. A guest may have written anything:
every number is checked before it is used, and every walk has a bound. Nothing is ever written.
"""

from __future__ import annotations

import stat
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final

from capsem.model.errors import Corrupt
from capsem.offline import journal

ROOT: Final = 2
_JOURNAL: Final = 8
_MAGIC: Final = 0xEF53
_RECOVER: Final = 0x4
# filetype, recover, extents, 64bit, flex_bg, csum_seed: the incompatible features that change nothing for a reader, or
# that are dealt with below
_KNOWN: Final = 0x2 | _RECOVER | 0x40 | 0x80 | 0x200 | 0x2000
_64BIT: Final = 0x80
_EXTENTS_FLAG: Final = 0x80000
_REFUSED_FLAGS: Final = 0x800 | 0x10000000  # encrypted, content in the inode
_EXTENT_MAGIC: Final = 0xF30A
_DEEPEST: Final = 5
_MOST_EXTENTS: Final = 1 << 20
_MOST_ENTRIES: Final = 1 << 20  # of one directory
_PIECE: Final = 256 * 1024

Read = Callable[[int, int], bytes]  # offset, size -> that many bytes


@dataclass(frozen=True, slots=True)
class Inode:
    """What is known of a file without its content. `map` is the root of its block map."""

    number: int
    mode: int
    size: int  # bytes
    mtime: int  # seconds since 1970
    flags: int
    map: bytes

    @property
    def is_directory(self) -> bool:
        """Whether it is a directory."""
        return stat.S_ISDIR(self.mode)

    @property
    def is_file(self) -> bool:
        """Whether it is a regular file."""
        return stat.S_ISREG(self.mode)

    @property
    def is_link(self) -> bool:
        """Whether it is a symbolic link."""
        return stat.S_ISLNK(self.mode)


class FileSystem:
    """Inodes, directories and content. Every method raises Corrupt, and what `read` raises."""

    def __init__(self, read: Read) -> None:
        """`read` returns bytes of the volume. The journal is replayed, in memory, if it has to be."""
        self._device = read
        self._replayed: journal.Replayed = {}
        self._journal_blocks: list[int] = []
        self._tables: dict[int, int] = {}  # block group -> first block of its inodes
        top = read(1024, 1024)
        (magic,) = struct.unpack_from("<H", top, 0x38)
        (features,) = struct.unpack_from("<I", top, 0x60)
        if magic != _MAGIC:
            raise Corrupt("the volume holds no ext4 file system", hint="its guest may have formatted it anew")
        if features & ~_KNOWN:
            raise Corrupt(f"the volume's ext4 has features that are not known here ({features:#x})")
        self._inodes, blocks = struct.unpack_from("<II", top)
        shift, self._per_group, self._inode_size = (
            struct.unpack_from(kind, top, at)[0] for kind, at in (("<I", 0x18), ("<I", 0x28), ("<H", 0x58))
        )
        if shift > 6 or not self._per_group or not 128 <= self._inode_size <= 1024 << shift:
            raise Corrupt("the volume's superblock makes no sense")
        self.block_size = 1024 << shift
        self._descriptor_size = struct.unpack_from("<H", top, 0xFE)[0] if features & _64BIT else 32
        self._blocks = blocks | (struct.unpack_from("<I", top, 0x150)[0] << 32 if features & _64BIT else 0)
        self._descriptors = (struct.unpack_from("<I", top, 0x14)[0] + 1) * self.block_size
        if not 32 <= self._descriptor_size <= 1024 or (features & _64BIT and self._descriptor_size < 64):
            raise Corrupt("the volume's superblock makes no sense")
        if features & _RECOVER:
            self._replay()

    def _replay(self) -> None:
        inode = self.inode(_JOURNAL)
        blocks: list[int] = []
        for logical, physical, length in self._extents(inode):
            if logical != len(blocks) or physical is None:
                raise Corrupt("the volume's journal has holes")
            blocks += range(physical, physical + length)

        def read(block: int) -> bytes:
            if block >= len(blocks):
                raise Corrupt("the volume's journal is shorter than it says")
            return self._device(blocks[block] * self.block_size, self.block_size)

        replayed = journal.replay(read, self.block_size)
        self._journal_blocks, self._replayed = blocks, replayed
        self._tables.clear()  # as the journal found them, before it was replayed

    def _read(self, offset: int, size: int) -> bytes:
        """Bytes of the file system, the journal's newer ones where it has them."""
        data = self._device(offset, size)
        if not self._replayed:
            return data
        patched: bytearray | None = None
        first, last = offset // self.block_size, (offset + size - 1) // self.block_size
        for block in range(first, last + 1):
            found = self._replayed.get(block)
            if found is None:
                continue
            place, escaped = found
            newer = self._device(self._journal_blocks[place] * self.block_size, self.block_size)
            if escaped:
                newer = struct.pack(">I", journal.MAGIC) + newer[4:]
            patched = patched if patched is not None else bytearray(data)
            start = block * self.block_size - offset
            low, high = max(0, start), min(size, start + self.block_size)
            patched[low:high] = newer[low - start : high - start]
        return data if patched is None else bytes(patched)

    def inode(self, number: int) -> Inode:
        """An inode by its number."""
        if not 0 < number <= self._inodes:
            raise Corrupt(f"there is no inode {number}")
        group, index = divmod(number - 1, self._per_group)
        data = self._read(self._inode_table(group) * self.block_size + index * self._inode_size, 128)
        mode, _, low, _, _, mtime = struct.unpack_from("<HHIIII", data)
        (flags,) = struct.unpack_from("<I", data, 0x20)
        (high,) = struct.unpack_from("<I", data, 0x6C)
        return Inode(number, mode, low | high << 32, mtime, flags, data[0x28:0x64])

    def _inode_table(self, group: int) -> int:
        if group not in self._tables:
            descriptor = self._read(self._descriptors + group * self._descriptor_size, self._descriptor_size)
            (table,) = struct.unpack_from("<I", descriptor, 0x8)
            if self._descriptor_size >= 64:
                table |= struct.unpack_from("<I", descriptor, 0x28)[0] << 32
            self._tables[group] = self._block(table, 1)
        return self._tables[group]

    def _block(self, number: int, count: int) -> int:
        if not 0 < number <= self._blocks - count:
            raise Corrupt(f"a block outside of the volume: {number}")
        return number

    # -- content

    def content(self, inode: Inode) -> Iterator[bytes]:
        """All bytes of a file, in pieces of at most 256 KiB."""
        at = 0  # bytes

        def zeroes(end: int) -> Iterator[bytes]:
            nonlocal at
            while at < end:
                size = min(end - at, _PIECE)
                at += size
                yield bytes(size)

        for logical, physical, length in self._extents(inode):
            start = logical * self.block_size
            if start < at:
                raise Corrupt(f"the blocks of inode {inode.number} are out of order")
            yield from zeroes(min(start, inode.size))
            end = min(start + length * self.block_size, inode.size)
            if physical is None:
                yield from zeroes(end)
            while at < end:
                assert physical is not None
                size = min(end - at, _PIECE)
                yield self._read(physical * self.block_size + at - start, size)
                at += size
        yield from zeroes(inode.size)

    def _extents(self, inode: Inode) -> Iterator[tuple[int, int | None, int]]:
        """(first block in the file, first block on the volume or None for zeroes, how many), in order."""
        if inode.flags & _REFUSED_FLAGS or not inode.flags & _EXTENTS_FLAG:
            raise Corrupt(f"the content of inode {inode.number} is stored in a way that is not known here")
        # Nodes are read when their turn comes: a map that names one block over and over must not fill the memory.
        pending: list[tuple[int | None, int]] = [(None, _DEEPEST + 1)]
        seen = 0
        while pending:
            block, above = pending.pop()
            node = inode.map if block is None else self._read(block * self.block_size, self.block_size)
            magic, entries, _, depth = struct.unpack_from("<HHHH", node)
            if magic != _EXTENT_MAGIC or depth >= above or 12 + 12 * entries > len(node):
                raise Corrupt(f"the block map of inode {inode.number} makes no sense")
            seen += entries
            if seen > _MOST_EXTENTS:
                raise Corrupt(f"the block map of inode {inode.number} does not end")
            if depth:
                below = [struct.unpack_from("<IIH", node, 12 + 12 * each) for each in range(entries)]
                pending += [(self._block(low | high << 32, 1), depth) for _, low, high in reversed(below)]
                continue
            for each in range(entries):
                logical, length, high, low = struct.unpack_from("<IHHI", node, 12 + 12 * each)
                if length > 0x8000:  # allocated, and not written yet
                    yield logical, None, length - 0x8000
                elif length:
                    yield logical, self._block(low | high << 32, length), length

    # -- names

    def entries(self, directory: Inode) -> Iterator[tuple[str, int]]:
        """Names and inode numbers of a directory, without "." and ".."; a hashed one reads like any other."""
        if not directory.is_directory:
            raise Corrupt(f"inode {directory.number} is no directory")
        found = 0
        for piece in self.content(directory):
            for start in range(0, len(piece), self.block_size):
                for name, number in self._block_entries(piece[start : start + self.block_size]):
                    found += 1
                    if found > _MOST_ENTRIES:
                        raise Corrupt(f"the directory of inode {directory.number} does not end")
                    if name not in (".", ".."):
                        yield name, number

    def _block_entries(self, block: bytes) -> Iterator[tuple[str, int]]:
        at = 0
        while at + 8 <= len(block):
            number, length, name_length = struct.unpack_from("<IHB", block, at)
            if length < 8 or length % 4 or at + length > len(block) or name_length + 8 > length:
                raise Corrupt("a directory makes no sense")
            name = block[at + 8 : at + 8 + name_length]
            if number and name:
                if b"/" in name or b"\0" in name:
                    raise Corrupt("a directory holds a name that is none")
                yield name.decode("utf-8", "surrogateescape"), number
            at += length

    def target(self, link: Inode) -> str:
        """Where a symbolic link points."""
        if link.size > self.block_size:
            raise Corrupt(f"the link of inode {link.number} is too long")
        if link.size < len(link.map) and not link.flags & _EXTENTS_FLAG:
            text = link.map[: link.size]
        else:
            text = b"".join(self.content(link))
        return text.decode("utf-8", "surrogateescape")
