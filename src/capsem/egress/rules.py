"""One rule of a policy: what it is about, and whether a subject is that.

A subject is judged several times on its way out, and more is known of it each time: its name when it is asked for, then the
port, the address that it was resolved to, the request. So a rule may fit (YES), not fit (NO), or fit depending on what is
not known yet (MAYBE).
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from enum import IntEnum
from functools import cached_property
from ipaddress import IPv4Network, IPv6Network, ip_network
from typing import Any, Final

from capsem.egress.facts import Action, Layer, Protocol, Subject
from capsem.egress.paths import PathPattern, readings

Network = IPv4Network | IPv6Network

LAYERS: Final = (Layer.CORPORATE, Layer.VM, Layer.USER, Layer.PRESET)  # from strong to weak, below the floor
_LAYER_RANK: Final = {layer: rank for rank, layer in enumerate(LAYERS)}
_ACTION_RANK: Final = {Action.DENY: 0, Action.ASK: 2, Action.ALLOW: 3}
_ANSWERS: Final = 1  # the rank of what allows although a rule of its layer asks

ANY_HOST: Final = "*"
ANY_PORT: Final = -1  # of a subject whose port is not known: a name that is being looked up
LONGEST_PATH: Final = 8 * 1024  # characters; what is longer is allowed by no rule about paths, and denied by any

_LABEL: Final = re.compile(r"(?!-)[a-z0-9_-]{1,63}(?<!-)\Z")
_NUMERIC: Final = re.compile(r"(?:\d+|0x[0-9a-f]*)\Z")


class Match(IntEnum):
    """Whether a rule fits a subject."""

    NO = 0
    MAYBE = 1
    YES = 2


NO, MAYBE, YES = Match.NO, Match.MAYBE, Match.YES


@dataclass(frozen=True)
class Rule:
    """What is allowed, denied or asked about. An empty tuple says nothing about that; there is at least a host or a range.

    `hosts`: lower-case names in punycode, "*.example.com" for all below (never example.com itself), "*" for every name.
    `cidrs` is about the address that is dialled, or was asked for by number. `protocol` None (of a denial only): all.
    `ech`: what is passed through may hide its true name. `model`: the API of models that is spoken there (see facts.Verdict).
    `answers`: it allows although a rule of its layer asks. `until`: when it ends, in seconds since 1970. `where` says where it
    was written, for people: "policy.toml, line 7".
    """

    name: str
    action: Action
    layer: Layer
    hosts: tuple[str, ...] = ()
    ports: tuple[int, ...] = ()
    methods: tuple[str, ...] = ()
    paths: tuple[PathPattern, ...] = ()
    cidrs: tuple[Network, ...] = ()
    protocol: Protocol | None = Protocol.HTTP
    http2: bool = False
    certificate: str | None = None
    ech: bool = False
    model: str | None = None
    answers: bool = False
    until: float | None = None
    where: str = field(default="", compare=False)

    @cached_property
    def rank(self) -> tuple[int, int, int]:
        """Where it stands: the smaller the stronger. Of what allows, what asks for more than HTTP comes first."""
        action = _ANSWERS if self.answers else _ACTION_RANK[self.action]
        return _LAYER_RANK[self.layer], action, int(self.protocol is Protocol.HTTP)

    @cached_property
    def judges_requests(self) -> bool:
        """Whether a method or a path decides: then nothing is known before there is a request."""
        return bool(self.methods or self.paths)

    @cached_property
    def _ports(self) -> frozenset[int]:
        return frozenset(self.ports)

    @cached_property
    def _methods(self) -> frozenset[str]:
        return frozenset(self.methods)

    def fits(self, subject: Subject, *, in_range: bool) -> Match:
        """Whether the rule is about `subject`, given that its name is one of `hosts` if there are any.

        `in_range`: `subject.address` is in one of `cidrs`.
        """
        result = YES
        if self._ports and subject.port not in self._ports:
            if subject.port != ANY_PORT:
                return NO
            result = MAYBE
        if self.cidrs and not in_range:
            if subject.address is not None or (not self.hosts and self.action is not Action.DENY):
                return NO
            result = MAYBE
        if (spoken := self.protocol) is not None:
            if subject.port == ANY_PORT:
                result = MAYBE
            elif spoken is Protocol.PASSTHROUGH:
                # What has a request is not passed through unseen.
                if subject.protocol is Protocol.TCP or subject.method is not None:
                    return NO
                if self.action is Action.DENY and subject.protocol is Protocol.HTTP:
                    result = MAYBE  # what may not be passed through may still be ended here
            elif spoken is not subject.protocol and not (
                spoken is Protocol.HTTP and subject.protocol is Protocol.PASSTHROUGH
            ):
                return NO
        if self.methods or self.paths:
            if subject.protocol is Protocol.TCP:
                return NO
            return min(result, self._request(subject))
        return result

    def _request(self, subject: Subject) -> Match:
        if subject.method is None:
            return MAYBE
        if self._methods and subject.method not in self._methods:
            return NO
        if not self.paths:
            return YES
        path = subject.path or ""
        denies = self.action is not Action.ALLOW
        if len(path) > LONGEST_PATH:
            return YES if denies else NO
        found = [
            any(pattern.matches(reading, second=number > 0) for pattern in self.paths)
            for number, reading in enumerate(readings(path))
        ]
        return YES if (any(found) if denies else all(found)) else NO

    def to_dict(self) -> dict[str, Any]:
        """What it says, in JSON's types; `from_dict` is the opposite."""
        said: dict[str, Any] = {"name": self.name, "action": str(self.action)}
        lists: dict[str, list[Any]] = {
            "host": list(self.hosts),
            "port": list(self.ports),
            "method": list(self.methods),
            "path": [pattern.text for pattern in self.paths],
            "cidr": [str(each) for each in self.cidrs],
        }
        said |= {key: values for key, values in lists.items() if values}
        if self.protocol not in {None, Protocol.HTTP}:
            said["protocol"] = str(self.protocol)
        elif self.protocol is Protocol.HTTP and self.action is Action.DENY:
            said["protocol"] = str(Protocol.HTTP)
        if self.http2:
            said["http2"] = True
        if self.certificate:
            said["client_certificate"] = self.certificate
        if self.ech:
            said["ech"] = True
        if self.model:
            said["model"] = self.model
        if self.answers:
            said["answers"] = True
        if self.until is not None:
            said["until"] = self.until
        return said


