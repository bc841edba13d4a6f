"""One stream of a guest, from its first byte on: TLS that is ended here or passed through, HTTP, or bytes that are not read."""

from __future__ import annotations

import asyncio
import re
from enum import Enum
from typing import Final

from capsem.egress import hosts
from capsem.egress.admit import Admitted, Denied
from capsem.egress.dial import DialError, Target
from capsem.egress.door import Allowed, Arrival, Door, note
from capsem.egress.events import NetEvent
from capsem.egress.facts import Action, Protocol, Subject, TlsMode, Verdict
from capsem.egress.h2side import Side, SideFailed
from capsem.egress.hello import FIRST_BYTE, Hello, HelloError, HelloReader
from capsem.egress.http2 import Http2
from capsem.egress.mint import Minter
from capsem.egress.names import NameTable
from capsem.egress.parts import Judge
from capsem.egress.peer import Peer
from capsem.egress.pool import Upstream
from capsem.egress.requests import Requests, Tunnel
from capsem.egress.resolve import NotFound
from capsem.egress.stream import GuestStream
from capsem.egress.tls import TlsRefused, TlsStream

HELLO_TIME: Final = 10.0  # seconds for the first byte, the rest of the hello and the handshake together
SILENCE: Final = 0.3  # seconds after which a client is taken for one that waits for the server to speak

_LINE: Final = re.compile(rb"[A-Za-z][A-Za-z-]{0,31} [^ ]+ HTTP/[0-9.]+\Z")
_BEGINNING: Final = re.compile(rb"[A-Za-z][A-Za-z-]{0,31}( [^ \r\n]*( [HTP/0-9.\r]*)?)?\Z")
_LONGEST_LINE: Final = 64 * 1024


class Spoken(Enum):
    """What the first bytes of a client look like."""

    TLS = "tls"
    HTTP = "http"
    OTHER = "other"
    UNKNOWN = "unknown"  # more bytes will tell


def spoken(first: bytes) -> Spoken:
    """What begins like that."""
    if not first:
        return Spoken.UNKNOWN
    if first[0] == FIRST_BYTE:
        return Spoken.TLS
    line, end, _ = first.partition(b"\r\n")
    if end:
        return Spoken.HTTP if _LINE.match(line) else Spoken.OTHER
    return Spoken.UNKNOWN if _BEGINNING.match(first) and len(first) < _LONGEST_LINE else Spoken.OTHER


