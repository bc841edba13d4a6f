"""The real guest agent as a plain process on this computer, spoken to by the real host end."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import NamedTuple

import capsem
from capsem.control.guest import Guest, Identity
from capsem.system.real import RealClock, RealEntropy

START = "from capsem.guest.__main__ import main; sys.exit(main(sys.argv[1:]))"
SOURCE = Path(capsem.__file__).parent.parent


class Ports(NamedTuple):
    """Of an agent that listens for connections."""

    redirected: int
    proxy: int
    udp: int
    tcp: int


class AgentProcess:
    """Starts agents one after the other on one connection, as PID 1 does."""

    def __init__(self, directory: Path) -> None:
        self.workspace = directory / "root"
        self.workspace.mkdir()
        self.memory = directory / "memory"
        self.ports_file = directory / "ports"
        self.ours, self._theirs = socket.socketpair()
        self.process: asyncio.subprocess.Process | None = None

    async def start(self) -> None:
        fd = self._theirs.fileno()
        code = f"import sys; sys.path.insert(0, {str(SOURCE)!r}); " + START
        options = ["--fd", str(fd), "--workspace", str(self.workspace), "--memory", str(self.memory), "--bystander"]
        options += ["--ports", str(self.ports_file)]
        self.process = await asyncio.create_subprocess_exec(
            sys.executable, "-I", "-S", "-c", code, *options, pass_fds=[fd], env={"PATH": os.environ["PATH"]}
        )

    @property
    def ports(self) -> Ports:
        """Where programs connect to."""
        return Ports(*map(int, self.ports_file.read_text().split()))

    async def stop(self) -> None:
        if self.process is not None and self.process.returncode is None:
            self.process.kill()
            await self.process.wait()


@contextlib.asynccontextmanager
async def running_agent(
    directory: Path, env: dict[str, str] | None = None, *, network: bool = False
) -> AsyncIterator[tuple[Guest, AgentProcess]]:
    agent = AgentProcess(directory)
    guest = Guest(Identity("box", "box", env or {}), RealClock(), RealEntropy())
    guest.set_network(on=network)
    await agent.start()
    await asyncio.get_running_loop().create_unix_connection(lambda: guest.channel, sock=agent.ours)
    try:
        await guest.wait_ready(10)
        yield guest, agent
    finally:
        guest.channel.hang_up()
        agent._theirs.close()
        await agent.stop()
