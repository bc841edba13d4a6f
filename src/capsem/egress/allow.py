"""One host more or less: what a VM's own policy becomes when somebody allows or denies a destination."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from ipaddress import ip_address, ip_network
from typing import Final
from urllib.parse import urlsplit

from capsem.egress import hosts
from capsem.egress.document import Document
from capsem.egress.facts import Action, Layer, Protocol, Subject
from capsem.egress.lint import covers
from capsem.egress.paths import normalise
from capsem.egress.policy import WEB_PORTS
from capsem.egress.reader import MOST_RULES
from capsem.egress.rules import Network, Rule, host_pattern
from capsem.model.errors import InvalidInput, LimitReached

_WITH_PORT: Final = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[^:\[\]]+):(\d{1,5})\Z")
_METHOD: Final = re.compile(r"[A-Z][A-Z0-9_-]{0,31}\Z")


@dataclass(frozen=True, slots=True)
class Destination:
    """A name, or a pattern of names, or an address; the ports, and what is spoken."""

    host: str | None
    network: Network | None
    ports: tuple[int, ...]
    protocol: Protocol

    @property
    def text(self) -> str:
        """For people, and names of rules."""
        return self.host or str(self.network).partition("/")[0]

    def subjects(self, methods: Sequence[str]) -> list[Subject]:
        """Some of what it is about: of a pattern, one name."""
        host = None if self.host is None else re.sub(r"\A\*(\.|\Z)", r"any\1", self.host)
        address = None if self.network is None else str(self.network[0])
        if self.protocol is Protocol.TCP:
            return [Subject(port, host, address, self.protocol) for port in self.ports]
        return [Subject(port, host, address, method=method, path="/") for port in self.ports for method in methods]


def destination(text: str, port: int | None = None, *, tcp: bool = False) -> Destination:
    """HOST, HOST:PORT, *.DOMAIN or an address. Raises InvalidInput."""
    wanted = text.strip()
    if (match := _WITH_PORT.match(wanted)) is not None:
        wanted, said = match[1], int(match[2])
        if port not in {None, said}:
            raise InvalidInput(f"{text} names another port than {port}", hint="give the port once")
        port = said
    if port is not None and not 1 <= port <= 65535:
        raise InvalidInput(f"{port} is no port", hint="choose 1 to 65535")
    if port is None and tcp:
        raise InvalidInput("what is not HTTP needs a port", hint=f"{text}:PORT")
    ports = WEB_PORTS if port is None else (port,)
    protocol = Protocol.TCP if tcp else Protocol.HTTP
    if (address := hosts.address(wanted)) is not None:
        return Destination(None, ip_network(ip_address(address)), ports, protocol)
    try:
        return Destination(host_pattern(wanted), None, ports, protocol)
    except ValueError as error:
        raise InvalidInput(
            str(error), hint="name a host (example.com), all below one (*.example.com), or an address"
        ) from error


def allowing(own: Document, wanted: Destination, methods: Sequence[str] = (), until: float | None = None) -> Rule:
    """A rule for the VM's own policy that allows it. Raises InvalidInput."""
    for method in methods:
        if not _METHOD.match(method):
            raise InvalidInput(f"{method!r} is no method of HTTP", hint="those are in capitals: GET")
    rule = _rule(own, "allowed", Action.ALLOW, wanted)
    return replace(rule, protocol=wanted.protocol, methods=tuple(methods), until=until)


def denying(own: Document, wanted: Destination) -> Rule:
    """A rule for the VM's own policy that denies it, on its ports or, where those are the web's, on all."""
    ports = () if wanted.ports == WEB_PORTS else wanted.ports
    return _rule(own, "denied", Action.DENY, replace(wanted, ports=ports))


def _rule(own: Document, word: str, action: Action, wanted: Destination) -> Rule:
    name = f"{word}-{re.sub('[^A-Za-z0-9.-]+', '-', wanted.text).strip('-.') or 'all'}"[:50]
    taken, number, found = {rule.name for rule in own.rules}, 1, name
    while found in taken:
        number += 1
        found = f"{name}-{number}"
    return Rule(
        found,
        action,
        Layer.VM,
        hosts=(wanted.host,) if wanted.host else (),
        ports=wanted.ports,
        cidrs=(wanted.network,) if wanted.network else (),
        protocol=None,
    )


def without_opposite(own: Document, rule: Rule) -> tuple[Document, list[str]]:
    """The policy without what was said to the contrary in the same way: whoever says `rule` has changed their mind. Also the
    names of the rules that went."""
    return _without(
        own,
        lambda other: (
            other.action is not rule.action
            and other.name.startswith(("allowed-", "denied-"))
            and (other.hosts, other.cidrs) == (rule.hosts, rule.cidrs)
        ),
    )


def with_rule(own: Document, rule: Rule) -> tuple[Document, list[str]]:
    """The policy with a rule, and the names of those that it makes idle, which go. Raises LimitReached."""
    kept, gone = _without(own, lambda other: other.action is rule.action and covers(rule, other))
    if len(kept.rules) >= MOST_RULES:
        raise LimitReached(f"the policy has {len(kept.rules)} rules, {MOST_RULES} is the limit", hint="capsem net set")
    return replace(kept, rules=(*kept.rules, rule)), gone


def _without(own: Document, goes: Callable[[Rule], bool]) -> tuple[Document, list[str]]:
    kept = tuple(rule for rule in own.rules if not goes(rule))
    return replace(own, rules=kept), [rule.name for rule in own.rules if goes(rule)]


def subject_of_url(url: str, method: str) -> Subject:
    """What would be judged for a URL; https unless said, tcp://HOST:PORT for something other than HTTP. Raises InvalidInput."""
    text = url if "://" in url else f"https://{url}"
    try:
        parts = urlsplit(text)
        name, port = parts.hostname or "", parts.port
    except ValueError as error:
        raise InvalidInput(f"{url} is no URL: {error}", hint="https://example.com/path") from error
    default = {"http": 80, "https": 443, "ws": 80, "wss": 443}.get(parts.scheme)
    if parts.scheme == "tcp" and port is None:
        raise InvalidInput(f"{url} has no port", hint="tcp://HOST:PORT")
    if (default is None and parts.scheme != "tcp") or port == 0:
        raise InvalidInput(f"{url} is no URL that is judged", hint="https://, http:// or tcp://HOST:PORT")
    host, address = hosts.host_name(name), hosts.address(name)
    if host is None and address is None and not name.isascii():
        try:
            host = host_pattern(name)
        except ValueError as error:
            raise InvalidInput(str(error)) from error
    if host is None and address is None:
        raise InvalidInput(f"{url} names no host", hint="https://example.com/path")
    if parts.scheme == "tcp":
        return Subject(port or 0, host, address, Protocol.TCP)
    if not _METHOD.match(method):
        raise InvalidInput(f"{method!r} is no method of HTTP", hint="those are in capitals: GET")
    return Subject(port or default or 0, host, address, method=method, path=normalise(parts.path or "/"))
