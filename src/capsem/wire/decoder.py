"""Finds frames, and epoch markers, in a raw byte stream (frames.py says what they look like).

Messages are handed on whole. The payload of a data frame is handed on as it comes, without a copy, in pieces: a frame
may be far longer than what a port delivers at a time. Bytes that may be the beginning of a marker wait until it is
known whether they are: of a frame that a new epoch cut off nothing is ever handed on but what was meant to be in it.
"""

from __future__ import annotations

from capsem.wire.frames import (
    DATA,
    HEADER,
    LIMITS,
    NONCE_SIZE,
    TRAILER,
    Frame,
    Marker,
    ProtocolError,
    answer_to,
    check_nonce,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator


class FrameDecoder:
    """Turns received bytes into frames and epoch markers.

    It begins by hunting: everything is dropped up to a marker of one of the `nonces` it is armed with. From then on
    frames are expected, and markers are still looked for in the raw stream, so that a peer which was cut off in the
    middle of a frame can begin anew.
    """

    def __init__(self, *nonces: bytes, hunting: bool = True) -> None:
        self._chunk: bytes | bytearray = b""  # what is being decoded, from _at to _size; the caller's, or our own
        self._at = self._size = 0
        self._own = False  # whether the chunk may grow
        self._searched = 0  # no marker begins before this in the chunk, but one of which the rest is still to come
        self._found: tuple[int, Marker | None] | None = None  # the first marker, where it is looked up already
        self._markers: dict[bytes, Marker] = {}
        self._nonces: tuple[bytes, ...] = ()
        self._announced: set[bytes] = set()
        self._hunting = hunting
        self._awaited = 0  # how many bytes the frame at _at takes, where some are still to come; 0: not known
        self._data: tuple[int, int] | None = None  # stream and channel of the data frame that is under way
        self._left = 0  # bytes of its payload that are still to come
        self.arm(*nonces)

    def arm(self, *nonces: bytes) -> None:
        """Look for these nonces in what has not been handed on yet, and for no other."""
        self._nonces = tuple(check_nonce(nonce) for nonce in nonces)
        self._announced &= set(nonces)
        self._look()

    def announced(self, nonce: bytes) -> None:
        """This end begins an epoch: look for the answer, too. To what was not announced none comes, and every marker that
        is looked for costs."""
        self._announced.add(nonce)
        self._look()

    def _look(self) -> None:
        self._markers = {nonce: Marker(nonce, answer=False) for nonce in self._nonces}
        for nonce in self._announced:
            self._markers[answer_to(nonce)] = Marker(nonce, answer=True)
        self._searched = self._at
        self._found = None

    def hunt(self) -> None:
        """Drop everything, from what is buffered on, up to a marker: the way out after a ProtocolError."""
        self._hunting, self._data, self._awaited = True, None, 0

    @property
    def hunting(self) -> bool:
        """Whether nothing counts but a marker."""
        return self._hunting

    @property
    def missing(self) -> int:
        """How many bytes of the frame that is under way are still to come; 0 when that is not known."""
        if self._data is not None:
            return self._left + len(TRAILER)
        return max(0, self._awaited - (self._size - self._at))

    @property
    def buffered(self) -> int:
        """How many bytes wait for those that come after them."""
        return self._size - self._at

    def feed(self, data: bytes | bytearray, size: int | None = None) -> Iterator[Frame | Marker]:
        """Take received bytes, the first `size` of `data`; return what they complete, found one by one as it is asked for.

        What the caller does with one (`arm`, `hunt`) holds for the next. Payloads of data frames are views of `data`:
        whoever writes to that again must be done with them. Raises ProtocolError; then only `hunt` makes sense, and
        feeding nothing goes on with what is left.
        """
        size = len(data) if size is None else size
        if self._at == self._size:
            self._chunk, self._at, self._size, self._own, self._searched = data, 0, size, False, 0
        elif size:
            rest = self._chunk if self._own else self._keep()
            assert isinstance(rest, bytearray)
            rest += data if size == len(data) else memoryview(data)[:size]
            self._size = len(rest)
        self._found = None
        if self._size - self._at < self._awaited and not self._hunting and self._find()[1] is None:
            return iter(())  # a port hands out a little of a long message at a time: the rest must not cost as much
        return self._items()

    def _keep(self) -> bytearray:
        """What is left of the chunk, as a chunk of our own."""
        rest = bytearray(memoryview(self._chunk)[self._at : self._size])
        self._searched = max(0, self._searched - self._at)
        self._chunk, self._at, self._size, self._own, self._found = rest, 0, len(rest), True, None
        return rest

    def _items(self) -> Iterator[Frame | Marker]:
        self._own = False  # there may be views of it from here on
        while True:
            at, marker = self._find()
            if not self._hunting:
                frame = self._frame(at, final=marker is not None)
                if frame is not None:
                    yield frame
                    continue
            if marker is None:
                break
            self._at = at + NONCE_SIZE
            self._hunting, self._data, self._awaited, self._found = False, None, 0, None
            yield marker
        if self._hunting:
            self._at = max(self._at, self._size - NONCE_SIZE + 1)
        if self._at < self._size:
            self._keep()

    def _find(self) -> tuple[int, Marker | None]:
        """The first marker in the chunk and where it is; without one, where the chunk ends."""
        if self._found is None:
            start = max(self._at, self._searched - NONCE_SIZE + 1)
            first, marker = self._size, None
            for text, each in self._markers.items():
                at = self._chunk.find(text, start, min(first + NONCE_SIZE, self._size))
                if 0 <= at < first:
                    first, marker = at, each
            self._searched = first
            self._found = first, marker
        return self._found

    def _clear(self) -> int:
        """Where in the chunk a marker may begin of which the rest is still to come; without any, where the chunk ends."""
        first = max(self._at, self._size - NONCE_SIZE + 1)
        tail = bytes(self._chunk[first : self._size])
        clear = len(tail)
        for text in self._markers:
            at = tail.find(text[:1])
            while 0 <= at < clear:
                if text.startswith(tail[at:]):
                    clear = at
                at = tail.find(text[:1], at + 1)
        return first + clear

    def _frame(self, end: int, *, final: bool) -> Frame | None:
        """What can be handed on of the frame that the chunk goes on with, of which it holds the bytes before `end`.

        With `final`, a marker follows there and excuses what makes no sense.
        """
        while True:
            if self._data is None:
                frame = self._head(end, final=final)
                if frame is not None or self._data is None:
                    return frame
            if self._left:
                size = min(self._left, (end if final else self._clear()) - self._at)
                if size <= 0:
                    return None
                stream, channel = self._data
                piece = memoryview(self._chunk)[self._at : self._at + size]
                self._at += size
                self._left -= size
                return Frame(DATA, stream, channel, piece)
            if self._at >= end:
                return None
            if self._chunk[self._at] != TRAILER[0]:
                self._wrong("frame without its trailer", 1, final=final)
                return None
            self._at += 1
            self._data = None

    def _head(self, end: int, *, final: bool) -> Frame | None:
        """A whole message; None where a data frame begins, and `_data` says of what, and for what is not whole yet."""
        at, have = self._at, end - self._at
        if have < HEADER.size:
            return None
        kind, channel, zero, stream, length = HEADER.unpack_from(self._chunk, at)
        if zero or length > LIMITS.get(kind, -1):
            self._wrong(f"bad frame header {bytes(self._chunk[at : at + HEADER.size]).hex()}", HEADER.size, final=final)
            return None
        if kind == DATA and length:
            if not final and self._clear() < at + HEADER.size:  # the header's end may be a marker's beginning
                return None
            self._at += HEADER.size
            self._data, self._left = (stream, channel), length
            return None
        size = HEADER.size + length + len(TRAILER)
        if have < size:
            self._awaited = size
            return None
        if self._chunk[at + size - 1] != TRAILER[0]:
            self._wrong("frame without its trailer", size, final=final)
            return None
        self._awaited = 0
        self._at += size
        return Frame(kind, stream, channel, bytes(memoryview(self._chunk)[at + HEADER.size : at + size - 1]))

    def _wrong(self, error: str, size: int, *, final: bool) -> None:
        """The next `size` bytes make no sense. Raises ProtocolError, unless a marker begins in them, as far as it has come."""
        if not final and self._clear() >= self._at + size:
            raise ProtocolError(error)
