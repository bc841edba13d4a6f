"""JSON bodies to requests and answers to JSON. Whatever bytes come in, the only error that comes out is InvalidInput."""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from typing import TypeVar

import msgspec

from capsem.model.errors import InvalidInput

T = TypeVar("T", bound=msgspec.Struct)

_AT = re.compile(r"(?P<what>.*) - at `(?P<where>[^`]*)`\Z", re.DOTALL)


def decode(kind: type[T], body: bytes) -> T:
    """The request of type `kind` in a JSON body; an empty body counts as `{}`. Raises InvalidInput naming the field."""
    try:
        request: T = _decoder(kind).decode(body.strip() or b"{}")
    except msgspec.ValidationError as exc:
        raise InvalidInput(_explain(str(exc)), hint="see the type of this field in the reference") from exc
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as exc:
        raise InvalidInput(f"the body is no JSON that can be read: {exc}", hint="send one JSON object") from exc
    return request


def decode_query(kind: type[T], query: Mapping[str, str]) -> T:
    """The query as a `kind`: numbers in decimal, true as "true" or "1". Raises InvalidInput naming the key."""
    try:
        return msgspec.convert(dict(query), kind, strict=False)
    except msgspec.ValidationError as exc:
        raise InvalidInput(
            _explain(str(exc), "the query"), hint="see the reference for what the query may hold"
        ) from exc


def encode(answer: object) -> bytes:
    """An answer as JSON; optional keys that were not set are left out."""
    return msgspec.json.encode(answer)


@functools.cache
def _decoder(kind: type[T]) -> msgspec.json.Decoder[T]:
    return msgspec.json.Decoder(kind)


def _explain(text: str, whole: str = "the body") -> str:
    """msgspec's sentence with the field first: "ram_mb: expected `int | null`, got `str`"."""
    match = _AT.match(text)
    what = match["what"] if match else text
    where = match["where"].removeprefix("$").removeprefix(".") if match else ""
    return f"{where or whole}: {what[:1].lower()}{what[1:]}"
