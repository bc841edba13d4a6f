"""What may leave a VM: rules in layers, compiled into an index, and a verdict on each subject.

    floor > corporate > VM > user > preset        an upper layer beats a lower one,
    deny > ask > allow                            and this is the order within one; what no rule is about is denied.

An allowing rule may say that it `answers`: then it stands above those of its layer that ask.

The floor is about addresses: private ones, the host's own and the like are denied whatever a name's rule says. There are
two ways past it: a rule of the corporate or the VM's layer with a range (`cidr`) that holds the address; and, for names
alone and never for this host or its metadata, `resolve_allow`, for networks whose gateway gives names reserved addresses.

A subject that is not complete yet (see `rules`) is allowed if some completion of it is, asked about if every completion is
at least asked about, and denied if none can be allowed. So nothing goes out for what is denied anyway, and what is judged
early is judged again with all that is known.

Pure: no clock, no I/O. `at` gives the policy without the rules that have ended. What the rules say of the last subjects is kept:
a connection asks the same again for each request. The floor is asked each time, for what is this host's own may change.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from functools import lru_cache
from ipaddress import IPv4Address, IPv6Address, ip_address
from typing import Final, NamedTuple

from capsem.egress.facts import Action, Layer, Protocol, Subject, Verdict
from capsem.egress.rules import ANY_HOST, ANY_PORT, MAYBE, NO, Network, Rule, host_matches

Address = IPv4Address | IPv6Address
_parsed: Final = lru_cache(maxsize=4096)(ip_address)  # the same few addresses are judged at every request

KEPT: Final = 256  # subjects
_LONGEST: Final = 1024  # characters of a path of theirs

PAST_THE_FLOOR: Final = frozenset({Layer.CORPORATE, Layer.VM})
NO_RULE: Final = "default"
WEB_PORTS: Final = (80, 443)  # what is meant where a host alone is allowed


class FloorHit(NamedTuple):
    """Why an address is denied, as the end of a sentence: "10.0.0.1 is ...". `excusable`: `resolve_allow` may excuse it."""

    reason: str
    excusable: bool = False


Floor = Callable[[Address], FloorHit | None]


class ResolveAllow(NamedTuple):
    """Ranges into which names may resolve although the floor denies them."""

    hosts: tuple[str, ...]
    cidrs: tuple[Network, ...]


@dataclass(frozen=True)
class Policy:
    """The rules of one VM. `floor` is handed in; `vm` is named in remedies; `version` counts reloads.

    `otherwise`: what becomes of a subject that no rule is about, DENY or ASK. `learning`: all that neither the floor nor a
    rule denies is let through.
    """

    rules: tuple[Rule, ...] = ()
    floor: Floor = field(default=lambda _address: None, compare=False)
    resolve_allow: tuple[ResolveAllow, ...] = ()
    otherwise: Action = Action.DENY
    vm: str = "VM"
    version: int = 0
    learning: bool = False
    _index: _Index = field(init=False, repr=False, compare=False)
    _kept: Callable[[Subject], Verdict] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_index", _Index(self.rules))
        object.__setattr__(self, "_kept", lru_cache(maxsize=KEPT)(self._by_rules))

    def judge(self, subject: Subject) -> Verdict:
        """The verdict on a subject. The floor is judged if it has an address."""
        address = None if subject.address is None else _parsed(subject.address)
        if (
            address is not None
            and (hit := self.floor(address)) is not None
            and not self._excused(subject, address, hit)
        ):
            leads = f"{subject.host} leads to {address}" if subject.host else str(address)
            return self._verdict(subject, Action.DENY, "floor", Layer.FLOOR, f"{leads}, which is {hit.reason}")
        return self._kept(subject) if len(subject.path or "") <= _LONGEST else self._by_rules(subject)

    def _by_rules(self, subject: Subject) -> Verdict:
        address = None if subject.address is None else _parsed(subject.address)
        verdict = self._first(subject, self._index.about(subject, address))
        if self.learning and (verdict.action is Action.ASK or verdict.layer is Layer.DEFAULT):
            reason = f"learning: {verdict.reason}"
            return replace(verdict, action=Action.ALLOW, reason=reason, protocol=subject.protocol, remedy=None)
        return verdict

    def judge_name(self, host: str) -> Verdict:
        """The verdict on a name that is looked up: nothing else of what will follow is known."""
        return self.judge(Subject(port=ANY_PORT, host=host))

    def ends(self) -> float | None:
        """When the next rule ends, in seconds since 1970; None if none does."""
        return min((rule.until for rule in self.rules if rule.until is not None), default=None)

    def at(self, now: float) -> Policy:
        """The policy without the rules that have ended by `now`; itself if there are none."""
        kept = tuple(rule for rule in self.rules if rule.until is None or rule.until > now)
        return self if len(kept) == len(self.rules) else replace(self, rules=kept, version=self.version + 1)

    def _excused(self, subject: Subject, address: Address, hit: FloorHit) -> bool:
        for rule in self._index.in_range(address):
            # By number, or by whatever name: that the name may be used is for the layers to say.
            if (
                rule.layer in PAST_THE_FLOOR
                and rule.action is not Action.DENY
                and (not rule.hosts or any(host_matches(host, subject.host or "") for host in rule.hosts))
                and rule.fits(subject, in_range=True) is not NO
            ):
                return True
        if not hit.excusable or subject.host is None:
            return False
        return any(
            any(host_matches(host, subject.host) for host in each.hosts)
            and any(address in network for network in each.cidrs)
            for each in self.resolve_allow
        )

    def _first(self, subject: Subject, candidates: Iterable[tuple[Rule, bool]]) -> Verdict:
        asks: Rule | None = None  # the strongest that asks, if what is not known yet turns out so
        unseen: Rule | None = None  # is against passing through, or would have to see requests to judge them
        for rule, in_range in candidates:
            match = rule.fits(subject, in_range=in_range)
            if match is NO:
                continue
            if match is MAYBE and rule.action is not Action.ALLOW:
                if rule.action is Action.ASK:
                    asks = asks or rule
                if rule.judges_requests or rule.protocol is Protocol.PASSTHROUGH:
                    unseen = unseen or rule
                continue
            if asks is not None and rule.action is not Action.ALLOW:
                break
            if unseen and rule.protocol is Protocol.PASSTHROUGH and subject.port != ANY_PORT:
                return self._verdict(
                    subject,
                    Action.DENY,
                    unseen.name,
                    unseen.layer,
                    f"rule {rule.name} would pass {_what(subject)} through, and rule {unseen.name} of the {unseen.layer} "
                    f"layer {'has to see each request' if unseen.judges_requests else 'is against that'}",
                )
            return self._of(rule, subject, go_on=match is MAYBE or asks is not None)
        if asks is not None:
            return self._of(asks, subject)
        return self._verdict(subject, self.otherwise, NO_RULE, Layer.DEFAULT, f"no rule is about {_what(subject)}")

    def _of(self, rule: Rule, subject: Subject, *, go_on: bool = False) -> Verdict:
        if rule.action is Action.ALLOW:
            return Verdict(
                Action.ALLOW,
                rule.name,
                rule.layer,
                f"rule {rule.name} of the {rule.layer} layer " + ("may allow it" if go_on else "allows it"),
                policy_version=self.version,
                protocol=rule.protocol or Protocol.HTTP,
                http2=rule.http2,
                certificate=rule.certificate,
                ech=rule.ech,
                model=rule.model,
            )
        verb = "denies" if rule.action is Action.DENY else "asks about"
        reason = f"rule {rule.name} of the {rule.layer} layer {verb} {_what(subject)}"
        return self._verdict(subject, rule.action, rule.name, rule.layer, reason, rule.protocol)

    def _verdict(
        self,
        subject: Subject,
        action: Action,
        rule: str,
        layer: Layer,
        reason: str,
        protocol: Protocol | None = None,
    ) -> Verdict:
        # Where the VM's own rule denies, one more that allows would not help: it is beaten.
        final = layer in {Layer.FLOOR, Layer.CORPORATE} or (layer is Layer.VM and action is Action.DENY)
        return Verdict(
            action,
            rule,
            layer,
            reason,
            policy_version=self.version,
            protocol=protocol or subject.protocol,
            remedy=None if final else f"capsem net allow {self.vm} {_destination(subject)}",
        )


def _destination(subject: Subject) -> str:
    """What to give to `capsem net allow`."""
    name = subject.host or subject.address or ""
    if subject.host is None and ":" in name:
        name = f"[{name}]"
    if subject.port in {ANY_PORT, *WEB_PORTS} and subject.protocol is not Protocol.TCP:
        return name
    return f"{name}:{subject.port}" + (" --tcp" if subject.protocol is Protocol.TCP else "")


def _what(subject: Subject) -> str:
    name = subject.host or subject.address or "an unknown host"
    where = name if subject.port == ANY_PORT else f"{name}:{subject.port}"
    if subject.method is not None:
        return f"{subject.method} {where}{subject.path or ''}"
    return where if subject.protocol is Protocol.HTTP else f"{subject.protocol} to {where}"


class _Index:
    """Rules by host and by range, each list from strong to weak."""

    def __init__(self, rules: Iterable[Rule]) -> None:
        self._exact: dict[str, list[tuple[int, Rule]]] = {}
        self._below: dict[str, list[tuple[int, Rule]]] = {}
        self._any: list[tuple[int, Rule]] = []
        self._ranges: dict[tuple[int, int], dict[int, list[tuple[int, Rule]]]] = {}
        self._denied_ranges: list[tuple[int, Rule]] = []
        for place, rule in enumerate(sorted(rules, key=lambda rule: rule.rank)):
            for host in rule.hosts:
                if host == ANY_HOST:
                    self._any.append((place, rule))
                elif host.startswith("*."):
                    self._below.setdefault(host[2:], []).append((place, rule))
                else:
                    self._exact.setdefault(host, []).append((place, rule))
            for each in rule.cidrs:
                by_prefix = self._ranges.setdefault((each.version, each.prefixlen), {})
                by_prefix.setdefault(int(each.network_address), []).append((place, rule))

    def about(self, subject: Subject, address: Address | None) -> list[tuple[Rule, bool]]:
        """The rules whose host or range fits, from strong to weak, each with whether `address` is in its range."""
        found: dict[int, Rule] = {}
        if (host := subject.host) is not None:
            found.update(self._any)
            found.update(self._exact.get(host, ()))
            if self._below:
                at = host.find(".")
                while at >= 0:
                    found.update(self._below.get(host[at + 1 :], ()))
                    at = host.find(".", at + 1)
        inside: set[int] = set()
        if address is not None and self._ranges:
            for place, rule in self._of_range(address):
                inside.add(place)
                # A range without a host allows what is asked for by number; it denies whatever leads there.
                if not rule.hosts and (host is None or rule.action is Action.DENY):
                    found[place] = rule
        if len(found) > 1:
            return [(found[place], place in inside) for place in sorted(found)]
        return [(rule, place in inside) for place, rule in found.items()]

    def in_range(self, address: Address) -> list[Rule]:
        """The rules that have a range with this address."""
        return [rule for _, rule in self._of_range(address)]

    def _of_range(self, address: Address) -> Iterable[tuple[int, Rule]]:
        number, bits = int(address), address.max_prefixlen
        for (version, prefix), by_prefix in self._ranges.items():
            if version == address.version:
                shift = bits - prefix
                yield from by_prefix.get(number >> shift << shift, ())
