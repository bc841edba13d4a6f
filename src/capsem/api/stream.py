"""The frames of an exec stream, both directions, without any I/O; standard library only.

    offset  size  field
    0       1     channel
    1       4     length of the payload in bytes, big-endian, at most MAX_PAYLOAD
    5       n     payload

Client to service: first one REQUEST frame with the JSON of an ExecRequest, then the command's standard input as STDIN
frames; an empty STDIN frame, or the end of the body, is its end of file. Service to client: STDOUT and STDERR as they
are made (an empty frame says only that the command has begun), then as the last frame either RESULT (ExecResult) or
ERROR (CapsemError.to_dict), both JSON. CREDIT frames, anywhere before that, hold a 4-byte big-endian number of bytes
of standard input that have been used up: a client that keeps at most WINDOW bytes outstanding can never be held up
by a command that does not read, and so is always heard when it hangs up. A reader ignores channels it does not know.

RESIZE, client to service, holds two 2-byte numbers, rows and columns: the terminal that the command runs on has another
size. A forward stream is the same, with a ForwardRequest, a ForwardResult, and a connection in the command's place.
"""

from __future__ import annotations

import struct

from capsem.model.errors import InvalidInput

STDIN, STDOUT, STDERR, RESULT, ERROR, CREDIT, RESIZE = range(7)
REQUEST = RESULT  # the same number, the other direction

CONTENT_TYPE = "application/vnd.capsem.stream"
MAX_PAYLOAD = 1024 * 1024
CHUNK = 32 * 1024  # a good size for a piece of standard input
WINDOW = 256 * 1024  # bytes of standard input under way

_HEADER = struct.Struct(">BI")
_CREDIT = struct.Struct(">I")
_RESIZE = struct.Struct(">HH")


def encode(channel: int, payload: bytes | memoryview = b"") -> bytes:
    """`payload` as one frame, or as several if it is longer than MAX_PAYLOAD."""
    if len(payload) <= MAX_PAYLOAD:
        return _HEADER.pack(channel, len(payload)) + payload
    view = memoryview(payload)
    pieces = (view[at : at + MAX_PAYLOAD] for at in range(0, len(view), MAX_PAYLOAD))
    return b"".join(_HEADER.pack(channel, len(piece)) + piece for piece in pieces)


def encode_credit(size: int) -> bytes:
    """The frame that says that `size` bytes of standard input were used up."""
    return encode(CREDIT, _CREDIT.pack(size))


def decode_credit(payload: bytes) -> int:
    """What `encode_credit` was given. Raises InvalidInput."""
    if len(payload) != _CREDIT.size:
        raise InvalidInput("bad credit frame in the stream")
    return int(_CREDIT.unpack(payload)[0])


def encode_resize(rows: int, columns: int) -> bytes:
    """The frame that says what size the terminal has now."""
    return encode(RESIZE, _RESIZE.pack(min(rows, 0xFFFF), min(columns, 0xFFFF)))


def decode_resize(payload: bytes) -> tuple[int, int]:
    """What `encode_resize` was given. Raises InvalidInput."""
    if len(payload) != _RESIZE.size:
        raise InvalidInput("bad resize frame in the stream")
    rows, columns = _RESIZE.unpack(payload)
    return int(rows), int(columns)


class Decoder:
    """Turns received bytes, in pieces of any size, into frames."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    @property
    def partial(self) -> bool:
        """Whether the stream would be cut off in the middle of a frame if it ended here."""
        return bool(self._buffer)

    def feed(self, data: bytes) -> list[tuple[int, bytes]]:
        """The frames that are complete now, as (channel, payload). Raises InvalidInput; then the stream is lost."""
        buffer = self._buffer
        buffer += data
        found: list[tuple[int, bytes]] = []
        at = 0
        while len(buffer) - at >= _HEADER.size:
            channel, length = _HEADER.unpack_from(buffer, at)
            if length > MAX_PAYLOAD:
                raise InvalidInput(
                    f"a frame of {length} bytes in the stream", hint=f"at most {MAX_PAYLOAD} bytes are allowed in one"
                )
            end = at + _HEADER.size + length
            if end > len(buffer):
                break
            found.append((channel, bytes(memoryview(buffer)[at + _HEADER.size : end])))
            at = end
        del buffer[:at]
        return found
