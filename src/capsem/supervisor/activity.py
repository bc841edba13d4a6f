"""For how long has nobody used this VM?"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from capsem.system import Clock


class Activity:
    """Counts what goes on."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._going = 0
        self._since = clock.monotonic()

    def begin(self) -> None:
        """Something begins; `end` goes with it."""
        self._going += 1

    def end(self) -> None:
        """It is over."""
        self._going -= 1
        self._since = self._clock.monotonic()

    @contextlib.contextmanager
    def going_on(self) -> Iterator[None]:
        """Something goes on inside."""
        self.begin()
        try:
            yield
        finally:
            self.end()

    @property
    def idle(self) -> float:
        """Seconds since the last thing ended, or since the beginning; 0 while something goes on."""
        return 0.0 if self._going else self._clock.monotonic() - self._since
