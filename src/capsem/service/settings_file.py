"""Settings in the user's file, changed in place: what else stands there, comments too, stays as it is."""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Mapping
from typing import Any

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


def with_table(text: str, array: str, table: Mapping[str, Any]) -> str:
    """The file's text with a table of an array of tables, in place of the one with the same `name`."""
    lines = [f"[[{array}]]", *(f"{key} = {_toml(value)}" for key, value in table.items())]
    kept = without_table(text, array, table["name"]).rstrip("\n")
    return f"{kept}\n\n" * bool(kept) + "\n".join(lines) + "\n"


def without_table(text: str, array: str, name: str) -> str:
    """The file's text without the table of that `name`. Raises InvalidInput when it stands there in a way of its own."""
    lines = text.splitlines()
    header = re.compile(rf"\s*\[\[\s*{re.escape(array)}\s*\]\]\s*(#.*)?\Z")
    starts = [at for at, line in enumerate(lines) if header.match(line)]
    for start in starts:
        end = next((at for at in range(start + 1, len(lines)) if re.match(r"\s*\[", lines[at])), len(lines))
        block = "\n".join(lines[start:end])
        try:
            (found,) = tomllib.loads(block)[array]
        except tomllib.TOMLDecodeError:
            continue
        if found.get("name") == name:
            while end > start + 1 and lines[end - 1].lstrip().startswith("#"):
                end -= 1  # a comment above the next table is that one's
            return "\n".join((*lines[:start], *lines[end:])).strip("\n") + "\n" * (len(lines) > end - start)
    if any(each.get("name") == name for each in tomllib.loads(text).get(array, ()) if isinstance(each, dict)):
        raise InvalidInput(
            f"{array} {name} stands in the settings file in a way of its own", hint="edit the file by hand"
        )
    return text


def _toml(value: object) -> str:
    """A value as TOML has it; strings and numbers are written as in JSON."""
    return json.dumps(value, ensure_ascii=False)
