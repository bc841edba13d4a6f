"""Connections to origins: by way of the host's own proxies, with certificates, and to the addresses that were checked."""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import socket
import ssl
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from capsem.egress import dial
from capsem.egress.dial import Dialer, DialError, Target, Trust
from capsem.egress.facts import Layer, Protocol
from capsem.egress.proxies import BadProxy, HostProxies, HostProxy, from_environment
from egress_bench import Bench, answering, bench, read_head, rule, run, sites

GET = b"GET /x HTTP/1.1\r\nHost: site.test\r\n\r\n"


def test_proxies_are_read_as_curl_reads_them() -> None:
    found = from_environment(
        {
            "http_proxy": "proxy.test:3128",
            "HTTP_PROXY": "http://other.test",
            "HTTPS_PROXY": "https://u%40:p%3a@[2001:db8::1]",
        }
    )
    assert found.http == HostProxy("proxy.test", 3128)
    assert found.https == HostProxy("2001:db8::1", 443, tls=True, authorization=b"Basic dUA6cDo=")
    assert from_environment({"ALL_PROXY": "http://proxy.test"}).https == HostProxy("proxy.test", 80)
    assert from_environment({"HTTPS_PROXY": ""}) == HostProxies()
    socks = from_environment({"ALL_PROXY": "socks5h://u:pass@proxy.test"})
    assert socks.http == socks.https == HostProxy("proxy.test", 1080, authorization=b"\1\1u\4pass", socks=True)


@pytest.mark.parametrize(
    "text",
    [
        "socks4://proxy.test",
        "socks5://user@proxy.test",
        "socks5://a:secret" + 250 * "x" + "@proxy.test",
        "http://",
        "http://proxy.test:x",
        "http://a b",
        "ftp://user:secret@proxy.test",
    ],
)
def test_what_is_no_proxy_is_told_without_its_password(text: str) -> None:
    with pytest.raises(BadProxy) as caught:
        from_environment({"HTTPS_PROXY": text})
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("entry", "host", "direct"),
    [
        ("*", "a.test", True),
        ("a.test", "a.test", True),
        ("a.test", "b.a.test", True),
        (".a.test", "b.a.test", True),
        ("*.a.test", "b.a.test", True),
        ("a.test", "ba.test", False),
        ("a.test:443", "a.test", True),
        ("a.test:80", "a.test", False),
        ("10.0.0.0/8", "10.1.2.3", True),
        ("10.0.0.0/8", "11.1.2.3", False),
        ("10.0.0.0/8", "a.test", False),
        ("10.1.2.3", "10.1.2.3", True),
        ("::1", "::1", False),
        ("[::1]", "::1", True),
        ("?", "a.test", False),
    ],
)
def test_where_to_go_directly(entry: str, host: str, direct: bool) -> None:
    proxies = from_environment({"HTTPS_PROXY": "http://proxy.test", "NO_PROXY": f"x.test, {entry}"})
    assert (proxies.to(host, 443, plain=False) is None) is direct


