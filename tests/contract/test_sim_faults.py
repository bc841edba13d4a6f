"""Every fault that the simulated driver can be told to make, once each: it strikes, and nothing acknowledged is lost."""

from __future__ import annotations

import asyncio
import errno
import os
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
from sim_world import SimWorld, sim_world

from capsem import faults
from capsem.api.checkpoint_types import CheckpointRequest
from capsem.api.file_types import ReadFileRequest, WriteFileRequest
from capsem.api.vm_types import ResumeRequest
from capsem.hypervisor.sim import plan
from capsem.hypervisor.sim.plan import FAULTS
from capsem.model.errors import CapsemError, MachineFailed
from capsem.model.vm import VmRecord
from capsem.service import lifecycle
from capsem.store import records
from capsem.store.layout import SessionDir

Scene = Callable[[SimWorld], Awaitable[None]]


def play(root: Path, planned: str, scene: Scene) -> None:
    async def run() -> None:
        async with asyncio.timeout(60), sim_world(root, plan=planned) as world:
            await scene(world)
            struck = [fault for fault in FAULTS if f"{fault}@" in planned]
            for fault in struck:
                wanted = int(planned.split(f"{fault}@")[1].split()[0])
                assert (root / "host" / f"count-{fault}").stat().st_size >= wanted, f"{fault} never struck"

    asyncio.run(run())


async def begin(world: SimWorld) -> None:
    """A VM with something in memory, on disk, and in the page cache."""
    await world.create("box")
    assert await world.sh("box", "tally t; echo kept > kept; sync; echo cached > cached") == "1\n"


async def check(world: SimWorld, *, warm: bool) -> None:
    assert await world.sh("box", "cat kept") == "kept\n"
    if warm:
        assert await world.sh("box", "tally t; cat cached") == "2\ncached\n"


@pytest.mark.parametrize("fault", [plan.SAVE_FAILS, plan.SAVE_FULL])
def test_a_save_that_fails_leaves_the_vm_running_and_the_next_is_good(tmp_path: Path, fault: str) -> None:
    async def scene(world: SimWorld) -> None:
        await begin(world)
        with pytest.raises(MachineFailed, match=r"could not be saved"):
            await world.handlers.suspend("box")
        assert (await world.handlers.info("box")).status == "Running"
        await world.handlers.suspend("box")
        assert (await world.handlers.resume("box")).boot_kind == "warm"
        await check(world, warm=True)

    play(tmp_path, f"{fault}@1", scene)


@pytest.mark.parametrize("fault", [plan.SAVE_FAILS, plan.SAVE_FULL])
def test_a_checkpoint_that_fails_is_not_there(tmp_path: Path, fault: str) -> None:
    async def scene(world: SimWorld) -> None:
        await begin(world)
        with pytest.raises(CapsemError):
            await world.handlers.checkpoint("box", CheckpointRequest())
        assert (await world.handlers.checkpoints("box", hidden=True)).checkpoints == []
        await check(world, warm=True)

    play(tmp_path, f"{fault}@1", scene)


def test_a_save_that_cannot_say_that_it_failed_leaves_no_layer_in_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = False

    def named(step: str, _vmm: int) -> None:
        nonlocal full
        if step == "checkpoint.named":
            full = True
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def write(session: SessionDir, record: VmRecord, *, lasting: bool = True) -> None:
        nonlocal full
        if full:
            full = False
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        records_write(session, record, lasting=lasting)

    records_write = records.write
    monkeypatch.setattr(records, "write", write)

    async def scene(world: SimWorld) -> None:
        await begin(world)
        faults.install(named)
        with pytest.raises(MachineFailed, match="No space"):
            await world.handlers.checkpoint("box", CheckpointRequest())
        faults.install(None)
        await check(world, warm=True)
        await world.handlers.delete("box")
        await world.fleet.cleared()
        assert list(world.layout.layers.iterdir()) == []

    try:
        play(tmp_path, "", scene)
    finally:
        faults.install(None)


