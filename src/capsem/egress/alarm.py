"""A timer that is put off again and again, and hardly ever rings: asyncio's own costs as much to put off as to make."""

from __future__ import annotations

import asyncio
from collections.abc import Callable


class Alarm:
    """Calls `ring` once it is time, unless it was told otherwise meanwhile. What asyncio is asked for is left as it is where
    that is early enough: then it looks whether the time has come."""

    def __init__(self, ring: Callable[[], None]) -> None:
        self._loop = asyncio.get_running_loop()
        self._ring = ring
        self._due: float | None = None
        self._timer: asyncio.TimerHandle | None = None

    def set(self, seconds: float) -> None:
        """Ring after that, and not when it was to be before."""
        self._due = due = self._loop.time() + seconds
        if self._timer is not None and due < self._timer.when():
            self._timer.cancel()
            self._timer = None
        if self._timer is None:
            self._timer = self._loop.call_at(due, self._look)

    def hurry(self, seconds: float) -> None:
        """Ring after that at the latest."""
        if self._due is None or self._loop.time() + seconds < self._due:
            self.set(seconds)

    def off(self) -> None:
        """Do not ring."""
        self._due = None

    def close(self) -> None:
        """Never again."""
        self._due = None
        if self._timer is not None:
            self._timer.cancel()

    def _look(self) -> None:
        self._timer = None
        if self._due is None:
            return
        if self._loop.time() < self._due:
            self._timer = self._loop.call_at(self._due, self._look)
        else:
            self._due = None
            self._ring()
