"""Requests that a rule wants somebody to be asked about: held, told to those who listen, and answered by them.

Without a listener an ask is a denial at once. What asks for the same host, port and protocol is one ask, however many
connections wait for it. An answer that is for once holds for a while: a client opens several connections, and each of them
is judged several times.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Final, Protocol

from capsem.egress.facts import Action, Subject, Verdict

HELD: Final = 60.0  # seconds
ONCE: Final = 60.0  # seconds that an answer for once holds
MOST_HELD: Final = 64

Key = tuple[str | None, int, str]


@dataclass(frozen=True, slots=True)
class Ask:
    """What is asked, for those who listen. `since` is in seconds since 1970."""

    id: str
    subject: Subject
    verdict: Verdict
    since: float


class Listener(Protocol):
    """Somebody who could answer."""

    def held(self, ask: Ask) -> None:
        """Something waits."""

    def over(self, ask: Ask, outcome: str) -> None:
        """It waits no more: "allowed", "denied", or "unanswered"."""


@dataclass(slots=True)
class _Waiting:
    """`answer`: whether it is allowed, or why there is none."""

    ask: Ask
    answer: asyncio.Future[bool | str] = field(default_factory=lambda: asyncio.get_running_loop().create_future())
    waiters: int = 0


class Asks:
    """An egress.parts.Asker. `now` gives the time in seconds since 1970; `judge` is the policy, to look again when it has
    changed (`changed`)."""

    def __init__(self, judge: Callable[[Subject], Verdict], now: Callable[[], float], held: float = HELD) -> None:
        self._judge = judge
        self._now = now
        self._limit = held
        self._listeners: list[Listener] = []
        self._waiting: dict[Key, _Waiting] = {}
        self._once: dict[Key, tuple[bool, float]] = {}
        self._ids = itertools.count(1)

    async def ask(self, subject: Subject, verdict: Verdict) -> Verdict:
        """See egress.parts.Asker."""
        key = _key(subject)
        answered, until = self._once.get(key, (False, 0.0))
        if self._now() < until:
            return _answered(verdict, answered)
        if not self._listeners:
            return _refused(verdict, "nobody is there to be asked (capsem net asks)")
        waiting = self._waiting.get(key)
        if waiting is None:
            if len(self._waiting) >= MOST_HELD:
                return _refused(verdict, f"{MOST_HELD} other requests wait for an answer already")
            waiting = self._waiting[key] = _Waiting(Ask(str(next(self._ids)), subject, verdict, self._now()))
            for listener in tuple(self._listeners):
                listener.held(waiting.ask)
        waiting.waiters += 1
        try:
            async with asyncio.timeout(self._limit):
                await asyncio.wait((waiting.answer,))
        except TimeoutError:
            self._end(key, f"nobody answered within {self._limit:.0f} s")
        finally:
            waiting.waiters -= 1
            if not waiting.waiters and self._waiting.get(key) is waiting:
                self._end(key, "nobody waits for it any more")
        answer = waiting.answer.result()
        # What was allowed for longer is a rule by now; it may have more to say than that.
        judged = self._judge(subject)
        if judged.action is not Action.ASK:
            return judged
        return _refused(verdict, answer) if isinstance(answer, str) else _answered(verdict, answer)

    def waiting(self) -> list[Ask]:
        """What waits for an answer, oldest first."""
        return [each.ask for each in self._waiting.values()]

    def answer(self, ask_id: str | None, host: str | None, *, allow: bool) -> int:
        """Answer one ask, or all about a host, for once; returns how many there were."""
        found = [
            key
            for key, each in self._waiting.items()
            if ask_id == each.ask.id or (host is not None and host in {each.ask.subject.host, each.ask.subject.address})
        ]
        for key in found:
            self._once[key] = (allow, self._now() + ONCE)
            self._end(key, allow)
        return len(found)

    def changed(self) -> None:
        """The policy is another one: what it decides by now needs no answer."""
        self._once = {key: kept for key, kept in self._once.items() if self._now() < kept[1]}
        for key, each in tuple(self._waiting.items()):
            verdict = self._judge(each.ask.subject)
            if verdict.action is not Action.ASK:
                self._end(key, verdict.action is Action.ALLOW)

    def listen(self, listener: Listener) -> Callable[[], None]:
        """Tell `listener` what waits now and later; returns what ends that."""
        self._listeners.append(listener)
        for each in self._waiting.values():
            listener.held(each.ask)

        def leave() -> None:
            self._listeners.remove(listener)
            if not self._listeners:
                for key in tuple(self._waiting):
                    self._end(key, "whoever was asked is gone")

        return leave

    @property
    def listeners(self) -> int:
        """How many listen."""
        return len(self._listeners)

    def _end(self, key: Key, answer: bool | str) -> None:
        waiting = self._waiting.pop(key, None)
        if waiting is None:
            return
        waiting.answer.set_result(answer)
        outcome = "unanswered" if isinstance(answer, str) else "allowed" if answer else "denied"
        for listener in tuple(self._listeners):
            listener.over(waiting.ask, outcome)


def _key(subject: Subject) -> Key:
    return subject.host or subject.address, subject.port, str(subject.protocol)


def _answered(verdict: Verdict, allowed: bool) -> Verdict:
    action, word = (Action.ALLOW, "allowed") if allowed else (Action.DENY, "denied")
    return replace(verdict, action=action, reason=f"{verdict.reason}, and it was {word} for once")


def _refused(verdict: Verdict, why: str) -> Verdict:
    return replace(verdict, action=Action.DENY, reason=f"{verdict.reason}, and {why}")
