"""A disk that forgets: what a power cut leaves of a directory tree that was written through os and pathlib.

Every durable operation under the root is counted: fsync, rename, link, unlink, rmdir, mkdir, creation, truncation,
write. At the n-th the power goes: it raises `PowerCut`, as does every later one, so that no cleaning up in the program
can help. What a test then starts again from is one of two extremes that real file systems lie between, or something
drawn by lot from between them:

    kept    everything that was done before the cut is on the disk
    lost    only what was made durable: a file's content as of its last fsync, a directory's entries as of its last
    torn    of what was not made durable some, in whatever order: each directory entry that has changed is the old or the
            new (a rename both of its ends, unless one was made durable before), and so is each sector of a file

Files are opaque here: what QEMU writes is as good as any bytes.
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

SECTOR = 512  # bytes, the most that a disk writes or does not write
LEDGER = "main.db"  # and its journal: SQLite's, which has its own ways through a power cut, and a thread of its own
KEPT, LOST = "kept", "lost"
TORN = 2  # how many lots are drawn for each cut


class PowerCut(BaseException):
    """Not an Exception: nothing may catch it and go on."""


class Disk:
    """Watches one directory tree; `cut_at` is the number of the operation that is no longer done."""

    def __init__(self, root: Path, cut_at: int | None = None) -> None:
        self.root = root
        self.cut_at = cut_at
        self.count = 0
        self.gone = False
        self.log: list[str] = []
        self._inodes: dict[int, bytes] = {}  # durable content by inode
        self._dirs: dict[int, dict[str, int]] = {}  # durable entries by the directory's inode
        self._kind: dict[int, bool] = {}  # is it a directory?
        self._held: dict[int, int] = {}  # a descriptor for each inode, so that no number is used again
        for path in sorted((root, *root.rglob("*"))):
            self._sync(path)

    # -- what is durable

    def _sync(self, path: Path) -> None:
        info = path.lstat()
        self._hold(path)
        if path.is_dir():
            entries = {child.name: self._hold(child) for child in sorted(path.iterdir())}
            for inode in entries.values():
                if self._kind[inode]:  # a directory that was moved here is nowhere else
                    for other in self._dirs.values():
                        for name in [name for name, each in other.items() if each == inode]:
                            del other[name]
            self._dirs[info.st_ino] = entries
        else:
            self._inodes[info.st_ino] = path.read_bytes()

    def _hold(self, path: Path) -> int:
        info = path.lstat()
        if info.st_ino not in self._kind:
            self._kind[info.st_ino] = path.is_dir()
            self._held[info.st_ino] = os.open(path, os.O_RDONLY)
        return info.st_ino

    def _sync_fd(self, fd: int) -> None:
        path = Path(f"/proc/self/fd/{fd}").readlink()
        info = os.fstat(fd)
        if path.exists() and path.lstat().st_ino == info.st_ino:
            self._sync(path)

    def after_the_cut(self, target: Path, how: str) -> Path:
        """The tree that the machine finds when it is switched on again: KEPT, LOST, or torn, by any other word's lot."""
        if how == KEPT:
            shutil.copytree(self.root, target, symlinks=True)
        else:
            if how != LOST:
                self._tear(random.Random(how))
            self._restore(self.root.lstat().st_ino, target)
        for fd in self._held.values():
            os.close(fd)
        self._held = {}
        return target

    def _tear(self, lot: random.Random) -> None:
        """Let some of what was only done be durable too."""
        now: dict[int, dict[str, int]] = {}
        for path in sorted((self.root, *self.root.rglob("*"))):
            inode = self._hold(path)
            if path.is_dir():
                now[inode] = {child.name: self._hold(child) for child in sorted(path.iterdir())}
        for (
            inode,
            is_directory,
        ) in self._kind.items():  # in the order in which they were met, which no inode number decides
            if not is_directory:
                self._inodes[inode] = _torn(self._inodes.get(inode, b""), _content(self._held[inode]), lot)
        added, taken = [], []
        for directory in dict.fromkeys((*self._dirs, *now)):
            before, after = self._dirs.get(directory, {}), now.get(directory, {})
            changed = [name for name in sorted({*before, *after}) if before.get(name) != after.get(name)]
            added += [(directory, name, after[name]) for name in changed if name in after]
            taken += [(directory, name, before[name]) for name in changed if name not in after]
        for directory, name, inode in added:
            moved = [each for each in taken if each[2] == inode]
            if lot.random() < 0.5:
                self._dirs.setdefault(directory, {})[name] = inode
                for old, old_name, _ in moved:
                    del self._dirs[old][old_name]
            taken = [each for each in taken if each not in moved]
        for directory, name, _inode in taken:
            if lot.random() < 0.5:
                del self._dirs[directory][name]

    def _restore(self, inode: int, target: Path) -> None:
        if self._kind[inode]:
            target.mkdir()
            for name, child in self._dirs.get(inode, {}).items():
                self._restore(child, target / name)
        else:
            target.write_bytes(self._inodes.get(inode, b""))

    # -- the operations

    def step(self, what: str) -> None:
        if self.cut_at is not None and self.count >= self.cut_at:
            self.gone = True
            raise PowerCut(f"{self.count}: {what}")
        self.count += 1
        self.log.append(what)

    def inside(self, target: Any, dir_fd: int | None = None) -> Path | None:
        path = Path(f"/proc/self/fd/{target}").readlink() if isinstance(target, int) else Path(os.fspath(target))
        if dir_fd is not None and not path.is_absolute():
            path = Path(f"/proc/self/fd/{dir_fd}").readlink() / path
        ours = path.is_relative_to(self.root) and not path.name.startswith(LEDGER)
        return path if ours else None

    def watch(self, patch: pytest.MonkeyPatch) -> Disk:
        """Stand between the program and os."""

        def wrap(name: str, *, sync: bool = False) -> None:
            real: Callable[..., Any] = getattr(os, name)

            def call(target: Any, *rest: Any, **options: Any) -> Any:
                path = self.inside(target, options.get("dir_fd"))
                if path is not None and not (name == "mkdir" and path.exists()):
                    self.step(f"{name} {path.relative_to(self.root)}")
                result = real(target, *rest, **options)
                if sync and path is not None:
                    self._sync_fd(target)
                return result

            patch.setattr(os, name, call)

        for name in ("write", "pwrite", "ftruncate", "replace", "rename", "unlink", "rmdir", "mkdir", "link"):
            wrap(name)
        wrap("fsync", sync=True)
        real_open = os.open

        def opened(path: Any, flags: int, *rest: Any, **options: Any) -> int:
            there = self.inside(path, options.get("dir_fd"))
            if there is not None and flags & os.O_CREAT and not there.exists():
                self.step(f"create {there.relative_to(self.root)}")
            return real_open(path, flags, *rest, **options)

        patch.setattr(os, "open", opened)
        return self


