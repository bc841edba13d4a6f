"""POST /exec/{id}/stream and /forward/{id}: a command's input and output, or a connection's, as frames of `api.stream`,
both ways at once.

Two tasks share a request. One *listens*: it alone calls `receive`, hands standard input to a queue and notices when
the client hangs up. The other *speaks*: it runs the manager's iterator and sends what comes. Whichever ends first
ends the other. The queue is bounded by stopping to listen, which a client that keeps to its credit never brings about.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable
from typing import Any, Final, TypeVar

import msgspec
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from capsem.api import stream
from capsem.api.codec import decode
from capsem.api.exec_types import ExecRequest, ForwardRequest
from capsem.api.operation import Operation
from capsem.model.errors import Interrupted, InvalidInput, PayloadTooLarge
from capsem.model.ids import check_name
from capsem.service.manager import Manager, Resize

_HELD: Final = 4 * stream.WINDOW  # bytes of standard input that wait here before listening stops

T = TypeVar("T", bound=msgspec.Struct)
ErrorResponse = Callable[[Exception, Operation], Response]


class ExecStream:
    """The endpoint, an ASGI application."""

    def __init__(self, operation: Operation, manager: Manager, error_response: ErrorResponse) -> None:
        self._operation = operation
        self._manager = manager
        self._error_response = error_response
        self._kind: type[Any] = ForwardRequest if operation.name == "forward" else ExecRequest

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request; errors are answered, none are raised."""
        reply = _Reply(send)
        try:
            vm_id = check_name(scope["path_params"]["id"])
            incoming = _Incoming(receive, self._operation.body_limit)
            request = await incoming.request(self._kind)
            if request is None:
                return
            await self._attend(vm_id, request, incoming, reply)
        except Exception as exc:  # noqa: BLE001  this is the edge: everything becomes an answer
            response = self._error_response(exc, self._operation)
            if reply.started:
                await reply.end(stream.ERROR, bytes(response.body))
            else:
                await response(scope, receive, send)

    async def _attend(self, vm_id: str, request: Any, incoming: _Incoming, reply: _Reply) -> None:
        listening = asyncio.ensure_future(incoming.listen())
        speaking = asyncio.ensure_future(self._speak(vm_id, request, incoming, reply))
        try:
            await asyncio.wait({listening, speaking}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in (listening, speaking):
                task.cancel()
            # The command is to be dead, and its iterator closed, before the request counts as over.
            ended, spoken = await asyncio.gather(listening, speaking, return_exceptions=True)
        for outcome in (ended, spoken):
            if isinstance(outcome, Exception):
                raise outcome

    async def _speak(self, vm_id: str, request: Any, incoming: _Incoming, reply: _Reply) -> None:
        stdin = None if incoming.ended_empty else incoming.stdin(reply)
        begin = self._manager.forward if self._kind is ForwardRequest else self._manager.execute_stream
        output = begin(vm_id, request, stdin)
        try:
            async for channel, data in output:
                if channel in (stream.RESULT, stream.ERROR):
                    await reply.end(channel, data)
                    return
                await reply.send(channel, data)
        finally:
            close = getattr(output, "aclose", None)
            if close is not None:
                await close()
        raise Interrupted("the output of the command ended without a result")


class _Reply:
    """The response. It begins with its first frame, so that until then an error can still have a status of its own."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self._turn = asyncio.Lock()  # output and credit come from different tasks
        self._ended = False
        self.started = False

    async def send(self, channel: int, data: bytes) -> None:
        """Send a frame; waits while the client is slow to read."""
        await self._body(stream.encode(channel, data), more=True)

    async def credit(self, size: int) -> None:
        """Tell the client that `size` bytes of its input were used up."""
        await self._body(stream.encode_credit(size), more=True)

    async def end(self, channel: int, data: bytes) -> None:
        """Send the last frame."""
        await self._body(stream.encode(channel, data), more=False)

    async def _body(self, data: bytes, *, more: bool) -> None:
        async with self._turn:
            if self._ended:
                return  # credit for input that was read while the command ended
            self._ended = not more
            if not self.started:
                self.started = True
                headers = [(b"content-type", stream.CONTENT_TYPE.encode()), (b"connection", b"close")]
                await self._send({"type": "http.response.start", "status": 200, "headers": headers})
            await self._send({"type": "http.response.body", "body": data, "more_body": more})


class _Incoming:
    """The request's body: first the request itself, then standard input."""

    def __init__(self, receive: Receive, limit: int) -> None:
        self._receive = receive
        self._limit = limit
        self._decoder = stream.Decoder()
        self._chunks: deque[bytes | Resize] = deque()
        self._held = 0
        self._changed = asyncio.Condition()
        self._closed = False  # by an empty frame
        self._more = True  # of the body

    @property
    def ended_empty(self) -> bool:
        """Whether it is known by now that there is no standard input at all."""
        return self._eof and not self._chunks

    @property
    def _eof(self) -> bool:
        return self._closed or not self._more

    async def request(self, kind: type[T]) -> T | None:
        """The first frame; None if the client hung up before it was whole. Raises InvalidInput, PayloadTooLarge."""
        received = 0
        while True:
            message = await self._receive()
            if message["type"] == "http.disconnect":
                return None
            received += len(message.get("body", b""))
            frames = self._take(message)
            if frames:
                (channel, payload), *rest = frames
                if channel != stream.REQUEST:
                    raise InvalidInput(f"the stream begins with a frame of channel {channel}", hint="the request first")
                request = decode(kind, payload)
                self._accept(rest)
                return request
            if not self._more:
                raise InvalidInput("the stream ended before its first frame", hint="send the request on channel 3")
            if received > self._limit:
                raise PayloadTooLarge("the first frame of the stream is too large")

    async def listen(self) -> None:
        """Take in standard input; returns when the client hangs up. Raises InvalidInput."""
        while True:
            async with self._changed:
                await self._changed.wait_for(lambda: self._held <= _HELD)
            message = await self._receive()
            if message["type"] == "http.disconnect":
                return
            frames = self._take(message)
            async with self._changed:
                self._accept(frames)
                self._changed.notify_all()

    async def stdin(self, reply: _Reply) -> AsyncIterator[bytes | Resize]:
        """Standard input, to its end; what is asked for next is taken as used up, and told to the client."""
        while True:
            async with self._changed:
                await self._changed.wait_for(lambda: self._chunks or self._eof)
                if not self._chunks:
                    return
                chunk = self._chunks.popleft()
            yield chunk
            if not isinstance(chunk, bytes):
                continue
            async with self._changed:
                self._held -= len(chunk)
                self._changed.notify_all()
            await reply.credit(len(chunk))

    def _take(self, message: Message) -> list[tuple[int, bytes]]:
        frames = self._decoder.feed(message.get("body", b""))
        self._more = self._more and message.get("more_body", False)
        if not self._more and self._decoder.partial:
            raise InvalidInput("the stream ended in the middle of a frame")
        return frames

    def _accept(self, frames: list[tuple[int, bytes]]) -> None:
        for channel, payload in frames:
            if channel == stream.RESIZE:
                self._chunks.append(Resize(*stream.decode_resize(payload)))
            elif channel != stream.STDIN or self._closed:
                continue
            elif payload:
                self._chunks.append(payload)
                self._held += len(payload)
            else:
                self._closed = True
