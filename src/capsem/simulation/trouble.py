"""What is done to the world while clients are at work."""

from __future__ import annotations

import asyncio
import itertools
import logging
import random
from typing import Final

from capsem.simulation.history import VmHistory
from capsem.simulation.network import SimNetwork
from capsem.simulation.process import Process
from capsem.simulation.world import World

log = logging.getLogger("capsem.simulation")

PAUSE: Final = 3.0  # seconds between two of them, at most
WRITES: Final = 40  # changes of files until a process is killed at one, at most
KINDS: Final = (
    "kill_service",
    "kill_service_at_write",
    "kill_supervisor",
    "kill_supervisor_at_write",
    "kill_vmm",
    "cut",
    "freeze",
    "fill_disk",
    "restart",
    "set_clock",
    "reboot",
)


class Trouble:
    """Makes it until it is cancelled."""

    def __init__(self, world: World, dice: random.Random, vms: dict[str, VmHistory], kinds: tuple[str, ...]) -> None:
        self.world = world
        self.counts: dict[str, int] = {}
        self._dice = dice
        self._vms = vms
        some = max(0, dice.randint(-4, len(kinds)))  # each seed is troubled in ways of its own, or not at all
        self._kinds = dice.sample(kinds, some)
        self._made = itertools.count(1)
        self._last = 0
        self._lasting = 0

    def so_far(self) -> int:
        """A number that is the same only if nothing was done in between."""
        if self._lasting:
            self._last = next(self._made)
        return self._last

    async def make(self) -> None:
        """One after the other."""
        while self._kinds:
            await asyncio.sleep(self._dice.random() * PAUSE)
            kind = self._dice.choice(self._kinds)
            self.counts[kind] = self.counts.get(kind, 0) + 1
            log.info("-- %s", kind)
            self._last = next(self._made)
            self._lasting += 1
            try:
                await getattr(self, f"_{kind}")()
            finally:
                self._lasting -= 1
                self._last = next(self._made)

    def _supervisor(self) -> Process | None:
        return (
            self._dice.choice([each for _, each, _ in found]) if (found := [*self.world.supervisors.values()]) else None
        )

    async def _kill_service(self) -> None:
        self.world.service.process.kill()
        await self._up()

    async def _up(self) -> None:
        service = self.world.service
        while service.process.dead or not service.ready.is_set():
            await asyncio.sleep(0.1)
            service = self.world.service

    async def _kill_service_at_write(self) -> None:
        await self._at_write(self.world.service.process)
        await self._up()

    async def _at_write(self, process: Process) -> None:
        process.writes_left = self._dice.randrange(WRITES)
        await asyncio.sleep(self._dice.random() * PAUSE)
        process.writes_left = None

    async def _kill_supervisor(self) -> None:
        if (process := self._supervisor()) is not None:
            process.kill()
        await asyncio.sleep(3)

    async def _kill_supervisor_at_write(self) -> None:
        if (process := self._supervisor()) is not None:
            await self._at_write(process)
            await asyncio.sleep(3)

    async def _kill_vmm(self) -> None:
        machines = self.world.machines()
        if machines:
            _, process, machine = self._dice.choice(machines)
            self.world.kill_machine(process, machine)
        await asyncio.sleep(3)

    async def _cut(self) -> None:
        network = self.world.host.network
        assert isinstance(network, SimNetwork)
        if ends := [end for end in network.ends if end.may_break]:
            self._dice.choice(ends).cut()
        await asyncio.sleep(3)

    async def _freeze(self) -> None:
        loop = self.world.host.loop
        process = self._supervisor() if self._dice.random() < 0.6 else self.world.service.process
        if process is not None and not process.dead:
            loop.stop_process(process)
            await asyncio.sleep(self._dice.random() * self._dice.choice((1, 5, 20)))
            loop.continue_process(process)
        await asyncio.sleep(3)

    async def _fill_disk(self) -> None:
        guard = self.world.host.guard
        guard.full = True
        await asyncio.sleep(self._dice.random() * 5)
        guard.full = False
        await asyncio.sleep(3)

    async def _restart(self) -> None:
        service = self.world.service
        if service.ready.is_set() and not service.process.dead:
            how = self._dice.choice(("suspend", "stop", "keep"))
            service.process.create_task(service.end(how), name="end")
            await service.process.ended.wait()
        await self._up()

    async def _set_clock(self) -> None:
        self.world.host.clock.jump(self._dice.choice((-3600, -30, 30, 86400)))

    async def _reboot(self) -> None:
        self.world.reboot()
        for vm in self._vms.values():
            vm.may_lose_memory()
        await self._up()
