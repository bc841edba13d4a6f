"""The hazard that the gate is there for: without it operations overlap and guests lose their disks, with it they do not."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
from collections.abc import Awaitable, Callable
from pathlib import Path
from random import Random

import pytest
from sim_world import RAM_MB, SimWorld, churn, sim_world

from capsem import faults
from capsem.api.checkpoint_types import CheckpointRequest, RollbackRequest
from capsem.api.exec_types import RunRequest
from capsem.api.vm_types import ForkRequest
from capsem.model.errors import MachineFailed, NotFound, NotRunning, Unavailable, WrongState

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


def test_no_operation_goes_past_the_gate(tmp_path: Path) -> None:
    """Clients of two services do everything that can be done to a VM, at once: no two operations meet that must not."""

    async def client(world: SimWorld, name: str, random: Random) -> None:
        handlers = world.handlers
        await world.create(name)
        done: list[Callable[[], Awaitable[object]]] = [
            lambda: handlers.suspend(name),
            lambda: handlers.resume(name),
            lambda: handlers.resume(name),
            lambda: handlers.checkpoint(name, CheckpointRequest()),
            lambda: back(world, name),
            lambda: handlers.fork(name, ForkRequest(name=f"{name}-{random.randrange(1 << 30)}", live=True)),
            lambda: handlers.stop(name),
            lambda: handlers.run(RunRequest(command="true", ram_mb=RAM_MB, cpus=1)),
            lambda: world.sh(name, "count n; poweroff"),
            lambda: recreate(world, name),
        ]
        for operation in random.sample(done, len(done)) * 2:
            with contextlib.suppress(
                NotRunning, NotFound, WrongState, Unavailable, MachineFailed
            ):  # a VM that is off, for instance
                await operation()

    async def back(world: SimWorld, name: str) -> None:
        for each in (await world.handlers.checkpoints(name)).checkpoints[:1]:
            await world.handlers.rollback(name, RollbackRequest(checkpoint=each.id))

    async def recreate(world: SimWorld, name: str) -> None:
        await world.handlers.delete(name)
        await world.create(name)

    async def run() -> None:
        async with sim_world(tmp_path, "one") as one, sim_world(tmp_path, "other") as other:
            pairs = [(world, f"vm{number}") for world in (one, other) for number in range(2)]
            await asyncio.gather(*(client(*pair, Random(seed)) for seed, pair in enumerate(pairs)))
        assert [path.read_text() for path in (tmp_path / "host" / "struck").iterdir()] == []

    asyncio.run(run())