def host_pattern(text: str) -> str:
    """A host of a rule, in the form in which names are compared. Raises ValueError with what is wrong."""
    pattern = text.strip().lower()
    if pattern == ANY_HOST:
        return pattern
    pattern = pattern.removesuffix(".")
    bare = pattern.removeprefix("*.")
    if "*" in bare:
        raise ValueError(f"{text!r}: the only patterns are *.example.com and *")
    if ":" in bare or "/" in bare:
        raise ValueError(f"{text!r}: a name alone, without scheme, port or path")
    try:
        name = bare if bare.isascii() else bare.encode("idna").decode("ascii")
    except UnicodeError as exc:
        raise ValueError(f"{text!r} is no name of a host: {exc}") from None
    labels = name.split(".")
    if len(name) > 253 or not all(_LABEL.match(label) for label in labels):
        raise ValueError(f"{text!r} is no name of a host")
    if _NUMERIC.match(labels[-1]):
        raise ValueError(f"{text!r} is an address: a rule names those with cidr")
    return "*." + name if pattern.startswith("*.") else name


def network(text: str) -> Network:
    """An address range of a rule. Raises ValueError with what is wrong."""
    found = ip_network(text)
    if isinstance(found, IPv6Network) and found.network_address.ipv4_mapped is not None and found.prefixlen >= 96:
        raise ValueError(f"{text!r}: write the IPv4 range itself")
    return found


def host_matches(pattern: str, host: str) -> bool:
    """Whether a host is one of a pattern's; what the index does, in one line."""
    return pattern in {ANY_HOST, host} or (pattern.startswith("*.") and host.endswith(pattern[1:]))
