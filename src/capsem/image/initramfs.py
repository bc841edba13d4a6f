"""The initramfs: the first files a guest has. A cpio archive in the kernel's "newc" form, written here byte by byte.

Nothing in the archive depends on when or where it is made: entries are sorted, owners and times are zero, inode
numbers are counted up. It is not compressed: it is small, QEMU hands it over by copying memory, and unpacking it would
be the emulated guest's work.
"""

from __future__ import annotations

import stat
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Final

from capsem.model.errors import Corrupt

_MAGIC: Final = b"070701"
_HEADER: Final = 110
_TRAILER: Final = "TRAILER!!!"
_FIELDS: Final = ("ino", "mode", "uid", "gid", "nlink", "mtime", "size", "major", "minor", "rmajor", "rminor", "name")


@dataclass(frozen=True, slots=True)
class Entry:
    """One file, directory, link or device. `mode` holds type and permissions, `device` major and minor number."""

    mode: int
    data: bytes = b""
    device: tuple[int, int] = (0, 0)


def directory(mode: int = 0o755) -> Entry:
    """An entry for a directory."""
    return Entry(stat.S_IFDIR | mode)


def file(data: bytes, mode: int = 0o644) -> Entry:
    """An entry for a regular file."""
    return Entry(stat.S_IFREG | mode, data)


def character_device(major: int, minor: int, mode: int = 0o600) -> Entry:
    """An entry for a character device."""
    return Entry(stat.S_IFCHR | mode, device=(major, minor))


def pack(entries: Mapping[str, Entry]) -> bytes:
    """The archive of `entries`, by path relative to the root; missing parent directories are added with mode 0755."""
    tree = dict(entries)
    for path in entries:
        for parent in PurePosixPath(path).parents:
            if str(parent) != ".":
                tree.setdefault(str(parent), directory())
    parts: list[bytes] = []
    for number, (path, entry) in enumerate(sorted(tree.items()), start=1):
        parts.extend(_record(number, path, entry))
    parts.extend(_record(0, _TRAILER, Entry(0)))
    archive = b"".join(parts)
    return archive + bytes(-len(archive) % 512)


def for_guest(*, init: bytes, mounts: bytes, busybox: bytes, modules: Mapping[str, bytes]) -> bytes:
    """The archive a guest starts with: its first program, the table of mounts, and kernel modules in order of loading."""
    entries = {
        "init": file(init, 0o755),
        "mounts": file(mounts),
        "bin/busybox": file(busybox, 0o755),
        "dev/console": character_device(5, 1),  # where the kernel connects init's output to
        "modules/order": file("".join(f"{name}\n" for name in modules).encode()),
        **{f"modules/{name}.ko": file(data) for name, data in modules.items()},
        **{name: directory() for name in ("lower", "new", "proc", "volume")},
    }
    return pack(entries)


def parse(archive: bytes) -> Iterator[tuple[str, Entry]]:
    """The entries of an archive, in order; the inverse of `pack`. Raises Corrupt."""
    offset = 0
    while True:
        header = archive[offset : offset + _HEADER]
        if len(header) != _HEADER or header[:6] != _MAGIC:
            raise Corrupt(f"no cpio header at offset {offset}")
        try:
            field = {key: int(header[6 + 8 * i : 14 + 8 * i], 16) for i, key in enumerate(_FIELDS)}
        except ValueError as exc:
            raise Corrupt(f"a cpio header at offset {offset} is malformed") from exc
        start = offset + _HEADER
        body = _align(start + field["name"])
        offset = _align(body + field["size"])
        if body + field["size"] > len(archive):
            raise Corrupt("the cpio archive is cut short")
        path = archive[start : start + field["name"] - 1].decode()
        if path == _TRAILER:
            return
        device = (field["rmajor"], field["rminor"])
        yield path, Entry(field["mode"], archive[body : body + field["size"]], device)


def _record(number: int, path: str, entry: Entry) -> Iterable[bytes]:
    name = path.encode() + b"\0"
    links = 2 if stat.S_ISDIR(entry.mode) else 1
    values = (number, entry.mode, 0, 0, links, 0, len(entry.data), 0, 0, *entry.device, len(name), 0)
    head = _MAGIC + b"".join(b"%08X" % value for value in values) + name
    yield head + bytes(-len(head) % 4)
    yield entry.data + bytes(-len(entry.data) % 4)


def _align(offset: int) -> int:
    return (offset + 3) & ~3
