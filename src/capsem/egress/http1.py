"""Heads of HTTP/1.1, read strictly and always written anew.

No I/O, and total: any bytes are a head, or the beginning of one, or end in `BadHead`. What two programs could read in two ways
is refused: RFC 9112 allows some of it, smuggling lives on it. What h11 refuses, this refuses (a test says so), and more:
bodies are framed by exactly one Content-Length or by "Transfer-Encoding: chunked" alone.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import Enum
from typing import Final

from capsem.egress import hosts
from capsem.egress.heads import Header, Headers, RequestHead, ResponseHead

MAX_HEAD: Final = 64 * 1024
MAX_HEADERS: Final = 200

_FIELD: Final = re.compile(
    rb"([!#$%&'*+\-.^_`|~0-9A-Za-z]+):[ \t]*((?:[\x21-\x7e\x80-\xff](?:[\x20-\x7e\t\x80-\xff]*[\x21-\x7e\x80-\xff])?)?)[ \t]*"
)
_REQUEST: Final = re.compile(rb"([!#$%&'*+\-.^_`|~0-9A-Za-z]{1,32}) ([\x21-\x7e]+) HTTP/1\.([01])")
_STATUS: Final = re.compile(rb"HTTP/1\.([01]) ([1-9][0-9]{2})(?: ([\x20-\x7e\t\x80-\xff]*))?")
_ABSOLUTE: Final = re.compile(rb"(https?)://([^/?#]+)([/?].*)?", re.IGNORECASE)
_LENGTH: Final = re.compile(rb"[0-9]{1,18}")
_TOKEN: Final = re.compile(rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]+")
_BARE: Final = re.compile(rb"(?<!\r)\n|\r(?=[^\n])|\0")

# Of one connection, not of the message. What Connection names besides goes, too.
_HOP: Final = frozenset(
    {
        b"connection",
        b"keep-alive",
        b"proxy-connection",
        b"proxy-authorization",
        b"proxy-authenticate",
        b"te",
        b"transfer-encoding",
        b"upgrade",
        b"content-length",
    }
)
_KEPT: Final = frozenset({b"host"})  # whatever Connection says
_TELLING: Final = frozenset(
    {b"host", b"connection", b"content-length", b"transfer-encoding", b"upgrade", b"expect", b"te"}
)


class BadHead(Exception):
    """A head that is not taken: `status` is what to answer when it was a request's. The message is for a person."""

    def __init__(self, message: str, status: int = 400) -> None:
        super().__init__(message)
        self.status = status


class Body(Enum):
    """How a body ends, where its length is not known beforehand (then it is an int)."""

    CHUNKED = "chunked"
    CLOSE = "close"  # with the connection; answers only


Framing = int | Body


@dataclass(frozen=True, slots=True)
class Request:
    """A request and what its connection needs to know of it.

    `connect`: it asks for a tunnel to `head.authority`. `scheme` is that of an absolute form, None for another. `upgrade` is
    the protocol that the client wants to go on with, such as b"websocket". `expects`: it waits for 100 before it sends
    its body. `trailers`: it takes trailers.
    """

    head: RequestHead
    framing: Framing
    keep_alive: bool
    version: int = 1
    connect: bool = False
    scheme: bytes | None = None
    upgrade: bytes | None = None
    expects: bool = False
    trailers: bool = False


@dataclass(frozen=True, slots=True)
class Response:
    """An answer and what its connection needs to know of it. `upgrade`: see Request; of an answer of 101."""

    head: ResponseHead
    framing: Framing
    keep_alive: bool
    upgrade: bytes | None = None


class HeadReader:
    """Cuts heads out of what arrives. What follows one stays here until it is taken."""

    def __init__(self) -> None:
        self._data = bytearray()
        self._seen = 0  # no end of a head begins before this

    def __bool__(self) -> bool:
        return bool(self._data)

    def feed(self, data: bytes) -> None:
        """More bytes."""
        self._data += data

    def head(self) -> bytes | None:
        """The next whole head, with the empty line at its end; None: more is needed. Raises BadHead."""
        end = self._data.find(b"\r\n\r\n", self._seen)
        size = len(self._data) if end < 0 else end + 4
        if size > MAX_HEAD:
            raise BadHead(f"a head of more than {MAX_HEAD} bytes", 431)
        if end < 0:
            # A client that ends lines with LF alone would wait for ever: it is told at once.
            if _BARE.search(self._data, max(self._seen - 1, 0)):
                raise BadHead("a line of the head does not end with CR LF")
            self._seen = max(size - 3, 0)
            return None
        block = bytes(self._data[:size])
        del self._data[:size]
        self._seen = 0
        return block

    def peek(self) -> bytes:
        """All that is here."""
        return bytes(self._data)

    def rest(self) -> bytes:
        """All that came after the head: the beginning of a body, or of what is next."""
        data = bytes(self._data)
        self._data.clear()
        self._seen = 0
        return data


