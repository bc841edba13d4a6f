"""HTTP/2 from the guest to an origin: stream by stream, each judged, recorded and carried as a request of HTTP/1.1 is.

It is offered where a rule asks for it and the origin speaks it. One connection of the guest's has one at the origin, so that
windows, trailers and ends mean the same on both; gRPC needs no less.
"""

from __future__ import annotations

import asyncio
import functools
import logging
from collections import deque
from dataclasses import dataclass, field
from typing import Final

from h2.errors import ErrorCodes
from h2.events import (
    DataReceived,
    Event,
    InformationalResponseReceived,
    RequestReceived,
    ResponseReceived,
    StreamReset,
    TrailersReceived,
)
from h2.exceptions import H2Error

from capsem.egress import hosts, pages, paths
from capsem.egress.admit import Denied
from capsem.egress.door import Arrival, Door, note
from capsem.egress.events import NetEvent
from capsem.egress.exchange import Filter, Incoming
from capsem.egress.facts import Subject
from capsem.egress.h2side import GoingAway, Side, SideFailed, plain
from capsem.egress.heads import Header, RequestHead, ResponseHead
from capsem.egress.parts import SecretMisuse, SecretRefused, Tap
from capsem.egress.pool import Upstream
from capsem.egress.requests import HEAD_TIME, IDLE_TIME

RESETS: Final = 100  # streams that a client may take back, beyond two for each that it let come to its end

_INTERIM: Final = 100  # heads of an answer that wait

log = logging.getLogger("capsem.egress")


class Refused(Exception):
    """Something is not carried out: `status` and the message are the answer."""

    def __init__(self, message: str, status: int = 400) -> None:
        super().__init__(message)
        self.status = status


class OriginLost(Exception):
    """The origin has ended the stream, or its connection."""


@dataclass(slots=True)
class _Piece:
    """What arrived for a stream, in this order: a head, data (which took `size` of its window), trailers, the end; or the news
    that nothing more will."""

    head: list[Header] | None = None
    data: bytes = b""
    size: int = 0
    trailers: list[Header] | None = None
    end: bool = False
    lost: bool = False


class _Pipe:
    """What has arrived for one direction of a stream. Windows bound its data, however small the pieces are."""

    def __init__(self) -> None:
        self._heads: deque[tuple[list[Header], bool]] = deque()
        self._data = bytearray()
        self._rest = _Piece()
        self._told = asyncio.Event()

    def head(self, headers: list[Header], *, end: bool) -> None:
        """Header fields; those of an answer may be preceded by others."""
        self._heads.append((headers, end))
        self._told.set()
        if len(self._heads) > _INTERIM:
            self.lose()

    def body(self, data: bytes, size: int, *, end: bool) -> None:
        """Data."""
        self._data += data
        self._rest.size += size
        self._rest.end |= end
        if data or size or end:
            self._told.set()

    def finish(self, trailers: list[Header]) -> None:
        """Trailers, which are the end."""
        self._rest.trailers, self._rest.end = trailers, True
        self._told.set()

    def lose(self) -> None:
        """Nothing more will come, and that is not the end."""
        self._rest.lost = True
        self._told.set()

    async def get(self) -> _Piece:
        """All that is here, one head at most."""
        await self._told.wait()
        if self._heads:
            headers, end = self._heads.popleft()
            if not (self._heads or self._data or self._rest.size or self._rest.end or self._rest.lost):
                self._told.clear()
            return _Piece(head=headers, end=end)
        piece, self._rest = self._rest, _Piece()
        piece.data = bytes(self._data)
        self._data.clear()
        self._told.clear()
        return piece

    def left(self) -> int:
        """How much of the window that took which nobody has got."""
        size, self._rest.size = self._rest.size, 0
        return size


@dataclass(slots=True)
class _Call:
    """A request: `up` is what the guest has sent of it and `down` the origin. `sent` and `answered`: the origin has been sent
    the end of the one, and the guest that of the other."""

    client_id: int
    headers: list[Header]
    event: NetEvent
    whole: bool  # there is no body
    origin_id: int | None = None
    up: _Pipe = field(default_factory=_Pipe)
    down: _Pipe = field(default_factory=_Pipe)
    task: asyncio.Task[None] | None = None
    started: bool = False
    begun: bool = False  # the guest has been sent a part of the answer
    received: bool = False
    sent: bool = False
    answered: bool = False