@pytest.mark.parametrize("fault", [plan.RESTORE_FAILS, plan.DIES, plan.RESTORE_HANGS])
def test_a_restore_that_fails_is_tried_again(tmp_path: Path, fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lifecycle, "READY_LIMIT", 1.0)

    async def scene(world: SimWorld) -> None:
        await begin(world)
        await world.handlers.suspend("box")
        assert (await world.handlers.resume("box")).boot_kind == "warm"
        await check(world, warm=True)

    play(tmp_path, f"{fault}@{2 if fault == plan.DIES else 1}", scene)  # a boot has a handshake, too


def test_restores_that_always_fail_end_in_a_cold_start_that_says_so(tmp_path: Path) -> None:
    async def scene(world: SimWorld) -> None:
        await begin(world)
        await world.handlers.suspend("box")
        resumed = await world.handlers.resume("box")
        assert resumed.boot_kind == "cold-after-failure"
        assert "simulated fault" in (resumed.boot_note or "")
        await check(world, warm=False)

    play(tmp_path, f"{plan.RESTORE_FAILS}=1", scene)


def test_a_boot_that_fails_says_why_and_the_next_is_good(tmp_path: Path) -> None:
    async def scene(world: SimWorld) -> None:
        with pytest.raises(MachineFailed, match="simulated fault"):
            await world.create("box")
        assert (await world.handlers.resume("box")).boot_kind == "cold"

    play(tmp_path, f"{plan.START_FAILS}@1", scene)


@pytest.mark.parametrize("fault", [plan.CUT, plan.GARBAGE, plan.DUPLICATE, plan.STALE])
@pytest.mark.parametrize("when", [1, 2, 3])
def test_a_broken_wire_is_mended_and_nothing_runs_twice(tmp_path: Path, fault: str, when: int) -> None:
    """What was under way may be lost, which its client is told; what was acknowledged is not, nor is anything repeated."""

    async def scene(world: SimWorld) -> None:
        await world.create("box")
        asked = answered = 0
        for _ in range(6):
            asked += 1
            try:
                await world.sh("box", "count n; sync")
            except CapsemError:
                continue
            answered += 1
        await world.handlers.suspend("box")
        await world.handlers.resume("box")
        assert answered <= int(await world.sh("box", "cat n")) <= asked
        await world.handlers.stop("box")
        await world.handlers.resume("box")
        assert answered <= int(await world.sh("box", "cat n")) <= asked

    play(tmp_path, f"{fault}@{when}", scene)


def test_a_full_disk_stops_the_machine_until_there_is_room(tmp_path: Path) -> None:
    async def scene(world: SimWorld) -> None:
        await world.create("box")
        await world.handlers.write_file("box", WriteFileRequest(path="f", content="all of it"))
        read = await world.handlers.read_file("box", ReadFileRequest(path="f"))
        assert read.content == "all of it"
        await world.handlers.stop("box")
        await world.handlers.resume("box")
        assert (await world.handlers.read_file("box", ReadFileRequest(path="f"))).content == "all of it"

    play(tmp_path, f"{plan.DISK_FULL}@1", scene)


def test_a_flush_that_is_slow_is_not_waited_for_and_the_suspend_says_so(tmp_path: Path) -> None:
    async def scene(world: SimWorld) -> None:
        await world.create("box")
        await world.sh("box", "echo cached > cached; tally t")
        suspended = await world.handlers.suspend("box")
        assert not suspended.synced
        assert (await world.handlers.resume("box")).boot_kind == "warm"
        assert await world.sh("box", "cat cached; tally t") == "cached\n2\n"

    play(tmp_path, f"{plan.SLOW_FSYNC}@1", scene)


def test_what_a_lying_disk_took_is_in_a_checkpoint_and_lost_with_a_crash(tmp_path: Path) -> None:
    """The one fault against which nobody above can do anything: tests must be able to tell that they would see it."""

    async def scene(world: SimWorld) -> None:
        await world.create("box")
        await world.handlers.write_file("box", WriteFileRequest(path="saved", content="x"))
        await world.handlers.suspend("box")
        await world.handlers.resume("box", ResumeRequest(cold=True))
        assert await world.sh("box", "cat saved") == "x"
        await world.handlers.write_file("box", WriteFileRequest(path="lost", content="x"))
        await world.handlers.stop("box")
        await world.handlers.resume("box")
        assert "No such file" in await world.sh("box", "cat lost")

    play(tmp_path, f"{plan.LYING_FSYNC}=1", scene)
