"""Files that survive a crash: the only place that calls fsync and rename for data that must not be lost.

The order is the whole point, and is the same everywhere: write a temporary name in the same directory, fsync it,
rename it over the final name, fsync the directory. A reader sees the old content or the new, never a mixture, and
after a crash the same holds.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from pathlib import Path

TEMPORARY = ".tmp-"


def write(path: Path, data: bytes, *, mode: int = 0o600, lasting: bool = True) -> None:
    """Replace the content of `path` atomically and durably; atomically alone if it need not be `lasting`: when the host
    itself goes down, what is there afterwards may be the old, the new, or not whole.

    Raises OSError; then `path` is as it was, or, when only the last step (the directory's sync) failed, new.
    """
    temporary = path.with_name(f"{TEMPORARY}{path.name}.{os.getpid()}")
    try:
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, mode)
        try:
            view = memoryview(data)
            while view:
                view = view[os.write(fd, view) :]
            if lasting:
                os.fsync(fd)
        finally:
            os.close(fd)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            temporary.unlink()
        raise
    if lasting:
        sync_directory(path.parent)


def create(path: Path, data: bytes, *, mode: int = 0o600) -> bool:
    """Make a file that is not there yet, atomically and durably; False, and nothing done, when there is one.

    Of several who do so at once, one is first, and the others find its file whole. Raises OSError.
    """
    temporary = path.with_name(f"{TEMPORARY}{path.name}.{os.getpid()}")
    write(temporary, data, mode=mode)
    try:
        os.link(temporary, path)
    except FileExistsError:
        return False
    finally:
        temporary.unlink()
    sync_directory(path.parent)
    return True


def sync_directory(path: Path) -> None:
    """Make additions, renames and removals in a directory durable."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def sync_file(path: Path) -> None:
    """Make the content of a file that somebody else wrote durable."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def rename(old: Path, new: Path) -> None:
    """Rename a file or directory within one file system, durably."""
    os.rename(old, new)
    sync_directory(new.parent)
    if new.parent != old.parent:
        sync_directory(old.parent)


def remove_tree(path: Path) -> None:
    """Remove a file or directory tree; one that is not there is no error. Symbolic links are removed, not followed."""
    # rmtree gives up at an entry that vanishes under it: that one is gone, so going on ends.
    while path.is_dir() and not path.is_symlink():
        with contextlib.suppress(FileNotFoundError):
            shutil.rmtree(path)
    path.unlink(missing_ok=True)


def allocated_bytes(path: Path) -> int:
    """Bytes that a file or tree really takes on disk (a hole takes none); links are not followed. Vanishing is no error."""
    try:
        info = path.lstat()
    except FileNotFoundError:
        return 0
    total = info.st_blocks * 512
    if path.is_dir() and not path.is_symlink():
        with contextlib.suppress(FileNotFoundError):
            total += sum(allocated_bytes(child) for child in path.iterdir())
    return total