class Http2:
    """Serves one connection. `upstream` has agreed upon HTTP/2 with the origin."""

    def __init__(self, door: Door, arrival: Arrival, client: Side, upstream: Upstream) -> None:
        self._door = door
        self._arrival = arrival
        self._client = client
        self._upstream = upstream
        self._origin = Side(upstream.stream, server=False)
        self._calls: dict[int, _Call] = {}
        self._by_origin: dict[int, _Call] = {}
        self._last: int | None = None  # of the origin's streams that go on
        self._resets = self._done = 0
        self._interrupted = True
        self._limit: asyncio.Timeout | None = None  # on how long nothing is asked, while the client is read

    async def serve(self) -> None:
        """Until one side ends. Raises ConnectionError."""
        reading: list[asyncio.Task[None]] = []
        try:
            await self._client.start()
            await self._origin.start()
            reading = [asyncio.create_task(self._read_client()), asyncio.create_task(self._read_origin())]
            await asyncio.wait(reading, return_when=asyncio.FIRST_COMPLETED)
            self._interrupted = False
            if reading[0].done():
                for call in self._calls.values():
                    call.event.error = "the client left"
            else:  # what the origin has answered is still on its way to the guest
                await asyncio.gather(*(call.task for call in self._calls.values() if call.task), return_exceptions=True)
            for task in reading:
                if task.done():
                    task.result()
        finally:
            calls = [call.task for call in self._calls.values() if call.task is not None]
            for task in (*reading, *calls):
                task.cancel()
            await asyncio.gather(*reading, *calls, return_exceptions=True)

    # What the guest sends.

    async def _read_client(self) -> None:
        try:
            async with asyncio.timeout(HEAD_TIME) as limit:
                self._limit = limit
                while (events := await self._client.events()) is not None:
                    for event in events:
                        self._from_client(event)
                    if self._resets > RESETS + 2 * self._done:
                        self._client.h2.close_connection(ErrorCodes.ENHANCE_YOUR_CALM)
                        await self._client.flush()
                        raise SideFailed(f"HTTP/2: {self._resets} requests were taken back by the client")
        except TimeoutError:
            return
        finally:
            self._limit = None

    def _give_time(self, until: float | None) -> None:
        """Wait for the client's next request until then."""
        if self._limit is not None and not self._limit.expired():
            self._limit.reschedule(until)

    def _from_client(self, event: Event | GoingAway) -> None:
        if isinstance(event, RequestReceived):
            self._begin(event)
            return
        call = self._calls.get(getattr(event, "stream_id", None) or 0)
        if isinstance(event, StreamReset):
            self._resets += 1
            if call is not None and call.task is not None:
                call.event.error = "the client took it back"
                # A task that has not begun would never do so, and never clean up.
                if call.started:
                    call.task.cancel()
        elif isinstance(event, DataReceived):
            if call is None:
                self._client.h2.acknowledge_received_data(event.flow_controlled_length, event.stream_id)
            else:
                call.received = event.stream_ended is not None
                call.up.body(event.data, event.flow_controlled_length, end=call.received)
        elif isinstance(event, TrailersReceived) and call is not None:
            call.received = True
            call.up.finish(event.headers)

    def _begin(self, event: RequestReceived) -> None:
        door, arrival = self._door, self._arrival
        row = NetEvent(
            door.clock.time(), arrival.host, arrival.port, process_name=arrival.connection.process, tls=arrival.tls
        )
        whole = event.stream_ended is not None
        call = _Call(event.stream_id, event.headers, row, whole, received=whole, sent=whole)
        self._calls[event.stream_id] = call
        self._give_time(None)
        call.task = asyncio.create_task(self._serve(call))

    # What the origin sends.

    async def _read_origin(self) -> None:
        try:
            while (events := await self._origin.events()) is not None:
                for event in events:
                    self._from_origin(event)
        finally:
            self._last = 0
            for call in self._by_origin.values():
                call.down.lose()

    def _from_origin(self, event: Event | GoingAway) -> None:
        if isinstance(event, GoingAway):
            self._last = event.last
            for each in self._by_origin.values():
                if each.origin_id is not None and each.origin_id > event.last:
                    each.down.lose()
            return
        call = self._by_origin.get(getattr(event, "stream_id", None) or 0)
        if isinstance(event, DataReceived):
            if call is None:
                self._origin.h2.acknowledge_received_data(event.flow_controlled_length, event.stream_id)
            else:
                call.down.body(event.data, event.flow_controlled_length, end=event.stream_ended is not None)
        elif call is None:
            return
        elif isinstance(event, InformationalResponseReceived):
            call.down.head(event.headers, end=False)
        elif isinstance(event, ResponseReceived):
            call.down.head(event.headers, end=event.stream_ended is not None)
        elif isinstance(event, TrailersReceived):
            call.down.finish(event.headers)
        elif isinstance(event, StreamReset):
            call.down.lose()

    # One request.

    async def _serve(self, call: _Call) -> None:
        """To its end, whatever that is."""
        door, event = self._door, call.event
        started, call.started = door.clock.monotonic(), True
        try:
            if event.error is None:
                await self._judge(call)
                self._done += 1
        except asyncio.CancelledError:
            if self._interrupted and event.error is None:
                event.decision = "interrupted"
        except (ConnectionError, H2Error) as error:
            event.error = event.error or str(error) or type(error).__name__
        except Exception:
            log.exception("a request is broken off: an error of ours")
        finally:
            event.duration = door.clock.monotonic() - started
            door.recorder.net(event)
            await self._forget(call)

    async def _forget(self, call: _Call) -> None:
        """It is over: neither side has a stream for it any more, and windows are as they were."""
        self._calls.pop(call.client_id, None)
        if not self._calls:
            self._give_time(asyncio.get_running_loop().time() + IDLE_TIME)
        try:
            await self._client.took(call.client_id, call.up.left())
            if not call.answered:
                await self._client.reset(call.client_id, ErrorCodes.INTERNAL_ERROR)
            elif not call.received:  # it is told that nobody waits for the rest
                await self._client.reset(call.client_id, ErrorCodes.NO_ERROR)
            if call.origin_id is not None:
                del self._by_origin[call.origin_id]
                await self._origin.took(call.origin_id, call.down.left())
                if not (call.sent and call.answered):
                    await self._origin.reset(call.origin_id, ErrorCodes.CANCEL)
        except ConnectionError:  # whoever reads that side finds out, too
            return

    async def _judge(self, call: _Call) -> None:
        event, accept = call.event, None
        try:
            head, subject = self._subject(call)
            accept = head.headers.get(b"accept")
            admitted = await self._door.admission.admit(subject)
            note(event, admitted.verdict)
            if not self._upstream.proxied:
                await self._door.admission.check(subject, admitted, self._upstream.dialled.address)
            event.address = self._upstream.dialled.address
            tap = self._door.taps(subject, head, admitted.verdict) if self._door.taps is not None else None
            try:
                await self._carry(call, subject, head, tap)
            finally:
                if tap is not None:
                    tap.finish()
        except Denied as denial:
            note(event, denial.verdict)
            event.decision = "denied"
            await self._page(call, *pages.denied(denial.subject, denial.verdict, accept))
        except SecretRefused as refused:
            event.decision = "denied" if isinstance(refused, SecretMisuse) else "error"
            event.error, event.secrets = str(refused), (refused.secret,)
            status = 403 if event.decision == "denied" else 502
            await self._page(call, *pages.failed(status, str(refused), accept, decision=event.decision))
        except Refused as refusal:
            event.error = str(refusal)
            event.decision = "denied" if refusal.status == 421 else "error"
            await self._page(call, *pages.failed(refusal.status, str(refusal), accept))
        except OriginLost as error:
            event.decision, event.error = "error", str(error)
            await self._page(call, *pages.failed(502, f"{event.domain}: {error}", accept))

    def _subject(self, call: _Call) -> tuple[RequestHead, Subject]:
        pseudo = {name: value for name, value in call.headers if name.startswith(b":")}
        method, target = pseudo.get(b":method", b""), pseudo.get(b":path", b"")
        authority = pseudo.get(b":authority", b"").lower()
        call.event.method = method.decode("latin-1")
        split = hosts.split_authority(authority)
        if method == b"CONNECT" or not target.startswith(b"/") or b"#" in target or split is None:
            raise Refused("a request that HTTP/2 does not know, or not here")
        path = paths.normalise(target.decode("latin-1"))
        call.event.domain, call.event.path = split[0], path
        expected = self._arrival.host if self._arrival.host is not None else self._arrival.address
        if split[0] != expected:
            raise Refused(f"a request for {split[0]} on a connection for {expected}", 421)
        if b"/." in target or b"%2e" in target.lower():
            query = target.partition(b"?")
            target = path.encode("latin-1") + query[1] + query[2]
        head = RequestHead(method, target, plain(call.headers, b"host"), authority)
        host, address = self._arrival.host, None if self._arrival.host is not None else split[0]
        return head, Subject(self._arrival.port, host, address, method=call.event.method, path=path)

    async def _carry(self, call: _Call, subject: Subject, head: RequestHead, tap: Tap | None) -> None:
        broker, event = self._door.broker, call.event
        outgoing: Filter | None = None
        incoming: Incoming | None = None
        if broker is not None:
            headers = head.headers
            head = await broker.outgoing(subject, head, verified=True)
            event.secrets = head.secrets
            outgoing = broker.body(subject, headers, verified=True)
            incoming = functools.partial(broker.incoming, subject)
        if self._last is not None:
            await self._client.reset(call.client_id, ErrorCodes.REFUSED_STREAM)
            call.answered = True
            raise ConnectionAbortedError("the origin takes no more requests on this connection")
        pseudo = [
            (b":method", head.method),
            (b":scheme", b"https"),
            (b":authority", head.authority),
            (b":path", head.target),
        ]
        changed = (b"content-length",) if outgoing is not None else ()
        fields = [*pseudo, *plain(list(head.headers), *changed)]
        call.origin_id = await self._origin.open([(name.lower(), value) for name, value in fields], end=call.whole)
        self._by_origin[call.origin_id] = call
        event.decision = "allowed"
        up = None if call.whole else asyncio.create_task(self._up(call, outgoing, tap))
        try:
            await self._down(call, incoming, tap)
        except OriginLost:
            if up is not None and up.done() and (error := up.exception()) is not None:
                raise error from None
            raise
        finally:
            if up is not None:
                up.cancel()
                await asyncio.gather(up, return_exceptions=True)

    async def _up(self, call: _Call, change: Filter | None, tap: Tap | None) -> None:
        """The request's body, and its trailers."""
        assert call.origin_id is not None
        try:
            while not call.sent:
                piece = await call.up.get()
                data = piece.data
                if data:
                    call.event.bytes_sent += len(data)
                    if tap is not None:
                        tap.request_body(data)
                if change is not None:
                    data = (change(data) if data else b"") + (change(b"") if piece.end else b"")
                await self._origin.data(call.origin_id, data, end=piece.end and piece.trailers is None)
                if piece.trailers is not None:
                    await self._origin.head(call.origin_id, piece.trailers, end=True)
                call.sent = piece.end
                await self._client.took(call.client_id, piece.size)
        except H2Error:
            return  # the origin has answered without waiting for all of it
        except SecretRefused:
            call.down.lose()
            raise

    async def _down(self, call: _Call, incoming: Incoming | None, tap: Tap | None) -> None:
        """The answer."""
        assert call.origin_id is not None
        change: Filter | None = None
        while not call.answered:
            piece = await call.down.get()
            if piece.lost:
                raise OriginLost("it broke the request off")
            if piece.head is not None:
                change = await self._head(call, piece.head, incoming, tap, end=piece.end)
                call.answered = piece.end
                continue
            data = piece.data
            call.event.bytes_received += len(data)
            if change is not None:
                data = (change(data) if data else b"") + (change(b"") if piece.end else b"")
            if tap is not None and data:
                tap.response_body(data)
            await self._client.data(call.client_id, data, end=piece.end and piece.trailers is None)
            if piece.trailers is not None:
                await self._client.head(call.client_id, piece.trailers, end=True)
            call.answered = piece.end
            await self._origin.took(call.origin_id, piece.size)

    async def _head(
        self, call: _Call, headers: list[Header], incoming: Incoming | None, tap: Tap | None, *, end: bool
    ) -> Filter | None:
        status, change = int(headers[0][1]), None
        head = ResponseHead(status, b"", plain(headers, b"alt-svc"))
        if status >= 200:
            call.event.status_code = status
            if incoming is not None:
                head, change = incoming(head)
            if tap is not None:
                tap.response(head)
            call.begun = True
        fields = [(b":status", b"%d" % status), *plain(list(head.headers))]
        await self._client.head(call.client_id, fields, end=end)
        return change

    async def _page(self, call: _Call, head: ResponseHead, body: bytes) -> None:
        """Answer ourselves, or break the stream off where an answer has begun."""
        if call.begun:
            return
        call.begun = True
        call.event.status_code = head.status
        fields = [(b":status", b"%d" % head.status), *((name.lower(), value) for name, value in head.headers)]
        fields.append((b"content-length", b"%d" % len(body)))
        await self._client.head(call.client_id, fields, end=False)
        await self._client.data(call.client_id, body, end=True)
        call.answered = True
