"""A checkpoint as one stream of bytes: what `capsem checkpoint export` writes. docs/checkpoint-export.md specifies it.

    "CAPSEM-CHECKPOINT 1\n", then frames: kind (1 byte), number (8), length (4), big-endian, and `length` bytes

    P  a part begins: its name; the number is its size
    D  data of the part, at the offset `number`; ascending. What is in no such frame is zero
    E  the part ends: SHA-256 of the whole stream up to this frame
    Z  the stream ends: the same

So a byte that changes on the way is noticed at the end of its part at the latest, and a stream that is cut off always.
No frame is longer than PIECE: either end needs little memory, however large the parts are.
"""

from __future__ import annotations

import hashlib
import os
import struct
from collections.abc import Iterable, Iterator
from typing import Final, NamedTuple

from capsem.model.errors import Corrupt
from capsem.store.ram import PAGE, data_extents

MAGIC: Final = b"CAPSEM-CHECKPOINT 1\n"
PIECE: Final = 1 << 20  # bytes
NAME_LIMIT: Final = 64
MANIFEST, DEVICES, JOBS, MEMORY = "manifest.json", "devices.state", "jobs.state", "memory.ram"

_FRAME: Final = struct.Struct(">cQI")
_DIGEST: Final = 32


class Source(NamedTuple):
    """A part to be sent: the first `size` bytes of an open file, which nobody changes."""

    name: str
    fd: int
    size: int


class Event(NamedTuple):
    """What a stream holds next: `kind` is P, D, E or Z; `number` a part's size or an offset; `data` a name or bytes."""

    kind: bytes
    number: int
    data: bytes


def layer_name(place: int) -> str:
    """The part that holds a layer, 0 the lowest."""
    return f"layer-{place}"


def encode(parts: Iterable[Source]) -> Iterator[bytes]:
    """The stream, piece by piece. Blocks. Raises OSError, Corrupt (a file is shorter than it should be)."""
    digest = hashlib.sha256(MAGIC)
    yield MAGIC

    def frame(kind: bytes, number: int, data: bytes) -> bytes:
        whole = _FRAME.pack(kind, number, len(data)) + data
        digest.update(whole)
        return whole

    for part in parts:
        yield frame(b"P", part.size, part.name.encode())
        for start, end in _extents(part):
            for offset in range(start, end, PIECE):
                wanted = min(PIECE, end - offset)
                data = os.pread(part.fd, wanted, offset)
                if len(data) != wanted:
                    raise Corrupt(f"{part.name} became shorter while it was read")
                yield frame(b"D", offset, data)
        yield frame(b"E", 0, digest.digest())
    yield frame(b"Z", 0, digest.digest())


def _extents(part: Source) -> Iterator[tuple[int, int]]:
    """Runs of whole pages in which there is data; runs that come to touch are not joined."""
    done = 0
    for start, end in data_extents(part.fd, part.size):
        first, last = max(done, start // PAGE * PAGE), min(-(-end // PAGE) * PAGE, part.size)
        if first < last:
            yield first, last
        done = max(done, last)


class Decoder:
    """Takes a stream apart. Anything that `encode` would not write raises Corrupt, and there is no going on."""

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._digest = hashlib.sha256()
        self._begun = self.done = False
        self._size = -1  # of the part that is being read; -1: between two
        self._at = 0  # where its next data may begin

    def feed(self, data: bytes) -> Iterator[Event]:
        """Yields what is complete. Raises Corrupt."""
        self._buffer += data
        if not self._begun:
            if not MAGIC.startswith(self._buffer[: len(MAGIC)]):
                raise _bad("it is no exported checkpoint, or one of another version")
            if len(self._buffer) < len(MAGIC):
                return
            self._begun = True
            self._take(len(MAGIC))
        while not self.done and len(self._buffer) >= _FRAME.size:
            kind, number, length = _FRAME.unpack_from(self._buffer)
            self._check(kind, number, length)
            if len(self._buffer) < _FRAME.size + length:
                break
            before = self._digest.digest() if kind in b"EZ" else b""
            payload = self._take(_FRAME.size + length)[_FRAME.size :]
            if kind in b"EZ" and payload != before:
                raise _bad("a digest is wrong: it is not what was written")
            yield self._event(kind, number, payload)
        if self.done and self._buffer:
            raise _bad("something follows its end")

    def finish(self) -> None:
        """No more will come. Raises Corrupt when it should have."""
        if not self.done:
            raise _bad("it is cut off")

    def _take(self, count: int) -> bytes:
        data = bytes(self._buffer[:count])
        del self._buffer[:count]
        self._digest.update(data)
        return data

    def _check(self, kind: bytes, number: int, length: int) -> None:
        """Is a frame with this head possible here?"""
        inside = self._size >= 0
        if kind == b"P":
            good = not inside and 0 < length <= NAME_LIMIT
        elif kind == b"D":
            good = inside and 0 < length <= PIECE and self._at <= number <= self._size - length
        elif kind == b"E":
            good = inside and number == 0 and length == _DIGEST
        else:
            good = kind == b"Z" and not inside and number == 0 and length == _DIGEST
        if not good:
            raise _bad("a frame is not of the kind that can come there")

    def _event(self, kind: bytes, number: int, data: bytes) -> Event:
        if kind == b"P":
            self._size, self._at = number, 0
        elif kind == b"D":
            self._at = number + len(data)
        elif kind == b"E":
            self._size = -1
        else:
            self.done = True
        return Event(kind, number, data)


def _bad(what: str) -> Corrupt:
    return Corrupt(f"this file cannot be imported: {what}", hint="export the checkpoint again; nothing was kept of it")
