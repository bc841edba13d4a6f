"""Frames: the unit on the wire, and the decoder that finds them, and epoch markers, in a raw byte stream.

    offset  size  field
    0       1     kind      what the payload is (the constants below)
    1       1     channel   which of a stream's channels (0 towards the command, 1 and 2 from it); 0 otherwise
    2       2     zero
    4       4     stream    stream id, 0 for the connection itself; big-endian
    8       4     length    of the payload in bytes; big-endian
    12      n     payload
    12+n    1     0x0A      trailer

An epoch begins with a marker outside any frame: its nonce, 16 bytes of which none is 0x0A, from the end that begins
it, and the nonce backwards as the other end's answer (two forms, so that an answer is never answered). Since a frame
ends with 0x0A, no frame can end inside a marker: a frame that was cut off by a new epoch is never taken for a whole
one, however the bytes are chunked.
"""

from __future__ import annotations

import struct

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

HEADER = struct.Struct(">BBHII")
TRAILER = b"\n"
OVERHEAD = HEADER.size + len(TRAILER)

# A virtio port takes at most 32 KiB a write, and every write is an exit to the VMM: one data frame is one write.
MAX_DATA = 32 * 1024 - OVERHEAD
MAX_MESSAGE = 1024 * 1024
NONCE_SIZE = 16

CONTROL, OPEN, DATA, EOF, CREDIT, MESSAGE, CLOSE, RESET = range(1, 9)
KINDS = ("control", "open", "data", "eof", "credit", "message", "close", "reset")
_MAX_PAYLOAD = {
    CONTROL: MAX_MESSAGE,
    OPEN: MAX_MESSAGE,
    DATA: MAX_DATA,
    EOF: 0,
    CREDIT: 8,
    MESSAGE: MAX_MESSAGE,
    CLOSE: MAX_MESSAGE,
    RESET: MAX_MESSAGE,
}

# What both ends wait for on a machine's first boot, when no nonce has been handed over yet.
FIRST_NONCE = bytes.fromhex("c4a95e3d01ee5b1670b5e0ff9d8821d3")


class ProtocolError(Exception):
    """The peer sent something that the protocol does not allow."""


def make_nonce(token_bytes: Callable[[int], bytes]) -> bytes:
    """A fresh epoch nonce from a source of random bytes, `token_bytes(n) -> bytes`; the trailer's byte does not occur."""
    nonce = b""
    while len(nonce) < NONCE_SIZE:
        nonce += token_bytes(NONCE_SIZE).replace(TRAILER, b"")
    return nonce[:NONCE_SIZE]


def check_nonce(nonce: bytes) -> bytes:
    """Return `nonce` if it can mark an epoch; raises ProtocolError."""
    if len(nonce) != NONCE_SIZE or TRAILER in nonce:
        raise ProtocolError("bad epoch nonce")
    return nonce


class Frame:
    """One decoded frame."""

    __slots__ = ("channel", "kind", "payload", "stream")

    def __init__(self, kind: int, stream: int, channel: int, payload: bytes) -> None:
        self.kind = kind
        self.stream = stream
        self.channel = channel
        self.payload = payload

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Frame) and (self.kind, self.stream, self.channel, self.payload) == (
            other.kind,
            other.stream,
            other.channel,
            other.payload,
        )

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        kind = KINDS[self.kind - 1] if 0 < self.kind <= len(KINDS) else self.kind
        return f"Frame({kind}, stream={self.stream}, channel={self.channel}, {len(self.payload)} bytes)"


class Marker:
    """Stands among the frames where an epoch begins; `answer` when the peer answers ours."""

    __slots__ = ("answer", "nonce")

    def __init__(self, nonce: bytes, *, answer: bool) -> None:
        self.nonce = nonce
        self.answer = answer

    def __repr__(self) -> str:
        return f"Marker({self.nonce.hex()}, answer={self.answer})"


def answer_to(nonce: bytes) -> bytes:
    """The marker that answers `nonce`."""
    return nonce[::-1]


def encode(kind: int, stream: int = 0, channel: int = 0, payload: bytes | memoryview = b"") -> bytes:
    """One frame as bytes. Raises ProtocolError if the payload is over the limit of its kind."""
    if len(payload) > _MAX_PAYLOAD[kind]:
        raise ProtocolError(
            f"{KINDS[kind - 1]} frame of {len(payload)} bytes is over the limit of {_MAX_PAYLOAD[kind]}"
        )
    return b"".join((HEADER.pack(kind, channel, 0, stream, len(payload)), payload, TRAILER))


