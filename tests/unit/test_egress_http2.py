"""HTTP/2 through the proxy core: as gRPC uses it, and as those do who mean no good."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from h2.config import H2Configuration
from h2.connection import H2Connection
from h2.errors import ErrorCodes
from h2.events import (
    ConnectionTerminated,
    DataReceived,
    RequestReceived,
    ResponseReceived,
    StreamEnded,
    StreamReset,
    TrailersReceived,
)

from capsem.egress import http2
from capsem.egress.broker import Lender
from capsem.egress.facts import Action, Layer, TlsMode
from capsem.egress.grants import Grant, Places
from capsem.egress.parts import SecretUnavailable
from capsem.egress.paths import PathPattern
from capsem.egress.tls import TlsStream
from egress_bench import Bench, MemoryStream, answering, bench, rule, run, sites

Answer = Callable[["Served", int], Awaitable[None]]
GRPC = [(b"content-type", b"application/grpc"), (b"te", b"trailers")]


class Served:
    """An origin's side of a connection."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer
        self.h2 = H2Connection(H2Configuration(client_side=False, header_encoding=None))
        self.requests: dict[int, list[tuple[bytes, bytes]]] = {}
        self.trailers: dict[int, list[tuple[bytes, bytes]]] = {}
        self.data: dict[int, asyncio.Queue[bytes]] = {}
        self.reset: dict[int, asyncio.Event] = {}

    def send(self) -> None:
        self.writer.write(self.h2.data_to_send())

    async def serve(self, answer: Answer) -> None:
        self.h2.initiate_connection()
        self.send()
        tasks = []
        try:
            while data := await self.reader.read(65536):
                for event in self.h2.receive_data(data):
                    if isinstance(event, RequestReceived):
                        self.requests[event.stream_id] = event.headers
                        self.data[event.stream_id] = asyncio.Queue()
                        self.reset[event.stream_id] = asyncio.Event()
                        tasks.append(asyncio.create_task(answer(self, event.stream_id)))
                    elif isinstance(event, DataReceived):
                        self.data[event.stream_id].put_nowait(event.data)
                        self.h2.acknowledge_received_data(event.flow_controlled_length, event.stream_id)
                    elif isinstance(event, TrailersReceived):
                        self.trailers[event.stream_id] = event.headers
                    elif isinstance(event, StreamEnded):
                        self.data[event.stream_id].put_nowait(b"")
                    elif isinstance(event, StreamReset):
                        self.reset[event.stream_id].set()
                self.send()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


async def origin(world: Bench, answer: Answer) -> int:
    context = world.server_context("site.test")
    context.set_alpn_protocols(["h2"])
    return await world.origin(lambda reader, writer: Served(reader, writer).serve(answer), context=context)


class Caller:
    """A client's side."""

    def __init__(self, raw: MemoryStream, stream: TlsStream) -> None:
        self.raw, self.stream = raw, stream
        self.h2 = H2Connection(H2Configuration(header_encoding=None))
        self.h2.local_settings.enable_push = 0
        self.events: list[Any] = []

    async def send(self) -> None:
        if data := self.h2.data_to_send():
            await self.stream.write(data)

    async def request(
        self,
        *,
        method: bytes = b"POST",
        path: bytes = b"/Service/Call",
        host: bytes = b"site.test",
        end: bool = True,
        more: list[tuple[bytes, bytes]] | None = None,
    ) -> int:
        stream_id = self.h2.get_next_available_stream_id()
        fields = [(b":method", method), (b":scheme", b"https"), (b":authority", host), (b":path", path)]
        self.h2.send_headers(stream_id, [*fields, *(more or [])], end_stream=end)
        await self.send()
        return stream_id

    async def data(self, stream_id: int, data: bytes, *, end: bool = False) -> None:
        self.h2.send_data(stream_id, data, end_stream=end)
        await self.send()

    async def event(self, kind: type[Any], stream_id: int | None = None) -> Any:
        """The next event of a kind, of a stream; the others are kept."""
        while True:
            for at, event in enumerate(self.events):
                if isinstance(event, kind) and stream_id in (None, getattr(event, "stream_id", None)):
                    return self.events.pop(at)
            data = await self.stream.read()
            if not data:
                raise EOFError
            self.events += self.h2.receive_data(data)
            for event in self.events:
                if isinstance(event, DataReceived) and event.flow_controlled_length:
                    self.h2.acknowledge_received_data(event.flow_controlled_length, event.stream_id)
                    event.flow_controlled_length = 0
            await self.send()

    async def answer(self, stream_id: int) -> tuple[int, dict[bytes, bytes], bytes, dict[bytes, bytes]]:
        """Status, fields, body and trailers."""
        head = await self.event(ResponseReceived, stream_id)
        await self.event(StreamEnded, stream_id)
        body, trailers = b"", {}
        for event in [each for each in self.events if getattr(each, "stream_id", None) == stream_id]:
            self.events.remove(event)
            if isinstance(event, DataReceived):
                body += event.data
            elif isinstance(event, TrailersReceived):
                trailers = dict(event.headers)
        fields = dict(head.headers)
        return int(fields.pop(b":status")), fields, body, trailers


