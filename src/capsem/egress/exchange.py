"""One request and its answer: carried from the guest to an origin and back, as they come, with nothing collected.

The request's body is sent while the answer is read, so that an early answer reaches the guest.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Final

from capsem.egress.bodies import BodyReader, chunk, last_chunk
from capsem.egress.events import NetEvent
from capsem.egress.heads import ResponseHead
from capsem.egress.http1 import (
    BadHead,
    Body,
    Framing,
    Request,
    Response,
    parse_response,
    write_request,
    write_response,
)
from capsem.egress.parts import Tap
from capsem.egress.peer import Peer
from capsem.egress.pool import Upstream

Filter = Callable[[bytes], bytes]
Incoming = Callable[[ResponseHead], tuple[ResponseHead, Filter | None]]

COLLECTED: Final = 64 * 1024  # a body that secrets are put into is measured again up to here, and chunked beyond
_INTERIM: Final = 100  # answers of the kind 1xx before the true one
_SAFE: Final = frozenset({b"GET", b"HEAD", b"OPTIONS", b"PUT", b"DELETE", b"TRACE"})


class Stale(ConnectionError):
    """A connection that had been used before broke before it answered anything: the request may be made again on another."""


class OriginFailed(Exception):
    """The origin did not answer as HTTP has it; nothing has been said to the guest yet. The message is for a person."""


class Exchange:
    """See the module. `tap` and the filters see bodies free of their framing; `relay` are the target's prefix and more header
    lines where the host's proxy is asked instead of the origin.
    """

    def __init__(
        self,
        client: Peer,
        request: Request,
        event: NetEvent,
        *,
        tap: Tap | None = None,
        outgoing: Filter | None = None,
        incoming: Incoming | None = None,
        relay: tuple[bytes, list[bytes]] = (b"", []),
    ) -> None:
        self._client = client
        self._request = request
        self._event = event
        self._tap = tap
        self._outgoing = outgoing
        self._incoming = incoming
        self._relay = relay
        self._body = BodyReader(request.framing)
        self._framing = request.framing  # as it goes out
        self._client_failed: BaseException | None = None
        self.begun = False  # the guest has been sent a part of the answer
        self.upgraded = False  # after the answer, both sides go on with another protocol

    async def run(self, upstream: Upstream) -> tuple[bool, bool]:
        """Whether the guest's connection and the origin's can be used again.

        Raises Stale, OriginFailed; ConnectionError and BadHead when the guest's side breaks, or the origin's in the middle of
        the answer; whatever the filters raise.
        """
        pump = await self._send(upstream)
        try:
            response = await self._answer(upstream)
            reusable = await self._forward(upstream, response, pump)
        except BaseException:
            if self._client_failed is not None:
                raise self._client_failed from None
            raise
        finally:
            if pump is not None:
                pump.cancel()
                await asyncio.gather(pump, return_exceptions=True)
        return reusable

    # The request.

    async def _send(self, upstream: Upstream) -> asyncio.Task[None] | None:
        """Send head and as much of the body as is here; a task sends what is not."""
        first = b""
        if not self._body.whole():
            first = self._content(self._client.rest())
            if self._outgoing is not None:
                first = await self._measure(first)
        head = write_request(self._request, framing=self._framing, absolute=self._relay[0], extra=self._relay[1])
        data = head + self._encoded(first)
        try:
            await upstream.stream.write(data)
        except ConnectionError as error:
            if self._body.whole():
                raise self._lost(upstream, error) from error
            # It may have answered before it broke off.
            return None
        return None if self._body.whole() else asyncio.create_task(self._pump(upstream))

    async def _measure(self, first: bytes) -> bytes:
        """Have a body that changes on its way declare its new length, if it is a small one that is not waited for."""
        length = self._request.framing
        if isinstance(length, int) and length <= COLLECTED and not self._request.expects:
            parts = [first]
            while not self._body.whole():
                parts.append(self._content(await self._client.read()))
            whole = b"".join(parts)
            self._framing = len(whole)
            return whole
        self._framing = Body.CHUNKED
        return first

    def _content(self, data: bytes) -> bytes:
        """What of the guest's bytes is to go on; b"" is the end of them. Raises BadHead."""
        if self._body.whole():
            return b""
        content = self._body.feed(data) if data else b""
        self._event.bytes_sent += len(content)
        if content and self._tap is not None:
            self._tap.request_body(content)
        if self._outgoing is not None:
            content = self._outgoing(content) if content else content
            if self._body.whole():
                content += self._outgoing(b"")
        if self._body.whole() and self._body.rest:
            self._client.push(self._body.rest)
        return content

    def _encoded(self, content: bytes) -> bytes:
        if self._framing is not Body.CHUNKED:
            return content
        data = chunk(content) if content else b""
        return data + last_chunk(self._body.trailers) if self._body.whole() else data

    async def _pump(self, upstream: Upstream) -> None:
        """Send the rest of the body as it comes."""
        broken = False
        while not self._body.whole():
            try:
                data = await self._client.read()
                if not data:
                    self._body.eof()
                content = self._encoded(self._content(data))
            except (ConnectionError, BadHead) as error:
                self._client_failed = error
                upstream.stream.abort()
                return
            except Exception as error:  # noqa: BLE001 - a filter's; handed to whoever waits for the answer
                self._client_failed = error
                upstream.stream.abort()
                return
            if content and not broken:
                try:
                    await upstream.stream.write(content)
                except ConnectionError:
                    return  # what it said before is still to be read

    # The answer.

    async def _answer(self, upstream: Upstream) -> Response:
        """The head of the answer; those before it are passed on."""
        method = self._request.head.method
        try:
            for _ in range(_INTERIM):
                response = parse_response(await self._head(upstream), method)
                if response.head.status >= 200 or response.head.status == 101:
                    break
                await self._client.stream.write(write_response(response, method=method, framing=0, keep_alive=True))
            else:
                raise OriginFailed("it gave a hundred preliminary answers and no other")
        except BadHead as error:
            raise OriginFailed(f"its answer is not HTTP: {error}") from error
        if response.head.status == 101:
            if self._request.upgrade is None or response.upgrade != self._request.upgrade:
                raise OriginFailed("it changes to a protocol that it was not asked for")
            self.upgraded = True
        return response

    async def _head(self, upstream: Upstream) -> bytes:
        try:
            block = await upstream.head()
        except ConnectionError as error:
            raise self._lost(upstream, error) from error
        if block is None:
            raise self._lost(upstream, None)
        return block

    def _lost(self, upstream: Upstream, error: ConnectionError | None) -> Exception:
        request = self._request
        if upstream.used and request.framing == 0 and request.head.method in _SAFE:
            return Stale()
        return OriginFailed(f"it closed the connection without an answer{f' ({error})' if error else ''}")

    async def _forward(
        self, upstream: Upstream, response: Response, pump: asyncio.Task[None] | None
    ) -> tuple[bool, bool]:
        """Pass the answer on."""
        request, event = self._request, self._event
        event.status_code = response.head.status
        change: Filter | None = None
        if self._incoming is not None:
            head, change = self._incoming(response.head)
            response = Response(head, response.framing, response.keep_alive, response.upgrade)
        if self._tap is not None:
            self._tap.response(response.head)
        keep = request.keep_alive and self._body.whole()
        framing: Framing = response.framing
        if framing is Body.CLOSE:
            framing = Body.CHUNKED
        if framing is Body.CHUNKED and request.version == 0:
            framing, keep = Body.CLOSE, False
        data = write_response(response, method=request.head.method, framing=framing, keep_alive=keep)
        self.begun = True
        body = BodyReader(response.framing)
        rest = b"" if body.whole() else upstream.rest()
        if body.whole() or not rest:
            await self._client.stream.write(data)
            data = b""
        while not body.whole():
            rest = rest or await self._more(upstream, body)
            content = body.feed(rest) if not body.whole() else b""
            rest = b""
            event.bytes_received += len(content)
            if change is not None:
                content = (change(content) if content else b"") + (change(b"") if body.whole() else b"")
            if self._tap is not None and content:
                self._tap.response_body(content)
            if framing is Body.CHUNKED:
                if content:
                    data += chunk(content)
                if body.whole():
                    data += last_chunk(body.trailers)
            else:
                data += content
            if data:
                await self._client.stream.write(data)
                data = b""
        if not self._body.whole() and pump is not None:
            await asyncio.sleep(0)  # it may just have read the last of it
        whole = self._body.whole() and self._client_failed is None
        return keep and whole, response.keep_alive and whole and not body.rest and not self.upgraded

    async def _more(self, upstream: Upstream, body: BodyReader) -> bytes:
        data = await upstream.read()
        if not data:
            body.eof()
        return data
