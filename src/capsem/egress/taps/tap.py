"""Listens to one call of a model and records it at its end."""

from __future__ import annotations

import datetime
import logging
from collections.abc import Callable
from typing import Final

from capsem.egress.events import ModelCall, Recorder
from capsem.egress.heads import Headers, ResponseHead
from capsem.egress.taps.arrays import Elements
from capsem.egress.taps.coding import Opener, Unreadable, opener
from capsem.egress.taps.found import Reader
from capsem.egress.taps.prices import Prices
from capsem.egress.taps.sse import Events
from capsem.egress.taps.values import decode, fields
from capsem.system import Clock

WHOLE: Final = 2 * 1024 * 1024  # bytes of a body that is looked at as a whole
ROOM: Final = 32 * 1024 * 1024  # bytes that all taps of a VM hold at once

log = logging.getLogger("capsem_process.taps")


class Room:
    """What all taps of a VM may hold together."""

    def __init__(self, size: int = ROOM) -> None:
        self._free = size

    def take(self, size: int) -> bool:
        """Whether there is so much; it is the caller's then. Less than nothing gives back."""
        if size > self._free:
            return False
        self._free -= size
        return True


class _Whole:
    """A body to be looked at when it is all there."""

    def __init__(self) -> None:
        self._pieces: list[bytes] = []
        self.held = 0
        self.dropped = 0

    def feed(self, chunk: bytes) -> list[bytes]:
        self.held += len(chunk)
        if self.held > WHOLE or self.dropped:
            self.dropped, self.held = 1, 0
            self._pieces.clear()
        else:
            self._pieces.append(chunk)
        return []

    def end(self) -> list[bytes]:
        return [] if self.dropped else [b"".join(self._pieces)]


class _Body:
    """One direction: what comes is opened, cut into parts and handed on. It goes deaf when it has to, and knows why."""

    def __init__(self, room: Room, parts: _Whole | Events | Elements, take: Callable[[bytes], None]) -> None:
        self._room = room
        self._parts = parts
        self._take = take
        self._opener: Opener | None = None
        self._reserved = 0
        self.deaf: str | None = None

    def open(self, headers: Headers) -> None:
        """The headers that come before it."""
        try:
            self._opener = opener(headers.get(b"content-encoding"))
        except Unreadable as error:
            self.deaf = str(error)

    def feed(self, chunk: bytes) -> None:
        """Bytes as they were on the way."""
        if self.deaf is not None or self._opener is None:
            return
        try:
            for piece in self._opener.feed(chunk):
                self._hand_on(self._parts.feed(piece))
                if not self._reserve():
                    raise Unreadable("too many calls are listened to at once")
        except Unreadable as error:
            self._stop(str(error))

    def end(self) -> None:
        """Nothing more comes."""
        if self.deaf is None:
            self._hand_on(self._parts.end())
            if self._parts.dropped:
                self.deaf = "a part of it was too long"

    def close(self) -> None:
        """Give up what it holds."""
        self._stop(self.deaf)

    def _hand_on(self, parts: list[bytes]) -> None:
        for part in parts:
            self._take(part)

    def _reserve(self) -> bool:
        if not self._room.take(self._parts.held - self._reserved):
            return False
        self._reserved = self._parts.held
        return True

    def _stop(self, why: str | None) -> None:
        self.deaf = why
        self._opener = None
        self._room.take(-self._reserved)
        self._reserved = 0
        self._parts = _Whole()