def _content(fd: int) -> bytes:
    return os.pread(fd, os.fstat(fd).st_size, 0)


def _torn(old: bytes, new: bytes, lot: random.Random) -> bytes:
    """Each sector the old or the new, or zeroes where there was none; the length one of the two."""
    if old == new:
        return old
    pieces = []
    for at in range(0, max(len(old), len(new)), SECTOR):
        one, other = old[at : at + SECTOR], new[at : at + SECTOR]
        pieces.append((one if lot.random() < 0.5 else other).ljust(max(len(one), len(other)), b"\0"))
    return b"".join(pieces)[: len(old) if lot.random() < 0.25 else len(new)]


def every_cut(
    tmp_path: Path,
    prepare: Callable[[Path], Any],
    act: Callable[[Path, Any], None],
    judge: Callable[[Path, Any], None],
    *,
    torn: int = TORN,
    first: int = 0,
) -> int:
    """Do `act` on what `prepare` made, cut short at every operation from the `first` in turn; `judge` what is left, in every way
    in which it can be. Returns how many operations there were."""
    cut_at, at_end = first, False
    while not at_end:
        for how in (KEPT, LOST, *(f"torn {cut_at} {number}" for number in range(torn))):
            root = tmp_path / f"{cut_at}-{how.replace(' ', '-')}"
            root.mkdir()
            made = prepare(root)
            disk = Disk(root, cut_at)
            with pytest.MonkeyPatch.context() as patch:
                disk.watch(patch)
                with contextlib.suppress(PowerCut):
                    act(root, made)
            at_end = not disk.gone  # whatever `act` made of it
            left = disk.after_the_cut(root.with_name(f"{root.name}-left"), how)
            try:
                judge(left, made)
            except BaseException as error:
                error.add_note(f"cut after {disk.log}, {how}")
                raise
            shutil.rmtree(root)
            shutil.rmtree(left)
        cut_at += 1
    return cut_at - 1