async def call(world: Bench, port: int, name: str = "site.test") -> Caller:
    raw = world.open(port=port)
    context = ssl.create_default_context(cadata=world.authority.pem.decode())
    context.set_alpn_protocols(["h2", "http/1.1"])
    stream = TlsStream(raw, context, server_hostname=name)
    await stream.handshake()
    assert stream.alpn == "h2"
    caller = Caller(raw, stream)
    caller.h2.initiate_connection()
    await caller.send()
    return caller


async def echo(served: Served, stream_id: int) -> None:
    """Every message back as it comes, and the status in trailers, as gRPC has it."""
    served.h2.send_headers(
        stream_id, [(b":status", b"200"), (b"content-type", b"application/grpc"), (b"alt-svc", b"h3=x")]
    )
    served.send()
    while data := await served.data[stream_id].get():
        served.h2.send_data(stream_id, data)
        served.send()
    served.h2.send_headers(stream_id, [(b"grpc-status", b"0")], end_stream=True)
    served.send()


@run
async def test_messages_go_both_ways_as_they_come_and_trailers_last(tmp_path: Path) -> None:
    async with bench(tmp_path, sites("site.test", http2=True)) as world:
        caller = await call(world, await origin(world, echo))
        first, second = await caller.request(end=False, more=GRPC), await caller.request(end=False, more=GRPC)
        for number in range(3):
            for stream_id in (first, second):
                await caller.data(stream_id, b"message %d of %d" % (number, stream_id))
                assert (await caller.event(DataReceived, stream_id)).data == b"message %d of %d" % (number, stream_id)
        caller.h2.end_stream(first)
        caller.h2.end_stream(second)
        await caller.send()
        status, fields, _, trailers = await caller.answer(first)
        assert (status, fields[b"content-type"], trailers) == (200, b"application/grpc", {b"grpc-status": b"0"})
        assert b"alt-svc" not in fields
        row = await world.rows.row()
        assert (row.domain, row.method, row.path, row.decision) == ("site.test", "POST", "/Service/Call", "allowed")
        assert (row.status_code, row.bytes_sent, row.bytes_received, row.tls) == (200, 42, 42, TlsMode.INTERCEPTED)
        assert world.lookups == ["site.test"]


@run
async def test_an_answer_that_is_trailers_alone_stays_one(tmp_path: Path) -> None:
    async def fail(served: Served, stream_id: int) -> None:
        fields = [(b":status", b"200"), (b"content-type", b"application/grpc"), (b"grpc-status", b"5")]
        served.h2.send_headers(stream_id, fields, end_stream=True)
        served.send()

    async with bench(tmp_path, sites("site.test", http2=True)) as world:
        caller = await call(world, await origin(world, fail))
        head = await caller.event(ResponseReceived, await caller.request(more=GRPC))
        assert head.stream_ended is not None
        assert dict(head.headers)[b"grpc-status"] == b"5"


@run
async def test_more_than_a_window_passes(tmp_path: Path) -> None:
    body = bytes(range(256)) * 4096

    async def send(served: Served, stream_id: int) -> None:
        served.h2.send_headers(stream_id, [(b":status", b"200")])
        at = 0
        while at < len(body):
            room = min(
                served.h2.local_flow_control_window(stream_id), served.h2.max_outbound_frame_size, len(body) - at
            )
            if room:
                served.h2.send_data(stream_id, body[at : at + room], end_stream=at + room == len(body))
                at += room
                served.send()
            await asyncio.sleep(0)

    async with bench(tmp_path, sites("site.test", http2=True)) as world:
        caller = await call(world, await origin(world, send))
        assert (await caller.answer(await caller.request(method=b"GET")))[2] == body


@run
async def test_each_stream_is_judged(tmp_path: Path) -> None:
    rules = (
        sites("site.test", http2=True),
        rule("no", Action.DENY, layer=Layer.VM, hosts=("site.test",), paths=(PathPattern("/Admin/**"),)),
    )
    async with bench(tmp_path, *rules) as world:
        caller = await call(world, await origin(world, echo))
        for path in (b"/Admin/Call", b"/Service/../Admin/Call"):
            status, fields, body, _ = await caller.answer(await caller.request(path=path, end=False))
            assert (status, fields[b"x-capsem-rule"]) == (403, b"no")
            assert b"do not retry" in body
        assert (await caller.answer(await caller.request(host=b"other.test")))[0] == 421
        assert (await caller.answer(await caller.request()))[0] == 200
        assert [row.decision for row in world.rows.requests] == ["denied", "denied", "denied", "allowed"]


