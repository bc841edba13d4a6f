"""Questions of DNS and answers to them, as bytes (RFC 1035). No I/O, and total: any bytes are a question, or `BadQuery`."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from ipaddress import IPv4Address
from typing import Final

MAX_QUERY: Final = 1232  # bytes; what fits a datagram everywhere, and more than any question that we answer
_MAX_ANSWERS: Final = 16
_HEADER: Final = struct.Struct("!6H")
_RESPONSE, _AVAILABLE, _DESIRED, _CHECKING_OFF = 0x8000, 0x0080, 0x0100, 0x0010
_IN, _OPT = 1, 41
_OUR_SIZE: Final = 1232


class Code(IntEnum):
    """What an answer says of itself."""

    OK = 0
    FORMERR = 1
    SERVFAIL = 2
    NXDOMAIN = 3
    NOTIMP = 4
    REFUSED = 5


class Kind(IntEnum):
    """Types of records that somebody here has heard of."""

    A = 1
    NS = 2
    CNAME = 5
    SOA = 6
    PTR = 12
    MX = 15
    TXT = 16
    AAAA = 28
    SRV = 33
    SVCB = 64
    HTTPS = 65
    ANY = 255


class BadQuery(Exception):
    """No question that can be answered. `reply` is what to send, b"" for nothing."""

    def __init__(self, message: str, reply: bytes = b"") -> None:
        super().__init__(message)
        self.reply = reply


@dataclass(frozen=True, slots=True)
class Query:
    """One question. `name` is lower-case text without a final dot, as it was asked for; what is no host name in it is escaped
    (\\nnn). `kind` is the type's number, of the class IN. `raw` is the question as it was sent, to be repeated.
    """

    number: int
    name: str
    kind: int
    flags: int
    raw: bytes
    extended: bool

    @property
    def kind_name(self) -> str:
        """Such as "A"; "TYPE999" for one that nobody here has heard of."""
        return Kind(self.kind).name if self.kind in Kind._value2member_map_ else f"TYPE{self.kind}"


def parse(data: bytes) -> Query:
    """A question of a guest. Raises BadQuery."""
    if len(data) < _HEADER.size:
        raise BadQuery("shorter than a header")
    number, flags, questions, answers, authorities, additional = _HEADER.unpack_from(data)
    if flags & _RESPONSE:
        raise BadQuery("an answer, not a question")  # to answer answers would be to talk for ever
    if len(data) > MAX_QUERY:
        raise BadQuery(f"more than {MAX_QUERY} bytes", _error(number, flags, Code.FORMERR))
    if flags >> 11 & 0xF:
        raise BadQuery("not a plain question", _error(number, flags, Code.NOTIMP))
    malformed = _error(number, flags, Code.FORMERR)
    if questions != 1 or answers or authorities or additional > 1:
        raise BadQuery("not one question alone", malformed)
    try:
        name, at = _name(data, _HEADER.size)
        kind, family = struct.unpack_from("!2H", data, at)
        at += 4
        extended = additional == 1
        if extended:
            at = _opt(data, at)
    except (struct.error, IndexError, ValueError) as error:
        raise BadQuery(f"malformed: {error}", malformed) from error
    if at != len(data):
        raise BadQuery("something follows the question", malformed)
    query = Query(number, name, kind, flags, data[_HEADER.size : at if not extended else _end(data)], extended)
    if family != _IN:
        raise BadQuery("a class other than IN", answer(query, Code.REFUSED))
    return query


def _name(data: bytes, at: int) -> tuple[str, int]:
    """A name without pointers (a question, which is first, has nothing to point to), and where it ends."""
    labels: list[str] = []
    start = at
    while (length := data[at]) != 0:
        if length > 63:
            raise ValueError("a label of more than 63 bytes")
        label = data[at + 1 : at + 1 + length]
        if len(label) < length:
            raise ValueError("a label is cut off")
        labels.append(
            "".join(
                chr(each).lower() if 0x20 < each < 0x7F and each not in b".\\" else f"\\{each:03}" for each in label
            )
        )
        at += 1 + length
        if at - start > 254:
            raise ValueError("a name of more than 255 bytes")
    return ".".join(labels), at + 1


def _end(data: bytes) -> int:
    return _name(data, _HEADER.size)[1] + 4


def _opt(data: bytes, at: int) -> int:
    """Skip the record that says that the client knows EDNS."""
    if data[at] != 0:
        raise ValueError("an additional record with a name")
    kind, _, _, length = struct.unpack_from("!HHIH", data, at + 1)
    if kind != _OPT:
        raise ValueError("an additional record other than OPT")
    return at + 11 + int(length)


def _error(number: int, flags: int, code: Code) -> bytes:
    return _HEADER.pack(number, _RESPONSE | (flags & 0x7800) | (flags & _DESIRED) | code, 0, 0, 0, 0)


def answer(query: Query, code: Code, addresses: Sequence[str] = (), ttl: int = 0) -> bytes:
    """The answer: IPv4 addresses (16 of them at most), or none, which with OK means that there is nothing of that type."""
    flags = _RESPONSE | _AVAILABLE | (query.flags & (_DESIRED | _CHECKING_OFF)) | code
    records = [
        struct.pack("!HHHIH", 0xC000 | _HEADER.size, Kind.A, _IN, ttl, 4) + IPv4Address(each).packed
        for each in addresses[:_MAX_ANSWERS]
    ]
    opt = struct.pack("!BHHIH", 0, _OPT, _OUR_SIZE, 0, 0) if query.extended else b""
    head = _HEADER.pack(query.number, flags, 1, len(records), 0, 1 if opt else 0)
    return head + query.raw + b"".join(records) + opt
