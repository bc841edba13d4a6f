"""Texts put in the place of others, in heads and in bodies that come in chunks. No I/O; a body is never collected.

What is put in is written as the place wants it: percent-encoded in a query or a form, escaped in JSON, inside of the base64 of
Basic. What is masked is looked for in all of these forms.
"""

from __future__ import annotations

import base64
import binascii
import json
import re
from collections.abc import Callable, Mapping
from typing import Final
from urllib.parse import quote

BASIC: Final = re.compile(rb"(basic[ \t]+)([A-Za-z0-9+/_-]+={0,2})[ \t]*\Z", re.IGNORECASE)
SHORTEST_MASKED: Final = 8  # bytes of a secret; what is shorter turns up by chance

_LONGEST_BASIC: Final = 16 * 1024


def basic_credentials(value: bytes) -> tuple[bytes, bytes] | None:
    """What stands in front of, and in, a header's credentials of the scheme Basic; None where there are none."""
    if len(value) > _LONGEST_BASIC or (match := BASIC.match(value)) is None:
        return None
    text = match[2].rstrip(b"=").translate(bytes.maketrans(b"-_", b"+/"))
    try:
        return match[1], base64.b64decode(text + b"=" * (-len(text) % 4), validate=True)
    except binascii.Error:
        return None


def with_credentials(scheme: bytes, credentials: bytes) -> bytes:
    """The opposite."""
    return scheme + base64.b64encode(credentials)


def as_it_is(value: bytes) -> bytes:
    """For a header, and for bodies of no known form."""
    return value


def in_query(value: bytes) -> bytes:
    """For a query, and for a form."""
    return quote(value, safe="").encode()


def in_json(value: bytes) -> bytes:
    """For the inside of a string of JSON."""
    return json.dumps(value.decode("utf-8", "surrogateescape"))[1:-1].encode("utf-8", "surrogateescape")


def body_form(content_type: bytes | None) -> Callable[[bytes], bytes]:
    """How a value is written into a body of that type."""
    kind = (content_type or b"").split(b";")[0].strip().lower()
    if kind == b"application/x-www-form-urlencoded":
        return in_query
    if kind.endswith((b"/json", b"+json")):
        return in_json
    return as_it_is


def masks(value: bytes, placeholder: bytes) -> dict[bytes, bytes]:
    """Every form in which an answer may repeat a value, and what is shown instead: as long as it is, so that nothing has to
    be measured anew."""
    if len(value) < SHORTEST_MASKED:
        return {}
    forms = {form(value) for form in (as_it_is, in_query, in_json)}
    for offset in range(3):  # where it begins in a group of three bytes
        encoded = base64.b64encode(b"\0" * offset + value)
        first = -(-offset * 4 // 3)  # characters that are of something else, too
        forms.add(encoded[first : len(encoded) // 4 * 4 - (4 if (offset + len(value)) % 3 else 0)])
    return {form: _as_long(placeholder, len(form)) for form in forms if len(form) >= SHORTEST_MASKED}


def _as_long(text: bytes, size: int) -> bytes:
    return text[:size].ljust(size, b"*")


class Replacer:
    """Replaces texts by others in the first `limit` bytes of what passes, also where a chunk ends in the middle of one.

    It keeps back no more than what may be the beginning of one. Instead of another text there may be an exception: it is
    raised where the text turns up.
    """

    # No regular expressions here: their module would remember them, and with them the secrets, for as long as we live.

    def __init__(self, texts: Mapping[bytes, bytes | Exception], limit: int) -> None:
        self._texts = sorted(texts.items(), key=lambda item: -len(item[0]))  # one may begin like another
        self._left = limit
        self._kept = b""

    def __call__(self, chunk: bytes) -> bytes:
        """What is to pass instead; b"" is the end of it all."""
        if self._left <= 0:
            return chunk
        data, self._kept = self._kept + chunk, b""
        self._left -= len(chunk)
        if chunk and self._left > 0:
            place = self._beginning(data)
            data, self._kept = data[:place], data[place:]
        return self.whole(data)

    def whole(self, data: bytes) -> bytes:
        """All of a text, with others in it."""
        for text, instead in self._texts:
            if text in data:
                if isinstance(instead, Exception):
                    raise instead
                data = data.replace(text, instead)
        return data

    def _beginning(self, data: bytes) -> int:
        """Where the end of the data may be the beginning of a text that is not all there."""
        place = len(data)
        after = max(_last_end(data, text) for text, _ in self._texts)
        for text, _ in self._texts:
            at = data.find(text[:1], max(after, len(data) - len(text) + 1))
            while 0 <= at < place:
                if text.startswith(data[at:]):
                    place = at
                    break
                at = data.find(text[:1], at + 1)
        return place


def _last_end(data: bytes, text: bytes) -> int:
    """Where the last one of a text ends, counted as `bytes.replace` does; 0 where there is none."""
    end, at = 0, data.find(text)
    while at >= 0:
        end = at + len(text)
        at = data.find(text, end)
    return end
