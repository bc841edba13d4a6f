"""HTTP/1.1 as far as our own service speaks it, without any I/O: a request as bytes, an answer from bytes.

`http.client` would do, but importing it (it brings the e-mail package) takes a third of what `capsem list` may take
as a whole process. What is here is the small part of RFC 9112 that is needed with one request on a connection.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

HEAD_LIMIT: Final = 64 * 1024
_LINE_LIMIT: Final = 4096


class BadAnswer(Exception):
    """What came is not an HTTP answer, or was cut off."""


def encode_head(method: str, path: str, headers: Mapping[str, str]) -> bytes:
    """The head of a request; `path` is percent-encoded already. The connection is for this request alone."""
    lines = [f"{method} {path} HTTP/1.1", "Host: capsem", "Connection: close"]
    lines += (f"{key}: {value}" for key, value in headers.items())
    return ("\r\n".join(lines) + "\r\n\r\n").encode("ascii")


def encode_chunk(data: bytes) -> bytes:
    """A piece of a body that is sent with `Transfer-Encoding: chunked`; the empty piece ends it."""
    return b"%x\r\n%b\r\n" % (len(data), data)


class Answer:
    """Takes in the bytes of one answer, in pieces of any size.

    `status` is 0 until the head is there; `headers` have lower-case keys. `feed` returns what came of the body;
    `done` tells that this was all.
    """

    def __init__(self) -> None:
        self.status = 0
        self.headers: dict[str, str] = {}
        self.done = False
        self._buffer = bytearray()
        self._chunked = False
        self._left: int | None = None  # bytes of the body, or of the present chunk, to come; None: up to the end
        self._trailer = False

    def feed(self, data: bytes) -> bytes:
        """Take received bytes, return those of the body. Raises BadAnswer; then there is no going on."""
        self._buffer += data
        if not self.status and not self._read_head():
            return b""
        if self._chunked:
            return self._read_chunks()
        return self._read_plain()

    def eof(self) -> None:
        """The peer has closed. Raises BadAnswer if something was still to come."""
        if not self.done and (not self.status or self._chunked or self._left is not None):
            raise BadAnswer("the connection was closed in the middle of the answer")
        self.done = True

    def _read_head(self) -> bool:
        while True:
            end = self._buffer.find(b"\r\n\r\n")
            if end < 0:
                if len(self._buffer) > HEAD_LIMIT:
                    raise BadAnswer("the head of the answer does not end")
                return False
            lines = bytes(self._buffer[:end]).decode("latin-1").split("\r\n")
            del self._buffer[: end + 4]
            status = _status(lines[0])
            if status >= 200:
                break  # what comes with 1xx is not the answer yet
        for line in lines[1:]:
            key, colon, value = line.partition(":")
            if not colon:
                raise BadAnswer(f"bad header {line[:80]!r}")
            self.headers[key.strip().lower()] = value.strip()
        self.status = status
        self._chunked = "chunked" in self.headers.get("transfer-encoding", "").lower()
        if self._chunked:
            self._left = 0
        elif (length := self.headers.get("content-length")) is not None:
            self._left = _number(length, 10)
        elif status in (204, 304):
            self._left = 0
        return True

    def _read_plain(self) -> bytes:
        if self._left is None:
            body = bytes(self._buffer)
            self._buffer.clear()
            return body
        body = bytes(self._buffer[: self._left])
        del self._buffer[: self._left]
        self._left -= len(body)
        self.done = self._left == 0
        return body

    def _read_chunks(self) -> bytes:
        body = bytearray()
        while not self.done:
            if self._left:
                piece = self._buffer[: self._left]
                if not piece:
                    break
                del self._buffer[: self._left]
                body += piece
                self._left -= len(piece)
                if not self._left:
                    self._left = None  # its line end is still to come
                continue
            line = self._line()
            if line is None:
                break
            if self._trailer:
                self.done = not line
            elif self._left is None:
                if line:
                    raise BadAnswer("a chunk without its end")
                self._left = 0
            else:
                self._left = _number(line.partition(";")[0], 16)
                self._trailer = self._left == 0
        return bytes(body)

    def _line(self) -> str | None:
        end = self._buffer.find(b"\r\n", 0, _LINE_LIMIT)
        if end < 0:
            if len(self._buffer) >= _LINE_LIMIT:
                raise BadAnswer("a line that does not end")
            return None
        line = bytes(self._buffer[:end]).decode("latin-1")
        del self._buffer[: end + 2]
        return line


def _status(line: str) -> int:
    words = line.split(" ", 2)
    if len(words) < 2 or not words[0].startswith("HTTP/1.") or len(words[1]) != 3 or not words[1].isdecimal():
        raise BadAnswer(f"bad status line {line[:80]!r}")
    return _number(words[1], 10)


def _number(text: str, base: int) -> int:
    text = text.strip()
    if not text or not text.isascii() or not text.isalnum():
        raise BadAnswer(f"bad number {text[:80]!r} in the answer")
    try:
        return int(text, base)
    except ValueError as exc:
        raise BadAnswer(f"bad number {text[:80]!r} in the answer") from exc
