"""The first message of a TLS client, read before any certificate exists: which name it wants, and what it speaks.

No I/O, and total: any bytes, whole or one at a time, are a hello, or a part of one, or end in `HelloError`. The layout is that
of RFC 8446, 4.1.2 and 5.1; ECH is RFC 9849.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from capsem.egress import hosts

FIRST_BYTE: Final = 0x16  # a handshake record; no HTTP method begins like that

MAX_HELLO: Final = 64 * 1024  # bytes of the message; post-quantum key shares make about 2 KiB of it
_MAX_RAW: Final = 2 * MAX_HELLO  # with record headers, of which a client may send more than it needs
_MAX_RECORD: Final = 16 * 1024
_CLIENT_HELLO: Final = 1
_SERVER_NAME, _ALPN, _ECH = 0x0000, 0x0010, 0xFE0D


class HelloError(Exception):
    """This is no ClientHello that we take; the message says what is wrong with it."""


@dataclass(frozen=True, slots=True)
class Hello:
    """`sni` is lower-case and without a final dot, None when the client names no host; `alpn` in its order of preference.
    `ech`: it says that the true name is hidden in an encrypted part (or wants that to look possible)."""

    sni: str | None
    alpn: tuple[bytes, ...]
    ech: bool


class _Cursor:
    """Reads fields from bytes that may lie about their lengths."""

    __slots__ = ("_at", "_data", "_end")

    def __init__(self, data: bytes) -> None:
        self._data, self._at, self._end = data, 0, len(data)

    def __bool__(self) -> bool:
        return self._at < self._end

    def take(self, size: int) -> bytes:
        """Exactly that many bytes."""
        if self._end - self._at < size:
            raise HelloError("a field of the ClientHello is longer than what is around it")
        self._at += size
        return self._data[self._at - size : self._at]

    def number(self, size: int) -> int:
        """A big-endian number of that many bytes."""
        return int.from_bytes(self.take(size), "big")

    def vector(self, size: int) -> _Cursor:
        """A field whose length stands before it, in that many bytes."""
        return _Cursor(self.take(self.number(size)))

    def rest(self) -> bytes:
        """All that is left."""
        return self.take(self._end - self._at)


class HelloReader:
    """Takes bytes until there is a hello. `raw` is everything it was given: what speaks TLS next has to see it, too."""

    def __init__(self) -> None:
        self.raw = bytearray()
        self._message = bytearray()
        self._at = 0  # where the first record begins that is not in _message

    def feed(self, data: bytes) -> Hello | None:
        """More bytes; None when more are needed. Raises HelloError, again and again once it has."""
        self.raw += data
        while (record := self._record()) is not None:
            self._message += record
            if len(self._message) >= 4:
                if self._message[0] != _CLIENT_HELLO:
                    raise HelloError("the first TLS message is not a ClientHello")
                length = int.from_bytes(self._message[1:4], "big")
                if length > MAX_HELLO:
                    raise HelloError(f"a ClientHello of {length} bytes; {MAX_HELLO} are the limit")
                if len(self._message) > 4 + length:
                    raise HelloError("something follows the ClientHello before it was answered")
                if len(self._message) == 4 + length:
                    return parse(bytes(self._message[4:]))
        if len(self.raw) > _MAX_RAW:
            raise HelloError(f"no ClientHello in {len(self.raw)} bytes")
        return None

    def _record(self) -> bytes | None:
        """The payload of the next whole record."""
        header = self.raw[self._at : self._at + 5]
        if (header and header[0] != FIRST_BYTE) or (len(header) > 1 and header[1] != 3):
            raise HelloError("this is not a TLS handshake")
        if len(header) < 5:
            return None
        length = int.from_bytes(header[3:5], "big")
        if not 0 < length <= _MAX_RECORD:
            raise HelloError(f"a TLS record of {length} bytes in a ClientHello")
        end = self._at + 5 + length
        if len(self.raw) < end:
            return None
        payload = bytes(self.raw[self._at + 5 : end])
        self._at = end
        return payload


def parse(body: bytes) -> Hello:
    """The body of a ClientHello message. Raises HelloError."""
    cursor = _Cursor(body)
    cursor.take(2 + 32)  # version and random
    cursor.vector(1)  # session id
    if len(cursor.vector(2).rest()) % 2:
        raise HelloError("half a cipher suite in the ClientHello")
    if not cursor.vector(1):
        raise HelloError("no compression method in the ClientHello")
    sni: str | None = None
    alpn: tuple[bytes, ...] = ()
    ech = False
    seen: set[int] = set()
    extensions = cursor.vector(2) if cursor else _Cursor(b"")
    if cursor:
        raise HelloError("something follows the extensions of the ClientHello")
    while extensions:
        kind, content = extensions.number(2), extensions.vector(2)
        if kind in seen:
            raise HelloError(f"extension {kind} twice in the ClientHello")
        seen.add(kind)
        if kind == _SERVER_NAME:
            sni = _server_name(content)
        elif kind == _ALPN:
            alpn = _protocols(content)
        elif kind == _ECH:
            ech = True
    return Hello(sni, alpn, ech)


def _server_name(content: _Cursor) -> str | None:
    names = content.vector(2)
    if content:
        raise HelloError("something follows the server names of the ClientHello")
    found: str | None = None
    while names:
        if names.number(1) != 0:
            raise HelloError("a server name of an unknown kind in the ClientHello")
        if found is not None:
            raise HelloError("two server names in the ClientHello")
        found = names.vector(2).rest().decode("latin-1")
    if found is None:
        raise HelloError("an empty list of server names in the ClientHello")
    if hosts.address(found.removesuffix(".")):
        return None  # not allowed by RFC 6066, sent by some; there is no name in it
    name = hosts.host_name(found)
    if name is None:
        raise HelloError(f"the server name in the ClientHello is not a host name: {found[:80]!r}")
    return name


def _protocols(content: _Cursor) -> tuple[bytes, ...]:
    names = content.vector(2)
    if content or not names:
        raise HelloError("a malformed list of protocols in the ClientHello")
    found = []
    while names:
        name = names.vector(1).rest()
        if not name:
            raise HelloError("a protocol without a name in the ClientHello")
        found.append(name)
    return tuple(found)
