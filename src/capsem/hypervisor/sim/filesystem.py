"""The guest's file system: a page cache in memory over a disk that may be full, struck, slow, or a liar."""

from __future__ import annotations

import errno
import os
import posixpath
from collections.abc import Callable
from typing import Protocol

from capsem.guest.files import Refused
from capsem.hypervisor.sim import plan
from capsem.hypervisor.sim.host import complaints
from capsem.hypervisor.sim.memory import Memory
from capsem.hypervisor.sim.plan import Dice
from capsem.hypervisor.sim.timers import Timers
from capsem.hypervisor.sim.volume import Disk, File, Files

MARK = "/.capsem-mark"
WORKSPACE = "/root"
FLUSH = 0.002  # seconds
SLOW_FLUSH = 5.0  # longer than a supervisor waits before a save
Then = Callable[[OSError | None], None]


class Board(Protocol):
    """What a guest can do to the machine that it runs in."""

    @property
    def struck(self) -> bool:
        """Whether its disk takes no writes any more."""

    def print(self, line: str) -> None:
        """A line on the console."""

    def stall(self) -> None:
        """The host's disk is full: stand still, until somebody makes the machine run again."""

    def ready(self) -> None:
        """The handshake is done: whatever brought the machine up is over."""

    def power_off(self) -> None:
        """Switch the machine off."""

    def panic(self) -> None:
        """The kernel is at its end."""


class FileSystem:
    """One per machine; what it knows by heart is in `memory`."""

    def __init__(self, memory: Memory, disk: Disk, board: Board, dice: Dice, timers: Timers) -> None:
        self._memory = memory
        self._disk = disk
        self._board = board
        self._dice = dice
        self._timers = timers
        self._frozen = False
        self._waiting: list[tuple[Files, Then]] = []  # for a thaw, or for room

    # -- what programs see

    def get(self, path: str) -> File:
        """Raises FileNotFoundError."""
        memory = self._memory
        found = memory.dirty[path] if path in memory.dirty else self._disk.files.get(path)
        if found is None:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)
        return found

    def put(self, path: str, file: File | None) -> None:
        """Write or remove a file: in the page cache."""
        self._memory.dirty[path] = file

    def names(self) -> list[str]:
        """All files there are, sorted."""
        files = {**self._disk.files, **self._memory.dirty}
        return sorted(path for path, file in files.items() if file is not None and path != MARK)

    # -- what reaches the disk

    def sync(self, then: Then, **files: File | None) -> None:
        """Write the page cache, and `files`; `then` gets None, or why that failed."""
        delay = SLOW_FLUSH if self._dice.strikes(plan.SLOW_FSYNC) else FLUSH
        self._timers.after(delay, lambda: self.write({**self._memory.dirty, **files}, then))

    def write(self, files: Files, then: Then) -> None:
        """Write to the disk, at once where it takes it."""
        if self._frozen:
            self._waiting.append((files, then))
            return
        try:
            self.write_now(files)
        except OSError as error:
            if error.errno == errno.ENOSPC:
                self._waiting.append((files, then))
                self._board.stall()
                return
            then(error)
        else:
            then(None)

    def write_now(self, files: Files) -> None:
        """Raises OSError: nothing was written."""
        memory = self._memory
        if self._board.struck:
            for line in complaints(memory.refused):
                self.complain(line)
            memory.refused += 1
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        if self._dice.strikes(plan.DISK_FULL):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        lying = self._dice.strikes(plan.LYING_FSYNC)
        self._disk.write(files, lying=lying)
        if not lying:
            self._disk.flush()
        for path, file in files.items():
            if path in memory.dirty and memory.dirty[path] is file:
                del memory.dirty[path]

    def freeze(self) -> None:
        """Writes wait from here on."""
        self._frozen = True

    def go_on(self) -> None:
        """Writes that wait are tried: after a thaw, or because there may be room."""
        self._frozen = False
        waiting, self._waiting = self._waiting, []
        for files, then in waiting:
            self.write(files, then)

    # -- the kernel's log, and whether all is well (guest.health)

    def complain(self, line: str) -> None:
        """A line of the kernel's, of level "error"."""
        self._memory.log.append(line)
        self._board.print(f"[{self._timers.now:12.6f}] {line}")

    def mark(self, mark: str | None, then: Then) -> None:
        """Leave the mark in memory and on the volume, and flush all."""
        self._memory.followed = len(self._memory.log)
        if mark is None:
            self.sync(then)
        else:
            self._memory.mark = mark
            self.sync(then, **{MARK: File(mark.encode(), 0o600)})

    def examine(self, mark: str | None) -> list[str]:
        """What is wrong with this machine, which was restored."""
        problems = []
        if mark is not None:
            file = self._disk.files.get(MARK)
            found = "" if file is None else file.data.decode("ascii", "replace")
            if not mark == self._memory.mark == found:
                problems.append(
                    f"memory and volume are not of one checkpoint: expected {mark[:12]}, memory has "
                    f"{self._memory.mark[:12] or 'none'}, volume {found[:12] or 'none'}"
                )
        try:
            self.write_now({MARK: File((mark or "resumed").encode(), 0o600)})
        except OSError as error:
            problems.append(f"the volume cannot be written: {error}")
        return problems + self._memory.log[self._memory.followed :]


def workspace_path(path: str) -> str:
    """The absolute path of a file of the workspace. Raises Refused."""
    if not path or "\0" in path:
        raise Refused("invalid_input", "the path is empty, too long or contains NUL")
    if ".." in path.split("/"):
        raise Refused("invalid_input", f"{path}: '..' is not allowed", "use a path inside /root")
    full = posixpath.normpath(posixpath.join(WORKSPACE, path))
    if full == WORKSPACE:
        raise Refused("invalid_input", f"{path}: is a directory")
    if not full.startswith(f"{WORKSPACE}/"):
        raise Refused("permission_denied", f"{path}: outside of {WORKSPACE}", "use a path inside /root")
    return full
