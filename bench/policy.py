"""`python -m bench policy`: what a verdict costs, by the number of rules, beside a plain search of all of them, each for
a path that was not asked for before."""

from __future__ import annotations

import timeit
from dataclasses import replace

from bench.table import Row
from capsem.egress.facts import Action, Layer, Protocol, Subject
from capsem.egress.paths import PathPattern
from capsem.egress.policy import Policy
from capsem.egress.rules import Match, Rule, host_matches, network

ROUNDS, REPEATS = 2000, 5


def rules(count: int) -> tuple[Rule, ...]:
    """Hosts and domains with method and path, and one range in fifty."""
    named = [
        Rule(
            f"r{number}",
            Action.ALLOW,
            Layer.VM,
            (f"h{number}.example.com", f"*.s{number}.example.net"),
            (443,),
            ("GET",),
            (PathPattern(f"/v{number}/*"),),
        )
        for number in range(count - count // 50)
    ]
    ranges = [
        Rule(f"c{number}", Action.ALLOW, Layer.VM, ports=(443,), cidrs=(network(f"10.{number}.0.0/16"),))
        for number in range(count // 50)
    ]
    return (*named, *ranges)


def plain(table: tuple[Rule, ...], subject: Subject) -> Rule | None:
    """The first rule that fits, found by looking at each."""
    for rule in table:
        named = any(host_matches(host, subject.host or "") for host in rule.hosts)
        if named and rule.fits(subject, in_range=False) is Match.YES:
            return rule
    return None


def judge_all(policy: Policy, subjects: list[Subject]) -> None:
    """One after the other."""
    for subject in subjects:
        policy.judge(subject)


def measure() -> list[Row]:
    """Microseconds of a verdict, and of the plain search."""
    rows = []
    for count in (10, 100, 1000):
        table = rules(count)
        policy, middle = Policy(table), count // 2
        for name, subject in {
            "exact": Subject(443, f"h{middle}.example.com", None, Protocol.HTTP, "GET", f"/v{middle}/x"),
            "below": Subject(443, f"a.b.s{middle}.example.net", "93.184.216.34", Protocol.HTTP, "GET", f"/v{middle}/x"),
            "no rule": Subject(443, "nothing.example.org", None, Protocol.HTTP, "GET", "/"),
        }.items():
            subjects = [replace(subject, path=f"{subject.path}{each}") for each in range(ROUNDS)]
            ours = timeit.repeat(lambda: judge_all(policy, subjects), number=1, repeat=REPEATS)  # noqa: B023
            search = timeit.repeat(lambda: plain(table, subject), number=20, repeat=REPEATS)  # noqa: B023
            rows.append(
                Row(
                    f"verdict by {count} rules, {name} (us)",
                    [each / ROUNDS * 1e6 for each in ours],
                    peers={"plain search": [each / 20 * 1e6 for each in search]},
                )
            )
    return rows
