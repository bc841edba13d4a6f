"""A disk that forgets: what a power cut leaves of a directory tree that was written through os and pathlib.

Every durable operation under the root is counted: fsync, rename, link, unlink, rmdir, mkdir, creation, truncation,
write. At the n-th the power goes: it raises `PowerCut`, as does every later one, so that no cleaning up in the program
can help. What a test then starts again from is one of two extremes that real file systems lie between:

    kept    everything that was done before the cut is on the disk, in order
    lost    only what was made durable: a file's content as of its last fsync, a directory's entries as of its last
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


class PowerCut(BaseException):
    """Not an Exception: nothing may catch it and go on."""


class Disk:
    """Watches one directory tree; `cut_at` is the number of the operation that is no longer done."""

    def __init__(self, root: Path, cut_at: int | None = None) -> None:
        self.root = root
        self.cut_at = cut_at
        self.count = 0
        self.log: list[str] = []
        self._inodes: dict[int, bytes] = {}  # durable content by inode
        self._dirs: dict[int, dict[str, int]] = {}  # durable entries by the directory's inode
        self._kind: dict[int, bool] = {}  # is it a directory?
        self._held: list[int] = []  # descriptors, so that no inode's number is used again
        for path in (root, *root.rglob("*")):
            self._sync(path)

    # -- what is durable

    def _sync(self, path: Path) -> None:
        info = path.lstat()
        self._hold(path)
        if path.is_dir():
            self._dirs[info.st_ino] = {child.name: self._hold(child) for child in path.iterdir()}
        else:
            self._inodes[info.st_ino] = path.read_bytes()

    def _hold(self, path: Path) -> int:
        info = path.lstat()
        if info.st_ino not in self._kind:
            self._kind[info.st_ino] = path.is_dir()
            self._held.append(os.open(path, os.O_RDONLY))
        return info.st_ino

    def _sync_fd(self, fd: int) -> None:
        path = Path(f"/proc/self/fd/{fd}").readlink()
        info = os.fstat(fd)
        if path.exists() and path.lstat().st_ino == info.st_ino:
            self._sync(path)

    def after_the_cut(self, target: Path, *, lost: bool) -> Path:
        """The tree that the machine finds when it is switched on again."""
        if lost:
            self._restore(self.root.lstat().st_ino, target)
        else:
            shutil.copytree(self.root, target, symlinks=True)
        for fd in self._held:
            os.close(fd)
        self._held = []
        return target

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
            raise PowerCut(f"{self.count}: {what}")
        self.count += 1
        self.log.append(what)

    def inside(self, target: Any, dir_fd: int | None = None) -> Path | None:
        path = Path(f"/proc/self/fd/{target}").readlink() if isinstance(target, int) else Path(os.fspath(target))
        if dir_fd is not None and not path.is_absolute():
            path = Path(f"/proc/self/fd/{dir_fd}").readlink() / path
        return path if path.is_relative_to(self.root) else None

    def watch(self, patch: pytest.MonkeyPatch) -> Disk:
        """Stand between the program and os."""

        def wrap(name: str, *, sync: bool = False) -> None:
            real: Callable[..., Any] = getattr(os, name)

            def call(target: Any, *rest: Any, **options: Any) -> Any:
                if (path := self.inside(target, options.get("dir_fd"))) is not None:
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


def every_cut(
    tmp_path: Path, prepare: Callable[[Path], Any], act: Callable[[Path, Any], None], judge: Callable[[Path, Any], None]
) -> int:
    """Do `act` on what `prepare` made, cut short at every operation in turn; `judge` what is left. Returns how many."""
    cut_at, at_end = 0, False
    while not at_end:
        for lost in (False, True):
            root = tmp_path / f"{cut_at}-{lost}"
            root.mkdir()
            made = prepare(root)
            disk = Disk(root, cut_at)
            with pytest.MonkeyPatch.context() as patch:
                disk.watch(patch)
                try:
                    act(root, made)
                    at_end = True
                except PowerCut:
                    pass
            left = disk.after_the_cut(tmp_path / f"{cut_at}-{lost}-left", lost=lost)
            try:
                judge(left, made)
            except BaseException as error:
                error.add_note(f"cut after {disk.log}, {'lost' if lost else 'kept'}")
                raise
            shutil.rmtree(root)
            shutil.rmtree(left)
        cut_at += 1
    return cut_at - 1
