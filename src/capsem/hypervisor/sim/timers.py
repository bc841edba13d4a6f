"""The guest's own time: it passes while the machine runs, and its alarms wait while it does not."""

from __future__ import annotations

import asyncio
import heapq
import itertools
from collections.abc import Callable


class Alarm:
    """A call to come; `cancel` it."""

    __slots__ = ("callback", "due", "order")

    def __init__(self, due: float, order: int, callback: Callable[[], None]) -> None:
        self.due = due
        self.order = order
        self.callback: Callable[[], None] | None = callback

    def cancel(self) -> None:
        """The call will not be made."""
        self.callback = None

    def __lt__(self, other: Alarm) -> bool:
        return (self.due, self.order) < (other.due, other.order)


class Timers:
    """Alarms on the running event loop's clock, less the time that the machine stood still."""

    def __init__(self, uptime: float) -> None:
        """`uptime`: what `now` begins with, in seconds."""
        self._base = uptime
        self._since: float | None = None
        self._alarms: list[Alarm] = []
        self._order = itertools.count()
        self._handle: asyncio.TimerHandle | None = None

    @property
    def running(self) -> bool:
        """Whether time passes."""
        return self._since is not None

    @property
    def now(self) -> float:
        """Seconds of guest time."""
        return self._base + (asyncio.get_running_loop().time() - self._since if self._since is not None else 0.0)

    def run(self) -> None:
        """Time passes from here on."""
        if self._since is None:
            self._since = asyncio.get_running_loop().time()
            self._arm()

    def pause(self) -> None:
        """Time stands still."""
        self._base, self._since = self.now, None
        self._arm()

    def after(self, seconds: float, callback: Callable[[], None]) -> Alarm:
        """Call once, that many seconds from now."""
        return self.at(self.now + seconds, callback)

    def at(self, due: float, callback: Callable[[], None]) -> Alarm:
        """Call once, at that time or, if it has passed, soon."""
        alarm = Alarm(due, next(self._order), callback)
        heapq.heappush(self._alarms, alarm)
        self._arm()
        return alarm

    def _arm(self) -> None:
        if self._handle is not None:
            self._handle.cancel()
            self._handle = None
        while self._alarms and self._alarms[0].callback is None:
            heapq.heappop(self._alarms)
        if self._alarms and self._since is not None:
            delay = max(0.0, self._alarms[0].due - self.now)
            self._handle = asyncio.get_running_loop().call_later(delay, self._ring)

    def _ring(self) -> None:
        # One at a time: what it does may stop the clock.
        self._handle = None
        while self._alarms and self._alarms[0].callback is None:
            heapq.heappop(self._alarms)
        if self._alarms and self._since is not None:
            callback = heapq.heappop(self._alarms).callback
            assert callback is not None
            callback()
        self._arm()
