"""Many streams on one connection, with flow control; bytes in, events out.

Flow control. Each channel of a stream has a window. The receiver grants it by *absolute* offset: a CREDIT frame says
"you may send up to byte N of this channel", so that a credit that is lost or repeated with an epoch does no harm. N is
what the application has consumed plus the window; a credit is sent when half the window has been used. Whoever expects
much may have a larger window than what both ends begin with.

Streams that a guest opens may be many, and what has come for each lies in the memory of the other end until it is consumed.
So their window is narrow at first, and grows with the first credit, as long as all of them together have no more than
`SHARED` bytes beyond that. A stream that stalls keeps what it has; the others go on, if more slowly once that is used up.

Order. What belongs to the connection (control messages, opening, credits, resets, messages on streams) goes out before
data. Data goes out one frame a stream in turn. The message that closes a stream waits until its data is out.

Sizes. How long a data frame may be depends on what the peer takes (`largest`). One that is too long for one write is
handed on in pieces, without a copy.

Versions. A request of a kind that this end does not know is a newer peer's: its stream is closed with `Failed`, and
nothing else happens.

Ids. The host opens odd streams, the guest even ones; an id is not used twice in an epoch.
"""

from __future__ import annotations

import struct
from collections import deque

from capsem.wire import frames
from capsem.wire.decoder import FrameDecoder
from capsem.wire.events import (
    Closed,
    CreditReceived,
    DataReceived,
    EndReceived,
    EpochStarted,
    Event,
    MessageReceived,
    Opened,
    ResetReceived,
)
from capsem.wire.frames import Frame, Marker, ProtocolError
from capsem.wire.messages import GUEST_STREAMS, MESSAGES, STREAMS, Failed
from capsem.wire.schema import Message, UnknownMessage, decode_message, encode_message

WINDOW = 256 * 1024  # bytes a channel may have under way; egress.md section 3 has the measurement
BULK_WINDOW = 1024 * 1024  # and one that carries a file: about what passes while the two ends hear of each other
NARROW = 64 * 1024  # at first, where there may be many
SHARED = 16 * 1024 * 1024  # bytes beyond that, for all of them together
MAX_STREAMS = 1024
CHANNELS = 3
_OFFSET = struct.Struct(">Q")

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


class _Out:
    __slots__ = ("end", "end_sent", "limit", "queue", "queued", "sent", "source")

    def __init__(self, window: int) -> None:
        self.queue: deque[memoryview] = deque()
        self.queued = 0  # bytes in the queue
        self.source: Callable[[int], bytes | memoryview] | None = None  # of what comes after it
        self.sent = 0  # offset of the first byte not yet sent
        self.limit = window
        self.end = False
        self.end_sent = False


class _In:
    __slots__ = ("consumed", "ended", "limit", "received", "shared", "window")

    def __init__(self, window: int) -> None:
        self.received = 0
        self.consumed = 0
        self.limit = self.window = window
        self.shared = 0  # bytes of the window that are taken from what all have
        self.ended = False


class _Stream:
    __slots__ = ("closing", "id", "incoming", "outgoing", "request", "waits", "window")

    def __init__(self, stream: int, request: Message) -> None:
        self.id = stream
        self.request = request
        self.outgoing: dict[int, _Out] = {}
        self.incoming: dict[int, _In] = {}
        self.closing: bytes | None = None
        self.waits = False  # for its turn to send
        self.window = NARROW if isinstance(request, GUEST_STREAMS) else WINDOW  # at first

    def out(self, channel: int) -> _Out:
        out = self.outgoing.get(channel)
        if out is None:
            out = self.outgoing[channel] = _Out(self.window)
        return out

    def into(self, channel: int) -> _In:
        into = self.incoming.get(channel)
        if into is None:
            into = self.incoming[channel] = _In(self.window)
        return into