def fields(lines: list[bytes]) -> Headers:
    """The header fields (or trailers) in lines without their ends. Raises BadHead."""
    if len(lines) > MAX_HEADERS:
        raise BadHead(f"more than {MAX_HEADERS} header fields", 431)
    found: list[Header] = []
    match = _FIELD.fullmatch
    for line in lines:
        field = match(line)
        if field is None:
            raise BadHead(f"a malformed header field: {line[:80]!r}")
        found.append((field[1], field[2]))
    return Headers(found)


def _telling(headers: Headers) -> dict[bytes, list[bytes]]:
    """The values of the fields that matter here, found in one pass: this is done for every head."""
    found: dict[bytes, list[bytes]] = {}
    for name, value in headers:
        lower = name.lower()
        if lower in _TELLING:
            found.setdefault(lower, []).append(value)
    return found


def _tokens(values: list[bytes] | None) -> set[bytes]:
    return {token.strip(b" \t").lower() for value in values for token in value.split(b",")} if values else set()


def _framing(telling: dict[bytes, list[bytes]], version: int) -> Framing | None:
    """As the head says; None when it says nothing. Raises BadHead."""
    lengths, codings = telling.get(b"content-length"), telling.get(b"transfer-encoding")
    if codings:
        if lengths:
            raise BadHead("both Content-Length and Transfer-Encoding")
        if len(codings) != 1 or codings[0].lower() != b"chunked":
            raise BadHead(f"a Transfer-Encoding other than chunked: {b', '.join(codings)[:80]!r}", 501)
        if version == 0:
            raise BadHead("Transfer-Encoding in HTTP/1.0")
        return Body.CHUNKED
    if not lengths:
        return None
    if len(lengths) != 1 or not _LENGTH.fullmatch(lengths[0]):
        raise BadHead(f"not one plain Content-Length: {b', '.join(lengths)[:80]!r}")
    return int(lengths[0])


def _upgrade(telling: dict[bytes, list[bytes]], connection: set[bytes]) -> bytes | None:
    """The protocol to change to, if it is one that we let pass; others are left out, as a proxy may."""
    values = telling.get(b"upgrade")
    if values is None or b"upgrade" not in connection:
        return None
    if len(values) != 1 or not re.fullmatch(rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]+(/[0-9.]+)?", values[0]):
        return None
    name = values[0].lower()
    return None if name.startswith((b"h2c", b"http/", b"tls/")) else name


def parse_request(block: bytes) -> Request:
    """A whole head, as HeadReader gives it. Raises BadHead."""
    first, *lines = block[:-4].split(b"\r\n")
    line = _REQUEST.fullmatch(first)
    if line is None:
        if first.startswith(b"PRI * HTTP/2"):
            raise BadHead("HTTP/2 was not agreed upon here: its preface is no request", 505)
        raise BadHead(f"a malformed request line: {first[:80]!r}")
    method, target, version = line[1], line[2], int(line[3])
    headers = fields(lines)
    telling = _telling(headers)
    hosts_named = telling.get(b"host", [])
    if len(hosts_named) != 1:
        raise BadHead(f"{len(hosts_named)} Host headers; there must be one")
    authority, scheme = hosts_named[0].lower(), None
    connect = method == b"CONNECT"
    if connect:
        authority = target.lower()
    elif target[0] != b"/"[0]:
        absolute = _ABSOLUTE.fullmatch(target)
        if absolute is not None:
            scheme, authority = absolute[1].lower(), absolute[2].lower()
            target = absolute[3] or b"/"
            target = target if target.startswith(b"/") else b"/" + target
        elif target != b"*" or method != b"OPTIONS":
            raise BadHead(f"a malformed request target: {target[:80]!r}")
    if b"#" in target:
        raise BadHead("a fragment in the request target")
    for named in (hosts_named[0].lower(), authority):
        if hosts.split_authority(named) is None:
            raise BadHead(f"a malformed host: {named[:80]!r}")
    connection = _tokens(telling.get(b"connection"))
    framing = _framing(telling, version)
    if connect and framing:
        raise BadHead("a body in CONNECT")
    return Request(
        RequestHead(method, target, headers, authority),
        framing or 0,
        keep_alive=b"close" not in connection and (version == 1 or b"keep-alive" in connection),
        version=version,
        connect=connect,
        scheme=scheme,
        upgrade=_upgrade(telling, connection) if version == 1 else None,
        expects=version == 1 and b"100-continue" in _tokens(telling.get(b"expect")),
        trailers=b"trailers" in _tokens(telling.get(b"te")),
    )


