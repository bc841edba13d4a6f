"""A service without its HTTP face, with supervisors as tasks and guests as processes (process_machine)."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

from capsem.config import load
from capsem.service.create import Maker
from capsem.service.fleet import Fleet
from capsem.service.gate import Gate
from capsem.service.handlers import Handlers
from capsem.service.launch import Launcher
from capsem.service.ledgers import Ledgers
from capsem.service.spares import Spares
from capsem.simulation.world import OneImage
from capsem.store.layout import Layout
from process_machine import InProcess, ProcessDriver


class World:
    """A service, and the directory and processes that outlive it."""

    def __init__(self, directory: Path, limit: int = 10) -> None:
        self.layout = Layout(directory / "run")
        self.layout.create()
        self.driver = ProcessDriver()
        self.processes = InProcess(self.driver)
        self.catalog = OneImage(directory)
        self.loop = asyncio.get_running_loop()
        self.spares: Spares | None = None
        self.start(limit)

    async def restart(self) -> None:
        """The service is gone without a word: its connections drop, its supervisors live. Another one starts."""
        self.fleet.leave_all()
        await self.ledgers.close()
        self.start()
        await self.fleet.reconcile()

    def start(self, limit: int = 10) -> None:
        """A service as it comes up: nothing in memory yet."""
        self.fleet = Fleet(self.processes.system, self.layout, limit)
        self.ledgers = Ledgers(self.fleet, self.layout.run_dir.parent / "sessions" / "main.db")
        launcher = Launcher(
            self.processes.system, self.layout, {}, Path("capsem-process"), "process", spares=self.spares
        )
        features, system = self.driver.features, self.processes.system
        gate = Gate(system.clock, overlap=features.transitions_overlap, path=self.layout.run_dir / "gate.lock")
        maker = Maker(self.fleet, self.driver, self.catalog, launcher, gate)  # type: ignore[arg-type]
        home = {"CAPSEM_HOME": str(self.layout.run_dir)}
        settings = load({**home, "CAPSEM_TEMPLATES": "off"})
        self.handlers = Handlers(self.fleet, maker, settings, home, self.ledgers)


@contextlib.asynccontextmanager
async def world(directory: Path, limit: int = 10) -> AsyncIterator[World]:
    it = World(directory, limit)
    try:
        yield it
    finally:
        await it.fleet.stop_all()
        await it.ledgers.close()


def play(directory: Path, scene: Callable[[World], Awaitable[None]], limit: int = 10) -> None:
    async def run() -> None:
        async with world(directory, limit) as it:
            await scene(it)
            await asyncio.sleep(0)

    asyncio.run(run())


async def status(it: World) -> dict[str, str]:
    return {info.id: info.status for info in (await it.handlers.list()).sandboxes}
