"""The guest's side of a connection that speaks HTTP/1.1: each request judged anew, and carried out or refused."""

from __future__ import annotations

import asyncio
import functools
from dataclasses import replace
from typing import Final

from capsem.egress import hosts, pages, paths
from capsem.egress.admit import Admitted, Denied
from capsem.egress.alarm import Alarm
from capsem.egress.dial import DialError, Target
from capsem.egress.door import Arrival, Door, note
from capsem.egress.events import NetEvent
from capsem.egress.exchange import Exchange, Filter, Incoming, OriginFailed, Stale
from capsem.egress.facts import Action, Subject, TlsMode, Verdict
from capsem.egress.heads import ResponseHead
from capsem.egress.http1 import BadHead, Request, Response, parse_request, write_response
from capsem.egress.parts import SecretMisuse, SecretRefused, Tap
from capsem.egress.peer import Peer
from capsem.egress.pool import Upstream
from capsem.egress.resolve import NotFound

HEAD_TIME: Final = 30.0  # seconds from the first byte of a head to its last
IDLE_TIME: Final = 120.0  # and between two requests
PATIENCE: Final = 1.0  # seconds of waiting for an answer, after which it matters whether the client still waits
_FORGIVEN: Final = 256 * 1024  # bytes that are still read of a client that was told to stop
_LINGER: Final = 5.0  # seconds


class Tunnel(Exception):
    """The client asked for a tunnel, and was told that it is there."""

    def __init__(self, host: str, port: int) -> None:
        super().__init__(host)
        self.host = host
        self.port = port


