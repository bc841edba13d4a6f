"""What a guest's questions of DNS are answered: policy comes first, so that a name that is not allowed never leaves the host.

An allowed name gets its real addresses; one that a rule denies does not exist; any other gets an address made here, which leads
to the page that says why. There is no IPv6 in the guest, and nothing but addresses is answered.
"""

from __future__ import annotations

import asyncio
from ipaddress import IPv4Address, IPv4Network
from typing import Final

from capsem.egress import hosts
from capsem.egress.dns import BadQuery, Code, Kind, Query, answer, parse
from capsem.egress.door import Door
from capsem.egress.events import DnsEvent
from capsem.egress.facts import Action, Layer, Subject, Verdict
from capsem.egress.names import NameTable
from capsem.egress.resolve import NotFound, Resolver
from capsem.egress.rules import ANY_PORT

RATE: Final = 20.0  # questions a second
BURST: Final = 60  # of them at once: a browser, or an installer, starts like that
_TTL: Final = 30  # seconds; the host's resolver, which knows better, does not tell
_NOTHING: Final = frozenset(
    {Kind.AAAA, Kind.HTTPS, Kind.SVCB}
)  # truly nothing of that kind here, rather than a refusal

# Where a guest finds itself, whatever the host has there (a server of its own, which a rule may allow).
_GUESTS_OWN: Final = tuple(map(IPv4Network, ("0.0.0.0/8", "127.0.0.0/8", "10.0.0.1/32")))


class Lookups:
    """Answers the questions of one VM."""

    def __init__(self, door: Door, resolver: Resolver, names: NameTable) -> None:
        self._door = door
        self._resolver = resolver
        self._names = names
        self._left = float(BURST)
        self._at: float | None = None

    async def answer(self, data: bytes, process: str | None = None) -> bytes:
        """The answer to a datagram; b"" where there is none to give."""
        try:
            query = parse(data)
        except BadQuery as error:
            return error.reply
        if not self._may_ask():
            # Not recorded: the record is as bounded as the answers.
            return answer(query, Code.SERVFAIL)
        clock = self._door.clock
        event = DnsEvent(clock.time(), query.name, query.kind_name, "error", process_name=process)
        started = clock.monotonic()
        try:
            return await self._answer(query, event)
        finally:
            event.duration = clock.monotonic() - started
            self._door.recorder.dns(event)

    def _may_ask(self) -> bool:
        now = asyncio.get_running_loop().time()
        if self._at is not None:
            self._left = min(float(BURST), self._left + (now - self._at) * RATE)
        self._at = now
        if self._left < 1:
            return False
        self._left -= 1
        return True

    async def _answer(self, query: Query, event: DnsEvent) -> bytes:
        name = hosts.host_name(query.name)
        if name is None:
            event.decision, event.answer = "denied", "NXDOMAIN"
            return answer(query, Code.NXDOMAIN)
        if query.kind != Kind.A and query.kind not in _NOTHING:
            event.decision, event.answer = "denied", "REFUSED"
            return answer(query, Code.REFUSED)
        verdict = self._door.admission.judge.judge_name(name)
        event.matched_rule, event.rule_layer = verdict.rule, verdict.layer.value
        event.policy_version = verdict.policy_version
        if verdict.action is Action.DENY and verdict.layer is not Layer.DEFAULT:
            event.decision, event.answer = "denied", "NXDOMAIN"
            return answer(query, Code.NXDOMAIN)
        if query.kind != Kind.A:
            event.decision = "allowed" if verdict.action is Action.ALLOW else "synthetic"
            return answer(query, Code.OK)
        if verdict.action is not Action.ALLOW:
            event.decision = "synthetic"
            return self._give(query, event, [self._names.synthetic(name)])
        return await self._resolve(query, name, verdict, event)

    async def _resolve(self, query: Query, name: str, verdict: Verdict, event: DnsEvent) -> bytes:
        event.decision = "allowed"
        try:
            found = await self._resolver.addresses(name)
        except NotFound as error:
            if self._door.dialer.looks_names_up(name):
                return self._give(query, event, [self._names.synthetic(name)])
            event.decision, event.answer = "error", f"{'NXDOMAIN' if error.final else 'SERVFAIL'}: {error}"
            return answer(query, Code.NXDOMAIN if error.final else Code.SERVFAIL)
        judge = self._door.admission.judge
        usable = [
            each
            for each in found
            if ":" not in each
            and not any(IPv4Address(each) in network for network in _GUESTS_OWN)
            and judge.judge(Subject(ANY_PORT, name, each)).action is not Action.DENY
        ]
        # An address of the host's own network means another machine, or none, to a guest; and IPv6 it has not.
        return self._give(query, event, usable or [self._names.synthetic(name)])

    def _give(self, query: Query, event: DnsEvent, addresses: list[str]) -> bytes:
        name = hosts.host_name(query.name)
        assert name is not None
        self._names.learn(name, addresses)
        event.answer = ", ".join(addresses)
        return answer(query, Code.OK, addresses, _TTL)
