"""A connection of many streams (wire.Mux) driven by asyncio; used with the guest and between service and supervisor."""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncIterator, Callable
from typing import cast

from capsem.model.errors import CapsemError, Interrupted, InvalidInput, TimedOut, from_dict
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
from capsem.wire.frames import ProtocolError
from capsem.wire.messages import Failed
from capsem.wire.schema import Message
from capsem.wire.streams import Mux


class Stream:
    """One stream, from the side that opened it or the side that serves it. Safe for several readers and writers."""

    def __init__(self, channel: Channel, stream: int, request: Message) -> None:
        self.id = stream
        self.request = request
        self.on_message: Callable[[Message], None] = lambda _message: None
        self._channel = channel
        self._chunks: dict[int, deque[bytes | memoryview]] = {}
        self._ended: set[int] = set()
        self._result: Message | CapsemError | None = None
        self._changed = asyncio.Event()

    @property
    def over(self) -> bool:
        """Whether the peer closed the stream, gave it up, or is gone."""
        return self._result is not None

    @property
    def backlog(self) -> int:
        """How many bytes wait for the peer, on all streams of the connection."""
        return self._channel.mux.backlog

    def ended(self, channel: int) -> bool:
        """Whether the peer has said that this was all; a stream that was given up, or lost, ends without that."""
        return channel in self._ended

    def widen(self, channel: int) -> None:
        """Much will come on a channel: let more of it be under way."""
        self._channel.mux.widen(self.id, channel)
        self._channel.flush()

    async def read(self, channel: int) -> bytes:
        """The next bytes on a channel; b"" when no more will come (see `ended` and `result` for why)."""
        return bytes(await self.take(channel))

    async def take(self, channel: int) -> bytes | memoryview:
        """As `read`, without a copy: for what only hands them on."""
        while True:
            chunks = self._chunks.get(channel)
            if chunks:
                data = chunks.popleft()
                self._channel.mux.consumed(self.id, channel, len(data))
                self._channel.flush()
                return data
            if channel in self._ended or self.over:
                return b""
            await self._changed.wait()

    async def write(self, channel: int, data: bytes | memoryview) -> None:
        """Send bytes, waiting for credit; returns when they are handed to the connection, or nobody wants them."""
        view = memoryview(data)
        while view and not self.over:
            room = self._channel.mux.room(self.id, channel)
            if room:
                self._channel.mux.send(self.id, channel, view[:room])
                self._channel.flush()
                view = view[room:]
            else:
                await self._changed.wait()

    def end(self, channel: int) -> None:
        """Send nothing more on a channel."""
        self._channel.mux.end(self.id, channel)
        self._channel.flush()

    def send(self, message: Message) -> None:
        """Send a message on the stream; it overtakes data."""
        self._channel.mux.message(self.id, message)
        self._channel.flush()

    def close(self, result: Message) -> None:
        """The serving side's last word."""
        self._channel.mux.close(self.id, result)
        self._channel.forget(self)

    def reset(self) -> None:
        """Give up: the other side stops what it does for this stream."""
        if not self.over:
            self._channel.mux.reset(self.id)
            self._channel.forget(self)
            self.deliver(Interrupted("the request was given up"))

    async def result(self) -> Message:
        """How the stream was closed. Raises the CapsemError that the peer gave, or Interrupted when it is gone."""
        while self._result is None:
            await self._changed.wait()
        if isinstance(self._result, CapsemError):
            raise self._result
        return self._result

    def deliver(self, event: Event | CapsemError) -> None:
        """For the channel: something happened."""
        if isinstance(event, CapsemError):
            self._result = self._result or event
        elif isinstance(event, DataReceived):
            self._chunks.setdefault(event.channel, deque()).append(event.data)
        elif isinstance(event, Closed):
            failed = event.message
            self._result = from_dict(failed.__dict__) if isinstance(failed, Failed) else failed
        elif isinstance(event, ResetReceived):
            self._result = Interrupted("the other side gave the request up")
        elif isinstance(event, MessageReceived):
            self.on_message(event.message)
        elif isinstance(event, EndReceived) and not isinstance(event, CreditReceived):
            self._ended.add(event.channel)
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()


@contextlib.asynccontextmanager
async def limited(stream: Stream, what: str, limit: float) -> AsyncIterator[None]:
    """Bound an operation on a stream to `limit` seconds; whatever goes wrong, the stream is given up. Raises TimedOut."""
    try:
        async with asyncio.timeout(limit):
            yield
    except TimeoutError:
        raise TimedOut(f"{what} timed out after {limit:.0f}s") from None
    finally:
        stream.reset()


