"""What a hostile guest, or a hostile origin, tries: it ends in a denial or a closed stream, and in a row that says so."""

from __future__ import annotations

import asyncio
import contextlib
import json
import ssl
from collections.abc import Callable
from ipaddress import ip_network
from pathlib import Path
from typing import Any

import pytest

from capsem.egress import connected, core, pool, requests
from capsem.egress.facts import Layer, Protocol, TlsMode
from capsem.egress.policy import Policy
from capsem.egress.tls import TlsStream
from egress_bench import Client, answering, bench, read_head, rule, run, sites

HOST = b"Host: site.test\r\n"
CLOSE = b"\r\nConnection: close\r\n\r\n"
GET = b"GET / HTTP/1.1\r\n" + HOST + b"\r\n"


def hello(name: str | None) -> bytes:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    with contextlib.suppress(ssl.SSLWantReadError):
        context.wrap_bio(incoming, outgoing, server_hostname=name).do_handshake()
    return outgoing.read()


async def drip(client: Client, data: bytes) -> None:
    """Send byte by byte, until that is not possible any more."""
    with contextlib.suppress(ConnectionError):
        for each in data:
            await client.send(bytes([each]))
            await asyncio.sleep(0.001)
        await client.rest()


# Slowness: a deadline holds for the whole of a thing, not for each byte.


@pytest.mark.parametrize("length", [0, 1, 50, -1])
@run
async def test_half_a_hello_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, length: int) -> None:
    monkeypatch.setattr(connected, "HELLO_TIME", 0.1)
    async with bench(tmp_path, sites("site.test")) as world:
        client = world.plain()
        await drip(client, hello("site.test")[:length])
        if length:
            assert "no ClientHello and handshake" in str((await world.rows.row()).error)
        with pytest.raises(ConnectionError):
            await client.send(b"x")


@run
async def test_half_a_handshake_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connected, "HELLO_TIME", 0.2)
    async with bench(tmp_path, sites("site.test")) as world:
        client = world.plain()
        await client.send(hello("site.test"))
        with pytest.raises((ConnectionError, EOFError)):
            await client.exactly(1 << 20)
        assert "no ClientHello and handshake" in str((await world.rows.row()).error)


@run
async def test_half_a_head_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(requests, "HEAD_TIME", 0.1)
    async with bench(tmp_path, sites("site.test")) as world:
        port = await world.origin(answering())
        client = world.plain(port=port)
        await client.send(GET)
        assert (await client.answer())[0] == 200
        await drip(client, GET[:-1])
        with pytest.raises(ConnectionError):
            await client.send(b"x")


