"""The policy in force, which may be another one at any time: rules end, files are read again, hosts are allowed."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

from capsem.egress.facts import Subject, Verdict
from capsem.egress.policy import Policy


class LivePolicy:
    """A Judge. `now` gives the time in seconds since 1970. A change is one assignment: who judges sees the old policy or the
    new one."""

    def __init__(self, policy: Policy, now: Callable[[], float]) -> None:
        self._now = now
        self._changed: list[Callable[[], None]] = []
        self._policy = policy
        self._ends = _end(policy)

    @property
    def policy(self) -> Policy:
        """The policy, without rules that have ended."""
        if self._now() >= self._ends:
            self.replace(self._policy.at(self._now()))
        return self._policy

    @property
    def version(self) -> int:
        """How often it has changed."""
        return self._policy.version

    def judge(self, subject: Subject) -> Verdict:
        """See egress.parts.Judge."""
        return self.policy.judge(subject)

    def judge_name(self, host: str) -> Verdict:
        """See egress.parts.Judge."""
        return self.policy.judge_name(host)

    def replace(self, policy: Policy) -> None:
        """Another policy from here on; its version is the next one, whatever it was made with."""
        self._policy = replace(policy, version=self._policy.version + 1)
        self._ends = _end(policy)
        for changed in tuple(self._changed):
            changed()

    def on_change(self, changed: Callable[[], None]) -> Callable[[], None]:
        """Call `changed` after each change; returns what ends that."""
        self._changed.append(changed)
        return lambda: self._changed.remove(changed)


def _end(policy: Policy) -> float:
    ends = policy.ends()
    return math.inf if ends is None else ends
