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


class Staged:
    """A file's next content, durable under a name that nobody looks at: what takes a disk longest is done before it is to
    count. `place` or `discard` it.
    """

    def __init__(self, path: Path, data: bytes, *, mode: int = 0o600, name: str = "", lasting: bool = True) -> None:
        """Write it beside `path`, durably if it is to be `lasting`; no two of the same `name` at a time in one process.

        Raises OSError; then it is gone.
        """
        self._path = path
        self._temporary = path.with_name(f"{TEMPORARY}{path.name}.{os.getpid()}{name}")
        try:
            fd = os.open(self._temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, mode)
            try:
                _write_all(fd, data)
                if lasting:
                    os.fsync(fd)
            finally:
                os.close(fd)
        except BaseException:
            self.discard()
            raise

    def place(self, *, sync: bool = True) -> None:
        """Replace the content of the file, durably, unless the caller is to `sync` its directory.

        Raises OSError; then the file is as it was, or, when only the last step (the directory's sync) failed, new.
        """
        try:
            os.replace(self._temporary, self._path)
        except BaseException:
            self.discard()
            raise
        if sync:
            sync_directory(self._path.parent)

    def discard(self) -> None:
        """It is not wanted any more."""
        with contextlib.suppress(FileNotFoundError):
            self._temporary.unlink()


def write(path: Path, data: bytes, *, mode: int = 0o600, lasting: bool = True) -> None:
    """Replace the content of `path` atomically and durably; atomically alone if it need not be `lasting`: when the host
    itself goes down, what is there afterwards may be the old, the new, or not whole.

    Raises OSError; then `path` is as it was, or, when only the last step (the directory's sync) failed, new.
    """
    Staged(path, data, mode=mode, lasting=lasting).place(sync=lasting)


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


def draft(path: Path, data: bytes) -> None:
    """Write a file that is not there yet, mode 0600. It is durable once it and its directory were synced. Raises OSError."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        _write_all(fd, data)
    finally:
        os.close(fd)


def _write_all(fd: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


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
