"""The agent's event loop: descriptors, timers, and work on a thread for calls that block (fsync).

asyncio would do all of it, and cost a third of a second to import under emulation.
"""

from __future__ import annotations

import _thread
import heapq
import os
import select
import time

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

READ, WRITE = select.EPOLLIN, select.EPOLLOUT
_LONGEST_WAIT = 86400.0  # epoll takes at most 24 days
_KEPT = 2  # idle threads: to start one is dear in a machine that was just restored, where every step is a first one


class Timer:
    """A callback to come; `cancel` it."""

    __slots__ = ("callback", "due")

    def __init__(self, due: float, callback: Callable[[], object]) -> None:
        self.due = due
        self.callback: Callable[[], object] | None = callback

    def cancel(self) -> None:
        """The callback will not be made."""
        self.callback = None

    def __lt__(self, other: Timer) -> bool:
        return self.due < other.due


class Loop:
    """epoll, timers on the monotonic clock, and results from threads; callbacks run one at a time."""

    def __init__(self) -> None:
        self._epoll = select.epoll()
        self._handlers: dict[int, Callable[[int], None]] = {}
        self._timers: list[Timer] = []
        self._work: list[tuple[Callable[[], Any], Callable[[Any], None]]] = []
        self._idle: list[_thread.LockType] = []  # each what a thread waits for
        self._done: list[tuple[Callable[[Any], None], Any]] = []
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self.watch(self._wake, READ, self._collect)
        self.exit_status: int | None = None

    def watch(self, fd: int, events: int, handler: Callable[[int], None]) -> None:
        """Call `handler(events)` when a descriptor is ready; replaces an earlier watch of it."""
        if fd in self._handlers:
            self._epoll.modify(fd, events)
        else:
            self._epoll.register(fd, events)
        self._handlers[fd] = handler

    def unwatch(self, fd: int) -> None:
        """Stop watching; one that is not watched is no error."""
        if self._handlers.pop(fd, None) is not None:
            self._epoll.unregister(fd)

    def after(self, seconds: float, callback: Callable[[], object]) -> Timer:
        """Call `callback` once, that many seconds from now."""
        timer = Timer(time.monotonic() + seconds, callback)
        heapq.heappush(self._timers, timer)
        return timer

    def offload(self, work: Callable[[], Any], then: Callable[[Any], None]) -> None:
        """Run `work` on a thread; `then` gets its result, or the exception it raised, in the loop."""
        self._work.append((work, then))  # one more than there are threads awake for it
        if self._idle:
            self._idle.pop().release()
        else:
            _thread.start_new_thread(self._labour, ())

    def _labour(self) -> None:
        """A thread's life."""
        wanted = _thread.allocate_lock()
        wanted.acquire()
        while True:
            work, then = self._work.pop(0)
            try:
                result = work()
            except Exception as error:  # noqa: BLE001 - handed over, not swallowed
                result = error
            del work
            kept = len(self._idle) < _KEPT
            if kept:
                self._idle.append(wanted)
            self._done.append((then, result))
            os.eventfd_write(self._wake, 1)
            del then, result
            if not kept:
                return
            wanted.acquire()

    def exit(self, status: int) -> None:
        """Leave `run` after this callback."""
        self.exit_status = status

    def run(self, before_waiting: Callable[[], None]) -> int:
        """Serve until `exit`; `before_waiting` is called before each wait. Returns the exit status."""
        while self.exit_status is None:
            before_waiting()
            ready = [(fd, events, self._handlers.get(fd)) for fd, events in self._epoll.poll(self._next_due())]
            for fd, events, handler in ready:
                # One called before may have closed this descriptor, and its number may be another's by now.
                if handler is not None and handler is self._handlers.get(fd):
                    handler(events)
            self._run_due()
        before_waiting()
        return self.exit_status

    def _next_due(self) -> float | None:
        while self._timers and self._timers[0].callback is None:
            heapq.heappop(self._timers)
        return min(max(0.0, self._timers[0].due - time.monotonic()), _LONGEST_WAIT) if self._timers else None

    def _run_due(self) -> None:
        now = time.monotonic()
        while self._timers and self._timers[0].due <= now:
            callback = heapq.heappop(self._timers).callback
            if callback is not None:
                callback()

    def _collect(self, _events: int) -> None:
        os.eventfd_read(self._wake)
        while self._done:
            then, result = self._done.pop(0)
            then(result)
