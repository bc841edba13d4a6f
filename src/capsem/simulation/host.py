"""The simulated host as its processes see it."""

from __future__ import annotations

import asyncio
import itertools
import random
import signal
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from capsem.simulation.loop import SimLoop
from capsem.simulation.network import SimNetwork, process_now
from capsem.simulation.process import Guard, Process
from capsem.system import System

FIRST_PID = 4_194_305  # beyond what Linux gives out: nothing of the real host has one of these
EPOCH = 1_700_000_000.0  # seconds since 1970 at which it all begins


@dataclass
class SimClock:
    """See capsem.system.Clock."""

    loop: SimLoop
    dice: random.Random
    set_by: float = 0.0  # how far somebody has set the wall clock
    slept: float = 0.0
    boots: int = 1
    _jumps: list[asyncio.Event] = field(default_factory=list)

    def time(self) -> float:
        """See Clock."""
        return EPOCH + self.loop.time() + self.set_by + self.slept

    def monotonic(self) -> float:
        """See Clock."""
        return self.loop.time()

    def boot_time(self) -> float:
        """See Clock."""
        return self.loop.time() + self.slept

    async def jumped(self) -> None:
        """See Clock."""
        event = asyncio.Event()
        self._jumps.append(event)
        await event.wait()

    def jump(self, seconds: float) -> None:
        """The wall clock is set."""
        self.set_by += seconds
        events, self._jumps = self._jumps, []
        for event in events:
            event.set()

    def boot_id(self) -> str:
        """See Clock."""
        return f"00000000-0000-4000-8000-{self.boots:012}"


@dataclass(frozen=True)
class SimEntropy:
    """See capsem.system.Entropy."""

    dice: random.Random

    def token_bytes(self, size: int) -> bytes:
        """See Entropy."""
        return self.dice.randbytes(size)

    def choose(self, words: Sequence[str]) -> str:
        """See Entropy."""
        return self.dice.choice(words)


class SimChild:
    """See capsem.system.Child."""

    def __init__(self, process: Process) -> None:
        self._process = process
        self.lines: asyncio.Queue[bytes] = asyncio.Queue()
        process.on_buried.append(lambda: self.lines.put_nowait(b""))

    @property
    def pid(self) -> int:
        """See Child."""
        return self._process.pid

    @property
    def status(self) -> int | None:
        """See Child."""
        return self._process.status if self._process.buried else None

    async def feed(self, data: bytes) -> None:
        """See Child."""
        raise BrokenPipeError

    async def read_line(self) -> bytes:
        """See Child."""
        return await self.lines.get()

    async def wait(self) -> int:
        """See Child."""
        await self._process.ended.wait()
        assert self._process.status is not None
        return self._process.status


class SimProcesses:
    """See capsem.system.Processes; `program` is what a spawned process runs."""

    def __init__(self, host: Host) -> None:
        self._host = host
        self.program: Callable[[Process, SimChild, Sequence[str], bytes], None] = lambda *_: None

    async def spawn(
        self, argv: Sequence[str], *, env: Mapping[str, str], stdin: bytes | None, log: Path, keep: Sequence[int] = ()
    ) -> SimChild:
        """See Processes."""
        log.touch(mode=0o600)
        process = self._host.process(argv[2])
        child = SimChild(process)
        self.program(process, child, argv, stdin or b"")
        return child

    def own_pid(self) -> int:
        """See Processes."""
        return process_now().pid

    def signal(self, pid: int, number: int) -> None:
        """See Processes."""
        process = self._host.processes.get(pid)
        if process is None or process.dead:
            return
        if number == signal.SIGKILL:
            process.kill()
        else:
            self._host.loop.call_soon(self._host.on_term[pid], context=process.context())

    async def gone(self, pid: int) -> None:
        """See Processes."""
        if (process := self._host.processes.get(pid)) is not None:
            await process.ended.wait()

    def start_time(self, pid: int) -> int | None:
        """See Processes."""
        process = self._host.processes.get(pid)
        return None if process is None or process.dead else pid


class Host:
    """All of it."""

    def __init__(self, loop: SimLoop, guard: Guard, dice: random.Random) -> None:
        self.loop = loop
        self.guard = guard
        self.dice = dice
        self.clock = SimClock(loop, dice)
        self.network = SimNetwork(loop, dice)
        self.spawning = SimProcesses(self)
        self.processes: dict[int, Process] = {}
        self.on_term: dict[int, Callable[[], None]] = {}  # what SIGTERM does to a process
        self.system = System(self.clock, SimEntropy(dice), self.network, self.spawning)
        self._pids = itertools.count(FIRST_PID)

    def process(self, name: str) -> Process:
        """A new one, which does nothing yet."""
        process = Process(self.loop, self.guard, next(self._pids), name)
        self.processes[process.pid] = process
        return process

    def living(self) -> list[Process]:
        """Those that are not dead."""
        return [process for process in self.processes.values() if not process.dead]
