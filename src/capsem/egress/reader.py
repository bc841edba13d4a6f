"""Reads the tables of a policy by the schema, and gathers everything that is wrong with them; see `document`."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Final, NamedTuple

from capsem.egress.facts import Action, Layer, Protocol
from capsem.egress.policy import ResolveAllow
from capsem.egress.rules import Rule
from capsem.egress.schema import NETWORK_KEYS, RESERVED, RESOLVE_KEYS, RULE_KEYS, Key
from capsem.egress.values import NAME, READERS, Wrong, tables

MOST_RULES: Final = 2000  # of one document

_HEADER: Final = re.compile(r"\s*\[\[\s*network\s*\.\s*rule\s*\]\]")
_OTHER_HEADER: Final = re.compile(r"\s*\[")


class Problem(NamedTuple):
    """What is wrong where: `line` is 0 where that is not known."""

    message: str
    line: int = 0
    rule: str | None = None

    def at(self, source: str) -> str:
        """For people."""
        place = f"{source}, line {self.line}" if self.line else source
        return f"{place}: rule {self.rule}: {self.message}" if self.rule else f"{place}: {self.message}"


class Lines:
    """Where the rules of a file stand, and their keys; TOML's reader does not tell. Line numbers are from 1."""

    def __init__(self, text: str) -> None:
        self._lines = text.splitlines()
        self._rules = [at for at, line in enumerate(self._lines) if _HEADER.match(line)]

    def rule(self, index: int, key: str = "") -> int:
        """The line of a rule, or of one of its keys."""
        if index >= len(self._rules):
            return 0
        begin = self._rules[index]
        if key:
            for at in range(begin + 1, len(self._lines)):
                if _OTHER_HEADER.match(self._lines[at]) and "=" not in self._lines[at].partition("[")[0]:
                    break
                if re.match(rf"\s*\"?{re.escape(key)}\"?\s*=", self._lines[at]):
                    return at + 1
        return begin + 1

    def key(self, key: str) -> int:
        """The first line that sets a key."""
        for at, line in enumerate(self._lines):
            if re.match(rf"\s*(network\s*\.\s*)?\"?{re.escape(key)}\"?\s*=", line):
                return at + 1
        return 0


class Reader:
    """Reads tables by the schema, and gathers what is wrong."""

    def __init__(self, layer: Layer, source: str, lines: Lines) -> None:
        self._layer = layer
        self._source = source
        self._lines = lines
        self.problems: list[Problem] = []
        self._line: Callable[[str], int] = lines.key
        self._rule: str | None = None

    def read(self, table: Mapping[str, Any]) -> dict[str, Any]:
        """The values by key; worth something only if there are no problems."""
        said = self._take(table, NETWORK_KEYS)
        names: set[str] = set()
        for index, rule in enumerate(said.get("rule", ())):
            if rule.name in names:
                self.problems.append(Problem("another rule has this name", self._lines.rule(index, "name"), rule.name))
            names.add(rule.name)
        return said

    def _wrong(self, message: str, key: str = "") -> None:
        self.problems.append(Problem(message, self._line(key), self._rule))

    def _take(self, table: Mapping[str, Any], keys: Sequence[Key]) -> dict[str, Any]:
        known = {key.name: key for key in keys}
        said: dict[str, Any] = {}
        for name, value in table.items():
            if (key := known.get(name)) is None:
                told = RESERVED.get(name) or f"there are: {', '.join(known)}"
                self._wrong(f"there is no key {name}; {told}", name)
                continue
            try:
                if key.kind == "rules":
                    said[name] = self._rules(value)
                elif key.kind == "resolve_allow":
                    said[name] = self._resolve_allow(value)
                else:
                    said[name] = READERS[key.kind](value)
                    self._unfit(name, said[name])
            except ValueError as error:
                self._wrong(f"{name}: {error}", name)
        return said

    def _unfit(self, name: str, value: Any) -> None:
        if name == "upstream_proxy" and "@" in value and self._layer is Layer.VM:
            raise Wrong(
                "a VM's policy goes into its checkpoints and exports; put one with a password into the user's file"
            )

    def _resolve_allow(self, value: Any) -> tuple[ResolveAllow, ...]:
        found = []
        for table in tables(value, "[[network.resolve_allow]]"):
            said = self._take(table, RESOLVE_KEYS)
            if not said.get("cidr"):
                raise Wrong("says no cidr, where names may lead")
            found.append(ResolveAllow(said.get("host", ("*",)), said["cidr"]))
        return tuple(found)

    def _rules(self, value: Any) -> tuple[Rule, ...]:
        written = tables(value, "[[network.rule]]")
        if len(written) > MOST_RULES:
            raise Wrong(f"{len(written)} are too many; {MOST_RULES} are the limit")
        found = []
        for index, table in enumerate(written):
            self._line = lambda key, index=index: self._lines.rule(index, key)  # type: ignore[misc]
            named = table.get("name")
            self._rule = named if isinstance(named, str) and NAME.match(named) else f"rule-{index + 1}"
            before = len(self.problems)
            said = self._take(table, RULE_KEYS)
            if len(self.problems) == before and (rule := self._whole(said, index)) is not None:
                found.append(rule)
        self._line, self._rule = self._lines.key, None
        return tuple(found)

    def _whole(self, said: dict[str, Any], index: int) -> Rule | None:
        before = len(self.problems)
        for message, key in _contradictions(said, self._layer):
            self._wrong(message, key)
        if len(self.problems) > before:
            return None
        action = said["action"]
        line = self._lines.rule(index)
        return Rule(
            said.get("name", f"rule-{index + 1}"),
            action,
            self._layer,
            said.get("host", ()),
            said.get("port", ()),
            said.get("method", ()),
            said.get("path", ()),
            said.get("cidr", ()),
            said.get("protocol", None if action is Action.DENY else Protocol.HTTP),
            said.get("http2", False),
            said.get("client_certificate"),
            said.get("ech", False),
            said.get("model"),
            said.get("answers", False),
            said.get("until"),
            f"{self._source}, line {line}" if line else self._source,
        )


def _contradictions(said: Mapping[str, Any], layer: Layer) -> Iterator[tuple[str, str]]:
    """What makes a rule impossible, or larger than it looks; with the key that it is about."""
    if "action" not in said:
        yield "says no action: allow, deny or ask", ""
        return
    action, protocol = said["action"], said.get("protocol")
    if not said.get("host") and not said.get("cidr"):
        yield 'names neither host nor cidr; host = ["*"] is every name', ""
    if said.get("cidr") and action is not Action.DENY and not said.get("port") and layer is not Layer.PRESET:
        yield "with cidr it has to name ports", "cidr"
    if protocol in {Protocol.TCP, Protocol.PASSTHROUGH}:
        for key in ("method", "path", "http2", "client_certificate", "model"):
            if said.get(key):
                yield f"with protocol {protocol} there are no requests to see, so {key} means nothing", key
    if said.get("ech") and (protocol is not Protocol.PASSTHROUGH or action is Action.DENY):
        yield "means something only where something is passed through", "ech"
    if said.get("answers") and action is not Action.ALLOW:
        yield "only what allows can answer a rule that asks", "answers"
    if protocol is Protocol.PASSTHROUGH and not said.get("host"):
        yield "what is passed through is judged by its name: it needs host", "protocol"
    if action is Action.DENY:
        for key in ("http2", "client_certificate", "model"):
            if said.get(key):
                yield f"what is denied needs no {key}", key
