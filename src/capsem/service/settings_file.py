"""Settings in the user's file, changed in place: what else stands there, comments too, stays as it is."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping

from capsem.model.errors import InvalidInput

_TABLE = re.compile(r"\s*\[\s*([^\[\]]+?)\s*\]\s*(#.*)?\Z")


def changed(text: str, values: Mapping[str, float | str]) -> str:
    """The file's `text` (TOML) with `values`, by dotted names. Raises InvalidInput when they cannot be put there safely."""
    for name, value in values.items():
        text = _with(text, name, value)
    parsed = tomllib.loads(text)
    for name, value in values.items():
        if _lookup(parsed, name) != value:
            raise InvalidInput(f"{name} stands in the settings file in a way of its own", hint="edit the file by hand")
    return text


def _with(text: str, name: str, value: float | str) -> str:
    table, _, key = name.rpartition(".")
    line = f'{key} = "{value}"' if isinstance(value, str) else f"{key} = {value}"
    lines, place = text.splitlines(), -1
    present = ""
    for at, each in enumerate(lines):
        if found := _TABLE.match(each):
            present = found[1]
            if present == table:
                place = at
        elif present == table and re.match(rf"\s*{re.escape(key)}\s*=", each):
            lines[at] = line
            break
    else:
        if place < 0:
            lines += ["", f"[{table}]"] if lines else [f"[{table}]"]
            place = len(lines) - 1
        lines.insert(place + 1, line)
    return "\n".join(lines) + "\n"


def _lookup(table: Mapping[str, object], name: str) -> object:
    found: object = table
    for part in name.split("."):
        found = found.get(part) if isinstance(found, dict) else None
    return found
