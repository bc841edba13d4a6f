"""The simulated driver keeps the contract of drivers, with its hazard and without."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import driver_cases
from capsem.control.guest import Guest, Identity, Restored
from capsem.hypervisor.driver import Accelerator, Layer, MachineSpec
from capsem.hypervisor.sim.driver import SimDriver
from capsem.hypervisor.sim.machine import SimMachine
from capsem.hypervisor.sim.plan import Plan
from capsem.system.real import RealClock, RealEntropy, real_system
from capsem.wire.messages import STDOUT, Exec
from driver_cases import Case


class Peer:
    """The real host end of the control channel."""

    def __init__(self, guest: Guest) -> None:
        self.guest = guest
        self._jobs = 0

    async def ready(self) -> None:
        await self.guest.wait_ready(10)

    async def ask(self) -> int:
        await self.ready()
        job = RealEntropy().token_bytes(8).hex()
        stream = self.guest.execute(Exec(job=job, command="tally n"))
        data = await stream.read(STDOUT)
        await stream.result()
        return int(data)

    async def power_off(self) -> None:
        self.guest.power_off(1.0)

    async def is_silent(self) -> bool:
        before = self.guest.is_ready, self.guest.boot_id
        await asyncio.sleep(0.1)
        return (self.guest.is_ready, self.guest.boot_id) == before

    def close(self) -> None:
        self.guest.channel.hang_up()


class Rig:
    def __init__(self, root: Path, plan: Plan) -> None:
        self.root = root
        self.driver = SimDriver(real_system(), replace(plan, host=root / "host"))
        (root / "base.img").touch()

    def layer(self, name: str) -> Layer:
        path = self.root / name
        if not path.exists():
            self.driver.create_layer(path, size_mb=16, vm_id="box", layer_id=driver_cases.ID)
        return Layer(path, "qcow2")

    def spec(self, **changes: Any) -> MachineSpec:
        spec = MachineSpec(
            vm_id="box",
            cpus=1,
            ram_mb=64,
            accelerator=Accelerator.TCG,
            kernel=self.root / "kernel",
            initrd=self.root / "initrd",
            root=self.root / "root",
            volume=(Layer(self.root / "base.img", "raw"), self.layer("top.qcow2")),
            ram_file=self.root / "ram",
        )
        return replace(spec, **changes)

    async def peer(self, machine: SimMachine, source: Peer | None = None) -> Peer:
        before = None
        if source is not None:
            before = Restored(source.guest.epoch, source.guest.next_nonce, None)
        guest = Guest(Identity("box", "box", {}), RealClock(), RealEntropy(), before)
        await real_system().network.attach(machine.console, asyncio.Protocol)
        await real_system().network.attach(machine.control, lambda: guest.channel)
        return Peer(guest)


@pytest.mark.parametrize("tolerant", [True, False], ids=["tolerant", "hazard"])
@pytest.mark.parametrize("case", driver_cases.CASES, ids=lambda case: case.__name__)
def test_driver_contract(case: Case, tmp_path: Path, *, tolerant: bool) -> None:
    async def run() -> None:
        async with asyncio.timeout(driver_cases.LIMIT):
            await case(Rig(tmp_path, Plan(tolerant=tolerant)))  # type: ignore[arg-type]

    asyncio.run(run())