class Mux:
    """One end of a connection. `initiator` is the host (or the client of a supervisor); the other end is the guest.

    `messages` and `requests` (what opens a stream -> what closes it, if not `Failed`) are the tables of what may
    travel: by default those of the control channel.
    """

    def __init__(
        self,
        decoder: FrameDecoder,
        *,
        initiator: bool,
        messages: dict[str, type[Message]] = MESSAGES,
        requests: dict[type[Message], type[Message]] = STREAMS,
    ) -> None:
        self.decoder = decoder
        self._messages = messages
        self._requests = requests
        self._first = 1 if initiator else 2
        self._next = self._first
        self._peer_last = 0
        self._streams: dict[int, _Stream] = {}
        self._urgent: deque[bytes] = deque()
        self._turns: deque[int] = deque()  # streams that have something to send, each once
        self.backlog = 0  # bytes of data that are queued, on all streams
        self._spare = SHARED  # bytes that windows may still be widened by
        self._begun = b""  # the epoch that this end announced and the peer has not answered yet
        self.largest = frames.ONE_WRITE  # bytes of data in a frame; MAX_DATA once the peer is known to take that

    # -- sending

    def begin_epoch(self, nonce: bytes) -> None:
        """Forget every stream and all that is queued, and announce an epoch to the peer.

        What the peer has under way belongs to the old epoch, and is dropped up to its answer.
        """
        self.forget()
        self.decoder.hunt()
        self.decoder.announced(nonce)
        self._urgent.append(frames.check_nonce(nonce))
        self._begun = nonce

    def forget(self) -> None:
        """Forget every stream and all that is queued."""
        self.backlog = 0
        self._spare = SHARED
        self._streams.clear()
        self._urgent.clear()
        self._turns.clear()
        self._next, self._peer_last = self._first, 0

    def control(self, message: Message) -> None:
        """Queue a message of the connection. Raises ProtocolError if it is too large."""
        self._urgent.append(frames.encode(frames.CONTROL, payload=encode_message(message)))

    def open(self, request: Message) -> int:
        """Open a stream; returns its id. Raises ProtocolError when there are too many or the request is too large."""
        assert type(request) in self._requests, f"{request.tag} does not open a stream"
        if len(self._streams) >= MAX_STREAMS:
            raise ProtocolError(f"more than {MAX_STREAMS} streams at once")
        payload = encode_message(request)
        stream = self._next
        self._urgent.append(frames.encode(frames.OPEN, stream, payload=payload))
        self._next += 2
        self._streams[stream] = _Stream(stream, request)
        return stream

    def message(self, stream: int, message: Message) -> None:
        """Queue a message on an open stream; it overtakes data. A stream that is gone swallows it."""
        if stream in self._streams:
            self._urgent.append(frames.encode(frames.MESSAGE, stream, payload=encode_message(message)))

    def room(self, stream: int, channel: int) -> int:
        """How many bytes `send` takes on a channel before more would only pile up here."""
        state = self._streams.get(stream)
        if state is None or state.closing is not None:
            return 0
        out = state.out(channel)
        return 0 if out.end else max(0, out.limit - out.sent - out.queued)

    def confirmed(self, stream: int, channel: int) -> int:
        """How many of the bytes sent on a channel, of which it has not widened the window, the peer has dealt with, as
        far as it has said so."""
        state = self._streams.get(stream)
        return 0 if state is None else max(0, state.out(channel).limit - WINDOW)

    def send(self, stream: int, channel: int, data: bytes | memoryview) -> None:
        """Queue data; a stream that is gone swallows it. The caller keeps within `room`, or it piles up here."""
        state = self._streams.get(stream)
        if state is not None and data:
            out = state.out(channel)
            out.queue.append(memoryview(data))
            out.queued += len(data)
            self.backlog += len(data)
            self._take_turn(state)

    def pour(self, stream: int, channel: int, source: Callable[[int], bytes | memoryview]) -> None:
        """Send what `source(n)` returns, at most n bytes, whenever it can go out at once; nothing ends that, not the
        channel. What it returned may be overwritten when what `output` returned has been written.
        """
        state = self._streams.get(stream)
        if state is not None:
            state.out(channel).source = source
            self._take_turn(state)

    def end(self, stream: int, channel: int) -> None:
        """Nothing more will be sent on a channel (after what is queued)."""
        state = self._streams.get(stream)
        if state is not None and not state.out(channel).end:
            state.out(channel).end = True
            self._take_turn(state)

    def close(self, stream: int, result: Message) -> None:
        """Close a stream that the peer opened, once its queued data is out."""
        state = self._streams.get(stream)
        if state is not None and state.closing is None:
            state.closing = frames.encode(frames.CLOSE, stream, payload=encode_message(result))
            self._take_turn(state)

    def reset(self, stream: int) -> None:
        """Give up a stream at once, dropping what is queued."""
        if stream in self._streams:
            self._drop(stream)
            self._urgent.append(frames.encode(frames.RESET, stream))

    def consumed(self, stream: int, channel: int, size: int) -> None:
        """The application has dealt with `size` received bytes; grants new credit in time."""
        state = self._streams.get(stream)
        if state is None or channel not in state.incoming:
            return
        into = state.incoming[channel]
        into.consumed += size
        if not into.ended and into.consumed + into.window - into.limit >= into.window // 2:
            wider = WINDOW - into.window
            if 0 < wider <= self._spare:
                self._spare -= wider
                into.shared += wider
                into.window = WINDOW
            into.limit = into.consumed + into.window
            self._urgent.append(frames.encode(frames.CREDIT, stream, channel, _OFFSET.pack(into.limit)))

    def widen(self, stream: int, channel: int, window: int = BULK_WINDOW) -> None:
        """Let the peer have `window` bytes of a channel under way, no less than so far. A stream that is gone has none."""
        state = self._streams.get(stream)
        if state is not None:
            state.into(channel).window = window
            self.consumed(stream, channel, 0)

    @property
    def streams(self) -> int:
        """How many streams are open."""
        return len(self._streams)

    def request(self, stream: int) -> Message | None:
        """The request that opened a stream, or None when there is no such stream."""
        state = self._streams.get(stream)
        return state.request if state else None

    def output(self) -> list[bytes | memoryview]:
        """The next bytes for the wire, to be written one after the other; none when there is nothing (or no credit)."""
        if self._urgent:
            taken = [self._urgent.popleft()]
            size = len(taken[0])
            while self._urgent and size + len(self._urgent[0]) <= frames.ONE_WRITE:
                taken.append(self._urgent.popleft())
                size += len(taken[-1])
            return [b"".join(taken)]
        for _ in range(len(self._turns)):
            stream = self._turns.popleft()
            state = self._streams.get(stream)
            if state is None:
                continue
            pieces = self._pieces(state)
            if pieces:
                if stream in self._streams:
                    self._turns.append(stream)
                return pieces
            state.waits = False
        return []

    def _take_turn(self, state: _Stream) -> None:
        if not state.waits:
            state.waits = True
            self._turns.append(state.id)

    def _pieces(self, state: _Stream) -> list[bytes | memoryview]:
        """The next frame of one stream; nothing when it must wait."""
        drained = True
        for channel, out in state.outgoing.items():
            room = min(self.largest, out.limit - out.sent)
            if out.source is not None and not out.queue and room > 0:
                data = out.source(room)
                if data:
                    out.queue.append(memoryview(data))
                    out.queued = len(data)
                    self.backlog += len(data)
                else:
                    out.source = None
            if out.queue:
                if room <= 0:
                    drained = False
                    continue
                head = out.queue.popleft()
                if room < len(head):
                    out.queue.appendleft(head[room:])
                    head = head[:room]
                out.sent += len(head)
                out.queued -= len(head)
                self.backlog -= len(head)
                state.outgoing[channel] = state.outgoing.pop(channel)  # the other channels come first next time
                if len(head) <= frames.ONE_WRITE:
                    return [frames.encode(frames.DATA, state.id, channel, head)]
                return [frames.HEADER.pack(frames.DATA, channel, 0, state.id, len(head)), head, frames.TRAILER]
            if out.source is not None:
                drained = False
            elif out.end and not out.end_sent:
                out.end_sent = True
                return [frames.encode(frames.EOF, state.id, channel)]
        if drained and state.closing is not None:
            self._drop(state.id)
            return [state.closing]
        return []

    # -- receiving

    def receive(self, data: bytes | bytearray, size: int | None = None) -> Iterator[Event]:
        """Take received bytes, the first `size` of `data`; return what happened, step by step, so that what the caller
        does about one event comes before the next. Raises ProtocolError: hang up, or begin a new epoch and receive b""
        (a marker may be among what is left).
        """
        for item in self.decoder.feed(data, size):
            if isinstance(item, Marker):
                if not item.answer:
                    self.forget()
                    self._urgent.append(frames.answer_to(item.nonce))
                elif item.nonce != self._begun:
                    self.forget()
                self._begun = b""
                yield EpochStarted(item.nonce, answer=item.answer)
            else:
                event = self._event(item)
                if event is not None:
                    yield event

    def _event(self, frame: Frame) -> Event | None:
        kind, stream = frame.kind, frame.stream
        if kind == frames.CONTROL:
            if stream:
                raise ProtocolError("control frame on a stream")
            return MessageReceived(0, decode_message(bytes(frame.payload), self._messages))
        if not stream or frame.channel >= CHANNELS:
            raise ProtocolError(f"bad stream or channel in {frame!r}")
        if kind == frames.OPEN:
            return self._opened(frame)
        state = self._streams.get(stream)
        if state is None:
            # It may have been given up on this side while the frame was under way; one never opened is an error.
            if stream < self._next if self._is_ours(stream) else stream <= self._peer_last:
                return None
            raise ProtocolError(f"{frame!r} on a stream that was never opened")
        if kind == frames.DATA:
            return self._data(state, frame)
        if kind == frames.EOF:
            into = state.into(frame.channel)
            if into.ended:
                raise ProtocolError(f"{frame!r} after the end")
            into.ended = True
            return EndReceived(stream, frame.channel)
        if kind == frames.CREDIT:
            if len(frame.payload) != _OFFSET.size:
                raise ProtocolError("bad credit")
            out = state.out(frame.channel)
            out.limit = max(out.limit, _OFFSET.unpack(frame.payload)[0])
            self._take_turn(state)
            return CreditReceived(stream, frame.channel)
        if kind == frames.RESET:
            self._drop(stream)
            return ResetReceived(stream)
        message = decode_message(bytes(frame.payload), self._messages)
        if kind == frames.CLOSE:
            if not self._is_ours(stream) or not isinstance(message, (self._requests[type(state.request)], Failed)):
                raise ProtocolError(f"{message.tag} does not close this stream")
            self._drop(stream)
            return Closed(stream, message)
        return MessageReceived(stream, message)

    def _drop(self, stream: int) -> None:
        state = self._streams.pop(stream)
        for out in state.outgoing.values():
            self.backlog -= out.queued
        for into in state.incoming.values():
            self._spare += into.shared

    def _is_ours(self, stream: int) -> bool:
        """Whether this end opens streams of that id."""
        return stream % 2 == self._first % 2

    def _opened(self, frame: Frame) -> Event | None:
        if self._is_ours(frame.stream) or frame.stream <= self._peer_last:
            raise ProtocolError(f"stream {frame.stream} is not the peer's to open")
        if len(self._streams) >= MAX_STREAMS:
            raise ProtocolError(f"more than {MAX_STREAMS} streams at once")
        try:
            request = decode_message(bytes(frame.payload), self._messages)
        except UnknownMessage as error:
            self._peer_last = frame.stream
            refusal = Failed(
                code="unsupported",
                message=f"the other end is of another version: {error}",
                hint="stop the VM and resume it",
            )
            self._urgent.append(frames.encode(frames.CLOSE, frame.stream, payload=encode_message(refusal)))
            return None
        if type(request) not in self._requests:
            raise ProtocolError(f"{request.tag} does not open a stream")
        self._peer_last = frame.stream
        self._streams[frame.stream] = _Stream(frame.stream, request)
        return Opened(frame.stream, request)

    def _data(self, state: _Stream, frame: Frame) -> Event | None:
        into = state.into(frame.channel)
        into.received += len(frame.payload)
        if into.ended or into.received > into.limit:
            raise ProtocolError(f"{frame!r} after the end or over the credit")
        return DataReceived(state.id, frame.channel, frame.payload) if frame.payload else None