class Connected:
    """See the module."""

    def __init__(self, door: Door, minter: Minter, names: NameTable, stream: GuestStream) -> None:
        self._door = door
        self._minter = minter
        self._names = names
        self._stream = stream
        self._connection = stream.connection

    async def serve(self) -> None:
        """To its end. Raises ConnectionError."""
        arrival = Arrival(self._connection, self._connection.port, address=hosts.address(self._connection.address))
        peer = Peer(self._stream)
        try:
            try:
                await self._speak(arrival, peer)
            except Tunnel as tunnel:
                address = hosts.address(tunnel.host)
                host = None if address is not None else tunnel.host
                inner = Arrival(self._connection, tunnel.port, host=host, address=address, tunnelled=True)
                await self._speak(inner, peer)
        finally:
            await peer.finish()

    async def _speak(self, arrival: Arrival, peer: Peer) -> None:
        explicit = arrival.connection.explicit and not arrival.tunnelled
        raw = [] if explicit else self._raw_subjects(arrival)
        judge = self._door.admission.judge
        maybe_raw = bool(raw) and all(judge.judge(each).action is not Action.DENY for each in raw)
        try:
            kind = await self._first(peer, maybe_raw=maybe_raw)
        except TimeoutError:
            return
        if kind is None:
            return
        if kind is Spoken.TLS and not explicit:
            await self._tls(arrival, peer)
        elif kind is Spoken.HTTP or explicit:
            await Requests(self._door, arrival, peer).serve()
        else:
            await self._raw(arrival, raw, peer)

    async def _first(self, peer: Peer, *, maybe_raw: bool) -> Spoken | None:
        """What the client speaks, None if it leaves without a word. Raises TimeoutError when it says too little."""
        kind = Spoken.UNKNOWN
        async with asyncio.timeout(HELLO_TIME):
            if maybe_raw:
                try:
                    async with asyncio.timeout(SILENCE):
                        await peer.peek()
                except TimeoutError:
                    return Spoken.OTHER
            data = await peer.peek()
            while (kind := spoken(data)) is Spoken.UNKNOWN:
                # Where nothing but HTTP can come of it, the rest of the line is waited for where errors are told.
                if not data or not maybe_raw:
                    return Spoken.HTTP if data else None
                before = len(data)
                data = await peer.peek(more=True)
                if len(data) == before:
                    return Spoken.OTHER
        return kind

    # TLS.

    async def _tls(self, arrival: Arrival, peer: Peer) -> None:
        event = self._event(arrival)
        started = self._door.clock.monotonic()
        recorded = True
        upstream: Upstream | None = None
        try:
            limit = asyncio.get_running_loop().time() + HELLO_TIME
            async with asyncio.timeout_at(limit):
                reader, hello = HelloReader(), None
                while hello is None:
                    data = await peer.read()
                    if not data:
                        raise HelloError("the connection ended in the middle of a ClientHello")
                    hello = reader.feed(data)
            event.domain = hello.sni or arrival.host or arrival.address
            subject = Subject(arrival.port, hello.sni, None if hello.sni else arrival.address)
            verdict = self._door.admission.judge.judge(subject)
            if verdict.protocol is Protocol.PASSTHROUGH and verdict.action is not Action.DENY:
                peer.push(bytes(reader.raw))
                await self._pass(arrival, hello, subject, peer, event)
                return
            event.tls = TlsMode.INTERCEPTED
            upstream = await self._http2(arrival, hello, subject, verdict)
            async with asyncio.timeout_at(max(limit, asyncio.get_running_loop().time() + 1)):
                inner = await self._intercept(arrival, hello, upstream, bytes(reader.raw))
            recorded = False
            await inner.serve()
        except TimeoutError:
            event.error = f"no ClientHello and handshake within {HELLO_TIME:.0f} s"
            return
        except HelloError as error:
            event.error = str(error)
            return
        except SideFailed as error:
            recorded, event.error = True, str(error)
            raise
        except TlsRefused as error:
            event.error = f"tls_client_refused: {error}" if error.by_peer else str(error)
            raise
        except asyncio.CancelledError:
            event.decision = "interrupted"
            raise
        except ConnectionError as error:
            event.error = str(error)
            raise
        finally:
            if upstream is not None:
                self._door.pool.drop(upstream)
            if recorded:
                self._record(event, started)

    async def _http2(self, arrival: Arrival, hello: Hello, subject: Subject, verdict: Verdict) -> Upstream | None:
        """A connection to the origin that speaks HTTP/2, where a rule asks for that and the guest can; None without one: then
        requests of HTTP/1.1 are told what is wrong."""
        if not verdict.http2 or verdict.action is not Action.ALLOW or b"h2" not in hello.alpn:
            return None
        if arrival.host is not None and hello.sni != arrival.host:
            return None
        door, host = self._door, subject.host or subject.address
        assert host is not None
        target = Target(host, arrival.port, tls=True, certificate=verdict.certificate, http2=True)
        proxied = door.dialer.proxy(target, http=True) is not None
        try:
            addresses = await door.admission.route(subject, Admitted(verdict), elsewhere=proxied)
            filled = await door.pool.reserve()
            upstream: Upstream | None = None
            try:
                upstream = Upstream(target, await door.dialer.dial(target, addresses), proxied=proxied)
            finally:
                filled(upstream)
        except (Denied, NotFound, DialError):
            return None
        if upstream.dialled.alpn == "h2":
            return upstream
        door.pool.drop(upstream)
        return None

    async def _intercept(
        self, arrival: Arrival, hello: Hello, upstream: Upstream | None, received: bytes
    ) -> Requests | Http2:
        name = hello.sni or arrival.host or arrival.address
        if name is None:
            raise HelloError("neither a name nor an address is known for this TLS connection")
        context = self._minter.context(name, http2=upstream is not None)
        tls = TlsStream(self._stream, context, server=True)
        await tls.handshake(received)
        mismatch = None
        if arrival.host is not None and hello.sni != arrival.host:
            mismatch = f"TLS for {hello.sni or 'no name'} in a tunnel to {arrival.host}"
        inside = Arrival(
            arrival.connection,
            arrival.port,
            host=hello.sni,
            address=None if hello.sni else arrival.address,
            tls=TlsMode.INTERCEPTED,
            tunnelled=arrival.tunnelled,
            mismatch=mismatch,
        )
        if upstream is not None and tls.alpn == "h2":
            return Http2(self._door, inside, Side(tls, server=True), upstream)
        return Requests(self._door, inside, Peer(tls))

    async def _pass(self, arrival: Arrival, hello: Hello, subject: Subject, peer: Peer, event: NetEvent) -> None:
        """TLS that is not ended here: what its hello says is all that is ever known of it."""
        event.tls = TlsMode.PASSTHROUGH
        try:
            admitted = await self._door.admission.admit(subject)
            note(event, admitted.verdict)
            if arrival.host is not None and hello.sni != arrival.host:
                event.decision, event.error = (
                    "denied",
                    f"TLS for {hello.sni or 'no name'} in a tunnel to {arrival.host}",
                )
                return
            if hello.ech and not admitted.verdict.ech:
                event.decision, event.error = (
                    "denied",
                    "the ClientHello may hide another name than the one it shows (ECH)",
                )
                return
            await self._dial_and_splice(arrival, subject, admitted, peer, event, _passes(subject))
        except Denied as denial:
            note(event, denial.verdict)
            event.decision, event.error = "denied", denial.verdict.reason
        except (NotFound, DialError) as error:
            event.decision, event.error = "error", str(error)

    # Neither TLS nor HTTP.

    def _raw_subjects(self, arrival: Arrival) -> list[Subject]:
        """What has to be allowed, all of it, for bytes to pass unread: every name that the address was given for."""
        names = (arrival.host,) if arrival.host is not None else self._names.names(arrival.address or "")
        if names:
            return [Subject(arrival.port, name, protocol=Protocol.TCP) for name in names]
        return [] if arrival.address is None else [Subject(arrival.port, None, arrival.address, Protocol.TCP)]

    async def _raw(self, arrival: Arrival, subjects: list[Subject], peer: Peer) -> None:
        event, started = self._event(arrival), self._door.clock.monotonic()
        try:
            if not subjects:
                event.decision, event.error = "denied", "neither a name nor an address is known"
                return
            admitted: Admitted | None = None
            for subject in reversed(subjects):
                event.domain = subject.host or subject.address
                admitted = await self._door.admission.admit(subject)
                note(event, admitted.verdict)
            assert admitted is not None
            await self._dial_and_splice(arrival, subjects[0], admitted, peer, event, _all_pass(subjects))
        except Denied as denial:
            note(event, denial.verdict)
            event.decision, event.error = "denied", denial.verdict.reason
        except (NotFound, DialError) as error:
            event.decision, event.error = "error", str(error)
        except asyncio.CancelledError:
            event.decision = "interrupted"
            raise
        except ConnectionError as error:
            event.error = str(error)
            raise
        finally:
            self._record(event, started)

    async def _dial_and_splice(
        self, arrival: Arrival, subject: Subject, admitted: Admitted, peer: Peer, event: NetEvent, allowed: Allowed
    ) -> None:
        door = self._door
        host = subject.host or subject.address
        assert host is not None
        target = Target(host, arrival.port, tls=False)
        proxied = door.dialer.proxy(target, http=False) is not None
        addresses = await door.admission.route(subject, admitted, elsewhere=proxied)
        # Where the guest was given one of them, it gets that one.
        addresses = sorted(addresses, key=lambda each: each != arrival.address)
        filled = await door.pool.reserve()
        upstream: Upstream | None = None
        try:
            upstream = Upstream(target, await door.dialer.dial(target, addresses, http=False), proxied=proxied)
        finally:
            filled(upstream)
        try:
            event.address, event.decision = upstream.dialled.address, "allowed"
            await door.splice(peer, upstream, allowed, event)
        finally:
            door.pool.drop(upstream)

    def _event(self, arrival: Arrival) -> NetEvent:
        return NetEvent(
            self._door.clock.time(),
            arrival.host or arrival.address,
            arrival.port,
            process_name=arrival.connection.process,
            tls=arrival.tls,
        )

    def _record(self, event: NetEvent, started: float) -> None:
        event.duration = self._door.clock.monotonic() - started
        self._door.recorder.net(event)


def _passes(subject: Subject) -> Allowed:
    def allowed(judge: Judge) -> bool:
        verdict = judge.judge(subject)
        return verdict.action is not Action.DENY and verdict.protocol is Protocol.PASSTHROUGH

    return allowed


def _all_pass(subjects: list[Subject]) -> Allowed:
    return lambda judge: all(judge.judge(subject).action is not Action.DENY for subject in subjects)
