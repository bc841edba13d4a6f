"""The proxy core in a process of its own, for `bench.proxy`: what connects to a port is carried as a stream of a guest's."""

from __future__ import annotations

import asyncio
import sys
from ipaddress import ip_network
from pathlib import Path

from capsem.egress.core import Egress
from capsem.egress.dial import Dialer, Trust
from capsem.egress.facts import Action, Connection, Layer
from capsem.egress.floor import floor
from capsem.egress.mint import Minter, open_authority
from capsem.egress.policy import Policy
from capsem.egress.resolve import Resolver, is_own
from capsem.egress.rules import Rule
from capsem.egress.sockets import SocketStream
from capsem.egress.taps import prices
from capsem.egress.taps.pick import model_taps
from capsem.supervisor.recording import Recording
from capsem.system.real import RealClock

RULES = 200


class Arrived(SocketStream):
    """A connection, as a stream that a guest has opened to an origin."""

    def __init__(self, connection: Connection) -> None:
        super().__init__()
        self.connection = connection


def policy() -> Policy:
    """As large a one as somebody might have; the origin is allowed by the last rule."""
    rules = [Rule(f"rule-{each}", Action.ALLOW, Layer.USER, hosts=(f"*.host{each}.test",)) for each in range(RULES)]
    loopback = (ip_network("127.0.0.0/8"), ip_network("::1/128"))
    rules.append(Rule("origin", Action.ALLOW, Layer.VM, hosts=("localhost",), cidrs=loopback))
    return Policy(tuple(rules), floor=floor(is_own))


async def serve(home: Path, origin_port: int) -> None:
    clock = RealClock()
    recording = Recording(clock, home / "session.db", on=True, resumed=False)
    egress = Egress(
        judge=policy(),
        resolver=Resolver(),
        dialer=Dialer(Trust([home / "origin-ca.pem"])),
        minter=Minter(open_authority(home, clock.time(), "bench"), clock.time),
        recorder=recording.traffic,
        clock=clock,
        taps=model_taps(recording.traffic, clock, prices.load()),
    )
    tasks: set[asyncio.Task[None]] = set()
    loop = asyncio.get_running_loop()

    class Arriving(Arrived):
        def __init__(self) -> None:
            super().__init__(Connection("198.18.0.1", origin_port, process="bench"))

        def connection_made(self, transport: asyncio.BaseTransport) -> None:
            super().connection_made(transport)
            task = asyncio.create_task(egress.serve(self))
            tasks.add(task)
            task.add_done_callback(tasks.discard)

    server = await loop.create_server(Arriving, "127.0.0.1", 0)
    print(server.sockets[0].getsockname()[1], flush=True)
    # It ends when its parent closes its standard input.
    await loop.run_in_executor(None, sys.stdin.read)
    server.close()
    await egress.close()
    await recording.close()


if __name__ == "__main__":
    asyncio.run(serve(Path(sys.argv[1]), int(sys.argv[2])))