class Known:
    """The values of secrets, as long as there is one."""

    value: bytes | None = b"sk-live-0123456789"

    async def get(self, name: str) -> bytes:
        if self.value is None:
            raise SecretUnavailable(name, "its source is gone")
        return self.value

    def known(self, _name: str) -> list[bytes]:
        return [self.value] if self.value is not None else []


@run
async def test_secrets_are_put_in_and_not_repeated(tmp_path: Path) -> None:
    own, known = b"capsem-key-" + b"a" * 20, Known()
    secret = known.value
    assert secret is not None
    grant = Grant("key", (own.decode(),), ("site.test",), Places(body=True))
    seen: list[bytes] = []

    async def tell(served: Served, stream_id: int) -> None:
        body = b"".join([data async for data in received(served, stream_id)])
        seen.append(dict(served.requests[stream_id])[b"x-api-key"])
        said = b"you sent " + body
        served.h2.send_headers(
            stream_id, [(b":status", b"200"), (b"content-length", b"%d" % len(said)), (b"x-echo", secret)]
        )
        served.h2.send_data(stream_id, said, end_stream=True)
        served.send()

    async with bench(tmp_path, sites("site.test", http2=True), broker=Lender([grant], known)) as world:
        caller = await call(world, await origin(world, tell))
        more = [(b"x-api-key", own)]
        stream_id = await caller.request(end=False, more=more)
        await caller.data(stream_id, b"key=" + own[:20])
        await caller.data(stream_id, own[20:] + b"!", end=True)
        status, fields, body, _ = await caller.answer(stream_id)
        assert (status, seen) == (200, [secret])
        assert secret not in body
        assert body.startswith(b"you sent key=capsem-key-")
        assert int(fields[b"content-length"]) == len(body) == len(b"you sent key=" + secret + b"!")
        assert secret not in fields[b"x-echo"]
        status, fields, body, _ = await caller.answer(await caller.request(more=[(b"x-api-key", own[:-1] + b"b")]))
        assert (status, fields[b"x-capsem-decision"]) == (403, b"denied")
        known.value = None
        status, fields, body, _ = await caller.answer(await caller.request(more=more))
        assert (status, fields[b"x-capsem-decision"]) == (502, b"error")
        assert b"its source is gone" in body
        assert len(seen) == 1
    rows = [(row.decision, row.secrets) for row in world.rows.requests]
    assert rows == [("allowed", ("key",)), ("denied", ("key",)), ("error", ("key",))]


async def received(served: Served, stream_id: int) -> AsyncIterator[bytes]:
    while data := await served.data[stream_id].get():
        yield data


@run
async def test_without_a_rule_or_without_an_origin_that_speaks_it_there_is_none(tmp_path: Path) -> None:
    async with bench(tmp_path, sites("site.test"), sites("other.test", http2=True)) as world:
        context = ssl.create_default_context(cadata=world.authority.pem.decode())
        context.set_alpn_protocols(["h2", "http/1.1"])
        old = await world.origin(answering(), "other.test")
        for name, port in (("site.test", await origin(world, echo)), ("other.test", old), ("other.test", 1)):
            stream = TlsStream(world.open(port=port), context, server_hostname=name)
            await stream.handshake()
            assert stream.alpn == "http/1.1"


@run
async def test_a_request_that_is_taken_back_is_taken_back_at_the_origin(tmp_path: Path) -> None:
    begun: asyncio.Queue[tuple[Served, int]] = asyncio.Queue()

    async def wait(served: Served, stream_id: int) -> None:
        begun.put_nowait((served, stream_id))

    async with bench(tmp_path, sites("site.test", http2=True)) as world:
        caller = await call(world, await origin(world, wait))
        stream_id = await caller.request()
        served, there = await begun.get()
        caller.h2.reset_stream(stream_id, ErrorCodes.CANCEL)
        await caller.send()
        await served.reset[there].wait()
        assert (await world.rows.row()).error == "the client took it back"


