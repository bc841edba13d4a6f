"""Connections of programs, from a socket in the guest to the host's end of a stream, by the real agent and gateway."""

from __future__ import annotations

import asyncio
import contextlib
import random
import socket
import struct
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest

from agent_bench import Bench
from capsem.egress.stream import GuestStream
from capsem.guest.capture import MAX_CONNECTIONS
from capsem.supervisor.gateway import Gateway
from capsem.wire.environment import AUTHORITY, BUNDLE
from capsem.wire.streams import WINDOW

Run = Callable[..., None]
Serve = Callable[[GuestStream], Awaitable[None]]
QUESTION = b"\x12\x34\x01\x00\x00\x01\x00\x00\x00\x00\x00\x00\x01a\x04test\x00\x00\x01\x00\x01"
ANSWER = b"\x12\x34\x81\x80\x00\x01\x00\x00\x00\x00\x00\x00\x01a\x04test\x00\x00\x01\x00\x01"
FAILED = b"\x12\x34\x81\x02\x00\x01\x00\x00\x00\x00\x00\x00\x01a\x04test\x00\x00\x01\x00\x01"


class Host:
    """A carrier that does what a test says, and the gateway before it."""

    def __init__(self, bench: Bench, serve: Serve) -> None:
        self.bench = bench
        self.serve = serve
        self.served: list[GuestStream] = []
        self.queries: list[bytes] = []
        self.answer: Callable[[bytes], Awaitable[bytes]] = self._echo
        self.gateway = Gateway(self)
        bench.guest.serve_streams(self.gateway.opened)

    async def connection(self, stream: GuestStream) -> None:
        self.served.append(stream)
        await self.serve(stream)

    async def question(self, query: bytes, process: str | None) -> bytes:
        self.queries.append(query)
        return await self.answer(query)

    async def _echo(self, query: bytes) -> bytes:
        return ANSWER

    @contextlib.asynccontextmanager
    async def connected(
        self, *, explicit: bool = False
    ) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
        ports = self.bench.agent.ports
        reader, writer = await asyncio.open_connection("127.0.0.1", ports.proxy if explicit else ports.redirected)
        try:
            yield reader, writer
        finally:
            writer.transport.abort()


async def echo(stream: GuestStream) -> None:
    while data := await stream.read():
        await stream.write(data)
    await stream.write_eof()


def reset_at_close(writer: asyncio.StreamWriter) -> None:
    sock = writer.get_extra_info("socket")
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


async def until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0.01)


def test_bytes_go_both_ways_and_each_end_is_handed_on(with_agent: Run) -> None:
    async def scenario(bench: Bench) -> None:
        host = Host(bench, echo)
        async with host.connected() as (reader, writer):
            writer.write(b"hello")
            assert await reader.readexactly(5) == b"hello"
            content = random.Random(1).randbytes(3_000_000)
            writer.write(content)
            writer.write_eof()
            assert await reader.read() == content
        connection = host.served[0].connection
        assert (connection.address, connection.port) == ("127.0.0.1", bench.agent.ports.redirected)
        assert not connection.explicit
        async with host.connected(explicit=True) as (reader, writer):
            writer.write_eof()
            assert await reader.read() == b""
        assert (host.served[1].connection.port, host.served[1].connection.explicit) == (3128, True)
        await until(lambda: bench.guest.channel.mux.streams == 0)

    with_agent(scenario, network=True)


def test_a_host_that_has_said_all_may_still_be_told_something(with_agent: Run) -> None:
    async def scenario(bench: Bench) -> None:
        got = bytearray()

        async def serve(stream: GuestStream) -> None:
            await stream.write(b"bye")
            await stream.write_eof()
            while data := await stream.read():
                got.extend(data)

        host = Host(bench, serve)
        async with host.connected() as (reader, writer):
            assert await reader.read() == b"bye"
            writer.write(b"one more thing")
            writer.write_eof()
            await until(lambda: bytes(got) == b"one more thing" and host.gateway.connections == 0)

    with_agent(scenario, network=True)


def test_an_answer_in_the_middle_of_a_request_arrives(with_agent: Run) -> None:
    """The host ends the connection while the program is still sending: what it was sent comes first, then an end."""

    async def scenario(bench: Bench) -> None:
        async def serve(stream: GuestStream) -> None:
            await stream.read()
            await stream.write(b"too large" * 100)

        host = Host(bench, serve)
        async with host.connected() as (reader, writer):
            writer.write(bytes(5_000_000))
            assert await reader.read() == b"too large" * 100
        await bench.serves()

    with_agent(scenario, network=True)


