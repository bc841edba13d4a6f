"""An event loop whose order of events comes from a seed, and whose time passes when nothing else can happen.

Each simulated process has a queue of its own: within one, callbacks come in the order that asyncio promises; between
two, in any order. What a process that is dead still had to do is not done, nor undone: nothing of it runs again, no
`finally` either. A callback belongs to the process in whose context it was made.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
import random
from collections import deque
from collections.abc import Callable, Coroutine
from contextvars import Context, ContextVar
from typing import Any, Protocol

LONGEST_THREAD = 0.02  # seconds


class Owner(Protocol):
    """A process, as the loop sees it."""

    dead: bool

    def bury(self) -> None:
        """It died in the callback that has just ended."""


current: ContextVar[Owner | None] = ContextVar("process", default=None)


class Stuck(AssertionError):
    """Nothing will ever happen again, and somebody waits for it."""


class SimLoop(asyncio.BaseEventLoop):
    """See the module. Has no sockets, pipes or threads."""

    def __init__(self, dice: random.Random) -> None:
        super().__init__()
        self._dice = dice
        self._now = 0.0
        self._timers: list[tuple[float, int, asyncio.TimerHandle]] = []  # of one instant: in the order of their numbers
        self._numbers = itertools.count()
        self._queues: dict[Owner | None, deque[asyncio.Handle]] = {}
        self._able: list[Owner | None] = []  # those with something to do
        self._asleep: set[Owner] = set()
        self.remains: list[object] = []  # of processes: what nobody held any more would be finalized, dead or not
        self.steps = 0

    def time(self) -> float:
        """Seconds of virtual time."""
        return self._now

    def create_task(self, coro: Coroutine[Any, Any, Any], **options: Any) -> asyncio.Task[Any]:  # type: ignore[override]
        """See asyncio.AbstractEventLoop. Whose process dies must not have its `finally` run, so the task stays."""
        task: asyncio.Task[Any] = super().create_task(coro, **options)
        self.remains.append(task)
        return task

    def call_at(  # type: ignore[override]
        self, when: float, callback: Callable[..., object], *args: Any, context: Context | None = None
    ) -> asyncio.TimerHandle:
        """See asyncio.AbstractEventLoop."""
        timer = asyncio.TimerHandle(when, callback, args, self, context)
        heapq.heappush(self._timers, (when, next(self._numbers), timer))
        return timer

    def _call_soon(self, callback: Callable[..., object], args: Any, context: Context | None) -> asyncio.Handle:
        handle = asyncio.Handle(callback, args, self, context)
        self._put(handle)
        return handle

    def _put(self, handle: asyncio.Handle) -> None:
        owner: Owner | None = handle._context.get(current)  # type: ignore[attr-defined]  # noqa: SLF001 - asyncio has no other word for whose it is
        if owner is not None and owner.dead:
            self.remains.append(handle)
            return
        queue = self._queues.get(owner)
        if queue is None:
            queue = self._queues[owner] = deque()
        if not queue and owner not in self._asleep:
            self._able.append(owner)
        queue.append(handle)

    def _run_once(self) -> None:
        self._advance(to_next=not self._able)
        if not self._able:
            return
        at = self._dice.randrange(len(self._able)) if len(self._able) > 1 else 0
        owner = self._able[at]
        queue = self._queues[owner]
        handle = queue.popleft()
        if not queue:
            del self._able[at]
        if not handle.cancelled():
            self.steps += 1
            handle._run()  # noqa: SLF001
            if owner is not None and owner.dead:
                self.remains.append(handle)
                owner.bury()

    def _advance(self, *, to_next: bool) -> None:
        """Hand out the timers that are due, those of the next instant at which there are any if so asked."""
        timers = self._timers
        while timers and timers[0][-1].cancelled():
            heapq.heappop(timers)
        if to_next:
            if not timers:
                raise Stuck("nothing will ever happen again")
            self._now = max(self._now, timers[0][0])
        while timers and timers[0][0] <= self._now:
            *_, timer = heapq.heappop(timers)
            if not timer.cancelled():
                self._put(timer)

    def forget(self, owner: Owner) -> None:
        """A process has died: what it had to do stays undone."""
        self.remains.extend(self._queues.pop(owner, ()))
        if owner in self._able:
            self._able.remove(owner)
        self._asleep.discard(owner)

    def stop_process(self, owner: Owner) -> None:
        """As SIGSTOP does."""
        self._asleep.add(owner)
        if owner in self._able:
            self._able.remove(owner)

    def continue_process(self, owner: Owner) -> None:
        """As SIGCONT does."""
        if owner in self._asleep:
            self._asleep.discard(owner)
            if self._queues.get(owner):
                self._able.append(owner)

    def run_in_executor(self, executor: Any, func: Callable[..., Any], *args: Any) -> asyncio.Future[Any]:  # type: ignore[override]
        """A thread: it takes a while, and what it does is done at one instant of that."""
        future: asyncio.Future[Any] = self.create_future()

        def work() -> None:
            try:
                result = func(*args)
            except Exception as error:  # noqa: BLE001 - handed to whoever waits for it
                if not future.cancelled():
                    future.set_exception(error)
            else:
                if not future.cancelled():
                    future.set_result(result)

        self.call_later(self._dice.random() * LONGEST_THREAD, work)
        return future

    def _process_events(self, event_list: object) -> None:
        """There are none."""

    def _write_to_self(self) -> None:
        """Nobody sleeps in a system call."""
