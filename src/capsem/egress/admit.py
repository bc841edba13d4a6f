"""Whether something may pass, and where to: the verdict on it, and the verdict on every address that its name has."""

from __future__ import annotations

from dataclasses import dataclass, replace

from capsem.egress.facts import Action, Subject, Verdict
from capsem.egress.parts import Asker, Judge
from capsem.egress.resolve import NotFound, Resolver


class Denied(Exception):
    """It may not pass: `verdict` says why."""

    def __init__(self, subject: Subject, verdict: Verdict) -> None:
        super().__init__(verdict.reason)
        self.subject = subject
        self.verdict = verdict


@dataclass(frozen=True, slots=True)
class Admitted:
    """The verdict that lets something pass. `asked`: because somebody said so."""

    verdict: Verdict
    asked: bool = False


class Admission:
    """Asks the judge, whoever has to be asked, and the resolver; in this order, so that a name is not looked up before it is
    allowed. `judge` may be replaced.
    """

    def __init__(self, judge: Judge, asker: Asker | None, resolver: Resolver) -> None:
        self.judge = judge
        self._asker = asker
        self._resolver = resolver

    async def admit(self, subject: Subject) -> Admitted:
        """Let it pass, as far as its name goes. Raises Denied."""
        verdict = self.judge.judge(subject)
        if verdict.action is Action.ALLOW:
            return Admitted(verdict)
        return Admitted(await self._ask(subject, verdict), asked=True)

    async def _ask(self, subject: Subject, verdict: Verdict) -> Verdict:
        if verdict.action is Action.ASK:
            answer = (
                replace(verdict, action=Action.DENY) if self._asker is None else await self._asker.ask(subject, verdict)
            )
            if answer.action is Action.ALLOW:
                return answer
            verdict = answer
        raise Denied(subject, verdict)

    async def route(self, subject: Subject, admitted: Admitted, *, elsewhere: bool) -> list[str]:
        """The addresses to dial, every one of them checked. `admitted` is the name's. `elsewhere`: a proxy of the host's
        looks names up, so that a name unknown here is no error, and the list may be empty. Raises Denied, NotFound."""
        if subject.host is None:
            found = [subject.address] if subject.address is not None else []
        else:
            try:
                found = await self._resolver.addresses(subject.host)
            except NotFound:
                if not elsewhere:
                    raise
                found = []
        for address in found:
            admitted = await self.check(subject, admitted, address)
        return found

    async def check(self, subject: Subject, admitted: Admitted, address: str) -> Admitted:
        """Let it pass to that address. Raises Denied."""
        there = replace(subject, address=address)
        verdict = self.judge.judge(there)
        if verdict.action is Action.ALLOW:
            return admitted
        # What was asked about the name is not asked again about its address.
        if verdict.action is Action.ASK and admitted.asked:
            return admitted
        return Admitted(await self._ask(there, verdict), asked=True)
