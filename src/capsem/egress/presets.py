"""What the presets allow. Which registries there are is not known here: they are those of this host's own clients."""

from __future__ import annotations

from collections.abc import Iterable
from ipaddress import ip_network
from typing import Final, NamedTuple

from capsem.egress.document import Document
from capsem.egress.facts import Action, Layer, Protocol
from capsem.egress.rules import ANY_HOST, Rule

READING: Final = ("GET", "HEAD")
OPEN: Final = "open-with-floor"


class Registry(NamedTuple):
    """A package registry: whose it is ("pip"), its host and its port, and where that was read, for people."""

    client: str
    host: str
    port: int
    where: str


def preset_document(name: str, registries: Iterable[Registry], remembered: Iterable[Rule]) -> Document:
    """The rules of a preset; `remembered` are those of hosts that were allowed for always."""
    if name == OPEN:
        return Document(preset=name, rules=_open())
    if name == "off":
        return Document(preset=name)
    rules = [_reads(registry) for registry in sorted(set(registries))]
    unique = {rule.name: rule for rule in rules}
    if name == "medium":
        unique |= {rule.name: rule for rule in remembered}
    return Document(preset=name, rules=tuple(unique.values()))


def _reads(registry: Registry) -> Rule:
    return Rule(
        f"{registry.client}-{registry.host}-{registry.port}"[:64],
        Action.ALLOW,
        Layer.PRESET,
        hosts=(registry.host,),
        ports=(registry.port,),
        methods=READING,
        where=registry.where,
    )


def _open() -> tuple[Rule, ...]:
    everywhere = (ip_network("0.0.0.0/0"), ip_network("::/0"))
    return tuple(
        Rule(f"open-{what}-{protocol}", Action.ALLOW, Layer.PRESET, hosts=hosts, cidrs=cidrs, protocol=protocol)
        for what, hosts, cidrs in (("names", (ANY_HOST,), ()), ("addresses", (), everywhere))
        for protocol in (Protocol.HTTP, Protocol.TCP)
    )