class FrameDecoder:
    """Turns received bytes into frames and epoch markers.

    It begins by hunting: everything is dropped up to a marker of one of the `nonces` it is armed with. From then on
    frames are expected, and markers are still looked for in the raw stream, so that a peer which was cut off in the
    middle of a frame can begin anew.
    """

    def __init__(self, *nonces: bytes, hunting: bool = True) -> None:
        self._buffer = bytearray()
        self._searched = 0  # bytes of the buffer already known to hold no marker (but for one begun at the end)
        self._markers: dict[bytes, Marker] = {}
        self._hunting = hunting
        self._awaited = 0  # how long the buffer has to be for the frame that it begins with; 0: not known
        self.arm(*nonces)

    def arm(self, *nonces: bytes) -> None:
        """Look for these nonces from here on, and for no other."""
        self._markers = {}
        for nonce in nonces:
            self._markers[check_nonce(nonce)] = Marker(nonce, answer=False)
            self._markers[answer_to(nonce)] = Marker(nonce, answer=True)
        self._searched = 0

    def hunt(self) -> None:
        """Drop everything, from what is buffered on, up to a marker: the way out after a ProtocolError."""
        self._hunting = True

    @property
    def hunting(self) -> bool:
        """Whether nothing counts but a marker."""
        return self._hunting

    @property
    def missing(self) -> int:
        """How many bytes of the frame that the buffer begins with are still to come; 0 when that is not known."""
        return max(0, self._awaited - len(self._buffer))

    def feed(self, data: bytes | bytearray | memoryview) -> Iterator[Frame | Marker]:
        """Take received bytes; return what is complete, found one by one as it is asked for.

        What the caller does with one (`arm`, `hunt`) holds for the next. Raises ProtocolError; then only `hunt` makes
        sense, and feeding nothing goes on with what is left.
        """
        self._buffer += data
        if len(self._buffer) < self._awaited and not self._hunting and self._find()[1] is None:
            return iter(())  # a port hands out an eighth of a frame at a time: the rest must not cost as much
        return self._items()

    def _items(self) -> Iterator[Frame | Marker]:
        while True:
            at, marker = self._find()
            if not self._hunting:
                frame = self._frame(at, final=marker is not None)
                if frame is not None:
                    self._drop(HEADER.size + len(frame.payload) + len(TRAILER))
                    yield frame
                    continue
            if marker is None:
                if self._hunting:
                    self._drop(max(0, len(self._buffer) - NONCE_SIZE + 1))
                return
            self._drop(at + NONCE_SIZE)
            self._hunting = False
            yield marker

    def _drop(self, size: int) -> None:
        del self._buffer[:size]
        self._awaited = 0
        self._searched = max(0, self._searched - size)

    def _find(self) -> tuple[int, Marker | None]:
        """The first marker in the buffer and where it is; without one, where the buffer ends."""
        start = max(0, self._searched - NONCE_SIZE + 1)
        first, marker = len(self._buffer), None
        for text, each in self._markers.items():
            at = self._buffer.find(text, start, first + NONCE_SIZE)
            if 0 <= at < first:
                first, marker = at, each
        self._searched = first
        return first, marker

    def _frame(self, end: int, *, final: bool) -> Frame | None:
        """The frame at the beginning of the buffer, if all of it is in the first `end` bytes.

        With `final`, a marker follows there and excuses what makes no sense.
        """
        buffer = self._buffer
        if end < HEADER.size:
            return None
        kind, channel, zero, stream, length = HEADER.unpack_from(buffer)
        size = HEADER.size + length + len(TRAILER)
        if zero or length > _MAX_PAYLOAD.get(kind, -1):
            error, wrong = f"bad frame header {bytes(buffer[: HEADER.size]).hex()}", HEADER.size
        elif end < size:
            self._awaited = size
            return None
        elif buffer[size - 1] != TRAILER[0]:
            error, wrong = "frame without its trailer", size
        else:
            return Frame(kind, stream, channel, bytes(memoryview(buffer)[HEADER.size : size - 1]))
        # What looks wrong may be a marker, begun no later than there, of which the rest is still to come.
        if not final and not self._marker_begins(wrong):
            raise ProtocolError(error)
        return None

    def _marker_begins(self, end: int) -> bool:
        """Whether the buffer ends with a part of a marker that begins before `end`."""
        size = len(self._buffer)
        tails = (bytes(self._buffer[start:]) for start in range(max(0, size - NONCE_SIZE + 1), min(size, end)))
        return any(text.startswith(tail) for tail in tails for text in self._markers)
