"""From a program's socket through the agent, the gateway and the proxy to an origin, under a policy that changes meanwhile."""

from __future__ import annotations

import asyncio
import contextlib
import json
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from agent_bench import Bench
from capsem.api.network_messages import SetNetwork
from capsem.egress.compose import Layers
from capsem.egress.floor import floor
from capsem.egress.resolve import Resolver
from capsem.egress.taps import prices
from capsem.supervisor.carrying import Carrying
from capsem.supervisor.gateway import Gateway
from capsem.supervisor.lending import Lending
from capsem.supervisor.outlet import Outlet, Outside
from capsem.supervisor.policing import Policing
from capsem.system.real import RealClock
from egress_bench import Bench as Origins
from egress_bench import answering, bench

Run = Callable[..., None]
Table = Mapping[str, Any]


class Way:
    """A guest's way out as its supervisor makes it."""

    def __init__(self, bench: Bench, origins: Origins) -> None:
        self.bench = bench
        self.origins = origins
        self.rows = origins.rows
        clock = RealClock()
        self.policing = Policing(clock, floor(lambda _address: False), lambda _own, _since: None)
        self.policing.begin("box", "", {}, None)
        carrying = Carrying(origins.authority, Resolver(origins._lookup), prices.load(), clock)
        outside = Outside(origins.authority.pem.decode("ascii"), lambda: carrying)
        self.outlet = Outlet(self.policing, Lending(), self.rows, outside, self.changed)
        self.gateway = Gateway(self.outlet)
        bench.guest.serve_streams(self.gateway.opened)
        bench.guest.on_epoch = self.new_epoch
        self.changed()

    def new_epoch(self) -> None:
        self.gateway.cut()
        self.outlet.new_epoch()

    def changed(self) -> None:
        self.bench.guest.set_network(on=self.outlet.open)

    def allow(self, *ports: int, **more: Any) -> None:
        rule = {"name": "sites", "action": "allow", "host": ["*.test"], "cidr": ["127.0.0.0/8"], "port": list(ports)}
        self.set({"rule": [rule] if ports else [], "extra_ca": [str(self.origins._origin_ca)], **more})

    def set(self, own: Table) -> None:
        self.policing.set(SetNetwork(own=json.dumps(own), layers=Layers().to_json()))

    async def tls(self, name: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        context = ssl.create_default_context(cadata=self.outlet.authority)
        port = self.bench.agent.ports.redirected
        return await asyncio.open_connection("127.0.0.1", port, ssl=context, server_hostname=name)

    async def explicit(self, port: int, path: str = "/") -> bytes:
        """A request to the proxy that programs ask for by themselves; the whole answer."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.bench.agent.ports.proxy)
        target = f"http://something.test:{port}{path}"
        writer.write(f"GET {target} HTTP/1.1\r\nHost: something.test:{port}\r\nConnection: close\r\n\r\n".encode())
        answer = await reader.read()
        writer.close()
        return answer


@contextlib.asynccontextmanager
async def way(agent: Bench, directory: Path) -> AsyncIterator[Way]:
    async with bench(directory / "origins") as origins:
        made = Way(agent, origins)
        try:
            yield made
        finally:
            await made.gateway.close()
            await made.outlet.close()


@pytest.fixture
def with_way(with_agent: Run, tmp_path: Path) -> Callable[[Callable[[Way], Awaitable[None]]], None]:
    (tmp_path / "origins").mkdir()

    def run(scenario: Callable[[Way], Awaitable[None]]) -> None:
        async def scene(agent: Bench) -> None:
            async with way(agent, tmp_path) as made:
                await scenario(made)

        with_agent(scene)

    return run


WithWay = Callable[[Callable[[Way], Awaitable[None]]], None]


def test_a_request_by_tls_is_carried_and_recorded(with_way: WithWay) -> None:
    async def scenario(way: Way) -> None:
        body = bytes(range(256)) * 8000
        port = await way.origins.origin(answering(body), "something.test")
        # The port that the connection was going to is the agent's own here: the origin is where the policy has it.
        way.allow(port)
        await way.bench.serves()
        reader, writer = await asyncio.open_connection("127.0.0.1", way.bench.agent.ports.proxy)
        writer.write(b"CONNECT something.test:%d HTTP/1.1\r\nHost: something.test:%d\r\n\r\n" % (port, port))
        assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 200 ")
        context = ssl.create_default_context(cadata=way.outlet.authority)
        await writer.start_tls(context, server_hostname="something.test")
        writer.write(b"GET / HTTP/1.1\r\nHost: something.test:%d\r\nConnection: close\r\n\r\n" % port)
        answer = await reader.read()
        assert answer.startswith(b"HTTP/1.1 200 ")
        assert answer.endswith(body)
        row = await way.rows.row()
        assert (row.decision, row.domain, row.bytes_received) == ("allowed", "something.test", len(body))
        writer.close()

    with_way(scenario)


def test_a_name_that_leads_to_the_hosts_loopback_does_not_lead_to_the_guests(with_way: WithWay) -> None:
    async def scenario(way: Way) -> None:
        way.allow(8080)
        query = b"\x12\x34\x01\x00\x00\x01\x00\x00\x00\x00\x00\x00\x04some\x04test\x00\x00\x01\x00\x01"
        answer = await way.outlet.question(query, None)
        assert (await way.origins.resolver.addresses("some.test"), answer[-4:-2]) == (["127.0.0.1"], b"\xc6\x12")

    with_way(scenario)


def test_without_a_rule_the_guest_does_not_even_ask(with_way: WithWay) -> None:
    async def scenario(way: Way) -> None:
        assert not way.outlet.open
        assert not way.bench.agent.ports_file.exists()
        port = await way.origins.origin(answering())
        way.allow(port)
        await way.bench.serves()
        assert b"200 OK" in await way.explicit(port)
        assert b"403" in await way.explicit(port + 1)
        way.allow()
        await way.bench.serves()
        with pytest.raises(ConnectionRefusedError):
            await way.explicit(port)
        assert [row.decision for row in way.rows.requests] == ["allowed", "denied"]

    with_way(scenario)


def test_a_new_epoch_ends_what_was_under_way_and_the_next_request_works(with_way: WithWay) -> None:
    async def scenario(way: Way) -> None:
        begun = asyncio.Event()

        async def slow(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            if b"/slow" not in await reader.readuntil(b"\r\n\r\n"):
                writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
                return
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\n\r\nbegun")
            begun.set()
            await asyncio.Event().wait()

        port = await way.origins.origin(slow)
        way.allow(port)
        await way.bench.serves()
        download = asyncio.create_task(way.explicit(port, "/slow"))
        await begun.wait()
        again = way.bench.next_epoch()
        way.bench.guest._begin_epoch()
        with pytest.raises(ConnectionResetError):
            await download
        await again
        assert (await way.rows.row()).decision == "interrupted"
        assert (await way.explicit(port)).endswith(b"ok")

    with_way(scenario)


def test_a_change_of_what_goes_with_the_policy_leaves_what_is_under_way(with_way: WithWay) -> None:
    async def scenario(way: Way) -> None:
        begun, go_on = asyncio.Event(), asyncio.Event()

        async def slow(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.readuntil(b"\r\n\r\n")
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nfirst")
            begun.set()
            await go_on.wait()
            writer.write(b"last")
            await writer.drain()

        port = await way.origins.origin(slow)
        way.allow(port)
        await way.bench.serves()
        download = asyncio.create_task(way.explicit(port))
        await begun.wait()
        way.allow(port, upstream_proxy="none")
        go_on.set()
        assert (await download).endswith(b"firstlast")
        assert (await way.explicit(port)).endswith(b"firstlast")
        way.policing.outside = way.policing.outside._replace(proxies={"ALL_PROXY": "gopher://nowhere.test"})
        way.outlet._policy_changed()
        with contextlib.suppress(ConnectionResetError):
            assert await way.explicit(port) == b""  # a proxy that cannot be used is not passed by

    with_way(scenario)
