"""The head of an HTTP message, as a value; what parses and writes it is `http1` and `http2`."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

Header = tuple[bytes, bytes]  # the name as it was sent, and the value without white space around it


class Headers(tuple[Header, ...]):
    """In the order in which they were sent; names compare without case."""

    __slots__ = ()

    def all(self, name: bytes) -> list[bytes]:
        """Every value of one name."""
        wanted = name.lower()
        return [value for each, value in self if each.lower() == wanted]

    def get(self, name: bytes) -> bytes | None:
        """The first value of a name, None if there is none."""
        values = self.all(name)
        return values[0] if values else None

    def without(self, *names: bytes) -> Headers:
        """All others."""
        unwanted = {name.lower() for name in names}
        return Headers(header for header in self if header[0].lower() not in unwanted)

    def plus(self, more: Iterable[Header]) -> Headers:
        """These, and more at the end."""
        return Headers((*self, *more))


@dataclass(frozen=True, slots=True)
class RequestHead:
    """`target` in origin form ("/path?query", or "*"), whatever form it came in; `authority` is the host and port that the
    request names (Host, :authority, absolute form), lower-case, b"" if none. `secrets` are the names of those whose values the
    broker has put in: for the record, never sent."""

    method: bytes
    target: bytes
    headers: Headers
    authority: bytes = b""
    secrets: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class ResponseHead:
    """An answer's, 1xx ones too."""

    status: int
    reason: bytes
    headers: Headers
