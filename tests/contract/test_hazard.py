"""The hazard that the gate is there for: without it operations overlap and guests lose their disks, with it they do not."""

from __future__ import annotations

import asyncio
import errno
import os
from pathlib import Path

import pytest
from sim_world import churn, sim_world

from capsem import faults
from capsem.model.errors import MachineFailed

CYCLES = 6


@pytest.mark.parametrize(("services", "vms"), [(1, 3), (3, 1)])
def test_with_the_gate_nothing_is_ever_lost(tmp_path: Path, services: int, vms: int) -> None:
    result = asyncio.run(churn(tmp_path, services=services, vms=vms, cycles=CYCLES, gate=True))
    assert result.anomalies == []
    assert result.cycles == services * vms * CYCLES


@pytest.mark.parametrize(("services", "vms"), [(1, 3), (3, 1)])
def test_without_it_the_fingerprint_shows(tmp_path: Path, services: int, vms: int) -> None:
    result = asyncio.run(churn(tmp_path, services=services, vms=vms, cycles=CYCLES, gate=False))
    assert result.anomalies
    consoles = [path.read_text() for path in tmp_path.glob("home*/run/persistent/*/serial.log")]
    assert any("loop: Write error at byte offset" in text for text in consoles)
    assert any("I/O error, dev loop0" in text for text in consoles)


def test_a_save_is_over_when_the_machine_goes_on_after_all(tmp_path: Path) -> None:
    def full(step: str, _vmm: int) -> None:
        if step == "suspend.saved":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    async def run() -> None:
        async with sim_world(tmp_path) as world:
            await asyncio.gather(*(world.create(name) for name in "ab"))
            faults.install(full)
            with pytest.raises(MachineFailed, match="No space"):
                await world.handlers.suspend("a")
            faults.install(None)
            await world.handlers.suspend("b")
            assert (await world.handlers.resume("b")).boot_kind == "warm"

    try:
        asyncio.run(run())
    finally:
        faults.install(None)


def test_a_hypervisor_that_does_not_mind_needs_no_gate(tmp_path: Path) -> None:
    async def run() -> None:
        async with sim_world(tmp_path, gate=False, plan="tolerant") as world:
            await asyncio.gather(*(world.create(name) for name in "abc"))
            await asyncio.gather(*(world.handlers.suspend(name) for name in "abc"))
            resumed = await asyncio.gather(*(world.handlers.resume(name) for name in "abc"))
            assert [each.boot_kind for each in resumed] == ["warm"] * 3

    asyncio.run(run())