@run
async def test_an_origin_that_leaves_lets_streams_end(tmp_path: Path) -> None:
    go_on = asyncio.Event()

    async def leave(served: Served, stream_id: int) -> None:
        last = stream_id.to_bytes(4, "big")
        served.h2.send_headers(stream_id, [(b":status", b"200")])
        served.send()
        served.writer.write(b"\0\0\x08\x07\0\0\0\0\0" + last + bytes(4))
        await go_on.wait()
        served.h2.send_data(stream_id, b"the end", end_stream=True)
        served.send()

    async with bench(tmp_path, sites("site.test", http2=True)) as world:
        caller = await call(world, await origin(world, leave))
        first = await caller.request()
        await caller.event(ResponseReceived, first)
        late = await caller.request()
        assert (await caller.event(StreamReset, late)).error_code == ErrorCodes.REFUSED_STREAM
        go_on.set()
        assert (await caller.event(DataReceived, first)).data == b"the end"


@run
async def test_an_origin_that_breaks_off_is_told_of(tmp_path: Path) -> None:
    async def reset(served: Served, stream_id: int) -> None:
        served.h2.reset_stream(stream_id)
        served.send()

    async with bench(tmp_path, sites("site.test", http2=True)) as world:
        caller = await call(world, await origin(world, reset))
        assert (await caller.answer(await caller.request()))[0] == 502
        assert (await world.rows.row()).decision == "error"


@run
async def test_rapid_resets_end_the_connection(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http2, "RESETS", 20)

    async def wait(served: Served, stream_id: int) -> None:
        await served.reset[stream_id].wait()

    async with bench(tmp_path, sites("site.test", http2=True)) as world:
        caller = await call(world, await origin(world, wait))
        with pytest.raises((ConnectionError, EOFError)):
            for _ in range(1000):
                stream_id = await caller.request()
                caller.h2.reset_stream(stream_id)
                await caller.send()
            await caller.event(ConnectionTerminated)
            await caller.event(ConnectionTerminated)
        while not any("taken back by the client" in str(row.error) for row in world.rows.requests):
            await asyncio.sleep(0)
        assert len(world.rows.requests) < 1000
        assert not world.egress._door.pool._open


HOSTILE = {
    "header flood": b"".join(b"\0\x40\0\x09\0\0\0\0\1" + b"\0\x04aaaa" + b"\x7f\x00" * 8189 for _ in range(100)),
    "naked continuation": b"\0\0\1\x09\0\0\0\0\1\x82",
    "huge frame": b"\xff\xff\xff\0\0\0\0\0\1",
    "data before a request": b"\0\0\1\0\0\0\0\0\1x",
    "short GOAWAY": b"\0\0\1\7\0\0\0\0\0x",
    "bad HPACK": b"\0\0\5\1\5\0\0\0\1\xff\xff\xff\xff\xff",
    "request of a request": b"\0\0\0\5\4\0\0\0\1",
    "push": b"\0\0\4\5\4\0\0\0\1\0\0\0\2",
    "window of 2^31": (b"\0\0\4\x08\0\0\0\0\0\x7f\xff\xff\xff") * 2,
    "zero window": b"\0\0\4\x08\0\0\0\0\0\0\0\0\0",
}


@pytest.mark.parametrize("data", HOSTILE.values(), ids=HOSTILE)
@run
async def test_what_breaks_the_protocol_ends_the_connection(tmp_path: Path, data: bytes) -> None:
    async with bench(tmp_path, sites("site.test", http2=True)) as world:
        caller = await call(world, await origin(world, echo))
        with pytest.raises((ConnectionError, EOFError)):
            await caller.stream.write(data)
            await caller.event(ConnectionTerminated)
            await caller.event(ConnectionTerminated)
        assert str((await world.rows.row()).error).startswith("HTTP/2: ")


@run
async def test_empty_and_tiny_frames_are_bounded(tmp_path: Path) -> None:
    async def ignore(served: Served, stream_id: int) -> None:
        await asyncio.Event().wait()

    async with bench(tmp_path, sites("site.test", http2=True)) as world:
        caller = await call(world, await origin(world, ignore))
        stream_id = await caller.request(end=False)
        empty = b"\0\0\0\0\0" + stream_id.to_bytes(4, "big")
        for _ in range(200):
            await caller.stream.write(empty * 100)
        for _ in range(100):
            await caller.data(stream_id, b"x")
        caller.h2.end_stream(stream_id)
        await caller.send()
        ping = asyncio.create_task(caller.event(ConnectionTerminated))
        await asyncio.sleep(0)
        ping.cancel()
        await asyncio.gather(ping, return_exceptions=True)


@run
async def test_the_end_of_an_epoch_interrupts_streams(tmp_path: Path) -> None:
    begun = asyncio.Event()

    async def wait(served: Served, stream_id: int) -> None:
        begun.set()

    async with bench(tmp_path, sites("site.test", http2=True)) as world:
        caller = await call(world, await origin(world, wait))
        await caller.request()
        await begun.wait()
        await world.egress.close()
        assert [row.decision for row in world.rows.requests] == ["interrupted"]
