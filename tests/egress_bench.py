"""A proxy core between clients in memory and origins on the loopback interface: real TLS, real sockets, a real policy."""

from __future__ import annotations

import asyncio
import datetime
import gc
import ssl
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import wraps
from ipaddress import ip_network
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from capsem.egress import mint
from capsem.egress.core import Egress
from capsem.egress.dial import Dialer, Trust
from capsem.egress.events import DnsEvent, ModelCall, NetEvent
from capsem.egress.facts import Action, Connection, Layer
from capsem.egress.floor import floor
from capsem.egress.names import NameTable
from capsem.egress.policy import Policy
from capsem.egress.resolve import Resolver
from capsem.egress.rules import Rule
from capsem.egress.tls import TlsStream
from capsem.system.real import RealClock

Handler = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


def run(test: Callable[..., Awaitable[None]]) -> Callable[..., None]:
    """Have pytest run an asynchronous test, which is ended if it hangs, and fails if it leaves an error behind that nobody
    looked at."""

    @wraps(test)
    def wrapper(*args: Any, **more: Any) -> None:
        left: list[dict[str, Any]] = []

        async def limited() -> None:
            asyncio.get_running_loop().set_exception_handler(lambda _loop, context: left.append(context))
            async with asyncio.timeout(60):
                await test(*args, **more)
            gc.collect()

        asyncio.run(limited())
        assert not left, left

    return wrapper


class MemoryStream:
    """One end of a pair of streams in memory. `limit` is how much may wait in it before a writer does."""

    def __init__(self, connection: Connection, limit: int = 256 * 1024) -> None:
        self.connection = connection
        self.limit = limit
        self.peer: MemoryStream = self
        self._chunks: deque[bytes] = deque()
        self._size = 0
        self._eof = False
        self.aborted = False
        self._changed = asyncio.Event()

    def _tell(self) -> None:
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    @property
    def waiting(self) -> int:
        return self._size

    async def read(self) -> bytes:
        while not self._chunks:
            if self.aborted:
                raise ConnectionResetError("reset")
            if self._eof:
                return b""
            await self._changed.wait()
        data = self._chunks.popleft()
        self._size -= len(data)
        self._tell()
        return data

    async def write(self, data: bytes | memoryview) -> None:
        there = self.peer
        view = memoryview(data)
        while view:
            if self.aborted:
                raise ConnectionResetError("reset")
            there._chunks.append(bytes(view[: 64 * 1024]))
            there._size += len(view[: 64 * 1024])
            view = view[64 * 1024 :]
            there._tell()
            while there._size > there.limit and not self.aborted:
                await there._changed.wait()

    async def write_eof(self) -> None:
        self.peer._eof = True
        self.peer._tell()

    def abort(self) -> None:
        if self._eof and self.peer._eof:
            return  # it has ended already
        for each in (self, self.peer):
            each.aborted = True
            each._tell()


def pair(connection: Connection) -> tuple[MemoryStream, MemoryStream]:
    """The client's end, and the proxy's."""
    client, proxy = MemoryStream(connection), MemoryStream(connection)
    client.peer, proxy.peer = proxy, client
    return client, proxy


class Rows:
    """A recorder that keeps everything."""

    def __init__(self) -> None:
        self.requests: list[NetEvent] = []
        self.questions: list[DnsEvent] = []
        self.calls: list[ModelCall] = []
        self._told = asyncio.Event()

    def net(self, event: NetEvent) -> None:
        self.requests.append(event)
        self._told.set()

    def dns(self, event: DnsEvent) -> None:
        self.questions.append(event)

    def model(self, call: ModelCall) -> None:
        self.calls.append(call)

    async def row(self, number: int = 0) -> NetEvent:
        """That row, once it is there."""
        while len(self.requests) <= number:
            self._told.clear()
            await self._told.wait()
        return self.requests[number]


def rule(name: str, action: Action = Action.ALLOW, *, layer: Layer = Layer.USER, **more: Any) -> Rule:
    return Rule(name, action, layer, **more)


def sites(*names: str, **more: Any) -> Rule:
    """A rule that allows names on the loopback interface, where the origins of tests are."""
    return rule("sites", layer=Layer.VM, hosts=names, cidrs=(ip_network("127.0.0.0/8"),), **more)


class Client:
    """A program in the guest, HTTP/1.1 by hand."""

    def __init__(self, stream: MemoryStream, secure: TlsStream | None = None) -> None:
        self.raw = stream
        self.stream: Any = secure or stream
        self._data = b""

    async def send(self, data: bytes) -> None:
        await self.stream.write(data)

    async def until(self, end: bytes) -> bytes:
        """All up to and with `end`."""
        while end not in self._data:
            data = await self.stream.read()
            if not data:
                raise EOFError(self._data)
            self._data += data
        found, _, self._data = self._data.partition(end)
        return found + end

    async def exactly(self, size: int) -> bytes:
        while len(self._data) < size:
            data = await self.stream.read()
            if not data:
                raise EOFError(self._data)
            self._data += data
        found, self._data = self._data[:size], self._data[size:]
        return found

    async def rest(self) -> bytes:
        """All up to the end."""
        while data := await self.stream.read():
            self._data += data
        found, self._data = self._data, b""
        return found

    async def answer(self) -> tuple[int, dict[str, str], bytes]:
        """One whole answer that has a length or is chunked."""
        head = (await self.until(b"\r\n\r\n")).decode("latin-1")
        first, *lines = head.strip().split("\r\n")
        headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}
        status = int(first.split(" ")[1])
        if headers.get("transfer-encoding") == "chunked":
            body = b""
            while size := int(await self.until(b"\r\n"), 16):
                body += await self.exactly(size)
                await self.exactly(2)
            await self.until(b"\r\n")
            return status, headers, body
        return status, headers, await self.exactly(int(headers.get("content-length", "0")))


