"""QEMU keeps the contract of drivers, with the smallest guest there is."""

from __future__ import annotations

import asyncio

import pytest
from qemu_bench import Bench, ask, bench_fixture, hear, is_silent, tell  # noqa: F401

import driver_cases
from capsem.hypervisor.qemu.machine import QemuMachine
from driver_cases import Case

pytestmark = pytest.mark.vm


class Peer:
    """The guest's serial line."""

    def __init__(self, machine: QemuMachine) -> None:
        self._machine = machine

    async def ready(self) -> None:
        assert await hear(self._machine) == b"R"

    async def ask(self) -> int:
        return int(await ask(self._machine))

    async def power_off(self) -> None:
        await tell(self._machine, b"q")

    async def is_silent(self) -> bool:
        return await is_silent(self._machine)

    def close(self) -> None:
        self._machine.control.close()
        self._machine.console.close()


class Rig(Bench):
    """What the tests of the driver have, and ways to speak with a guest."""

    async def peer(self, machine: QemuMachine, source: Peer | None = None) -> Peer:
        return Peer(machine)


@pytest.mark.parametrize("case", driver_cases.CASES, ids=lambda case: case.__name__)
def test_driver_contract(case: Case, bench: Bench) -> None:
    async def run() -> None:
        async with asyncio.timeout(driver_cases.LIMIT):
            await case(Rig(bench.root))  # type: ignore[arg-type]

    asyncio.run(run())
