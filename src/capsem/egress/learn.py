"""A minimal policy out of what was recorded: rows of net_events in, a document out that lets the same pass and nothing more.

Hosts, ports and methods are learnt; paths only on request. From so many siblings of one domain on, they become "*.domain". What
the floor denied is never learnt, nor what failed before it was known what it was.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from ipaddress import ip_address, ip_network
from typing import Any, Final, NamedTuple

from capsem.egress.document import NOTHING, Document
from capsem.egress.facts import Action, Layer, Protocol, TlsMode
from capsem.egress.paths import PathPattern, normalise
from capsem.egress.rules import Network, Rule, host_pattern

EXTRAS: Final = ("http2", "certificate", "ech", "model")  # fields of a rule that do not narrow it
SIBLINGS: Final = 4  # hosts of one domain that make a wildcard
MOST_PATHS: Final = 20  # of one rule, before they become the directories that they lie in
DEEPEST: Final = 3  # of those directories
RECORDED: Final = 4096  # characters of a path that a row has room for: one of that length may have been cut
NAMED: Final = 6  # siblings that a comment names


class Learnt(NamedTuple):
    """A document; comments on its rules by name; how many rows it is made of; and what could not be learnt, for people."""

    document: Document
    comments: Mapping[str, Sequence[str]]
    rows: int
    left_out: Sequence[str]


@dataclass(frozen=True, slots=True)
class _Key:
    host: str | None
    network: Network | None
    port: int
    protocol: Protocol

    @property
    def order(self) -> tuple[str, int, str]:
        return str(self.host or self.network), self.port, str(self.protocol)


@dataclass(slots=True)
class _Seen:
    """`extras` are of the VM's own rules that had let it pass: what they say beside that it may."""

    methods: Counter[str] = field(default_factory=Counter)
    paths: set[str] = field(default_factory=set)
    count: int = 0
    processes: list[str] = field(default_factory=list)
    hosts: list[str] = field(default_factory=list)
    extras: dict[str, Any] = field(default_factory=dict)

    def add(self, other: _Seen) -> None:
        self.methods += other.methods
        self.paths |= other.paths
        self.count += other.count
        self.processes += [each for each in other.processes if each not in self.processes]
        self.hosts += other.hosts
        self.extras |= other.extras


def learn(rows: Iterable[Mapping[str, Any]], own: Document = NOTHING, *, paths: bool = False) -> Learnt:
    """The policy for rows of net_events, oldest first, each of which may stand for `count` of them: those that were allowed,
    or, from denials, those that were not.

    `own` is the VM's present policy. Its rules that lead past the floor are kept where something went that way, and what it
    says beside its rules.
    """
    past = [rule for rule in own.rules if rule.cidrs and rule.action is Action.ALLOW]
    named = {rule.name: rule for rule in own.rules}
    seen: dict[_Key, _Seen] = {}
    left_out: Counter[str] = Counter()
    kept: dict[str, Rule] = {}
    count = 0
    for row in rows:
        key = _key(row)
        if isinstance(key, str):
            left_out[key] += row.get("count", 1)
            continue
        count += row.get("count", 1)
        ways = [rule for rule in past if _leads(rule, row)]
        kept |= {rule.name: rule for rule in ways}
        if key.host is None and ways:
            continue
        entry = seen.setdefault(key, _Seen(hosts=[key.host] if key.host else []))
        entry.count += row.get("count", 1)
        if (method := row["method"]) is not None:
            entry.methods[method] += 1
            entry.paths.add(normalise(row["path"] or "/"))
        if (process := row["process_name"]) and process not in entry.processes:
            entry.processes.append(process)
        if row["rule_layer"] == Layer.VM and (rule := named.get(row["matched_rule"])) is not None:
            entry.extras |= {name: value for name in EXTRAS if (value := getattr(rule, name))}
    comments: dict[str, list[str]] = {name: ["as it was: it leads past the floor"] for name in kept}
    rules = _rules(_with_wildcards(seen), comments, paths=paths)
    document = replace(own, preset="off", otherwise=None, rules=(*kept.values(), *rules))
    told = [f"{what} ({number} times)" for what, number in left_out.most_common()]
    return Learnt(document, comments, count, told)


def _leads(rule: Rule, row: Mapping[str, Any]) -> bool:
    """Whether a rule with ranges is about where a row went."""
    try:
        address = ip_address(row["address"] or "")
    except ValueError:
        return False
    return row["port"] in rule.ports and any(address in each for each in rule.cidrs)


