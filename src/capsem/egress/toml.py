"""A policy written as a file for people, with comments; `document.from_text` reads it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from capsem.egress.document import Document


def dump(document: Document, *, head: Sequence[str] = (), comments: Mapping[str, Sequence[str]] | None = None) -> str:
    """The file. `head` are lines of comment at its top, `comments` those above a rule, by its name."""
    return "\n".join(_lines(document, head, comments or {})) + "\n"


def _lines(document: Document, head: Sequence[str], comments: Mapping[str, Sequence[str]]) -> Iterator[str]:
    yield from _comment(head)
    table = document.to_dict()
    rules, resolve_allow = table.pop("rule", []), table.pop("resolve_allow", [])
    certificates = table.pop("client_certificate", {})
    yield "[network]"
    yield from _pairs(table)
    for each in resolve_allow:
        yield from ("", "[[network.resolve_allow]]", *_pairs(each))
    for name, files in certificates.items():
        yield from ("", f"[network.client_certificate.{_value(name)}]", *_pairs(files))
    for rule in rules:
        if rule.get("until") is not None:
            rule["until"] = datetime.fromtimestamp(rule["until"], UTC)
        yield from ("", "[[network.rule]]", *_comment(comments.get(rule["name"], ())), *_pairs(rule))


def _comment(lines: Sequence[str]) -> Iterator[str]:
    for line in lines:
        # What a guest calls its programs is in here.
        yield f"# {''.join(each if each.isprintable() else '?' for each in line)}".rstrip()


def _pairs(table: Mapping[str, Any]) -> Iterator[str]:
    for key, value in table.items():
        yield f"{key} = {_value(value)}"


def _value(value: Any) -> str:
    if isinstance(value, list):
        return f"[{', '.join(_value(each) for each in value)}]"
    if isinstance(value, datetime):
        return value.isoformat()
    # Strings of JSON are strings of TOML, as all that is not ASCII is escaped in the same way (but for surrogate pairs).
    return json.dumps(value) if not isinstance(value, str) else json.dumps(value, ensure_ascii=False)
