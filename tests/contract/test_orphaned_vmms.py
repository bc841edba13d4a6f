"""A VMM that outlives its supervisor by a moment, as one that was killed does: until it is gone, the VM has not ended."""

from __future__ import annotations

import asyncio
import fcntl
import subprocess
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from capsem.api.vm_types import ForkRequest, ProvisionRequest
from capsem.store import orphans
from capsem.store.locks import holders
from capsem.system.real import RealProcesses
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


def test_who_only_looks_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As `is_locked` does, which has the lock for an instant: it may have gone, and be there again, when it is looked for."""
    path = tmp_path / "vmm.lock"

    class Unkilled(RealProcesses):
        def signal(self, pid: int, number: int) -> None:
            raise AssertionError(f"process {pid} was to be killed")

    def look() -> subprocess.Popen[bytes]:
        with path.open("wb") as file:
            fcntl.flock(file, fcntl.LOCK_SH)
            return subprocess.Popen(["sleep", "600"], pass_fds=[file.fileno()])

    lookers = [look()]

    def found(path: Path) -> list[int]:
        pids = holders(path)
        lookers[-1].kill()
        lookers[-1].wait()
        if len(lookers) == 1:
            lookers.append(look())
        return pids

    monkeypatch.setattr(orphans, "holders", found)
    lock = asyncio.run(orphans.take_from_orphan(Unkilled(), path))
    assert lock is not None
    lock.release()
    assert len(lookers) == 2
