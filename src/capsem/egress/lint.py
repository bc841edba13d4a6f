"""What is wrong with a policy that can be read: rules that can never decide anything."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from capsem.egress.facts import Action
from capsem.egress.policy import PAST_THE_FLOOR, Floor
from capsem.egress.reader import Problem
from capsem.egress.rules import ANY_HOST, Network, Rule


def lint(rules: Sequence[Rule], floor: Floor) -> list[Problem]:
    """The rules of one layer that nothing ever comes to, each with the reason."""
    problems = [Problem(what, _line(rule), rule.name) for rule in rules if (what := _beneath_the_floor(rule, floor))]
    ordered = sorted(rules, key=lambda rule: rule.rank)  # stable: of equals the first one decides
    by_host: dict[str, list[tuple[int, Rule]]] = {}
    without: list[tuple[int, Rule]] = []
    for place, rule in enumerate(ordered):
        for host in rule.hosts:
            by_host.setdefault(host, []).append((place, rule))
        if not rule.hosts:
            without.append((place, rule))
    for place, rule in enumerate(ordered):
        above = [each for host in _covering(rule.hosts[0]) for each in by_host.get(host, ())] if rule.hosts else []
        for earlier, other in (*above, *without):
            if earlier < place and covers(other, rule):
                verb = {Action.ALLOW: "allows", Action.ASK: "asks about", Action.DENY: "denies"}[other.action]
                problems.append(
                    Problem(
                        f"it can never decide: rule {other.name} {verb} everything that it is about; remove one of them, or "
                        "narrow that one down",
                        _line(rule),
                        rule.name,
                    )
                )
                break
    return problems


def _beneath_the_floor(rule: Rule, floor: Floor) -> str | None:
    if rule.action is Action.DENY or not rule.cidrs or rule.layer in PAST_THE_FLOOR:
        return None
    if all(floor(each[0]) and floor(each[-1]) for each in rule.cidrs):
        return "it can never decide: its ranges lie below the floor, which only the corporate file and a VM's own policy pass"
    return None


def _line(rule: Rule) -> int:
    _, found, number = rule.where.rpartition(", line ")
    return int(number) if found else 0


def _covering(host: str) -> Iterator[str]:
    """The patterns that hold all of a pattern's names."""
    yield ANY_HOST
    if host == ANY_HOST:
        return
    yield host
    at = host.find(".")
    while at >= 0:
        if (wider := "*" + host[at:]) != host:
            yield wider
        at = host.find(".", at + 1)


def covers(other: Rule, rule: Rule) -> bool:
    """Whether every subject of `rule` is one of `other`, which is as strong or stronger."""
    if other.until is not None and (rule.until is None or rule.until > other.until):
        return False
    if other.hosts:
        if not rule.hosts or not all(any(wide in other.hosts for wide in _covering(host)) for host in rule.hosts):
            return False
    elif rule.hosts and other.action is not Action.DENY:
        return False
    if other.cidrs:
        if not rule.cidrs or not all(any(_within(each, wide) for wide in other.cidrs) for each in rule.cidrs):
            return False
    elif rule.cidrs and rule.layer in PAST_THE_FLOOR and other.action is not Action.DENY:
        return False  # it leads past the floor, if nothing else
    return (
        _subset(rule.ports, other.ports)
        and _subset(rule.methods, other.methods)
        and _subset([each.text for each in rule.paths], [each.text for each in other.paths])
        and other.protocol in {None, rule.protocol}
    )


def _within(narrow: Network, wide: Network) -> bool:
    return narrow.version == wide.version and narrow[0] in wide and narrow[-1] in wide


def _subset(narrow: Iterable[object], wide: Sequence[object]) -> bool:
    values = list(narrow)
    return not wide or (bool(values) and all(each in wide for each in values))
