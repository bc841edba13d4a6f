"""Bodies of HTTP/1.1 as they arrive: what is in them, where they end, and how they are written. No I/O, and total."""

from __future__ import annotations

import re
from typing import Final

from capsem.egress.heads import Headers
from capsem.egress.http1 import BadHead, Body, Framing, fields

_SIZE: Final = re.compile(rb"([0-9a-fA-F]{1,15})(?:[ \t]*;[\t\x20-\x7e\x80-\xff]*)?")
_MAX_SIZE_LINE: Final = 1024
_MAX_TRAILERS: Final = 8 * 1024
# Fields that decide how a message is read, or where it goes: they mean nothing after it.
_NOT_IN_TRAILERS: Final = (
    b"transfer-encoding",
    b"content-length",
    b"host",
    b"trailer",
    b"connection",
    b"te",
    b"upgrade",
    b"alt-svc",
)


class BodyReader:
    """Takes what follows a head. `rest` is what came after the body, once that is whole."""

    def __init__(self, framing: Framing) -> None:
        self.framing = framing
        self._done = framing == 0
        self.rest = b""
        self.trailers = Headers()
        self._left = framing if isinstance(framing, int) else 0  # of the body, or of a chunk
        self._buffer = b""  # the beginning of a size line or of trailers
        self._step = self._size

    def whole(self) -> bool:
        """Whether the body has ended."""
        return self._done

    def feed(self, data: bytes) -> bytes:
        """More bytes: what of them is content. Raises BadHead."""
        assert not self._done
        if self.framing is Body.CLOSE:
            return data
        if self.framing is Body.CHUNKED:
            return self._chunks(data)
        if len(data) < self._left:
            self._left -= len(data)
            return data
        self._done, self.rest = True, data[self._left :]
        return data[: self._left] if self.rest else data

    def eof(self) -> None:
        """No more will come. Raises BadHead when more should have."""
        if self.framing is Body.CLOSE:
            self._done = True
        if not self._done:
            raise BadHead("the connection ended in the middle of a body")

    def _chunks(self, data: bytes) -> bytes:
        found: list[bytes] = []
        if self._buffer:
            data, self._buffer = self._buffer + data, b""
        at = 0
        while not self._done:
            if self._left:
                piece = data[at : at + self._left]
                if not piece:
                    break
                found.append(piece)
                at += len(piece)
                self._left -= len(piece)
                if not self._left:
                    self._step = self._end
                continue
            next_at = self._step(data, at)
            if next_at is None:
                self._buffer = data[at:]
                break
            at = next_at
        else:
            self.rest = data[at:]
        return found[0] if len(found) == 1 else b"".join(found)

    def _line(self, data: bytes, at: int, limit: int) -> bytes | None:
        """The line that begins there, without its end; None: more is needed."""
        end = data.find(b"\n", at, at + limit + 2)
        if end < 0:
            if len(data) - at > limit:
                raise BadHead("a line of a chunked body is too long")
            return None
        if end == at or data[end - 1 : end] != b"\r":
            raise BadHead("a line of a chunked body does not end with CR LF")
        return data[at : end - 1]

    def _size(self, data: bytes, at: int) -> int | None:
        line = self._line(data, at, _MAX_SIZE_LINE)
        if line is None:
            return None
        match = _SIZE.fullmatch(line)
        if match is None:
            raise BadHead(f"a malformed size of a chunk: {line[:40]!r}")
        self._left = int(match[1], 16)
        if not self._left:
            self._step = self._trailers
        return at + len(line) + 2

    def _end(self, data: bytes, at: int) -> int | None:
        end = data[at : at + 2]
        if not b"\r\n".startswith(end):
            raise BadHead("a chunk is longer than its size")
        if len(end) < 2:
            return None
        self._step = self._size
        return at + 2

    def _trailers(self, data: bytes, at: int) -> int | None:
        start, lines = at, []
        while True:
            line = self._line(data, at, _MAX_TRAILERS)
            if line is None:
                if len(data) - start > _MAX_TRAILERS:
                    raise BadHead("trailers are too long", 431)
                return None
            at += len(line) + 2
            if not line:
                break
            lines.append(line)
        if at - start > _MAX_TRAILERS:
            raise BadHead("trailers are too long", 431)
        self.trailers = fields(lines).without(*_NOT_IN_TRAILERS)
        self._done = True
        return at


def chunk(data: bytes) -> bytes:
    """One chunk; b"" would end the body and must not be asked for."""
    assert data
    return b"%x\r\n%b\r\n" % (len(data), data)


def last_chunk(trailers: Headers = Headers()) -> bytes:  # noqa: B008 - a tuple
    """The end of a chunked body."""
    return b"".join((b"0\r\n", *(b"%b: %b\r\n" % each for each in trailers), b"\r\n"))