@run
async def test_a_slow_body_is_carried_as_it_comes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(requests, "HEAD_TIME", 0.05)
    monkeypatch.setattr(requests, "IDLE_TIME", 0.05)
    monkeypatch.setattr(connected, "HELLO_TIME", 0.05)
    got: asyncio.Queue[bytes] = asyncio.Queue()

    async def origin(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_head(reader)
        for _ in range(3):
            await got.put(await reader.readexactly(1))
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")

    async with bench(tmp_path, sites("site.test")) as world:
        client = world.plain(port=await world.origin(origin))
        await client.send(b"POST / HTTP/1.1\r\n" + HOST + b"Content-Length: 3\r\n\r\n")
        for _ in range(3):
            await asyncio.sleep(0.1)
            await client.send(b"x")
            assert await got.get() == b"x"
        assert (await client.answer())[0] == 200


# Numbers.


@run
async def test_six_hundred_streams_at_once(tmp_path: Path) -> None:
    async with bench(tmp_path, sites("site.test")) as world:
        port = await world.origin(answering())
        clients = [world.plain(port=port) for _ in range(600)]
        await asyncio.sleep(0)
        refused = [client for client in clients if client.raw.aborted]
        assert len(refused) == 600 - core.STREAMS
        assert len(world.rows.requests) == len(refused)
        served = [client for client in clients if not client.raw.aborted]
        for client in served:
            await client.send(GET)
        for client in served:
            assert (await client.answer())[0] == 200
        assert len(world.egress._door.pool._open) <= pool.LIMIT
        served[0].raw.abort()
        while len(world.egress._serving) == core.STREAMS:
            await asyncio.sleep(0)
        late = world.plain(port=port)
        await late.send(GET)
        assert (await late.answer())[0] == 200


@run
async def test_a_loop_through_the_proxy_itself_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool, "PATIENCE", 0.1)
    async with bench(tmp_path, sites("site.test")) as world:

        async def again(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            inner = world.plain(port=port)
            await inner.send((await read_head(reader)).replace(b"\r\n\r\n", CLOSE))
            writer.write(await inner.rest())

        port = await world.origin(again)
        client = world.plain(port=port)
        await client.send(GET.replace(b"\r\n\r\n", CLOSE))
        status, _, _ = await client.answer()
        assert status == 503
        await client.rest()
        other = world.plain(port=await world.origin(answering()))
        await other.send(GET)
        assert (await other.answer())[0] == 200


@run
async def test_the_host_itself_is_below_the_floor(tmp_path: Path) -> None:
    async with bench(tmp_path, rule("all", hosts=("*",), ports=(80, 443))) as world:
        world.names["me.test"] = ["127.0.0.1"]
        client = world.plain(port=80)
        await client.send(b"GET / HTTP/1.1\r\nHost: me.test\r\n\r\n")
        status, _, body = await client.answer()
        assert (status, json.loads(body)["layer"]) == (403, "floor")


@run
async def test_a_reader_that_stalls_stops_its_own_stream_alone(tmp_path: Path) -> None:
    written, size = 0, 64 << 20

    async def origin(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal written
        await read_head(reader)
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % size)
        while written < size:
            writer.write(bytes(65536))
            await writer.drain()
            written += 65536

    async with bench(tmp_path, sites("site.test")) as world:
        big = await world.origin(origin, "site.test")
        stalled = [await world.tls("site.test", port=big) for _ in range(3)]
        for client in stalled:
            await client.send(GET)
            await client.until(b"\r\n\r\n")
        small = await world.origin(answering())
        before = -1
        while written != before:  # until nothing moves any more
            before = written
            for _ in range(50):
                other = world.plain(port=small)
                await other.send(GET)
                assert (await other.answer())[0] == 200
                other.raw.abort()
        # What is in flight: the kernel's buffers of three connections, and less than 1 MiB each of ours.
        assert written < 40 << 20
        assert all(client.raw.waiting <= client.raw.limit + 65536 for client in stalled)
        for client in stalled:
            client.raw.abort()


# Names: what is judged, resolved, checked and dialled is one thing.


@run
async def test_a_tunnel_for_one_name_is_not_used_for_another(tmp_path: Path) -> None:
    async with bench(tmp_path, sites("site.test", "other.test")) as world:
        client = world.plain(port=3128, explicit=True)
        await client.send(b"CONNECT site.test:443 HTTP/1.1\r\nHost: site.test:443\r\n\r\n")
        await client.until(b"\r\n\r\n")
        inner = await world.tls("other.test", client.raw)
        await inner.send(b"GET / HTTP/1.1\r\nHost: other.test\r\n\r\n")
        assert (await inner.answer())[0] == 421
        client = world.plain(port=3128, explicit=True)
        await client.send(b"CONNECT site.test:80 HTTP/1.1\r\nHost: site.test:80\r\n\r\n")
        await client.until(b"\r\n\r\n")
        await client.send(b"GET / HTTP/1.1\r\nHost: other.test\r\n\r\n")
        assert (await client.answer())[0] == 421
    assert world.lookups == []
    assert {row.decision for row in world.rows.requests} == {"denied"}


@run
async def test_the_port_is_that_of_the_connection(tmp_path: Path) -> None:
    async with bench(tmp_path, sites("site.test")) as world:
        port = await world.origin(answering())
        client = world.plain(port=port)
        await client.send(b"GET / HTTP/1.1\r\nHost: site.test:1\r\n\r\n")
        assert (await client.answer())[0] == 200
        assert world.rows.requests[0].port == port


@pytest.mark.parametrize(
    "address",
    "127.0.0.1 10.1.2.3 169.254.169.254 ::1 ::ffff:127.0.0.1 ::ffff:10.0.0.1 64:ff9b::7f00:1 2002:7f00:1:: 2002:a9fe:a9fe:: "
    "fd00:ec2::254 fe80::1 224.0.0.1 0.0.0.0 168.63.129.16 192.0.0.192 100.64.0.1 198.18.0.1".split(),
)
@run
async def test_an_address_below_the_floor_is_not_dialled_whatever_its_name(tmp_path: Path, address: str) -> None:
    async with bench(tmp_path, rule("all", hosts=("*",))) as world:
        for found in ([address], ["93.184.215.14", address]):
            world.names["rebound.test"] = found
            world.resolver._known.clear()
            client = await world.tls("rebound.test")
            await client.send(b"GET / HTTP/1.1\r\nHost: rebound.test\r\n\r\n")
            status, _, body = await client.answer()
            assert (status, json.loads(body)["layer"]) == (403, "floor")
        row = world.rows.requests[0]
        assert (row.decision, row.rule_layer, row.address) == ("denied", "floor", None)
        host = f"[{address}]" if ":" in address else address
        client = world.plain(port=80)
        await client.send(f"GET /latest/meta-data HTTP/1.1\r\nHost: {host}\r\n\r\n".encode())
        assert (await client.answer())[0] == 403, "where a redirect may lead"


@pytest.mark.parametrize("there", ["169.254.169.254", "[fd00:ec2::254]", "metadata.test", "168.63.129.16"])
@run
async def test_a_redirect_to_a_metadata_service_leads_to_the_floor(tmp_path: Path, there: str) -> None:
    """An allowed host sends the client there, which follows."""
    location = f"http://{there}/latest/meta-data"
    seen: list[bytes] = []
    async with bench(tmp_path, sites("site.test"), rule("all", hosts=("*",))) as world:
        world.names["metadata.test"] = ["169.254.169.254"]
        port = await world.origin(answering(seen=seen, head=f"Location: {location}\r\n".encode()))
        client = world.plain(port=port)
        await client.send(GET)
        _, headers, _ = await client.answer()
        assert headers["location"] == location
        follower = world.plain(port=80)
        await follower.send(f"GET /latest/meta-data HTTP/1.1\r\nHost: {there}\r\n\r\n".encode())
        status, _, body = await follower.answer()
        assert (status, json.loads(body)["layer"]) == (403, "floor")
        row = await world.rows.row(1)
        assert (row.decision, row.rule_layer, row.address) == ("denied", "floor", None)
    assert len(seen) == 1


@run
async def test_a_name_is_looked_up_once_and_what_was_checked_is_dialled(tmp_path: Path) -> None:
    async with bench(tmp_path, sites("site.test")) as world:
        answers = [["127.0.0.1"], ["169.254.169.254"]]

        def rebind(name: str) -> list[str]:
            world.lookups.append(name)
            return answers[min(len(world.lookups), 2) - 1]

        world.resolver._lookup = rebind
        client = world.plain(port=await world.origin(answering()))
        await client.send(GET)
        assert (await client.answer())[0] == 200
        assert world.lookups == ["site.test"]
        assert world.rows.requests[0].address == "127.0.0.1"
        world.resolver._known.clear()
        client = world.plain(port=await world.origin(answering()))
        await client.send(GET)
        assert (await client.answer())[0] == 403


@run
async def test_tls_without_a_name_needs_a_rule_about_the_address(tmp_path: Path) -> None:
    number = rule("number", layer=Layer.VM, cidrs=(ip_network("127.0.0.0/8"),), ports=tuple(range(1024, 65536)))
    async with bench(tmp_path, sites("site.test"), number) as world:
        client = await world.tls(None, address="203.0.113.1")
        await client.send(b"GET / HTTP/1.1\r\nHost: 203.0.113.1\r\n\r\n")
        assert (await client.answer())[0] == 403
        await client.send(GET)
        assert (await client.answer())[0] == 421
        port = await world.origin(answering(), "127.0.0.1")
        client = await world.tls(None, address="127.0.0.1", port=port)
        await client.send(b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
        assert (await client.answer())[0] == 200


# TLS that is not ended here.


async def through(world: Any, name: str, port: int, **more: Any) -> Client:
    """A client that trusts the origin's authority alone."""
    context = ssl.create_default_context(cadata=world.origins.pem.decode())
    stream = world.open(port=port, **more)
    secure = TlsStream(stream, context, server_hostname=name)
    await secure.handshake()
    return Client(stream, secure)


@run
async def test_tls_passes_through_where_a_rule_says_so(tmp_path: Path) -> None:
    async with bench(tmp_path, sites("site.test", protocol=Protocol.PASSTHROUGH)) as world:
        port = await world.origin(answering(), "site.test")
        client = await through(world, "site.test", port)
        await client.send(GET)
        assert (await client.answer())[::2] == (200, b"hello")
        client.raw.abort()
        row = await world.rows.row()
        assert (row.domain, row.decision, row.tls, row.path) == ("site.test", "allowed", TlsMode.PASSTHROUGH, None)
        with pytest.raises(ConnectionError):
            await through(world, "other.test", port)


@run
async def test_a_hidden_name_does_not_pass_through(tmp_path: Path) -> None:
    async with bench(tmp_path, sites("site.test", protocol=Protocol.PASSTHROUGH)) as world:
        client = world.plain()
        listed = b"\0\0\0\x0e\0\x0c\0\0\x09site.test" + b"\xfe\x0d\0\x04\0abc"
        body = b"\3\3" + bytes(32) + b"\0" + b"\0\2\x13\1" + b"\1\0" + len(listed).to_bytes(2, "big") + listed
        message = b"\1" + len(body).to_bytes(3, "big") + body
        await client.send(b"\x16\3\1" + len(message).to_bytes(2, "big") + message)
        with pytest.raises(ConnectionError):
            await client.rest()
        row = await world.rows.row()
        assert (row.decision, world.lookups) == ("denied", [])
        assert "ECH" in str(row.error)


@run
async def test_a_client_that_does_not_trust_us_is_told_apart(tmp_path: Path) -> None:
    async with bench(tmp_path, sites("site.test")) as world:
        with pytest.raises(ConnectionError):
            await through(world, "site.test", 443)
        row = await world.rows.row()
        assert (row.tls, row.domain) == (TlsMode.INTERCEPTED, "site.test")
        assert str(row.error).startswith("tls_client_refused")


# An origin that is not who it says.


@run
async def test_an_origin_whose_certificate_is_not_trusted_is_not_spoken_to(tmp_path: Path) -> None:
    seen: list[bytes] = []
    async with bench(tmp_path, sites("site.test", "other.test")) as world:
        port = await world.origin(answering(seen=seen), "other.test")
        client = await world.tls("site.test", port=port)
        await client.send(GET)
        status, _, body = await client.answer()
        assert status == 502
        assert "certificate" in json.loads(body)["error"]
    assert seen == []


# Other policies.


@run
async def test_a_download_survives_a_reload_and_spliced_bytes_do_not_without_their_rule(tmp_path: Path) -> None:
    go_on = asyncio.Event()

    async def origin(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_head(reader)
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 8\r\n\r\nhalf")
        await go_on.wait()
        writer.write(b"half")

    async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(100):
            writer.write(data)

    async with bench(tmp_path, sites("site.test"), sites("raw.test", "gone.test", protocol=Protocol.TCP)) as world:
        client = world.plain(port=await world.origin(origin))
        await client.send(GET)
        await client.until(b"half")
        spliced = {}
        for name in ("raw.test", "gone.test"):
            stream = world.plain(address=world.names_table.synthetic(name), port=await world.origin(echo))
            await stream.send(b"\0hello\n")
            await stream.until(b"hello\n")
            spliced[name] = stream
        kept = sites("raw.test", protocol=Protocol.TCP)
        world.egress.reload(Policy((kept,), floor=world.policy.floor, version=2))
        go_on.set()
        assert await client.exactly(4) == b"half"
        await spliced["raw.test"].send(b"\0again\n")
        await spliced["raw.test"].until(b"again\n")
        with pytest.raises(ConnectionError):
            await spliced["gone.test"].rest()
        row = next(row for row in world.rows.requests if row.domain == "gone.test")
        assert row.error == "a new policy does not allow it"


@run
async def test_the_end_of_an_epoch_resets_everything(tmp_path: Path) -> None:
    asked = asyncio.Event()

    async def origin(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_head(reader)
        asked.set()
        await reader.read()

    async with bench(tmp_path, sites("site.test")) as world:
        client = world.plain(port=await world.origin(origin))
        await client.send(GET)
        await asked.wait()
        idle = await world.tls("site.test")
        await world.egress.close()
        for each in (client, idle):
            with pytest.raises(ConnectionError):
                await each.rest()
        assert {row.decision for row in world.rows.requests} == {"interrupted"}
        late = world.plain()
        with pytest.raises(ConnectionError):
            await late.rest()
        assert await world.egress.resolve(b"\0" * 12) == b""


# An agent that lies.


@pytest.mark.parametrize(
    ("address", "port"), [("not an address", 443), ("", 443), ("127.0.0.1\0", 80), ("1.2.3.4", 70_000), ("1.2.3.4", -1)]
)
@run
async def test_what_the_agent_says_is_not_believed(tmp_path: Path, address: str, port: int) -> None:
    async with bench(tmp_path, sites("site.test")) as world:
        client = world.plain(address=address, port=port)
        with contextlib.suppress(ConnectionError):
            await client.send(b"\0\1\2\3")
            await client.rest()
        row = await world.rows.row()
        assert row.decision in ("denied", "error")
    assert world.lookups == []


@pytest.mark.parametrize("explicit", [False, True])
@pytest.mark.parametrize("address", "127.0.0.1 169.254.169.254 ::1 192.0.2.7 198.18.0.1 lies".split())
@run
async def test_wherever_an_agent_says_that_it_leads_the_request_decides(
    tmp_path: Path, address: str, explicit: bool
) -> None:
    """It opens nothing that is denied, and takes what is allowed nowhere but where its name leads."""
    async with bench(tmp_path, sites("site.test")) as world:
        port = await world.origin(answering())
        told = {"address": address, "port": 3128 if explicit else port, "explicit": explicit}
        for name, expected in (("other.test", 403), ("site.test", 200), ("169.254.169.254", 403)):
            client = world.plain(**told)
            target = f"http://{name}:{port}/" if explicit else "/"
            await client.send(f"GET {target} HTTP/1.1\r\nHost: {name}:{port}\r\n\r\n".encode())
            assert (await client.answer())[0] == expected
        assert world.lookups == ["site.test"]
        assert [row.address for row in world.rows.requests if row.decision == "allowed"] == ["127.0.0.1"]


@pytest.mark.parametrize(
    "data",
    [
        b"\0",
        b"\x16\3\1\0\5hello",
        b"\x16" * 100,
        b"GET",
        b"GET / HTTP/1.1\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"\x80" * 70_000,
    ],
)
@run
async def test_whatever_a_client_says_first_ends_in_a_row_or_nothing(tmp_path: Path, data: bytes) -> None:
    async with bench(tmp_path, sites("site.test")) as world:
        for explicit in (False, True):
            client = world.plain(explicit=explicit)
            with contextlib.suppress(ConnectionError):
                await client.send(data)
                await client.stream.write_eof()
                await client.rest()
        assert {row.decision for row in world.rows.requests} <= {"denied", "error"}
    assert world.lookups == []


@run
async def test_a_body_that_breaks_its_framing_does_not_become_a_request(tmp_path: Path) -> None:
    seen: list[bytes] = []

    async def origin(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(1000):
            seen.append(data)

    async with bench(tmp_path, sites("site.test")) as world:
        client = world.plain(port=await world.origin(origin))
        await client.send(b"POST / HTTP/1.1\r\n" + HOST + b"Transfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n")
        while not seen or not b"".join(seen).endswith(b"hello\r\n"):
            await asyncio.sleep(0)
        await client.send(b"+5\r\nGET /admin HTTP/1.1\r\n" + HOST + b"\r\n")
        with pytest.raises((ConnectionError, EOFError)):
            await client.exactly(1)
        row = await world.rows.row()
        assert "size of a chunk" in str(row.error)
    assert b"admin" not in b"".join(seen)


@run
async def test_a_tap_hears_both_bodies_and_the_end(tmp_path: Path) -> None:
    heard: list[object] = []

    class Tap:
        def request_body(self, chunk: bytes) -> None:
            heard.append(chunk)

        def response(self, head: Any) -> None:
            heard.append(head.status)

        def response_body(self, chunk: bytes) -> None:
            heard.append(chunk)

        def finish(self) -> None:
            heard.append("end")

    taps: Callable[..., Tap] = lambda _subject, _head, _verdict: Tap()  # noqa: E731
    async with bench(tmp_path, sites("site.test"), taps=taps) as world:
        port = await world.origin(answering())
        client = world.plain(port=port)
        await client.send(b"POST / HTTP/1.1\r\n" + HOST + b"Content-Length: 3\r\n\r\nabc")
        assert (await client.answer())[0] == 200
        client = world.plain(port=1)
        await client.send(GET)
        assert (await client.answer())[0] == 502
    assert heard == [b"abc", 200, b"hello", "end", "end"]