async def relay(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, heads: list[bytes], port: int) -> None:
    """A proxy of a company's, which knows one origin."""
    head = await read_head(reader)
    heads.append(head)
    there, back = await asyncio.open_connection("127.0.0.1", port)
    if head.startswith(b"CONNECT "):
        writer.write(b"HTTP/1.1 200 Fine\r\n\r\n")
    else:
        back.write(head)

    async def carry(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        while data := await source.read(1000):
            sink.write(data)

    try:
        await asyncio.gather(carry(reader, back), carry(there, writer))
    finally:
        back.close()


async def proxied(world: Bench, origin: int, heads: list[bytes]) -> HostProxy:
    port = await world.origin(lambda reader, writer: relay(reader, writer, heads, origin))
    return HostProxy("127.0.0.1", port, authorization=b"Basic eA==")


@run
async def test_origins_are_reached_through_the_hosts_proxy(tmp_path: Path) -> None:
    heads: list[bytes] = []
    async with bench(tmp_path, sites("site.test", "unknown.example")) as world:
        plain = await proxied(world, await world.origin(answering()), heads)
        secure = await proxied(world, await world.origin(answering(), "site.test"), heads)
        world.egress.reload(dialer=Dialer(Trust([tmp_path / "origins.pem"]), HostProxies(plain, secure)))
        client = world.plain(port=80)
        for _ in range(2):
            await client.send(GET)
            assert (await client.answer())[0] == 200
        client = await world.tls("site.test")
        await client.send(GET)
        assert (await client.answer())[0] == 200
        client = world.plain(port=80)
        await client.send(GET.replace(b"site.test", b"unknown.example"))
        assert (await client.answer())[0] == 200, "the proxy may know names that are not known here"
    assert heads[0].startswith(b"GET http://site.test/x HTTP/1.1\r\nHost: site.test\r\n")
    assert b"Proxy-Authorization: Basic eA==" in heads[0]
    assert heads[1].startswith(b"CONNECT site.test:443 HTTP/1.1\r\nHost: site.test:443\r\n")
    assert b"/x" not in heads[1]


async def socks(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, asked: list[bytes], port: int) -> None:
    """A SOCKS 5 proxy that wants a password, and knows one origin. It says all that it has to in one piece."""
    assert await reader.readexactly(4) == b"\5\2\0\2"
    writer.write(b"\5\2")
    assert await reader.readexactly(8) == b"\1\1u\4pass"
    writer.write(b"\1\0")
    head = await reader.readexactly(4)
    size = {1: 4, 4: 16}.get(head[3]) or (await reader.readexactly(1))[0]
    asked.append(await reader.readexactly(size + 2))
    there, back = await asyncio.open_connection("127.0.0.1", port)
    first = await there.read(100) if asked[-1].startswith(b"greeter") else b""
    writer.write(b"\5\0\0\1\x7f\0\0\1\0\1" + first)

    async def carry(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        while data := await source.read(1000):
            sink.write(data)

    try:
        await asyncio.gather(carry(reader, back), carry(there, writer))
    finally:
        back.close()


@run
async def test_origins_are_reached_by_socks(tmp_path: Path) -> None:
    asked: list[bytes] = []

    async def greet(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"welcome\r\n")
        writer.write(await reader.readline())
        await reader.read()

    rules = sites("site.test", "unknown.example"), sites("greeter.test", protocol=Protocol.TCP, ports=(22,))
    async with bench(tmp_path, *rules) as world:
        handlers = {80: (answering(),), 443: (answering(), "site.test"), 22: (greet,)}
        ports = {
            port: await world.origin(partial(socks, asked=asked, port=await world.origin(*more)))
            for port, more in handlers.items()
        }
        for port, client in ((80, world.plain(port=80)), (443, await world.tls("site.test"))):
            proxy = HostProxy("127.0.0.1", ports[port], authorization=b"\1\1u\4pass", socks=True)
            world.egress.reload(dialer=Dialer(Trust([tmp_path / "origins.pem"]), HostProxies(proxy, proxy)))
            for _ in range(2):
                await client.send(GET)
                assert (await client.answer())[0] == 200
        assert asked == [b"site.test\x00\x50", b"site.test\x01\xbb"]
        proxy = HostProxy("127.0.0.1", ports[22], authorization=b"\1\1u\4pass", socks=True)
        world.egress.reload(dialer=Dialer(Trust(), HostProxies(proxy, proxy)))
        client = world.plain(address=world.names_table.synthetic("greeter.test"), port=22)
        assert await client.until(b"\n") == b"welcome\r\n"
        await client.send(b"hello\n")
        assert await client.until(b"\n") == b"hello\n"


@run
@pytest.mark.parametrize(
    ("said", "why"),
    [
        (b"HTTP/1.1 400 Bad\r\n", "does not speak SOCKS 5"),
        (b"\5\xff", "wants a user and a password"),
        (b"\5\0\5\2\0\1", "its rules do not allow it"),
        (b"\5\0\5\x63\0\1", "code 99"),
        (b"\5\0\5\0\0\7", "an address of kind 7"),
        (b"\5\0\5\0\0\1", "hung up"),
        (b"", "hung up"),
    ],
)
async def test_a_socks_proxy_that_does_not_help_is_told_of(tmp_path: Path, said: bytes, why: str) -> None:
    async def speak(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(said)
        writer.write_eof()
        await _reader.read()

    async with bench(tmp_path) as world:
        proxy = HostProxy("127.0.0.1", await world.origin(speak), socks=True)
        dialer = Dialer(Trust(), HostProxies(proxy, proxy))
        with pytest.raises(DialError, match=why):
            await dialer.dial(Target("site.test", 80, tls=False), [])


@run
async def test_a_name_below_the_floor_is_not_asked_of_a_proxy(tmp_path: Path) -> None:
    async with bench(tmp_path, rule("all", hosts=("*",))) as world:
        world.egress.reload(dialer=Dialer(Trust(), HostProxies(http=HostProxy("127.0.0.1", 1))))
        client = world.plain(port=80)
        await client.send(GET)
        assert (await client.answer())[0] == 403


def client_certificate(world: Bench) -> Path:
    """A file with a certificate that the origins' authority has signed for a client, and its key."""
    key, now = ec.generate_private_key(ec.SECP256R1()), datetime.datetime.now(datetime.UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "client.test")]))
        .issuer_name(world.origins.certificate.subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.ExtendedKeyUsage([x509.ExtendedKeyUsageOID.CLIENT_AUTH]), critical=False)
        .sign(world.origins._key, hashes.SHA256())
    )
    pem = serialization.Encoding.PEM
    private = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    path = world.directory / "client.pem"
    path.write_bytes(private + made.public_bytes(pem))
    return path


