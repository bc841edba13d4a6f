"""What passes through the proxy core and how: bodies of all kinds, early answers, other protocols, broken connections."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from ipaddress import ip_network
from pathlib import Path
from typing import Any

import pytest

from capsem.egress import requests
from capsem.egress.facts import Action, Layer, Protocol, Subject, TlsMode, Verdict
from capsem.egress.heads import Headers, RequestHead, ResponseHead
from capsem.egress.parts import SecretMisuse
from capsem.egress.paths import PathPattern
from capsem.egress.policy import Policy
from egress_bench import Bench, Client, answering, bench, read_head, rule, run, sites

HOST = b"Host: site.test\r\n"


async def plain(world: Bench, handler: Callable[..., Any]) -> tuple[int, Client]:
    port = await world.origin(handler)
    return port, world.plain(port=port)


@run
async def test_a_body_goes_chunk_by_chunk_both_ways_with_its_trailers(tmp_path: Path) -> None:
    got: asyncio.Queue[bytes] = asyncio.Queue()

    async def origin(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await got.put(await read_head(reader))
        while True:
            size = await reader.readline()
            if size == b"0\r\n":
                break
            await got.put(await reader.readexactly(int(size, 16)))
            await reader.readexactly(2)
        await got.put(await reader.readuntil(b"\r\n\r\n"))
        writer.write(
            b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2;x=y\r\nab\r\n3\r\ncde\r\n0\r\nX-Sum: 5\r\nHost: x\r\n\r\n"
        )

    async with bench(tmp_path, sites("site.test")) as world:
        _, client = await plain(world, origin)
        await client.send(b"POST / HTTP/1.1\r\n" + HOST + b"Transfer-Encoding: chunked\r\n\r\n")
        assert b"Transfer-Encoding: chunked" in await got.get()
        for piece in (b"one", b"two"):
            await client.send(b"%x\r\n%b\r\n" % (len(piece), piece))
            assert await got.get() == piece, "nothing waits for the rest of a body"
        await client.send(b"0\r\nX-Sum: 6\r\nContent-Length: 3\r\n\r\n")
        assert await got.get() == b"X-Sum: 6\r\n\r\n"
        head = await client.until(b"\r\n\r\n")
        assert b"Transfer-Encoding: chunked" in head
        assert await client.until(b"\r\n\r\n") == b"5\r\nabcde\r\n0\r\nX-Sum: 5\r\n\r\n"
    row = world.rows.requests[0]
    assert (row.bytes_sent, row.bytes_received) == (6, 5)


@run
async def test_an_event_passes_before_the_next_one_is_there(tmp_path: Path) -> None:
    next_event = asyncio.Event()

    async def origin(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_head(reader)
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\n")
        for number in range(3):
            writer.write(b"data: %d\n\n" % number)
            await writer.drain()
            await next_event.wait()
            next_event.clear()

    async with bench(tmp_path, sites("site.test")) as world:
        _, client = await plain(world, origin)
        await client.send(b"GET / HTTP/1.1\r\n" + HOST + b"\r\n")
        await client.until(b"\r\n\r\n")
        for number in range(3):
            assert await client.until(b"\n\n\r\n") == b"9\r\ndata: %d\n\n\r\n" % number
            next_event.set()
        assert await client.until(b"0\r\n\r\n") == b"0\r\n\r\n"


@run
async def test_the_client_is_told_to_go_on_by_the_origin(tmp_path: Path) -> None:
    async def origin(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        assert b"Expect: 100-continue" in await read_head(reader)
        writer.write(b"HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\nHTTP/1.1 100 Continue\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\n" + await reader.readexactly(3))
        await reader.read()

    async with bench(tmp_path, sites("site.test")) as world:
        _, client = await plain(world, origin)
        await client.send(b"PUT / HTTP/1.1\r\n" + HOST + b"Content-Length: 3\r\nExpect: 100-continue\r\n\r\n")
        assert (await client.until(b"\r\n\r\n")).startswith(b"HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n")
        assert await client.until(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
        await client.send(b"abc")
        assert (await client.answer())[::2] == (200, b"abc")
        assert (await world.rows.row()).status_code == 200


@run
async def test_an_early_answer_arrives_while_the_body_is_still_sent(tmp_path: Path) -> None:
    async def origin(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_head(reader)
        writer.write(b"HTTP/1.1 413 Too Large\r\nContent-Length: 4\r\nConnection: close\r\n\r\nmuch")
        await writer.drain()

    async with bench(tmp_path, sites("site.test")) as world:
        _, client = await plain(world, origin)
        await client.send(b"POST / HTTP/1.1\r\n" + HOST + b"Content-Length: 1000000\r\n\r\nbeginning")
        status, headers, body = await client.answer()
        assert (status, headers["connection"], body) == (413, "close", b"much")
        await client.stream.write_eof()
        assert await client.rest() == b""
        row = await world.rows.row()
        assert (row.decision, row.status_code) == ("allowed", 413)


@run
async def test_a_web_socket_is_two_streams_of_bytes_from_then_on(tmp_path: Path) -> None:
    async def origin(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        assert b"Upgrade: websocket" in await read_head(reader)
        writer.write(b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\nfirst")
        while data := await reader.read(100):
            writer.write(data)

    async with bench(tmp_path, sites("site.test")) as world:
        _, client = await plain(world, origin)
        await client.send(b"GET / HTTP/1.1\r\n" + HOST + b"Connection: Upgrade\r\nUpgrade: websocket\r\n\r\n")
        head = await client.until(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 101 ")
        assert b"Upgrade: websocket" in head
        assert await client.exactly(5) == b"first"
        await client.send(b"\x81\x05hello")
        assert await client.exactly(7) == b"\x81\x05hello"
        await client.stream.write_eof()
        assert await client.rest() == b""
        row = await world.rows.row()
        assert (row.decision, row.status_code, row.bytes_sent, row.bytes_received) == ("allowed", 101, 7, 12)


@run
async def test_a_protocol_that_nobody_asked_for_is_refused(tmp_path: Path) -> None:
    async def origin(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_head(reader)
        writer.write(b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: x\r\n\r\n")
        await reader.read()

    async with bench(tmp_path, sites("site.test")) as world:
        _, client = await plain(world, origin)
        await client.send(b"GET / HTTP/1.1\r\n" + HOST + b"\r\n")
        assert (await client.answer())[0] == 502


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"SSH-2.0-OpenSSH\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n",
        b"HTTP/1.1 200 OK\nContent-Length: 0\n\n",
        b"HTTP/1.1 100 Continue\r\n\r\n" * 200,
        b"HTTP/1.1 200 OK\r\nX: " + b"a" * 70_000,
    ],
)
@run
async def test_an_origin_that_does_not_speak_http_is_told_of(tmp_path: Path, answer: bytes) -> None:
    async def origin(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_head(reader)
        writer.write(answer)
        writer.write_eof()
        await reader.read()

    async with bench(tmp_path, sites("site.test")) as world:
        _, client = await plain(world, origin)
        await client.send(b"GET / HTTP/1.1\r\n" + HOST + b"\r\n")
        while (found := await client.answer())[0] == 100:
            pass
        assert found[0] == 502
        assert "site.test" in json.loads(found[2])["error"]
        assert (await world.rows.row()).decision == "error"


@run
async def test_a_body_that_is_cut_off_is_not_made_whole(tmp_path: Path) -> None:
    async def origin(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_head(reader)
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nshort")

    async with bench(tmp_path, sites("site.test")) as world:
        _, client = await plain(world, origin)
        await client.send(b"GET / HTTP/1.1\r\n" + HOST + b"\r\n")
        with pytest.raises((ConnectionError, EOFError)):
            await client.answer()
        row = await world.rows.row()
        assert (row.decision, row.bytes_received, row.error) == (
            "error",
            5,
            "the connection ended in the middle of a body",
        )


@run
async def test_an_answer_without_a_length_ends_with_its_connection(tmp_path: Path) -> None:
    async def origin(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_head(reader)
        writer.write(b"HTTP/1.1 200 OK\r\n\r\nall of it")

    async with bench(tmp_path, sites("site.test")) as world:
        port, client = await plain(world, origin)
        await client.send(b"GET / HTTP/1.1\r\n" + HOST + b"\r\n")
        assert (await client.answer())[2] == b"all of it"
        await client.send(b"GET / HTTP/1.1\r\n" + HOST + b"\r\n")
        assert (await client.answer())[2] == b"all of it", "the client's connection goes on"
        old = world.plain(port=port)
        await old.send(b"GET / HTTP/1.0\r\n" + HOST + b"\r\n")
        head, _, body = (await old.rest()).partition(b"\r\n\r\n")
        assert b"chunked" not in head
        assert body == b"all of it"


@run
async def test_requests_that_come_at_once_are_answered_in_order(tmp_path: Path) -> None:
    async with bench(tmp_path, sites("site.test")) as world:
        seen: list[bytes] = []
        _, client = await plain(world, answering(seen=seen))
        await client.send(b"".join(b"GET /%d HTTP/1.1\r\n%b\r\n" % (number, HOST) for number in range(5)))
        for _ in range(5):
            assert (await client.answer())[0] == 200
        assert [each.split()[1] for each in seen] == [b"/0", b"/1", b"/2", b"/3", b"/4"]


@run
async def test_each_request_of_a_connection_is_judged_anew(tmp_path: Path) -> None:
    rules = [sites("site.test"), rule("secret", Action.DENY, layer=Layer.VM, hosts=("site.test",), methods=("DELETE",))]
    async with bench(tmp_path, *rules) as world:
        _, client = await plain(world, answering())
        await client.send(b"GET / HTTP/1.1\r\n" + HOST + b"\r\n")
        assert (await client.answer())[0] == 200
        await client.send(b"DELETE / HTTP/1.1\r\n" + HOST + b"\r\n")
        assert (await client.answer())[0] == 403
        world.egress.reload(Policy((), floor=world.policy.floor, version=2))
        await client.send(b"GET / HTTP/1.1\r\n" + HOST + b"\r\n")
        assert (await client.answer())[0] == 403
    assert [row.decision for row in world.rows.requests] == ["allowed", "denied", "denied"]
    assert world.rows.requests[2].policy_version == 2


@run
async def test_what_is_judged_is_what_is_asked_for(tmp_path: Path) -> None:
    seen: list[bytes] = []
    async with bench(tmp_path, sites("site.test", paths=(PathPattern("/open/**"),))) as world:
        _, client = await plain(world, answering(seen=seen))
        for target, status in {
            b"/open/a?b=/../c": 200,
            b"/open/../shut": 403,
            b"/open/%2e%2e/shut": 403,
            b"/open/%2E./shut": 403,
            b"/shut/../open/x?q": 200,
            b"/open/..%2fshut": 403,
            b"/open/..;/shut": 403,
            b"/open/%252e%252e/shut": 403,
        }.items():
            await client.send(b"GET %b HTTP/1.1\r\n%b\r\n" % (target, HOST))
            assert (await client.answer())[0] == status, target
    assert [each.split()[1] for each in seen] == [b"/open/a?b=/../c", b"/open/x?q"]


@run
async def test_a_connection_that_went_stale_is_replaced(tmp_path: Path) -> None:
    connections = 0

    async def once(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal connections
        connections += 1
        await read_head(reader)
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
        if connections == 1:
            await read_head(reader)  # and closes without an answer

    async with bench(tmp_path, sites("site.test")) as world:
        _, client = await plain(world, once)
        for _ in range(2):
            await client.send(b"GET / HTTP/1.1\r\n" + HOST + b"\r\n")
            assert (await client.answer())[0] == 200
        assert connections == 2


@run
async def test_a_request_with_a_body_is_not_made_twice(tmp_path: Path) -> None:
    bodies = 0

    async def once(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal bodies
        for _ in range(2):
            await read_head(reader)
            await reader.readexactly(1)
            bodies += 1
            if bodies == 1:
                writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")

    async with bench(tmp_path, sites("site.test")) as world:
        _, client = await plain(world, once)
        request = b"POST / HTTP/1.1\r\n" + HOST + b"Content-Length: 1\r\n\r\nx"
        await client.send(request)
        assert (await client.answer())[0] == 200
        await client.send(request)
        assert (await client.answer())[0] == 502
        assert bodies == 2


@run
async def test_what_an_origin_says_unasked_is_nobodys_answer(tmp_path: Path) -> None:
    said, connections = asyncio.Event(), 0

    async def origin(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal connections
        connections += 1
        poisoned = connections == 1
        while True:
            await read_head(reader)
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\ntrue")
            if poisoned:
                await writer.drain()
                await world.rows.row()
                writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nfalse")
                await writer.drain()
                said.set()

    async with bench(tmp_path, sites("site.test")) as world:
        for secure in (False, True):
            connections = 0
            said.clear()
            world.rows.requests.clear()
            port = await world.origin(origin, *(["site.test"] if secure else []))
            client = await world.tls("site.test", port=port) if secure else world.plain(port=port)
            await client.send(b"GET / HTTP/1.1\r\n" + HOST + b"\r\n")
            assert (await client.answer())[2] == b"true"
            await said.wait()
            while not any(each.dialled.socket.waiting for each in world.egress._door.pool._open):
                await asyncio.sleep(0)
            await client.send(b"GET / HTTP/1.1\r\n" + HOST + b"\r\n")
            assert (await client.answer())[2] == b"true"
            assert connections == 2


@run
async def test_the_length_of_an_answer_is_not_believed_beyond_itself(tmp_path: Path) -> None:
    connections = 0

    async def origin(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal connections
        connections += 1
        while True:
            await read_head(reader)
            writer.write(
                b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\ntrueHTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nfalse"
            )

    async with bench(tmp_path, sites("site.test")) as world:
        _, client = await plain(world, origin)
        for _ in range(2):
            await client.send(b"GET / HTTP/1.1\r\n" + HOST + b"\r\n")
            assert (await client.answer())[2] == b"true"
        assert connections == 2


@pytest.mark.parametrize("secure", [False, True])
@run
async def test_a_client_that_leaves_ends_the_request_at_the_origin(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, secure: bool
) -> None:
    monkeypatch.setattr(requests, "PATIENCE", 0.0)
    asked, left = asyncio.Event(), asyncio.Event()

    async def origin(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_head(reader)
        asked.set()
        try:
            await reader.read()
        finally:
            left.set()

    async with bench(tmp_path, sites("site.test")) as world:
        port = await world.origin(origin, *(["site.test"] if secure else []))
        client = await world.tls("site.test", port=port) if secure else world.plain(port=port)
        await client.send(b"GET / HTTP/1.1\r\n" + HOST + b"\r\n")
        await asked.wait()
        client.raw.abort()
        await left.wait()
        assert (await world.rows.row()).error == "the client left"


@pytest.mark.parametrize("secure", [False, True])
@run
async def test_a_client_that_was_watched_and_leaves_later_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, secure: bool
) -> None:
    monkeypatch.setattr(requests, "PATIENCE", 0.0)
    go_on = asyncio.Event()

    async def origin(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            await read_head(reader)
            await go_on.wait()
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 500000\r\n\r\n" + bytes(500_000))

    async with bench(tmp_path, sites("site.test")) as world:
        port = await world.origin(origin, *(["site.test"] if secure else []))
        for read in (True, False):
            client = await world.tls("site.test", port=port) if secure else world.plain(port=port)
            await client.send(b"GET / HTTP/1.1\r\n" + HOST + b"\r\n")
            await asyncio.sleep(0.01)
            go_on.set()
            if read:
                assert (await client.answer())[0] == 200
            else:
                await client.until(b"\r\n\r\n")
            client.raw.abort()
        while len(world.rows.requests) < 2:
            await asyncio.sleep(0)


@run
async def test_bytes_pass_unread_where_a_rule_says_so(tmp_path: Path) -> None:
    async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"SSH-2.0-server\r\n")
        while data := await reader.read(100):
            writer.write(data)

    async with bench(tmp_path, sites("site.test", protocol=Protocol.TCP)) as world:
        port = await world.origin(echo)
        address = world.names_table.synthetic("site.test")
        silent = world.plain(address=address, port=port)
        assert await silent.until(b"\r\n") == b"SSH-2.0-server\r\n", "a client that waits is not waited for"
        talking = world.plain(address=address, port=port)
        await talking.send(b"SSH-2.0-client\r\n")
        assert await talking.until(b"client\r\n") == b"SSH-2.0-server\r\nSSH-2.0-client\r\n"
        await talking.stream.write_eof()
        assert await talking.rest() == b""
        row = await world.rows.row()
        assert (row.domain, row.decision, row.address, row.tls) == ("site.test", "allowed", "127.0.0.1", TlsMode.NONE)
        assert (row.bytes_sent, row.bytes_received) == (16, 32)
        silent.raw.abort()


@run
async def test_bytes_without_a_name_need_a_rule_about_their_address(tmp_path: Path) -> None:
    async def greet(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"hello\n")

    number = rule(
        "number",
        layer=Layer.VM,
        cidrs=(ip_network("127.0.0.0/8"),),
        ports=tuple(range(1024, 65536)),
        protocol=Protocol.TCP,
    )
    async with bench(tmp_path, number) as world:
        port = await world.origin(greet)
        client = world.plain(address="127.0.0.1", port=port)
        assert await client.rest() == b"hello\n"
        await client.stream.write_eof()
        await world.rows.row()
        for address in ("192.0.2.1", world.names_table.synthetic("other.test")):
            denied = world.plain(address=address, port=port)
            await denied.send(b"\0\1")
            with pytest.raises(ConnectionError):
                await denied.rest()
    assert [row.decision for row in world.rows.requests] == ["allowed", "denied", "denied"]


@run
async def test_every_name_of_an_address_must_be_allowed(tmp_path: Path) -> None:
    async def greet(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"hello\n")

    async with bench(tmp_path, sites("site.test", protocol=Protocol.TCP)) as world:
        port = await world.origin(greet)
        world.names_table.learn("site.test", ["203.0.113.1"])
        assert await world.plain(address="203.0.113.1", port=port).rest() == b"hello\n"
        world.names_table.learn("other.test", ["203.0.113.1"])
        with pytest.raises(ConnectionError):
            denied = world.plain(address="203.0.113.1", port=port)
            await denied.send(b"x\r\n")
            await denied.rest()


class Secrets:
    """A broker that swaps one word for another, and keeps it from the wrong host."""

    async def outgoing(self, subject: Subject, head: RequestHead, *, verified: bool) -> RequestHead:
        if all(b"placeholder" not in value for _, value in head.headers):
            return head
        if subject.host != "site.test" or not verified:
            raise SecretMisuse("key", "this key is for site.test over TLS alone")
        headers = Headers((name, value.replace(b"placeholder", b"true value")) for name, value in head.headers)
        return RequestHead(head.method, head.target, headers, head.authority, ("key",))

    def body(self, subject: Subject, headers: Headers, *, verified: bool) -> Callable[[bytes], bytes] | None:
        if headers.get(b"content-type") != b"text/secret":
            return None

        def swap(data: bytes) -> bytes:
            if b"misuse" in data:
                raise SecretMisuse("key", "not here")
            return data.replace(b"placeholder", b"true value")

        return swap

    def incoming(self, subject: Subject, head: ResponseHead) -> tuple[ResponseHead, Callable[[bytes], bytes] | None]:
        return head, lambda data: data.replace(b"true value", b"placeholder")


@run
async def test_secrets_are_put_in_on_the_way_out_and_taken_out_on_the_way_in(tmp_path: Path) -> None:
    seen: list[bytes] = []

    async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            head = await read_head(reader)
            size = next(
                (int(line.split(b":")[1]) for line in head.split(b"\r\n") if line.startswith(b"Content-Length")), 0
            )
            body = await reader.readexactly(size)
            seen.append(head + body)
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(head + body), head + body))

    async with bench(tmp_path, sites("site.test", "other.test"), broker=Secrets()) as world:
        port = await world.origin(echo, "site.test")
        client = await world.tls("site.test", port=port)
        await client.send(b"GET / HTTP/1.1\r\n" + HOST + b"X-Key: placeholder\r\n\r\n")
        status, _, body = await client.answer()
        assert status == 200
        assert b"X-Key: true value" in seen[0]
        assert b"true value" not in body
        assert world.rows.requests[0].secrets == ("key",)
        await client.send(
            b"POST / HTTP/1.1\r\n" + HOST + b"Content-Type: text/secret\r\nContent-Length: 11\r\n\r\nplaceholder"
        )
        assert (await client.answer())[0] == 200
        assert seen[1].endswith(b"Content-Length: 10\r\n\r\ntrue value")
        await client.send(
            b"POST / HTTP/1.1\r\n" + HOST + b"Content-Type: text/secret\r\nContent-Length: 6\r\n\r\nmisuse"
        )
        status, _, body = await client.answer()
        assert (status, len(seen)) == (403, 2)
        assert "not here" in json.loads(body)["error"]
        assert await client.rest() == b"", "and the connection is closed"
        plain_port = await world.origin(echo)
        client = world.plain(port=plain_port)
        await client.send(b"GET / HTTP/1.1\r\n" + HOST + b"X-Key: placeholder\r\n\r\n")
        assert (await client.answer())[0] == 403
        row = world.rows.requests[-1]
        assert (row.decision, row.secrets) == ("denied", ("key",))


class Asker:
    def __init__(self) -> None:
        self.asked: list[Subject] = []
        self.answer: asyncio.Future[Action] = asyncio.get_running_loop().create_future()

    async def ask(self, subject: Subject, verdict: Verdict) -> Verdict:
        self.asked.append(subject)
        return Verdict(await self.answer, verdict.rule, verdict.layer, "it was asked")


@pytest.mark.parametrize(("answer", "status"), [(Action.ALLOW, 200), (Action.DENY, 403)])
@run
async def test_a_request_that_must_be_asked_about_is_held(tmp_path: Path, answer: Action, status: int) -> None:
    asker = Asker()
    async with bench(tmp_path, rule("ask", Action.ASK, hosts=("site.test",)), asker=asker, grounded=False) as world:
        _, client = await plain(world, answering())
        await client.send(b"GET /x HTTP/1.1\r\n" + HOST + b"\r\n")
        while not asker.asked:
            await asyncio.sleep(0)
        assert world.lookups == []
        asker.answer.set_result(answer)
        assert (await client.answer())[0] == status
        assert [each.path for each in asker.asked] == ["/x"], "and only once"


@run
async def test_what_an_address_makes_a_question_is_asked_too(tmp_path: Path) -> None:
    asker = Asker()
    loopback = (ip_network("127.0.0.0/8"),)
    there = rule("there", Action.ASK, layer=Layer.VM, hosts=("site.test",), cidrs=loopback)
    elsewhere = rule("elsewhere", layer=Layer.VM, hosts=("site.test",))
    async with bench(tmp_path, there, elsewhere, asker=asker) as world:
        _, client = await plain(world, answering())
        await client.send(b"GET /x HTTP/1.1\r\n" + HOST + b"\r\n")
        asker.answer.set_result(Action.DENY)
        assert (await client.answer())[0] == 403
        assert [each.address for each in asker.asked] == ["127.0.0.1"]


@run
async def test_what_must_be_asked_about_is_denied_where_nobody_is(tmp_path: Path) -> None:
    async with bench(tmp_path, rule("ask", Action.ASK, hosts=("site.test",))) as world:
        client = await world.tls("site.test")
        await client.send(b"GET /x HTTP/1.1\r\n" + HOST + b"\r\n")
        assert (await client.answer())[0] == 403
