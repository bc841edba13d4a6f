"""The timer that is put off: on a loop whose clock is the test's."""

from __future__ import annotations

import asyncio
import heapq
from collections.abc import Callable
from typing import Any

import pytest

from capsem.egress.alarm import Alarm


class Clock:
    """What an alarm asks of an event loop."""

    def __init__(self) -> None:
        self.now = 0.0
        self.made = 0
        self._timers: list[tuple[float, int, asyncio.TimerHandle]] = []

    def time(self) -> float:
        return self.now

    def call_at(self, when: float, call: Callable[[], None]) -> asyncio.TimerHandle:
        self.made += 1
        handle = asyncio.TimerHandle(when, call, (), self)  # type: ignore[arg-type]
        heapq.heappush(self._timers, (when, self.made, handle))
        return handle

    def _timer_handle_cancelled(self, handle: asyncio.TimerHandle) -> None:
        """As asyncio has it."""

    def get_debug(self) -> bool:
        return False

    def until(self, now: float) -> None:
        while self._timers and self._timers[0][0] <= now:
            self.now, _, handle = heapq.heappop(self._timers)
            if not handle.cancelled():
                handle._run()
        self.now = now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(asyncio, "get_running_loop", lambda: made)
    return made


def alarm(clock: Clock) -> tuple[Alarm, list[float]]:
    rang: list[float] = []
    return Alarm(lambda: rang.append(clock.now)), rang


def test_it_rings_once_when_it_was_last_told_to(clock: Clock) -> None:
    it, rang = alarm(clock)
    it.set(10)
    clock.until(4)
    it.set(10)
    clock.until(13)
    assert rang == []
    clock.until(100)
    assert rang == [14]


def test_sooner_is_sooner_and_later_does_not_come_of_hurry(clock: Clock) -> None:
    it, rang = alarm(clock)
    it.set(100)
    it.hurry(5)
    clock.until(2)
    it.hurry(5)
    clock.until(200)
    assert rang == [5]
    it.set(10)
    it.set(1)
    clock.until(300)
    assert rang == [5, 201]


@pytest.mark.parametrize("silence", [Alarm.off, Alarm.close])
def test_it_can_be_kept_from_it(clock: Clock, silence: Any) -> None:
    it, rang = alarm(clock)
    it.set(1)
    silence(it)
    clock.until(10)
    assert rang == []


def test_putting_it_off_makes_nothing_new(clock: Clock) -> None:
    it, rang = alarm(clock)
    for turn in range(1000):
        it.set(10)
        it.off()
        it.set(100)
        clock.until(turn / 1000)
    assert clock.made == 1
    clock.until(1000)
    assert rang == [pytest.approx(100, abs=2)]
