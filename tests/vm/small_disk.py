"""A small file system of its own for a run directory, which can be filled."""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

MIB = 1024 * 1024


class Disk:
    """What is mounted somewhere."""

    def __init__(self, place: Path) -> None:
        self.filler = place / "filler"

    def fill(self, free: int = 0) -> None:
        """Leave so many bytes."""
        found = os.statvfs(self.filler.parent)
        left = found.f_bavail * found.f_frsize - free
        with self.filler.open("wb", buffering=0) as file:
            for step in (MIB, 4096):
                try:
                    while left >= step:
                        left -= file.write(bytes(min(step, left)))
                except OSError:
                    continue  # the file system keeps some for itself
            os.fsync(file.fileno())

    def empty(self) -> None:
        """Give it all back."""
        self.filler.unlink()


@contextlib.contextmanager
def mounted(place: Path, size_mb: int) -> Iterator[Disk]:
    """ext4 on a loop device; where there are none, memory with a limit. Skips the test where nothing can be mounted."""
    if os.geteuid() != 0:
        pytest.skip("mounting a small file system takes root")
    place.mkdir()
    image = place.with_name("disk.img")
    with image.open("wb") as file:
        file.truncate(size_mb * MIB)
    subprocess.run(["mkfs.ext4", "-q", "-m", "0", image], check=True)
    for options in (["-o", "loop", image], ["-t", "tmpfs", "-o", f"size={size_mb}m,mode=700", "tmpfs"]):
        done = subprocess.run(["mount", *options, place], capture_output=True, text=True)
        if not done.returncode:
            break
    else:
        pytest.skip(f"nothing can be mounted here: {done.stderr.strip()}")
    try:
        yield Disk(place)
    finally:
        subprocess.run(["umount", place], check=True)