def parse_response(block: bytes, method: bytes) -> Response:
    """The head of an answer to a request with that method. Raises BadHead."""
    first, *lines = block[:-4].split(b"\r\n")
    line = _STATUS.fullmatch(first)
    if line is None:
        raise BadHead(f"a malformed status line: {first[:80]!r}")
    version, status = int(line[1]), int(line[2])
    headers = fields(lines)
    telling = _telling(headers)
    connection = _tokens(telling.get(b"connection"))
    framing = _framing(telling, version)
    if status < 200 or status in (204, 304) or method == b"HEAD":
        framing = 0
    elif framing is None:
        framing = Body.CLOSE
    return Response(
        ResponseHead(status, line[3] or b"", headers),
        framing,
        keep_alive=framing is not Body.CLOSE
        and b"close" not in connection
        and (version == 1 or b"keep-alive" in connection),
        upgrade=_upgrade(telling, connection) if status == 101 else None,
    )


def _end_to_end(headers: Headers, *more: bytes) -> list[bytes]:
    """The lines of those that are meant for the other end, without `more`."""
    kept, named = [], None
    for name, value in headers:
        lower = name.lower()
        if lower not in _HOP:
            if lower not in more:
                kept.append((lower, b"%b: %b" % (name, value)))
        elif lower == b"connection":
            named = (named or set()) | _tokens([value])
    unwanted = named - _KEPT if named else ()
    return [line for lower, line in kept if lower not in unwanted]


def _write(first: bytes, lines: list[bytes], more: list[bytes]) -> bytes:
    return b"\r\n".join((first, *lines, *more, b"\r\n"))


def _framing_lines(framing: Framing) -> list[bytes]:
    if framing is Body.CHUNKED:
        return [b"Transfer-Encoding: chunked"]
    return [] if framing is Body.CLOSE else [b"Content-Length: %d" % framing]


def write_request(
    request: Request, *, framing: Framing | None = None, absolute: bytes = b"", extra: list[bytes] | None = None
) -> bytes:
    """The head as it goes to an origin. `framing` replaces its own; `absolute` ("http://host") makes the target absolute, for a
    proxy that is to be asked, `extra` are more lines for that."""
    head = request.head
    framing = request.framing if framing is None else framing
    more = list(extra or ())
    if framing or head.headers.get(b"content-length") is not None:
        more += _framing_lines(framing)
    if request.trailers:
        more.append(b"TE: trailers")
    connection = [b"TE"] if request.trailers else []
    if request.upgrade is not None:
        more.append(b"Upgrade: " + request.upgrade)
        connection.append(b"Upgrade")
    if connection:
        more.append(b"Connection: " + b", ".join(connection))
    return _write(b"%b %b%b HTTP/1.1" % (head.method, absolute, head.target), _end_to_end(head.headers), more)


def write_response(response: Response, *, method: bytes, framing: Framing, keep_alive: bool) -> bytes:
    """The head as it goes to the client of a request with that method, which speaks at least HTTP/1.0."""
    head = response.head
    more: list[bytes] = []
    if head.status == 101:
        more = [b"Connection: Upgrade", b"Upgrade: " + (response.upgrade or b"")]
    elif head.status >= 200:
        if method == b"HEAD" or head.status == 304:
            length = head.headers.get(b"content-length")
            more = [b"Content-Length: " + length] if length is not None else []
        elif head.status != 204:
            more = _framing_lines(framing)
        more.append(b"Connection: keep-alive" if keep_alive else b"Connection: close")
    return _write(b"HTTP/1.1 %d %b" % (head.status, head.reason), _end_to_end(head.headers, b"alt-svc"), more)