def _key(row: Mapping[str, Any]) -> _Key | str:
    """What a row is about, or why it is not learnt."""
    host, address, port = row["domain"], row["address"], row["port"]
    where = f"{host or address or 'an unknown host'}:{port}"
    if row["rule_layer"] == Layer.FLOOR:
        return f"{where} is below the floor"
    if not isinstance(port, int) or not 1 <= port <= 65535:
        return f"{where} has no port"
    if row["tls"] == TlsMode.PASSTHROUGH:
        protocol = Protocol.PASSTHROUGH
    elif row["method"] is not None:
        protocol = Protocol.HTTP
    elif row["tls"] == TlsMode.INTERCEPTED:
        return f"{where}: no request was made in its TLS; a client that trusts its own certificates alone needs passthrough"
    else:
        protocol = Protocol.TCP
    if row["method"] is not None and not re.fullmatch(r"[A-Z][A-Z0-9_-]{0,31}", row["method"]):
        return f"{where}: an unheard-of method"
    try:
        if host is not None:
            return _Key(host_pattern(host), None, port, protocol)
        return _Key(None, ip_network(ip_address(address)), port, protocol)
    except ValueError:
        return f"{where} has no name that a rule could have"


def _with_wildcards(seen: Mapping[_Key, _Seen]) -> dict[_Key, _Seen]:
    """Siblings of one domain, port and protocol as one, where there are enough of them."""
    families: defaultdict[_Key, list[_Key]] = defaultdict(list)
    for key in seen:
        if key.host is not None and (domain := _domain(key.host)) is not None:
            families[_Key(f"*.{domain}", None, key.port, key.protocol)].append(key)
    merged = dict(seen)
    # The widest first: what lies below it, at any depth, is its.
    for wide in sorted(
        (wide for wide, members in families.items() if len(members) >= SIBLINGS), key=lambda key: len(key.host or "")
    ):
        below = [key for key in merged if _below(key, wide)]
        if below:
            family = _Seen()
            for key in below:
                family.add(merged.pop(key))
            merged[wide] = family
    return merged


def _below(key: _Key, wide: _Key) -> bool:
    same = (key.port, key.protocol) == (wide.port, wide.protocol)
    return same and key.host is not None and key.host.endswith((wide.host or "")[1:])


def _domain(host: str) -> str | None:
    """The domain whose siblings may be one; None for one in which strangers have names (co.uk, com), as far as can be told."""
    labels = host.split(".")[1:]
    if len(labels) < 2 or (len(labels) == 2 and len(labels[0]) <= 3 and len(labels[1]) == 2):
        return None
    return ".".join(labels)


def _rules(seen: Mapping[_Key, _Seen], comments: dict[str, list[str]], *, paths: bool) -> list[Rule]:
    rules: list[Rule] = []
    for key, entry in sorted(seen.items(), key=lambda pair: pair[0].order):
        place = key.host.removeprefix("*.") if key.host else str(key.network).partition("/")[0].replace(":", ".")
        http = key.protocol is Protocol.HTTP
        name = _unused(f"{place[:40]}-{key.port}" + ("" if http else f"-{key.protocol}"), comments)
        rules.append(
            Rule(
                name,
                Action.ALLOW,
                Layer.VM,
                hosts=(key.host,) if key.host else (),
                ports=(key.port,),
                methods=tuple(sorted(entry.methods)) if http else (),
                paths=_patterns(entry.paths) if http and paths else (),
                cidrs=(key.network,) if key.network else (),
                protocol=key.protocol,
                **entry.extras,
            )
        )
        comments[name] = _comment(key, entry)
    return rules


def _unused(name: str, taken: Mapping[str, object]) -> str:
    number, found = 1, name
    while found in taken:
        number += 1
        found = f"{name}-{number}"
    return found


def _comment(key: _Key, entry: _Seen) -> list[str]:
    what = ("request" if key.protocol is Protocol.HTTP else "connection") + ("s" if entry.count > 1 else "")
    lines = [f"{entry.count} {what}" + (f", first by {entry.processes[0]}" if entry.processes else "")]
    if key.host and key.host.startswith("*."):
        more = len(entry.hosts) - NAMED
        lines.append("names: " + ", ".join(sorted(entry.hosts)[:NAMED]) + (f" and {more} more" if more > 0 else ""))
    return lines


def _patterns(paths: set[str]) -> tuple[PathPattern, ...]:
    """The paths themselves, or the directories that they lie in, where there are too many; nothing where that would not do."""
    if not all(path.startswith("/") and len(path) < RECORDED for path in paths):
        return ()
    texts, depth = {path if "*" not in path else _directory(path, DEEPEST) for path in paths}, DEEPEST
    while len(texts) > MOST_PATHS and depth:
        texts, depth = {_directory(path, depth) for path in paths}, depth - 1
    try:
        return tuple(PathPattern(text) for text in sorted(texts)) if len(texts) <= MOST_PATHS else ()
    except ValueError:
        return ()


def _directory(path: str, depth: int) -> str:
    """All that lies in one of the first directories on the way to a path."""
    parents = path.split("/")[1:-1][:depth]
    plain = [each for at, each in enumerate(parents) if not any("*" in before for before in parents[: at + 1])]
    return "/" + "/".join([*plain, "**"])
