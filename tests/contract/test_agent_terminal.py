"""Commands on a terminal, and connections to ports, in the real agent."""

from __future__ import annotations

import asyncio
import os
import socket
import threading
from collections.abc import Callable

import pytest
from test_agent_reattach import begin_anew, reattach

from agent_bench import Bench
from capsem.control.channel import Stream
from capsem.model.errors import InvalidInput, NotFound
from capsem.wire.messages import STDIN, STDOUT, Exited, Forward, Forwarded, Reattached, Resize, Terminal

Run = Callable[..., None]


def terminal(bench: Bench, command: str, rows: int = 24, columns: int = 80) -> Stream:
    return bench.guest.channel.open(Terminal(job="tty", command=command, rows=rows, columns=columns))


async def until(stream: Stream, text: bytes) -> bytes:
    """Read until the text is there; an end before that fails the test."""
    shown = b""
    while text not in shown:
        data = await stream.read(STDOUT)
        assert data, shown
        shown += data
    return shown


async def ended(stream: Stream) -> Exited:
    while await stream.read(STDOUT):
        pass
    result = await stream.result()
    assert isinstance(result, Exited)
    return result


def test_it_is_a_terminal_of_that_size_and_controls_the_session(with_agent: Run) -> None:
    async def scenario(bench: Bench) -> None:
        stream = terminal(bench, "tty; stty size; test -t 0 -a -t 1 -a -t 2 && echo all > /dev/tty; exit 5", 33, 101)
        shown = await until(stream, b"all\r\n")
        assert b"/dev/pts/" in shown
        assert b"33 101\r\n" in shown
        assert (await ended(stream)).exit_code == 5

    with_agent(scenario)


def test_keys_sizes_and_ctrl_c_arrive(with_agent: Run) -> None:
    async def scenario(bench: Bench) -> None:
        command = (
            "trap 'stty size' WINCH; trap 'echo stopped; exit 3' INT; echo go; "
            "while :; do read -t 0.1 x && echo got:$x; done"
        )
        stream = terminal(bench, command)
        await until(stream, b"go\r\n")
        await stream.write(STDIN, b"hello\r")
        await until(stream, b"got:hello\r\n")
        stream.send(Resize(rows=50, columns=132))
        await until(stream, b"50 132\r\n")
        await stream.write(STDIN, b"\x03")
        await until(stream, b"stopped\r\n")
        assert (await ended(stream)).exit_code == 3

    with_agent(scenario)


def test_it_outlives_its_stream_and_takes_input_on_the_next(with_agent: Run) -> None:
    async def scenario(bench: Bench) -> None:
        stream = terminal(bench, "stty -echo; echo ready; read x; echo $x; read y; echo $y; exit 4")
        shown = await until(stream, b"ready\r\n")
        stream.end(STDIN)  # who typed has gone
        await begin_anew(bench)
        again, said = reattach(bench, "tty", stdout=len(shown))
        await again.write(STDIN, b"one\r")
        shown += await until(again, b"one\r\n")
        await begin_anew(bench)
        again, said = reattach(bench, "tty", stdout=len(shown))
        await again.write(STDIN, b"two\r")
        await until(again, b"two\r\n")
        assert said == [Reattached(stdout=len(shown), stderr=0, terminal=True)]
        assert (await ended(again)).exit_code == 4

    with_agent(scenario)


def test_giving_it_up_ends_it_and_who_it_ran(with_agent: Run) -> None:
    async def scenario(bench: Bench) -> None:
        stream = terminal(bench, "cat; echo never > left")
        await stream.write(STDIN, b"x\r")
        await until(stream, b"x\r\nx\r\n")
        stream.reset()
        await bench.serves()
        while (await bench.run("pgrep -fx 'bash -c cat; echo never > left'")).code == 0:
            await asyncio.sleep(0.01)
        assert not (bench.workspace / "left").exists()

    with_agent(scenario)


@pytest.fixture
def echo_port() -> int:
    """A server that sends back what it gets, in upper case, and then its end."""
    server = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        connection, _ = server.accept()
        with connection, server:
            while data := connection.recv(65536):
                connection.sendall(data.upper())

    threading.Thread(target=serve, daemon=True).start()
    return int(server.getsockname()[1])


def test_a_port_is_reached_both_ways_with_flow_control(with_agent: Run, echo_port: int) -> None:
    async def scenario(bench: Bench) -> None:
        sent = os.urandom(700_000).hex().encode()
        stream = bench.guest.channel.open(Forward(port=echo_port))

        async def feed() -> None:
            await stream.write(STDIN, sent)
            stream.end(STDIN)

        feeding = asyncio.create_task(feed())
        got = bytearray()
        while data := await stream.read(STDOUT):
            got += data
        await feeding
        assert bytes(got) == sent.upper()
        assert await stream.result() == Forwarded()

    with_agent(scenario)


def test_a_port_without_a_listener_is_told(with_agent: Run) -> None:
    async def scenario(bench: Bench) -> None:
        with socket.create_server(("127.0.0.1", 0)) as server:
            port = server.getsockname()[1]
        with pytest.raises(NotFound, match=str(port)):
            await bench.ask(Forward(port=port))
        with pytest.raises(InvalidInput):
            await bench.ask(Forward(port=70000))
        await bench.serves()

    with_agent(scenario)
