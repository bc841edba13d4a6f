"""Unpacking a tar archive that nobody vouches for into a fresh directory.

Only what is plainly inside is made: every name is relative and without "..", nothing is ever written through a link,
because links are made when all else is there, and only those that point inside the tree however they are combined.
Owners, devices, hard links and set-id bits are none of it, nor are sparse files, a few bytes of which could fill the
disk. And what is made was all sent: an archive that ends without saying so is not one.
"""

from __future__ import annotations

import os
import shutil
import tarfile
from pathlib import Path
from typing import Protocol

from capsem.model.errors import GuestFailed

_PIECE = 256 * 1024


class Readable(Protocol):
    """What an archive is read from."""

    def read(self, size: int, /) -> bytes:
        """Up to `size` bytes; less only at the end."""


class _Counted:
    """The source, and where the last byte of it was that is not zero: `tarfile` takes a header that is cut off, or is
    none, for the end, which only a block of zeroes is.
    """

    def __init__(self, source: Readable) -> None:
        self._source = source
        self._total = 0
        self._content = 0

    def read(self, size: int, /) -> bytes:
        """As the source's."""
        data = self._source.read(size)
        if used := len(data.rstrip(b"\0")):
            self._content = self._total + used
        self._total += len(data)
        return data

    def check_end(self, offset: int) -> None:
        """Read what is left. Raises TarError unless from `offset` on all is zero, at least a block of it."""
        while self.read(_PIECE):
            pass
        if self._content > offset or self._total < offset + tarfile.BLOCKSIZE:
            raise tarfile.ReadError("it ends without its end")


def unpack(source: Readable, directory: Path) -> list[str]:
    """Unpack into `directory`, which is empty and nobody else's; returns what was left out, with the reason.

    Raises GuestFailed when it is no archive, or one that wants out of the directory; OSError.
    """
    left_out: list[str] = []
    counted = _Counted(source)
    links: list[tuple[Path, str]] = []
    modes: list[tuple[Path, int]] = []
    try:
        with tarfile.open(fileobj=counted, mode="r|", bufsize=_PIECE) as archive:  # type: ignore[call-overload]
            for entry in archive:
                name = _inside(entry.name)
                path = directory / name
                if entry.isdir():
                    path.mkdir(mode=0o700, parents=True, exist_ok=True)
                    modes.append((path, entry.mode & 0o777 | 0o700))
                elif entry.isreg() and not entry.issparse():
                    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
                    _write(archive, entry, path)
                elif entry.issym() and stays_inside(name, entry.linkname):
                    links.append((path, entry.linkname))
                elif entry.issym():
                    left_out.append(f"{name}: a link that leads out, to {entry.linkname}")
                else:
                    left_out.append(
                        f"{name}: {'a sparse file' if entry.issparse() else 'neither a file nor a directory'}"
                    )
            counted.check_end(archive.offset)
    except (tarfile.TarError, EOFError, UnicodeError) as error:
        raise GuestFailed(f"what the VM sent is no archive: {error}") from error
    for path, target in links:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        path.symlink_to(target)
    for path, mode in reversed(modes):
        path.chmod(mode)
    return left_out


def _inside(name: str) -> str:
    parts = [part for part in name.split("/") if part not in ("", ".")]
    if name.startswith("/") or ".." in parts:
        raise GuestFailed(f"the VM's archive wants to write outside of its directory: {name[:200]!r}")
    return "/".join(parts)


def stays_inside(name: str, target: str) -> bool:
    """Whether a link at `name` leads nowhere but into the tree. Steps up are allowed first only, and not beyond the top:
    there every step is a real directory's, while a later one might be that of another link's target.
    """
    if not target or target.startswith("/"):
        return False
    depth = name.count("/")
    descended = False
    for part in target.split("/"):
        if part == "..":
            depth -= 1
            if descended or depth < 0:
                return False
        elif part not in ("", "."):
            descended = True
    return True


def _write(archive: tarfile.TarFile, entry: tarfile.TarInfo, path: Path) -> None:
    content = archive.extractfile(entry)
    assert content is not None
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    with os.fdopen(fd, "wb") as file:
        shutil.copyfileobj(content, file, _PIECE)
        os.fchmod(fd, entry.mode & 0o777)
    os.utime(path, (entry.mtime, entry.mtime), follow_symlinks=False)


def remove_tree(directory: Path) -> None:
    """Remove what was unpacked."""
    shutil.rmtree(directory, ignore_errors=True)
