"""Services in one process whose VMs are simulated, on one host that they share."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path

from capsem.api.exec_types import ExecRequest
from capsem.api.vm_types import ProvisionRequest
from capsem.config import load
from capsem.hypervisor.sim.driver import SimDriver
from capsem.hypervisor.sim.plan import Plan
from capsem.service.create import Maker
from capsem.service.fleet import Fleet
from capsem.service.gate import Gate
from capsem.service.handlers import Handlers
from capsem.service.launch import Launcher
from capsem.service.ledgers import Ledgers
from capsem.simulation.world import OneImage
from capsem.store.layout import Layout
from process_machine import InProcess

RAM_MB = 256


class SimWorld:
    """A service with a home of its own."""

    def __init__(self, home: Path, plan: Plan, gate: Path | None, templates: str) -> None:
        home.mkdir()
        self.layout = Layout(home / "run")
        self.layout.create()
        self.processes = InProcess(None)  # type: ignore[arg-type]
        self.driver = self.processes.driver = SimDriver(self.processes.system, plan)  # type: ignore[assignment]
        system = self.processes.system
        self.gate = Gate(system.clock, overlap=self.driver.features.transitions_overlap, path=gate)
        self.fleet = Fleet(system, self.layout, 100)
        self.ledgers = Ledgers(self.fleet, home / "sessions" / "main.db")
        launcher = Launcher(system, self.layout, {}, Path("capsem-process"), "sim", gate=gate)
        self.catalog = OneImage(home)
        maker = Maker(self.fleet, self.driver, self.catalog, launcher, self.gate)  # type: ignore[arg-type]
        settings = load({"CAPSEM_HOME": str(home), "CAPSEM_TEMPLATES": templates})
        self.handlers = Handlers(self.fleet, maker, settings, {"CAPSEM_HOME": str(home)}, self.ledgers)

    async def create(self, name: str) -> None:
        await self.handlers.provision(ProvisionRequest(name=name, persistent=True, ram_mb=RAM_MB, cpus=1))

    async def sh(self, name: str, command: str) -> str:
        answer = await self.handlers.execute(name, ExecRequest(command=command, timeout_secs=30))
        return f"{answer.stdout}{answer.stderr}"


@contextlib.asynccontextmanager
async def sim_world(
    root: Path, name: str = "home", *, gate: bool = True, plan: str = "", templates: str = "off"
) -> AsyncIterator[SimWorld]:
    """One service; those of one `root` are on one host, and share its gate."""
    parsed = Plan.parse(f"{plan} host={root / 'host'}")
    world = SimWorld(root / name, parsed, root / "gate.lock" if gate else None, templates)
    try:
        yield world
    finally:
        await world.fleet.stop_all()
        await world.ledgers.close()


@dataclass
class Churn:
    """VMs of several services that are suspended and resumed all the time, and what was seen to be wrong with them."""

    anomalies: list[str] = field(default_factory=list)
    cycles: int = 0

    async def run(self, world: SimWorld, name: str, cycles: int) -> None:
        for cycle in range(1, cycles + 1):
            await world.handlers.suspend(name)
            resumed = await world.handlers.resume(name)
            if resumed.boot_kind != "warm":
                self.anomalies.append(f"{name}: {resumed.boot_kind}: {resumed.boot_note}")
            seen = await world.sh(name, "tally t; count n; sync; dmesg")
            if seen != f"{cycle}\n{cycle}\n":
                self.anomalies.append(f"{name}: {seen}")
            if self.anomalies:
                return
            self.cycles += 1


async def churn(root: Path, *, services: int, vms: int, cycles: int, gate: bool) -> Churn:
    """Every VM of every service at once; a first anomaly ends it."""
    result = Churn()
    async with contextlib.AsyncExitStack() as stack:
        worlds = [await stack.enter_async_context(sim_world(root, f"home{n}", gate=gate)) for n in range(services)]
        pairs = [(world, f"vm{number}") for world in worlds for number in range(vms)]
        await asyncio.gather(*(world.create(name) for world, name in pairs))
        await asyncio.gather(*(result.run(world, name, cycles) for world, name in pairs))
    return result
