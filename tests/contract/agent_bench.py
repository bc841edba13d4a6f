"""Fixtures: the real guest agent as a plain process, spoken to by the real host end."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

from agent_host import AgentProcess
from capsem.control.channel import Stream
from capsem.control.guest import Guest
from capsem.wire.messages import STDERR, STDIN, STDOUT, Exec, Exited
from capsem.wire.schema import Message

LIMIT = 120.0  # seconds for a whole scenario: nothing is measured by it, it only ends what hangs


@dataclass
class Ran:
    """What a command did."""

    stdout: bytes
    stderr: bytes
    exited: Exited

    @property
    def code(self) -> int:
        return self.exited.exit_code


class Bench:
    """A guest and its agent, and the little that every scenario needs."""

    def __init__(self, guest: Guest, agent: AgentProcess) -> None:
        self.guest = guest
        self.agent = agent
        self.jobs = 0

    @property
    def workspace(self) -> Path:
        return self.agent.workspace

    @property
    def pid(self) -> int:
        assert self.agent.process is not None
        return self.agent.process.pid

    def request(self, command: str, **options: object) -> Exec:
        self.jobs += 1
        return Exec(**{"job": f"job-{self.jobs}", "command": command, **options})  # type: ignore[arg-type]

    def start(self, command: str, **options: object) -> Stream:
        return self.guest.execute(self.request(command, **options))

    async def finish(self, stream: Stream, stdin: bytes | None = None) -> Ran:
        """Read a command to its end, both outputs at once, while its input is written."""

        async def collect(channel: int) -> bytes:
            content = bytearray()
            while data := await stream.read(channel):
                content += data
            return bytes(content)

        async def feed() -> None:
            if stdin is not None:
                await stream.write(STDIN, stdin)
                stream.end(STDIN)

        stdout, stderr, _ = await asyncio.gather(collect(STDOUT), collect(STDERR), feed())
        result = await stream.result()
        assert isinstance(result, Exited)
        return Ran(stdout, stderr, result)

    async def run(self, command: str, stdin: bytes | None = None, **options: object) -> Ran:
        return await self.finish(self.start(command, stdin=stdin is not None, **options), stdin)

    async def ask(self, request: Message) -> Message:
        """The result of a request without data."""
        return await self.guest.channel.open(request).result()

    async def serves(self) -> None:
        """It still does what it is for."""
        ran = await self.run("echo well; echo alive >&2; exit 3")
        assert (ran.stdout, ran.stderr, ran.code) == (b"well\n", b"alive\n", 3)

    async def restart(self) -> None:
        """Kill the agent and start another one, as PID 1 does; returns when it is ready."""
        await self.agent.stop()
        again = self.next_epoch()
        await self.agent.start()
        await again

    def next_epoch(self) -> Awaitable[None]:
        """Ask before, wait after: an epoch later than the present one is ready."""
        before = self.guest.epoch

        async def wait() -> None:
            while not (self.guest.is_ready and self.guest.epoch > before):
                await self.guest._changed.wait()

        return wait()


Scenario = Callable[[Bench], Awaitable[None]]