class Requests:
    """Serves one connection."""

    def __init__(self, door: Door, arrival: Arrival, client: Peer) -> None:
        self._door = door
        self._arrival = arrival
        self._client = client
        self._busy: asyncio.Task[object] | None = None  # while there is a request
        self._left = False  # by the client, in the middle of it
        self._waiting: asyncio.Task[object] | None = None  # while there is none
        self._late = False  # it took too long
        self._alarm = Alarm(self._rang)

    async def serve(self) -> None:
        """Until the client ends, or has to be hung up on. Raises ConnectionError when it breaks off, and Tunnel."""
        try:
            await self._serve_all()
        finally:
            self._alarm.close()
            await self._client.finish()

    def _rang(self) -> None:
        if self._busy is not None:
            self._client.watch(self._leave)
        elif self._waiting is not None:
            self._late = True
            self._waiting.cancel()

    async def _head(self) -> bytes | None:
        """The next head; None when the client ends, or sends too little. Raises BadHead, ConnectionError."""
        self._waiting = asyncio.current_task()
        self._alarm.set(IDLE_TIME)
        try:
            # One that has begun has less time than an idle connection has, and no more if more of it comes.
            return await self._client.head(began=lambda: self._alarm.hurry(HEAD_TIME))
        except asyncio.CancelledError:
            if self._late and self._waiting is not None and self._waiting.uncancel() == 0:
                return None  # it is not told anything
            raise
        finally:
            self._waiting = None
            self._alarm.off()

    async def _serve_all(self) -> None:
        keep = True
        while keep:
            try:
                block = await self._head()
                if block is None:
                    return
                request = parse_request(block)
            except BadHead as error:
                await self._malformed(error)
                break
            if request.connect:
                await self._tunnel(request)
            keep = await self._serve(request)
        await hang_up(self._client)

    async def _malformed(self, error: BadHead) -> None:
        event = self._event(None)
        event.error = str(error)
        started = self._door.clock.monotonic()
        try:
            await self._page(None, event, *pages.failed(error.status, str(error), None))
        finally:
            self._record(event, started)

    async def _tunnel(self, request: Request) -> None:
        split = hosts.split_authority(request.head.authority)
        if split is None or split[1] is None or self._arrival.tunnelled or self._arrival.tls is not TlsMode.NONE:
            await self._malformed(BadHead("a tunnel cannot be had here: CONNECT host:port, once, outside of TLS"))
            await hang_up(self._client)
            raise ConnectionAbortedError("a tunnel that cannot be had")
        await self._client.stream.write(b"HTTP/1.1 200 Connection established\r\n\r\n")
        raise Tunnel(split[0], split[1])

    def _event(self, request: Request | None) -> NetEvent:
        arrival = self._arrival
        return NetEvent(
            self._door.clock.time(),
            arrival.host,
            arrival.port,
            process_name=arrival.connection.process,
            method=None if request is None else request.head.method.decode("ascii"),
            tls=arrival.tls,
        )

    def _record(self, event: NetEvent, started: float) -> None:
        event.duration = self._door.clock.monotonic() - started
        self._door.recorder.net(event)

    async def _serve(self, request: Request) -> bool:
        """One request, to the end of its answer. Whether another may come."""
        started = self._door.clock.monotonic()
        event = self._event(request)
        self._busy = asyncio.current_task()
        if request.framing == 0:  # a body is read anyway
            self._alarm.set(PATIENCE)
        try:
            return await self._judge(request, event)
        except asyncio.CancelledError:
            if self._left and self._busy is not None and self._busy.uncancel() == 0:
                event.error = "the client left"
                raise ConnectionResetError(event.error) from None
            event.decision = "interrupted"
            raise
        except ConnectionError as error:
            event.error = str(error)
            raise
        finally:
            self._busy = None
            self._alarm.off()
            self._record(event, started)

    def _leave(self) -> None:
        """The client's side is broken: what is done for it is given up, wherever that is."""
        if self._busy is not None:
            self._left = True
            self._busy.cancel()

    async def _judge(self, request: Request, event: NetEvent) -> bool:
        try:
            request, subject = self._subject(request, event)
        except BadHead as error:
            event.error = str(error)
            event.decision = "denied" if error.status == 421 else "error"
            return await self._page(request, event, *pages.failed(error.status, str(error), _accept(request)))
        try:
            admitted = await self._door.admission.admit(subject)
            note(event, admitted.verdict)
            return await self._carry(request, subject, admitted, event)
        except Denied as denial:
            note(event, denial.verdict)
            event.decision = "denied"
            return await self._page(request, event, *pages.denied(denial.subject, denial.verdict, _accept(request)))
        except SecretRefused as refused:
            return await self._refuse_secret(request, event, refused)
        except (NotFound, DialError, OriginFailed) as error:
            status = error.status if isinstance(error, DialError) else 502
            event.decision, event.error = "error", str(error)
            return await self._page(
                request, event, *pages.failed(status, f"{subject.host or subject.address}: {error}", _accept(request))
            )
        except BadHead as error:  # in a body: what was said is said
            event.decision, event.error = "error", str(error)
            raise ConnectionAbortedError(str(error)) from error

    async def _refuse_secret(self, request: Request, event: NetEvent, refused: SecretRefused) -> bool:
        """Tell why, and end the connection: of a misuse no more is heard on it."""
        event.decision, event.error, event.secrets = _refusal(refused), str(refused), (refused.secret,)
        status = 403 if event.decision == "denied" else 502
        page = pages.failed(status, str(refused), _accept(request), decision=event.decision)
        await self._page(request, event, *page)
        return False

    def _subject(self, request: Request, event: NetEvent) -> tuple[Request, Subject]:
        """What is to be judged, and the request as it is to be made. Raises BadHead for one that cannot be either."""
        arrival, head = self._arrival, request.head
        split = hosts.split_authority(head.authority)
        assert split is not None
        named, port = split[0], arrival.port
        if request.scheme is not None and arrival.tls is TlsMode.NONE and not arrival.tunnelled:
            if request.scheme != b"http":
                raise BadHead("an https URL in the request target: ask for a tunnel with CONNECT")
            port = split[1] or 80
        elif arrival.connection.explicit and not arrival.tunnelled:
            raise BadHead("this is a proxy: the request target must be a URL")
        address = hosts.address(named)
        event.domain, event.port = named, port
        path = paths.normalise(head.target.decode("latin-1"))
        event.path = path
        if arrival.mismatch is not None:
            raise BadHead(arrival.mismatch, 421)
        fixed = arrival.address if arrival.host is None and arrival.tls is not TlsMode.NONE else arrival.host
        if fixed is not None and named != fixed:
            raise BadHead(f"a request for {named} on a connection for {fixed}", 421)
        if b"/." in head.target or b"%2e" in head.target.lower():
            # What was judged is what is asked for: "/a/../b" is sent as "/b".
            query = head.target.partition(b"?")
            head = replace(head, target=path.encode("latin-1") + query[1] + query[2])
            request = replace(request, head=head)
        host = None if address is not None else named
        return request, Subject(port, host, address, method=head.method.decode("ascii"), path=path)

    async def _carry(self, request: Request, subject: Subject, admitted: Admitted, event: NetEvent) -> bool:
        """Have it carried out, on a connection that is there already or on a new one."""
        door = self._door
        tap = door.taps(subject, request.head, admitted.verdict) if door.taps is not None else None
        try:
            upstream = await self._reusable(subject, admitted, event)
            if upstream is not None:
                try:
                    return await self._exchange(request, subject, upstream, event, tap)
                except Stale:
                    pass
            upstream = await self._dial(subject, admitted, event)
            return await self._exchange(request, subject, upstream, event, tap)
        finally:
            if tap is not None:
                tap.finish()

    def _target(self, subject: Subject, verdict: Verdict) -> Target:
        host = subject.host or subject.address
        assert host is not None
        return Target(host, subject.port, self._arrival.tls is TlsMode.INTERCEPTED, verdict.certificate)

    async def _reusable(self, subject: Subject, admitted: Admitted, event: NetEvent) -> Upstream | None:
        door = self._door
        upstream = door.pool.take(self._target(subject, admitted.verdict))
        if upstream is None:
            return None
        try:
            if not upstream.proxied:
                await door.admission.check(subject, admitted, upstream.dialled.address)
        except BaseException:
            door.pool.drop(upstream)
            raise
        event.address = upstream.dialled.address
        return upstream

    async def _dial(self, subject: Subject, admitted: Admitted, event: NetEvent) -> Upstream:
        door, target = self._door, self._target(subject, admitted.verdict)
        proxied = door.dialer.proxy(target, http=True) is not None
        addresses = await door.admission.route(subject, admitted, elsewhere=proxied)
        filled = await door.pool.reserve()
        upstream: Upstream | None = None
        try:
            dialled = await door.dialer.dial(target, addresses)
            upstream = Upstream(target, dialled, proxied=proxied)
        finally:
            filled(upstream)
        event.address = dialled.address
        return upstream

    async def _exchange(
        self, request: Request, subject: Subject, upstream: Upstream, event: NetEvent, tap: Tap | None
    ) -> bool:
        door, verified = self._door, upstream.target.tls
        outgoing: Filter | None = None
        incoming: Incoming | None = None
        reusable = False
        try:
            if door.broker is not None:
                head = await door.broker.outgoing(subject, request.head, verified=verified)
                event.secrets = head.secrets
                outgoing = door.broker.body(subject, request.head.headers, verified=verified)
                request = replace(request, head=head)

                incoming = functools.partial(door.broker.incoming, subject)
            exchange = Exchange(
                self._client, request, event, tap=tap, outgoing=outgoing, incoming=incoming, relay=_relay(upstream)
            )
            event.decision = "allowed"
            try:
                keep, reusable = await exchange.run(upstream)
            except SecretRefused as refused:
                if not exchange.begun:
                    raise
                event.decision, event.secrets = _refusal(refused), (refused.secret,)
                raise ConnectionAbortedError(str(refused)) from refused
            upstream.used += 1
            if exchange.upgraded:
                await door.splice(
                    self._client, upstream, lambda judge: judge.judge(subject).action is not Action.DENY, event
                )
                return False
            return keep
        finally:
            if reusable:
                door.pool.put(upstream)
            else:
                door.pool.drop(upstream)

    async def _page(self, request: Request | None, event: NetEvent, head: ResponseHead, body: bytes) -> bool:
        """Answer ourselves. Whether another request may come: not where this one's body was not read."""
        keep = request is not None and request.keep_alive and request.framing == 0 and head.status not in (400, 421)
        method = b"GET" if request is None else request.head.method
        event.status_code = head.status
        data = write_response(Response(head, len(body), keep), method=method, framing=len(body), keep_alive=keep)
        await self._client.stream.write(data if method == b"HEAD" else data + body)
        return keep


def _refusal(refused: SecretRefused) -> str:
    return "denied" if isinstance(refused, SecretMisuse) else "error"


def _accept(request: Request) -> bytes | None:
    return request.head.headers.get(b"accept")


def _relay(upstream: Upstream) -> tuple[bytes, list[bytes]]:
    proxy = upstream.dialled.relayed
    if proxy is None:
        return b"", []
    authority = hosts.join_authority(upstream.target.host, upstream.target.port, 80)
    lines = [b"Proxy-Authorization: " + proxy.authorization] if proxy.authorization else []
    return b"http://" + authority.encode("ascii"), lines


async def hang_up(client: Peer) -> None:
    """End a connection so that what was said last arrives: a reset would overtake it."""
    await client.stream.write_eof()
    left = _FORGIVEN
    try:
        async with asyncio.timeout(_LINGER):
            while left > 0 and (data := await client.read()):
                left -= len(data)
    except TimeoutError:
        return
