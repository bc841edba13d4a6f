"""Frames, the unit on the wire, and the markers between them where an epoch begins; decoder.py finds both.

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

A data frame is meant to be read piece by piece as it comes, and may be long: each costs the ends the same, whatever is
in it.
"""

from __future__ import annotations

import struct

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

HEADER = struct.Struct(">BBHII")
TRAILER = b"\n"
OVERHEAD = HEADER.size + len(TRAILER)

MAX_DATA = 256 * 1024
# A virtio port takes at most 32 KiB a write, and every write is an exit to the VMM: this much data is one write. It is
# also the most that an end of the first version takes.
ONE_WRITE = 32 * 1024 - OVERHEAD
MAX_MESSAGE = 1024 * 1024
NONCE_SIZE = 16

CONTROL, OPEN, DATA, EOF, CREDIT, MESSAGE, CLOSE, RESET = range(1, 9)
KINDS = ("control", "open", "data", "eof", "credit", "message", "close", "reset")
LIMITS = {
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
    """One decoded frame, or of a data frame a piece."""

    __slots__ = ("channel", "kind", "payload", "stream")

    def __init__(self, kind: int, stream: int, channel: int, payload: bytes | memoryview) -> None:
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
    if len(payload) > LIMITS[kind]:
        raise ProtocolError(f"{KINDS[kind - 1]} frame of {len(payload)} bytes is over the limit of {LIMITS[kind]}")
    return b"".join((HEADER.pack(kind, channel, 0, stream, len(payload)), payload, TRAILER))
