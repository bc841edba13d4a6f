"""A VMM that outlives its supervisor by a moment, as one that was killed does: until it is gone, the VM has not ended."""

from __future__ import annotations

import asyncio
import subprocess
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from capsem.api.vm_types import ForkRequest, ProvisionRequest
from service_world import World, play, status


async def stay(it: World) -> subprocess.Popen[bytes]:
    """Start `box`, whose supervisor ends and leaves that process: it holds the VMM lock, as what still dies does."""
    start, left = it.driver.start, list[subprocess.Popen[bytes]]()

    async def start_and_stay(*arguments: Any, vmm_lock: int) -> Any:
        left.append(subprocess.Popen(["sleep", "600"], pass_fds=[vmm_lock]))
        return await start(*arguments, vmm_lock=vmm_lock)

    it.driver.start = start_and_stay  # type: ignore[method-assign]
    await it.handlers.provision(ProvisionRequest(name="box", persistent=True))
    it.driver.start = start  # type: ignore[method-assign]
    return left[0]


async def kill_machine(it: World) -> None:
    agent = it.driver.machines[0]._process
    assert agent is not None
    agent.kill()


async def ended(it: World) -> None:
    await kill_machine(it)
    assert await it.fleet.get("box").ended(30)


async def delete(it: World) -> None:
    await it.handlers.delete("box")


async def stop(it: World) -> None:
    await it.handlers.stop("box")


async def resume(it: World) -> None:
    await kill_machine(it)
    while not it.fleet.get("box").ending:
        await asyncio.sleep(0)
    await it.handlers.resume("box")


async def fork(it: World) -> None:
    await ended(it)
    await it.handlers.fork("box", ForkRequest(name="child"))


async def take_over(it: World) -> None:
    """It all happens while there is no service."""
    child = it.processes.children[it.fleet.get("box").pid]
    it.fleet.leave_all()
    await kill_machine(it)
    await child.wait()
    await it.restart()
    assert await status(it) == {"box": "Defunct"}


@pytest.mark.parametrize("what", [ended, delete, stop, resume, fork, take_over])
def test_its_vmm_is_gone_before_it_counts_as_ended(tmp_path: Path, what: Callable[[World], Awaitable[None]]) -> None:
    async def scene(it: World) -> None:
        vmm = await stay(it)
        try:
            await what(it)
            assert vmm.poll() == -9
        finally:
            vmm.kill()
            vmm.wait()

    play(tmp_path, scene)