def test_a_reset_is_a_reset_on_the_other_side(with_agent: Run) -> None:
    async def scenario(bench: Bench) -> None:
        seen: list[Exception] = []

        async def serve(stream: GuestStream) -> None:
            if await stream.read() == b"reset me":
                stream.abort()
                return
            await stream.write(b"now you")
            try:
                await stream.read()
            except ConnectionError as error:
                seen.append(error)
                with pytest.raises(ConnectionError):
                    await stream.write(b"x")
                raise

        host = Host(bench, serve)
        async with host.connected() as (reader, writer):
            writer.write(b"reset me")
            with pytest.raises(ConnectionResetError):
                await reader.read()
        async with host.connected() as (reader, writer):
            writer.write(b"no")
            assert await reader.readexactly(7) == b"now you"
            reset_at_close(writer)
        await until(lambda: bool(seen) and host.gateway.connections == 0)
        assert bench.guest.channel.mux.streams == 0

    with_agent(scenario, network=True)


def test_one_that_does_not_read_stops_nobody_else(with_agent: Run) -> None:
    async def scenario(bench: Bench) -> None:
        sent = [0]

        async def serve(stream: GuestStream) -> None:
            if await stream.read() == b"flood":
                with contextlib.suppress(ConnectionError):
                    while True:
                        await stream.write(bytes(65536))
                        sent[0] += 65536
            else:
                await stream.write(bytes(2_000_000))

        host = Host(bench, serve)
        async with host.connected() as (_, stalled):
            stalled.transport.pause_reading()  # type: ignore[attr-defined]
            stalled.write(b"flood")
            await until(lambda: sent[0] > WINDOW)
            for _ in range(3):
                async with host.connected() as (reader, writer):
                    writer.write(b"fetch")
                    assert len(await reader.read()) == 2_000_000
                await bench.serves()
            before = sent[0]
            await bench.serves()
            assert sent[0] == before  # what sockets hold, and a window
            assert bench.guest.channel.mux.backlog <= WINDOW

    with_agent(scenario, network=True)


def test_programs_that_send_too_fast_wait(with_agent: Run) -> None:
    """The host reads nothing: each stream has its window, and nothing piles up; once it reads, all of it arrives."""

    async def scenario(bench: Bench) -> None:
        reads = asyncio.Event()
        got: list[int] = []

        async def serve(stream: GuestStream) -> None:
            await reads.wait()
            size = 0
            while data := await stream.read():
                size += len(data)
            got.append(size)

        host = Host(bench, serve)

        async def upload() -> None:
            async with host.connected() as (reader, writer):
                writer.write(bytes(4_000_000))
                writer.write_eof()
                assert await reader.read() == b""

        uploads = [asyncio.create_task(upload()) for _ in range(20)]
        await until(lambda: len(host.served) == 20)
        await bench.serves()
        reads.set()
        await asyncio.gather(*uploads)
        await until(lambda: got == [4_000_000] * 20)

    with_agent(scenario, network=True)


def test_as_many_connections_as_there_may_be(with_agent: Run) -> None:
    async def scenario(bench: Bench) -> None:
        most, go_on = [0], asyncio.Event()

        async def serve(stream: GuestStream) -> None:
            most[0] = max(most[0], host.gateway.connections)
            await stream.read()
            await go_on.wait()
            await stream.write(b"done")

        host = Host(bench, serve)

        async def fetch() -> bytes:
            async with host.connected() as (reader, writer):
                writer.write(b"x")
                return await reader.read()

        fetches = [asyncio.create_task(fetch()) for _ in range(600)]
        await until(lambda: len(host.served) == MAX_CONNECTIONS)
        await bench.serves()
        go_on.set()
        assert await asyncio.gather(*fetches) == [b"done"] * 600
        assert most[0] == MAX_CONNECTIONS
        await bench.serves()

    with_agent(scenario, network=True)


def test_a_new_epoch_resets_what_was_open_before_it_is_ready(with_agent: Run) -> None:
    async def scenario(bench: Bench) -> None:
        async def never(query: bytes) -> bytes:
            await asyncio.Event().wait()
            return b""

        host = Host(bench, echo)
        host.answer = never
        async with host.connected() as (reader, writer), host.connected() as (idle, _):
            writer.write(b"x")
            assert await reader.readexactly(1) == b"x"
            asked = asyncio.create_task(ask(bench.agent.ports.udp))
            await until(lambda: bool(host.queries) and len(host.served) == 2)
            again = bench.next_epoch()
            bench.guest._begin_epoch()
            for each in (reader, idle):
                with pytest.raises(ConnectionResetError):
                    await each.read()
            assert await asked == FAILED
            await again
            assert bench.guest.boot_ready is not None
            assert bench.guest.boot_ready.reset == 2
        async with host.connected() as (reader, writer):
            writer.write(b"y")
            assert await reader.readexactly(1) == b"y"

    with_agent(scenario, network=True)


