"""Values out of JSON that a stranger wrote: what is not of the kind that is looked for is not there."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, Final

import msgspec

LARGEST: Final = 1 << 53  # a count beyond it is no count
TRAILING: Final = 64  # messages at the end of a conversation that are looked at


def decode(data: bytes | msgspec.Raw) -> Any:
    """The value; None for what is no JSON."""
    try:
        return msgspec.json.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None


def fields(data: bytes) -> dict[str, msgspec.Raw]:
    """The members of an object, not looked into; none for what is no object."""
    try:
        return msgspec.json.decode(data, type=dict[str, msgspec.Raw])
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return {}


def at(value: Any, *path: str) -> Any:
    """The member of a member of an object; None where there is none."""
    for name in path:
        if not isinstance(value, dict):
            return None
        value = value.get(name)
    return value


def each(value: Any) -> list[Any]:
    """The elements of an array; none for what is no array."""
    return value if isinstance(value, list) else []


def text(value: Any) -> str | None:
    """A string that says something."""
    return value if isinstance(value, str) and value else None


def count(value: Any) -> int | None:
    """How many."""
    return value if type(value) is int and 0 <= value <= LARGEST else None


def compact(value: Any, limit: int) -> str:
    """The beginning of any value, as text: a string as it is, all else as JSON."""
    if isinstance(value, str):
        return value[:limit]
    try:
        return json.dumps(value, ensure_ascii=False, separators=(",", ":"))[:limit]
    except RecursionError:
        return ""


def told(content: Any, limit: int = 1024) -> str:
    """The beginning of what a tool answered: a text, or parts of which some are texts."""
    if not isinstance(content, list):
        return compact(content, limit)
    parts = (text(at(part, "text")) or f"[{text(at(part, 'type')) or '?'}]" for part in content[:limit])
    return "\n".join(parts)[:limit]


def last_turn(raw: msgspec.Raw | None, is_models: Callable[[Any], bool]) -> list[Any]:
    """The end of a conversation: what came after the model's last word. The rest was sent with earlier calls, too."""
    if raw is None:
        return []
    try:
        messages = msgspec.json.decode(raw, type=list[msgspec.Raw])
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return []
    turn: list[Any] = []
    for message in reversed(messages[-TRAILING:]):
        value = decode(message)
        if is_models(value):
            break
        turn.append(value)
    return turn[::-1]