class Channel(asyncio.Protocol):
    """The connection. Set the callbacks before it is attached; they are called in the order of the bytes."""

    def __init__(self, mux: Mux) -> None:
        self.mux = mux
        self.on_control: Callable[[Message], None] = lambda _message: None
        self.on_epoch: Callable[[EpochStarted], None] = lambda _event: None
        self.on_open: Callable[[Stream], None] = lambda stream: stream.reset()  # nobody serves it, nobody collects it
        self.on_garbage: Callable[[ProtocolError], None] = lambda _error: self.hang_up()
        self.on_lost: Callable[[], None] = lambda: None
        self._transport: asyncio.Transport | None = None
        self._hung_up = False
        self._streams: dict[int, Stream] = {}
        self._blocked = False
        self._held = False

    @property
    def connected(self) -> bool:
        """Whether there is a peer."""
        return self._transport is not None and not self._transport.is_closing()

    @property
    def blocked(self) -> bool:
        """Whether the peer does not take what it was sent, so that more would only pile up here."""
        return self._blocked

    def open(self, request: Message) -> Stream:
        """Open a stream. Raises Interrupted when the connection is gone, InvalidInput for a request too large."""
        if not self.connected:
            raise Interrupted("the connection is closed")
        try:
            stream = Stream(self, self.mux.open(request), request)
        except ProtocolError as error:
            raise InvalidInput(str(error), hint="send less, or fewer at once") from error
        self._streams[stream.id] = stream
        self.flush()
        return stream

    def control(self, message: Message) -> None:
        """Send a message of the connection."""
        self.mux.control(message)
        self.flush()

    def flush(self) -> None:
        """Hand queued output to the transport while it takes it."""
        if self._transport is None:
            return
        while not self._blocked and not self._held and not self._transport.is_closing():
            pieces = self.mux.output()
            if not pieces:
                return
            self._transport.writelines(pieces)

    def hold(self) -> None:
        """Send nothing until `release`: what is said meanwhile waits. What comes is taken as ever."""
        self._held = True

    def release(self) -> None:
        """Send again, beginning with what waits."""
        self._held = False
        self.flush()

    def drop_streams(self, reason: CapsemError) -> None:
        """Every open stream ends with `reason`."""
        streams, self._streams = self._streams, {}
        for stream in streams.values():
            stream.deliver(reason)

    def forget(self, stream: Stream) -> None:
        """For a stream that is over on this side."""
        self._streams.pop(stream.id, None)
        self.flush()

    def hang_up(self) -> None:
        """Close the connection once what is queued is out; one that is still to be made, as soon as it is."""
        self._hung_up = True
        if self._transport is not None:
            self._transport.close()

    # -- asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """See asyncio.Protocol."""
        self._transport = cast("asyncio.Transport", transport)
        self.flush()
        if self._hung_up:
            transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        """See asyncio.Protocol."""
        self._transport = None
        self.drop_streams(Interrupted("the connection was lost"))
        self.on_lost()

    def pause_writing(self) -> None:
        """See asyncio.Protocol."""
        self._blocked = True

    def resume_writing(self) -> None:
        """See asyncio.Protocol."""
        self._blocked = False
        self.flush()

    def data_received(self, data: bytes) -> None:
        """See asyncio.Protocol."""
        left: bytes | None = data
        while left is not None:
            try:
                for event in self.mux.receive(left):
                    self._dispatch(event)
                left = None
            except ProtocolError as error:
                self.on_garbage(error)
                # If it began a new epoch: the peer's own way out may be in what came with the garbage.
                left = b"" if self.mux.decoder.hunting else None
        self.flush()

    def _dispatch(self, event: Event) -> None:
        if isinstance(event, EpochStarted):
            self.drop_streams(
                Interrupted(
                    "the guest agent began anew", hint="whether the request took effect is not known; look, then repeat"
                )
            )
            self.on_epoch(event)
        elif isinstance(event, Opened):
            stream = Stream(self, event.stream, event.message)
            self._streams[stream.id] = stream
            self.on_open(stream)
        elif isinstance(event, MessageReceived) and not event.stream:
            self.on_control(event.message)
        else:
            stream_or_none = self._streams.get(event.stream)
            if stream_or_none is not None:
                if isinstance(event, (Closed, ResetReceived)):
                    del self._streams[event.stream]
                stream_or_none.deliver(event)