class ModelTap:
    """A Tap (parts.Tap). Whatever goes wrong in here is logged and ends the listening, never the call."""

    def __init__(
        self,
        call: ModelCall,
        reader: Reader,
        headers: Headers,
        recorder: Recorder,
        clock: Clock,
        prices: Prices,
        room: Room,
        *,
        in_elements: bool = False,
    ) -> None:
        """`call`: what is known when it begins; `headers` are the request's. `in_elements`: a streamed answer is a JSON array."""
        self._call = call
        self._reader = reader
        self._recorder = recorder
        self._clock = clock
        self._prices = prices
        self._room = room
        self._in_elements = in_elements
        self._began = clock.monotonic()
        self._broken = self._finished = False
        self._answer: _Body | None = None
        self._request = _Body(room, _Whole(), self._take_request)
        self._request.open(headers)

    def request_body(self, chunk: bytes) -> None:
        """A piece of the request."""
        self._safely(lambda: self._request.feed(chunk))

    def response(self, head: ResponseHead) -> None:
        """The answer begins; what comes before the last head is none."""
        if head.status >= 200 and self._answer is None:
            self._safely(lambda: self._begin(head))

    def response_body(self, chunk: bytes) -> None:
        """A piece of it."""
        if self._answer is not None:
            answer = self._answer
            self._safely(lambda: answer.feed(chunk))

    def finish(self) -> None:
        """That was all. A second call does nothing."""
        if self._finished:
            return
        self._finished = True
        self._safely(self._conclude)
        for body in (self._request, self._answer):
            if body is not None:
                body.close()
        self._call.duration = self._clock.monotonic() - self._began
        self._recorder.model(self._call)

    def _safely(self, do: Callable[[], None]) -> None:
        if self._broken:
            return
        try:
            do()
        except Exception:
            log.exception("a tap failed; the call goes on unheard")
            self._broken = True
            self._call.truncated = True
            self._call.note = "the tap failed; the log of the VM says how"

    @property
    def _succeeded(self) -> bool:
        return self._call.status_code is not None and self._call.status_code < 300

    # -- what it hears

    def _take_request(self, body: bytes) -> None:
        request = fields(body)
        self._reader.request(request)
        self._call.stream = self._call.stream or decode(request.get("stream", b"null")) is True

    def _begin(self, head: ResponseHead) -> None:
        self._call.status_code = head.status
        kind = (head.headers.get(b"content-type") or b"").split(b";")[0].strip().lower()
        if kind == b"text/event-stream":
            self._call.stream = True
            self._answer = _Body(self._room, Events(), self._take_piece)
        elif kind == b"application/json" and self._in_elements:
            self._answer = _Body(self._room, Elements(), self._take_piece)
        else:
            self._answer = _Body(self._room, _Whole(), self._take_whole)
        self._answer.open(head.headers)

    def _take_piece(self, data: bytes) -> None:
        if data != b"[DONE]":
            self._reader.piece(decode(data))

    def _take_whole(self, data: bytes) -> None:
        if self._succeeded:
            self._reader.whole(decode(data))

    # -- what is made of it

    def _conclude(self) -> None:
        self._request.end()
        if self._answer is not None:
            self._answer.end()
        call, found = self._call, self._reader.found
        call.model = found.model = found.model or found.asked
        call.input_tokens, call.output_tokens = found.input_tokens, found.output_tokens
        call.cache_read_tokens, call.cache_write_tokens = found.cache_read, found.cache_write
        call.thinking_tokens = found.thinking
        call.tools, call.responses = found.tools, found.responses
        notes = [self._deafness(), "more tools than are kept, or longer arguments" if found.crowded else None]
        call.truncated = any(notes)
        if self._succeeded:
            if not found.ended:
                notes.append("the answer broke off")
            elif found.input_tokens is None and not call.truncated:
                notes.append(self._reader.silence)
            day = datetime.datetime.fromtimestamp(call.time, datetime.UTC).date()
            call.cost_usd, call.price_date, why = self._prices.cost(call.provider, found, day)
            notes.append(why)
        call.note = "; ".join(note for note in notes if note) or None

    def _deafness(self) -> str | None:
        bodies = (("request", self._request), ("answer", self._answer))
        said = [
            f"the {name} was not read to its end: {body.deaf}"
            for name, body in bodies
            if body is not None and body.deaf
        ]
        return "; ".join(said) or None