@run
async def test_a_client_certificate_is_shown_where_a_rule_says_so(tmp_path: Path) -> None:
    shown: list[Any] = []

    async def origin(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_head(reader)
        shown.append(writer.get_extra_info("peercert"))
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")

    rules = sites("site.test", certificate="work"), sites("other.test", certificate="none")
    async with bench(tmp_path, *rules) as world:
        certificate = client_certificate(world)
        trust = Trust([tmp_path / "origins.pem"], {"work": (certificate, certificate)})
        world.egress.reload(dialer=Dialer(trust))
        context = world.server_context("site.test")
        context.verify_mode = ssl.CERT_REQUIRED
        context.load_verify_locations(tmp_path / "origins.pem")
        port = await world.origin(origin, context=context)
        client = await world.tls("site.test", port=port)
        await client.send(GET)
        status, _, body = await client.answer()
        client = await world.tls("other.test", port=port)
        await client.send(GET.replace(b"site.test", b"other.test"))
        other, _, text = await client.answer()
        assert (status, body) == (200, b"")
        assert shown[0]["subject"][0][0][1] == "client.test"
        assert other == 502
        assert b"no client certificate named none" in text


@run
async def test_the_next_address_is_tried(tmp_path: Path) -> None:
    async with bench(tmp_path, rule("all", layer=Layer.VM, hosts=("*",)), grounded=False) as world:
        world.names["site.test"] = ["127.0.0.2", "127.0.0.1"]
        client = world.plain(port=await world.origin(answering()))
        await client.send(GET)
        assert (await client.answer())[0] == 200
        assert world.rows.requests[0].address == "127.0.0.1"
        client = world.plain(port=1)
        await client.send(GET)
        status, _, body = await client.answer()
        assert status == 502
        assert b"127.0.0.2 port 1" in body


@contextlib.contextmanager
def silent(address: str, port: int) -> Iterator[None]:
    """Somebody listens there, and so does not refuse, but never answers: his queue is full."""
    with contextlib.ExitStack() as sockets:
        listener = sockets.enter_context(socket.socket())
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((address, port))
        listener.listen(0)
        for _ in range(2):  # one that he could accept, one that waits for that
            queued = sockets.enter_context(socket.socket())
            queued.setblocking(False)
            queued.connect_ex((address, port))
        yield


@run
async def test_an_address_that_says_nothing_holds_nobody_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dial, "_CONNECT", 3600.0)
    async with bench(tmp_path) as world:
        port = await world.origin(answering())
        with silent("127.0.0.2", port):
            dialled = await Dialer(Trust()).dial(Target("site.test", port, tls=False), ["127.0.0.2", "127.0.0.1"])
        assert dialled.address == "127.0.0.1"
        dialled.stream.abort()


@run
async def test_one_that_refuses_is_followed_by_the_next_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dial, "_HEAD_START", 3600.0)
    async with bench(tmp_path) as world:
        port = await world.origin(answering())
        dialled = await Dialer(Trust()).dial(Target("site.test", port, tls=False), ["127.0.0.3", "127.0.0.1"])
        assert dialled.address == "127.0.0.1"
        dialled.stream.abort()
        with pytest.raises(DialError, match=r"127\.0\.0\.3 port"):
            await Dialer(Trust()).dial(Target("site.test", port, tls=False), ["127.0.0.3", "127.0.0.4"])


@run
async def test_what_the_host_trusts_is_loaded_once_while_others_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    go_on, loaded, real = threading.Event(), [], ssl.create_default_context

    def load() -> ssl.SSLContext:
        go_on.wait(30)
        loaded.append(1)
        return real()

    async with bench(tmp_path, sites("site.test")) as world:
        secure, plain = await world.origin(answering(), "site.test"), await world.origin(answering())
        clients = [await world.tls("site.test", port=secure) for _ in range(2)]
        monkeypatch.setattr(ssl, "create_default_context", load)
        for each in clients:
            await each.send(GET)
        client = world.plain(port=plain)
        await client.send(GET)
        assert (await client.answer())[0] == 200
        assert not loaded
        go_on.set()
        assert [(await each.answer())[0] for each in clients] == [200, 200]
    assert len(loaded) == 1


@run
async def test_a_file_of_an_authority_that_is_mended_is_read_again(tmp_path: Path) -> None:
    trust, file = Trust([tmp_path / "company.pem"]), tmp_path / "company.pem"
    for _ in range(2):
        with pytest.raises(DialError, match=r"company\.pem cannot be read"):
            await trust.context()
    async with bench(tmp_path):
        file.write_bytes((tmp_path / "origins.pem").read_bytes())
    assert await trust.context() is await trust.context()
