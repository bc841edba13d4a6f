"""Processes of the simulated host.

What a killed process leaves is what the kernel would leave: its files as they are, its locks free, its connections
closed, its machine dead. Python cannot abandon a function half-way, so one that is killed in the middle of a callback
is unwound by an exception that no `except Exception` sees; all that its `finally` clauses could do to the world from
there on is refused (see `Guard`).
"""

from __future__ import annotations

import asyncio
import errno
import os
import sys
from collections.abc import Callable, Coroutine
from contextvars import Context, copy_context
from pathlib import Path
from typing import Any, Final

from capsem.simulation.loop import SimLoop, current

KILLED: Final = -9


class Dead(BaseException):
    """The process that runs now was killed."""


class Process:
    """One of them. `ended` is its exit status, once it has one."""

    def __init__(self, loop: SimLoop, guard: Guard, pid: int, name: str) -> None:
        self.pid = pid
        self.name = name
        self.dead = False
        self.buried = False
        self.status: int | None = None
        self.ended = asyncio.Event()
        self.writes_left: int | None = None  # it is killed before so many more changes of files
        self.on_buried: list[Callable[[], None]] = []
        self._loop = loop
        self._guard = guard
        self._context = copy_context()
        self._context.run(current.set, self)

    def context(self) -> Context:
        """To run callbacks in."""
        return self._context.copy()

    def create_task(self, work: Coroutine[Any, Any, Any], name: str | None = None) -> asyncio.Task[Any]:
        """Have the process do something."""
        return self._loop.create_task(work, name=name, context=self.context())

    def exit(self, status: int) -> None:
        """It ends of its own: what it left running is not run."""
        if not self.dead:
            self.status = status
            self.dead = True

    def kill(self) -> None:
        """SIGKILL, from within or without."""
        if self.dead:
            return
        self.status = KILLED
        self.dead = True
        if current.get() is not self:
            self.bury()

    def bury(self) -> None:
        """What the kernel does; called by the loop, or by `kill`, when nothing of the process is on the stack."""
        if self.buried:
            return
        self.buried = True
        self._loop.forget(self)
        token = current.set(None)
        try:
            for each in self.on_buried:
                each()
            self._guard.release(self)
        finally:
            current.reset(token)
        self.ended.set()


_CHANGES: Final = frozenset(
    {
        "open",
        "os.remove",
        "os.rename",
        "os.mkdir",
        "os.rmdir",
        "os.truncate",
        "os.link",
        "os.symlink",
        "os.chmod",
        "os.utime",
    }
)
_GROWS: Final = frozenset({"open", "os.mkdir"})
_FOR_WRITING: Final = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC


class Guard:
    """Stands between the processes and the files, as an audit hook of the interpreter (which cannot be removed again).

    It sees every change of a file before it is made: there a process can be killed, told that the disk is full, and
    kept from doing anything once it is dead. And it knows which process took which lock.
    """

    def __init__(self) -> None:
        self.full = False
        self.changes = 0
        self._locks: dict[int, tuple[Process, tuple[int, int]]] = {}
        sys.addaudithook(self._hook)

    def _hook(self, event: str, args: tuple[Any, ...]) -> None:
        if event in _CHANGES:
            process = current.get()
            if isinstance(process, Process) and (event != "open" or args[2] & _FOR_WRITING):
                self._change(process, event, args)
        elif event == "fcntl.flock":
            process = current.get()
            if isinstance(process, Process):
                if process.dead:
                    raise Dead
                info = os.fstat(args[0])
                self._locks[args[0]] = process, (info.st_dev, info.st_ino)

    def _change(self, process: Process, event: str, args: tuple[Any, ...]) -> None:
        if process.dead:
            raise Dead
        self.changes += 1
        if process.writes_left is not None:
            process.writes_left -= 1
            if process.writes_left < 0:
                process.kill()
                raise Dead
        if self.full and event in _GROWS and not (event == "open" and _is_there(args[0])):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def release(self, process: Process) -> None:
        """The locks of a dead process are free."""
        for fd, (owner, identity) in list(self._locks.items()):
            if owner is process:
                del self._locks[fd]
                try:
                    info = os.fstat(fd)
                except OSError:
                    continue
                if (info.st_dev, info.st_ino) == identity:
                    os.close(fd)


def _is_there(path: Any) -> bool:
    return isinstance(path, int) or Path(path).exists()