class Bench:
    """See the module."""

    def __init__(self, directory: Path, rules: tuple[Rule, ...], *, grounded: bool, **parts: Any) -> None:
        self.authority, _ = mint.make(datetime.datetime.now(datetime.UTC), "test")
        self.origins, _ = mint.make(datetime.datetime.now(datetime.UTC), "origins")
        self._origin_ca = directory / "origins.pem"
        self._origin_ca.write_bytes(self.origins.pem)
        self.directory = directory
        self.lookups: list[str] = []
        self.names: dict[str, list[str]] = {}
        self.rows = Rows()
        self.clock = RealClock()
        self._tasks: set[asyncio.Task[None]] = set()
        self._origins: set[asyncio.Task[None]] = set()
        self._servers: list[asyncio.Server] = []
        self.names_table = NameTable()
        self.resolver = Resolver(self._lookup)
        self.policy = Policy(rules, floor=floor(lambda _address: False) if grounded else lambda _address: None)
        self.egress = Egress(
            **{
                "judge": self.policy,
                "resolver": self.resolver,
                "dialer": Dialer(Trust([self._origin_ca])),
                "minter": mint.Minter(self.authority, self.clock.time),
                "recorder": self.rows,
                "clock": self.clock,
                "names": self.names_table,
                **parts,
            }
        )

    def _lookup(self, name: str) -> list[str]:
        self.lookups.append(name)
        if name in self.names:
            return self.names[name]
        if name.endswith(".test"):
            return ["127.0.0.1"]
        raise OSError(f"no such name: {name}")

    def open(self, address: str = "192.0.2.7", port: int = 443, *, explicit: bool = False) -> MemoryStream:
        """A stream that a guest opens, carried by the proxy."""
        client, proxy = pair(Connection(address, port, explicit=explicit, process="curl"))
        task = asyncio.create_task(self.egress.serve(proxy))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return client

    def plain(self, **more: Any) -> Client:
        return Client(self.open(**more))

    async def tls(self, name: str | None, stream: MemoryStream | None = None, **more: Any) -> Client:
        """A client that has shaken hands for a name."""
        stream = stream or self.open(**more)
        context = ssl.create_default_context(cadata=self.authority.pem.decode())
        context.check_hostname = name is not None
        context.set_alpn_protocols(["http/1.1"])
        secure = TlsStream(stream, context, server_hostname=name)
        await secure.handshake()
        return Client(stream, secure)

    async def origin(self, handler: Handler, *names: str, context: ssl.SSLContext | None = None) -> int:
        """An origin on 127.0.0.1, in TLS if it has names (or a context); its port."""
        if names:
            context = self.server_context(*names)

        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            task = asyncio.current_task()
            assert task is not None
            self._origins.add(task)
            try:
                await handler(reader, writer)
            except (asyncio.CancelledError, ConnectionError, asyncio.IncompleteReadError):
                writer.transport.abort()
            finally:
                self._origins.discard(task)
                writer.close()

        server = await asyncio.start_server(serve, "127.0.0.1", 0, ssl=context)
        self._servers.append(server)
        return int(server.sockets[0].getsockname()[1])

    def server_context(self, *names: str, authority: mint.Authority | None = None) -> ssl.SSLContext:
        key = ec.generate_private_key(ec.SECP256R1())
        leaf = (authority or self.origins).sign(names[0], key.public_key(), datetime.datetime.now(datetime.UTC))
        path = self.directory / f"{names[0]}.pem"
        path.write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
            )
            + leaf.public_bytes(serialization.Encoding.PEM)
        )
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(path)
        return context

    async def close(self) -> None:
        await self.egress.close()
        self.resolver.close()
        for server in self._servers:
            server.close()
        for task in self._origins:
            task.cancel()
        await asyncio.gather(*self._tasks, *self._origins, return_exceptions=True)
        for _ in range(3):  # transports that were closed are so a moment later
            await asyncio.sleep(0)


@asynccontextmanager
async def bench(directory: Path, *rules: Rule, grounded: bool = True, **parts: Any) -> AsyncIterator[Bench]:
    """Not `grounded`: without a floor."""
    made = Bench(directory, rules, grounded=grounded, **parts)
    try:
        yield made
    finally:
        await made.close()


async def read_head(reader: asyncio.StreamReader) -> bytes:
    return await reader.readuntil(b"\r\n\r\n")


def answering(body: bytes = b"hello", *, seen: list[bytes] | None = None, head: bytes = b"") -> Handler:
    """An origin that answers every request with that body; requests' heads go into `seen`."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            received = await read_head(reader)
            if seen is not None:
                seen.append(received)
            writer.write(b"HTTP/1.1 200 OK\r\n%bContent-Length: %d\r\n\r\n%b" % (head, len(body), body))
            await writer.drain()

    return serve
