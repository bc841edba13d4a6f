"""A policy as it is written: TOML for people, the same tables as JSON between processes. Text in, a `Document` out.

Everything wrong is told at once, each problem with file, line, rule and what to write instead. A file with a problem says
nothing at all: half a policy is none.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Final

from capsem.egress.facts import Action, Layer
from capsem.egress.policy import ResolveAllow
from capsem.egress.reader import Lines, Problem, Reader
from capsem.egress.rules import Rule
from capsem.egress.values import ClientCertificate
from capsem.model.errors import InvalidInput

LARGEST: Final = 128 * 1024  # characters of a file
SHOWN: Final = 10  # problems in one error


@dataclass(frozen=True)
class Document:
    """What one file, or one VM's own policy, says; see `schema` for what the fields mean. None: nothing."""

    preset: str | None = None
    otherwise: Action | None = None
    rules: tuple[Rule, ...] = ()
    resolve_allow: tuple[ResolveAllow, ...] = ()
    certificates: Mapping[str, ClientCertificate] = field(default_factory=lambda: MappingProxyType({}))
    extra_ca: tuple[str, ...] = ()
    upstream_proxy: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """The table [network], in JSON's types; `from_dict` is the opposite."""
        said: dict[str, Any] = {
            "preset": self.preset,
            "otherwise": None if self.otherwise is None else str(self.otherwise),
            "upstream_proxy": self.upstream_proxy,
            "extra_ca": list(self.extra_ca),
            "client_certificate": {name: each._asdict() for name, each in self.certificates.items()},
            "resolve_allow": [
                {"host": list(each.hosts), "cidr": [str(net) for net in each.cidrs]} for each in self.resolve_allow
            ],
            "rule": [rule.to_dict() for rule in self.rules],
        }
        return {key: value for key, value in said.items() if value}


NOTHING: Final = Document()


def from_text(text: str, layer: Layer, source: str) -> Document:
    """The document that a TOML file holds in its table [network]; other tables are not looked at. Raises InvalidInput."""
    document, problems = check_text(text, layer, source)
    if document is None:
        raise _invalid(problems, source)
    return document


def from_dict(table: Mapping[str, Any], layer: Layer, source: str) -> Document:
    """The opposite of `to_dict`. Raises InvalidInput."""
    reader = Reader(layer, source, Lines(""))
    said = reader.read(table)
    if reader.problems:
        raise _invalid(reader.problems, source)
    return _document(said)


def check_text(text: str, layer: Layer, source: str) -> tuple[Document | None, list[Problem]]:
    """The document, or None and everything that is wrong with it."""
    if len(text) > LARGEST:
        return None, [Problem(f"{len(text)} characters are too many for a policy; {LARGEST} are the limit")]
    try:
        whole = tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        line = re.search(r"line (\d+)", str(error))
        return None, [Problem(f"this is no TOML: {error}", int(line[1]) if line else 0)]
    table = whole.get("network", {})
    if not isinstance(table, dict):
        return None, [Problem("network is a table: write [network]")]
    reader = Reader(layer, source, Lines(text))
    said = reader.read(table)
    return (None if reader.problems else _document(said)), reader.problems


def _document(said: Mapping[str, Any]) -> Document:
    return Document(
        said.get("preset"),
        said.get("otherwise"),
        said.get("rule", ()),
        said.get("resolve_allow", ()),
        said.get("client_certificate", MappingProxyType({})),
        said.get("extra_ca", ()),
        said.get("upstream_proxy"),
    )


def _invalid(problems: Sequence[Problem], source: str) -> InvalidInput:
    told = [problem.at(source) for problem in problems[:SHOWN]]
    if len(problems) > SHOWN:
        told.append(f"and {len(problems) - SHOWN} more")
    return InvalidInput("; ".join(told), hint="docs/policy.md lists what a policy may hold")
