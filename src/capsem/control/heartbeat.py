"""The heartbeat of one guest: pings that carry the time, and what the lack of an answer says.

A guest follows the time of a ping when its own is off (guest/agent.py). So a ping goes out at once when the host has
slept or its clock was set: the guest, which noticed neither, is right again before its next command.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable

from capsem.control.guest import Guest
from capsem.model.errors import Interrupted, TimedOut
from capsem.system import Clock

PERIOD = 10.0  # seconds between pings, and until one counts as not answered
SILENCE = 30.0  # seconds without an answer until people are told
SLEPT = 1.0  # seconds that make a sleep of the host
STEPPED = 0.5  # seconds that make a step of its clock

log = logging.getLogger("capsem_process.heartbeat")


class Heartbeat:
    """Run it for as long as there is a guest. `on_change` is called when `silent` changes."""

    def __init__(self, guest: Guest, clock: Clock, on_change: Callable[[], None]) -> None:
        self.silent = False
        self._guest = guest
        self._clock = clock
        self._on_change = on_change
        self._answered = clock.monotonic()
        self._asleep, self._offset = self._apart()

    async def run(self) -> None:
        """Ping until the connection is lost."""
        while not self._guest.is_lost:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(PERIOD):
                    await self._clock.jumped()
            self._look()
            if not self._guest.is_ready:  # which is told in another way
                self._heard()
                continue
            try:
                await self._guest.ping(PERIOD)
                self._heard()
            except TimedOut:
                log.warning("no answer to a ping for %.0f s", PERIOD)
                if self._clock.monotonic() - self._answered >= SILENCE:
                    self._say(silent=True)
            except Interrupted:
                return

    def _apart(self) -> tuple[float, float]:
        """How long the host has slept since it was booted, and when that was by the wall clock."""
        boot_time = self._clock.boot_time()
        return boot_time - self._clock.monotonic(), self._clock.time() - boot_time

    def _look(self) -> None:
        """Log what happened to the host's clocks since the last look."""
        asleep, offset = self._apart()
        if asleep - self._asleep >= SLEPT:
            log.warning("the host slept %.0f s", asleep - self._asleep)
        if abs(offset - self._offset) >= STEPPED:
            log.warning("the host's clock was set %+.1f s", offset - self._offset)
        self._asleep, self._offset = asleep, offset

    def _heard(self) -> None:
        self._answered = self._clock.monotonic()
        self._say(silent=False)

    def _say(self, *, silent: bool) -> None:
        if silent != self.silent:
            self.silent = silent
            log.warning("the guest agent %s", "is silent" if silent else "answers again")
            self._on_change()