def test_a_guest_without_network_is_refused_at_once(with_agent: Run) -> None:
    async def scenario(bench: Bench) -> None:
        host = Host(bench, echo)
        assert not bench.agent.ports_file.exists()
        bench.guest.set_network(on=True)
        await bench.serves()
        async with host.connected() as (reader, writer):
            writer.write(b"x")
            assert await reader.readexactly(1) == b"x"
            bench.guest.set_network(on=False)
            with pytest.raises(ConnectionResetError):
                await reader.read()
        with pytest.raises(ConnectionRefusedError):
            await asyncio.open_connection("127.0.0.1", bench.agent.ports.redirected)
        bench.guest.set_network(on=True)
        await bench.serves()
        async with host.connected() as (reader, writer):
            writer.write(b"x")
            assert await reader.readexactly(1) == b"x"

    with_agent(scenario)


def test_programs_are_told_whom_to_trust(with_agent: Run) -> None:
    async def scenario(bench: Bench) -> None:
        show = "echo $SSL_CERT_FILE $NODE_EXTRA_CA_CERTS $PIP_CERT"
        assert (await bench.run(show)).stdout == b"/mine\n"
        again = bench.next_epoch()
        bench.guest.set_authority("PEM")
        bench.guest._begin_epoch()
        await again
        assert (await bench.run(show)).stdout.split() == [b"/mine", AUTHORITY.encode(), BUNDLE.encode()]
        assert (await bench.run(show, env={"PIP_CERT": "/its"})).stdout.split()[-1] == b"/its"

    with_agent(scenario, env={"SSL_CERT_FILE": "/mine"})


# -- questions


async def ask(port: int, query: bytes = QUESTION) -> bytes:
    loop = asyncio.get_running_loop()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.setblocking(False)
        sock.connect(("127.0.0.1", port))
        await loop.sock_sendall(sock, query)
        return await loop.sock_recv(sock, 4096)


def test_questions_and_answers(with_agent: Run) -> None:
    async def scenario(bench: Bench) -> None:
        host = Host(bench, echo)
        assert await ask(bench.agent.ports.udp) == ANSWER
        assert host.queries == [QUESTION]

        async def nothing(query: bytes) -> bytes:
            return b""

        host.answer = nothing
        assert await ask(bench.agent.ports.udp) == FAILED
        host.answer = host._echo
        reader, writer = await asyncio.open_connection("127.0.0.1", bench.agent.ports.tcp)
        message = len(QUESTION).to_bytes(2, "big") + QUESTION
        for piece in (message[:1], message[1:9], message[9:] + message + message):
            writer.write(piece)
            await writer.drain()
        writer.write_eof()
        assert await reader.read() == 3 * (len(ANSWER).to_bytes(2, "big") + ANSWER)
        writer.close()

    with_agent(scenario, network=True)


@pytest.mark.parametrize("text", [b"", b"x", bytes(11), ANSWER])
def test_what_is_no_question_is_not_answered(with_agent: Run, text: bytes) -> None:
    async def scenario(bench: Bench) -> None:
        host = Host(bench, echo)
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            sock.sendto(text, ("127.0.0.1", bench.agent.ports.udp))
        reader, writer = await asyncio.open_connection("127.0.0.1", bench.agent.ports.tcp)
        writer.write(len(text).to_bytes(2, "big") + text)
        assert await reader.read() == b""
        writer.close()
        assert await ask(bench.agent.ports.udp) == ANSWER
        assert host.queries == [QUESTION]

    with_agent(scenario, network=True)


def test_more_questions_than_there_may_be_fail_at_once(with_agent: Run) -> None:
    async def scenario(bench: Bench) -> None:
        go_on = asyncio.Event()

        async def late(query: bytes) -> bytes:
            await go_on.wait()
            return ANSWER

        host = Host(bench, echo)
        host.answer = late
        asked = [asyncio.create_task(ask(bench.agent.ports.udp)) for _ in range(128)]
        await until(lambda: len(host.queries) == 128)
        assert await ask(bench.agent.ports.udp) == FAILED
        go_on.set()
        assert await asyncio.gather(*asked) == [ANSWER] * 128

    with_agent(scenario, network=True)
