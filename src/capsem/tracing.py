"""What each process did when, for one operation of one client: `capsem --trace FILE`. Imports nothing of ours.

A piece of work is marked where it is done, and costs a look at a variable as long as nobody wants to know:

    with span("load devices"): ...

Who wants to know gives a *trace*, which takes events: the command line keeps its own in memory; service and supervisors
append theirs to one file in the run directory, a line of JSON each, so that what a process said stays when it ends. An
event is one of the Trace Event Format (chrome://tracing, ui.perfetto.dev). Times are microseconds of CLOCK_MONOTONIC,
which is one clock for all processes of a host; what a guest says of its own times is placed by who hears it.

A trace belongs to the context that `tracing` opens, with all tasks begun in it; a supervisor, which serves one VM, has
one for the whole process (`follow`). What others do with that VM meanwhile is in it, too.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from types import MappingProxyType
from typing import Any, Final

HEADER: Final = "Capsem-Trace"  # of a request: the id of the trace that it is part of
ID_LENGTH: Final = 32  # hexadecimal digits
LIMIT: Final = 16 * 1024 * 1024  # bytes that one process adds to a trace
_WORK, _INSTANT, NAMES = "X", "i", "M"  # phases of the format
_GUESTS: Final = 1 << 23  # added to a process's id for that of its guest: a process of its own in the picture

_NOTHING: Final[Mapping[str, object]] = MappingProxyType({})

Event = dict[str, Any]


class Trace:
    """Takes the events of one process, and hands them to `write`; `close` it."""

    def __init__(self, write: Callable[[Event], None], process: str, name: str = "") -> None:
        """`process` is how this one is called; `name` is what others need to join, such as the file."""
        self.name = name
        self.on_close: list[Callable[[], None]] = []
        self._write: Callable[[Event], None] | None = write
        self._pid = os.getpid()
        self._lanes: dict[tuple[int, int], int] = {}
        self._say("process_name", self._pid, 0, process)

    def add(
        self, name: str, began: int, ended: int, about: Mapping[str, object] = _NOTHING, *, guest: str | None = None
    ) -> None:
        """Something was done from `began` to `ended` (see `now`), by this process or by a guest of it."""
        if self._write is not None:
            pid, lane = self._place(guest)
            self._put(name, _WORK, began, pid, lane, about, dur=(ended - began) / 1000)

    def instant(self, name: str) -> None:
        """This process has come to a point that has a name."""
        if self._write is not None:
            pid, lane = self._place(None)
            self._put(name, _INSTANT, now(), pid, lane, _NOTHING, s="t")

    @property
    def open(self) -> bool:
        """Whether it takes more."""
        return self._write is not None

    def close(self) -> None:
        """Take nothing more."""
        self._write = None
        for call in self.on_close:
            call()
        self.on_close.clear()

    def _place(self, guest: str | None) -> tuple[int, int]:
        """Process and lane: work of one task follows upon or lies within other work of it, so each task is a lane."""
        if guest is not None:
            pid, key, name = self._pid + _GUESTS, 0, guest
        else:
            pid, (key, name) = self._pid, _worker()
        lane = self._lanes.get((pid, key))
        if lane is None:
            lane = self._lanes[pid, key] = len(self._lanes)
            self._say("thread_name", pid, lane, name)
            if guest is not None:
                self._say("process_name", pid, 0, name)
        return pid, lane

    def _say(self, what: str, pid: int, lane: int, name: str) -> None:
        self._put(what, NAMES, 0, pid, lane, {"name": name})

    def _put(
        self, name: str, phase: str, at: int, pid: int, lane: int, about: Mapping[str, object], **more: object
    ) -> None:
        if self._write is not None:
            event = {"name": name, "ph": phase, "ts": at / 1000, "pid": pid, "tid": lane, **more}
            self._write({**event, "args": dict(about)} if about else event)


def _worker() -> tuple[int, str]:
    """The task, else the thread, that does this: something that tells it from others, and its name."""
    asyncio = sys.modules.get("asyncio")  # the command line has no use for it, and no time
    if asyncio is not None:
        with contextlib.suppress(RuntimeError):
            task = asyncio.current_task()
            if task is not None:
                return id(task), task.get_name()
    thread = threading.current_thread()
    return thread.ident or 0, thread.name


_TRACE: ContextVar[Trace | None] = ContextVar("trace", default=None)
_of_process: Trace | None = None


def now() -> int:
    """Nanoseconds of CLOCK_MONOTONIC."""
    return time.monotonic_ns()


def active() -> Trace | None:
    """The trace that wants to know what is done here and now. A context outlives its trace in tasks that go on."""
    trace = _TRACE.get()
    return trace if trace is not None and trace.open else _of_process


@contextlib.contextmanager
def tracing(trace: Trace | None) -> Iterator[None]:
    """What is done inside goes into this trace, and into none with None; it is closed at the end."""
    token = _TRACE.set(trace)
    try:
        yield
    finally:
        _TRACE.reset(token)
        if trace is not None:
            trace.close()


def follow(trace: Trace | None) -> None:
    """What this process does from here on goes into this trace, and not into the one before."""
    global _of_process
    before, _of_process = _of_process, trace
    if before is not None:
        before.close()


def process_began() -> int:
    """When this process was started, to the hundredth of a second that the kernel keeps; see `now`."""
    with open("/proc/self/stat", "rb") as file:  # noqa: PTH123  pathlib takes longer to import than all of this
        ticks = int(file.read().rpartition(b")")[2].split()[19])
    ago = time.clock_gettime_ns(time.CLOCK_BOOTTIME) - ticks * 1_000_000_000 // os.sysconf("SC_CLK_TCK")
    return now() - ago


class span:  # noqa: N801  it is used as a statement
    """Mark a piece of work; what is known of it goes into `about`, also inside of it."""

    __slots__ = ("_began", "_trace", "about", "name")

    def __init__(self, name: str, **about: object) -> None:
        self.name = name
        self.about = about
        self._trace: Trace | None = None
        self._began = 0

    def __enter__(self) -> span:
        self._trace = active()
        if self._trace is not None:
            self._began = now()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_rest: object) -> None:
        if self._trace is not None:
            failed = {} if kind is None else {"failed": kind.__name__}
            self._trace.add(self.name, self._began, now(), {**self.about, **failed})


def to_file(path: str, process: str) -> Trace:
    """A trace that is appended to a file, whole lines at a time, by as many processes as like. Raises OSError."""
    fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    left = LIMIT

    def write(event: Event) -> None:
        nonlocal left
        line = json.dumps(event, separators=(",", ":")).encode() + b"\n"
        left -= len(line)
        if left >= 0:
            with contextlib.suppress(OSError):  # a full disk: the work matters, not the picture of it
                os.write(fd, line)

    trace = Trace(write, process, path)
    trace.on_close.append(lambda: os.close(fd))
    return trace


def is_id(text: str) -> bool:
    """Whether this can be the id of a trace, and a file's name."""
    return len(text) == ID_LENGTH and not set(text) - set("0123456789abcdef")
