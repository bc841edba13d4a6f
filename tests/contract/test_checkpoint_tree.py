"""What people see of a VM's checkpoints: whence each came, where the VM is, and why one may not go yet."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest
from sim_world import SimWorld, sim_world

from capsem.api.checkpoint_types import CheckpointInfo, CheckpointRequest, OneCheckpointRequest, RollbackRequest
from capsem.api.vm_types import ForkRequest
from capsem.model.errors import NotFound, WrongState

Scene = Callable[[SimWorld], Awaitable[None]]


def play(root: Path, scene: Scene) -> None:
    async def run() -> None:
        async with sim_world(root) as world:
            await world.create("box")
            await scene(world)

    asyncio.run(run())


async def checkpoint(world: SimWorld, name: str = "box") -> str:
    return (await world.handlers.checkpoint(name, CheckpointRequest())).id


async def tree(world: SimWorld, name: str = "box") -> dict[str, CheckpointInfo]:
    return {each.id: each for each in (await world.handlers.checkpoints(name)).checkpoints}


async def go_to_sleep_and_back(world: SimWorld) -> None:
    await world.handlers.suspend("box")
    await world.handlers.resume("box")


def test_a_suspend_in_between_does_not_cut_the_tree(tmp_path: Path) -> None:
    async def scene(world: SimWorld) -> None:
        first = await checkpoint(world)
        for _ in range(2):
            await go_to_sleep_and_back(world)
        assert (await tree(world))[first].current, "that is where it came from last, as far as anybody sees"
        second = await checkpoint(world)
        found = await tree(world)
        assert found[second].parent == first
        assert [each for each, it in found.items() if it.current] == [second]

    play(tmp_path, scene)


def test_nor_does_a_live_fork(tmp_path: Path) -> None:
    async def scene(world: SimWorld) -> None:
        first = await checkpoint(world)
        await world.handlers.fork("box", ForkRequest(name="twin", live=True))
        await world.handlers.delete("twin")
        second = await checkpoint(world)
        assert (await tree(world))[second].parent == first

    play(tmp_path, scene)


def test_a_suspend_that_a_rollback_has_kept_stands_in_the_tree(tmp_path: Path) -> None:
    async def scene(world: SimWorld) -> None:
        first = await checkpoint(world)
        await world.handlers.suspend("box")
        kept = (await world.handlers.rollback("box", RollbackRequest(checkpoint=first))).saved
        assert kept is not None
        assert (await tree(world))[kept].parent == first
        await world.handlers.rollback("box", RollbackRequest(checkpoint=kept))
        assert (await tree(world))[kept].current
        await world.handlers.resume("box")
        last = await checkpoint(world)
        assert (await tree(world))[last].parent == kept

    play(tmp_path, scene)


async def refused(world: SimWorld, checkpoint: str) -> WrongState:
    with pytest.raises(WrongState) as error:
        await world.handlers.remove_checkpoint("box", OneCheckpointRequest(checkpoint=checkpoint))
    return error.value


def test_what_is_needed_says_by_whom_and_what_would_help(tmp_path: Path) -> None:
    async def scene(world: SimWorld) -> None:
        first = await checkpoint(world)
        with world.fleet.pinned(first):
            error = await refused(world, first)
        assert "is being read" in error.message
        assert error.hint == "try again when that is done"
        await world.handlers.rollback("box", RollbackRequest(checkpoint=first, save=False))
        assert "suspend or stop that VM first" in ((await refused(world, first)).hint or "")
        await go_to_sleep_and_back(world)
        await world.handlers.suspend("box")
        await world.handlers.rollback("box", RollbackRequest(checkpoint=first, save=False))
        error = await refused(world, first)
        assert "box came from last" in error.message
        assert "resume, and then suspend or stop, that VM first" in (error.hint or ""), "it cannot be stopped"
        await world.handlers.resume("box")
        await world.handlers.suspend("box")
        await world.handlers.remove_checkpoint("box", OneCheckpointRequest(checkpoint=first))

    play(tmp_path, scene)


def test_a_checkpoint_without_memory_says_what_it_is_good_for(tmp_path: Path) -> None:
    async def scene(world: SimWorld) -> None:
        first = await checkpoint(world)
        await world.handlers.stop("box")
        disk = (await world.handlers.rollback("box", RollbackRequest(checkpoint=first))).saved
        assert disk is not None
        with pytest.raises(WrongState) as error:
            await world.handlers.fork("box", ForkRequest(name="twin", live=True, checkpoint=disk))
        assert f"capsem fork --cold --at {disk[:12]}" in (error.value.hint or "")
        await world.handlers.resume("box")
        back = await world.handlers.rollback("box", RollbackRequest(checkpoint=disk))
        assert (back.boot_kind, back.boot_note) == ("cold", "the checkpoint holds no memory")

    play(tmp_path, scene)


def test_a_new_vm_has_nothing_of_an_earlier_one_of_its_name(tmp_path: Path) -> None:
    async def scene(world: SimWorld) -> None:
        first = await checkpoint(world)
        await world.handlers.fork("box", ForkRequest(name="kid", live=True, checkpoint=first))
        await world.handlers.delete("box")
        await world.create("box")
        assert await tree(world) == {}
        with pytest.raises(NotFound):
            await world.handlers.rollback("box", RollbackRequest(checkpoint=first))
        await world.handlers.delete("kid")
        assert not world.fleet.checkpoints.is_committed(first), "nobody needs it any more"
        second = await checkpoint(world)
        assert set(await tree(world)) == {second}

    play(tmp_path, scene)


def test_an_imported_vm_that_has_its_origins_name_is_a_fork(tmp_path: Path) -> None:
    async def scene(world: SimWorld) -> None:
        first = await checkpoint(world)
        exported = b"".join([data async for data in await world.handlers.export_checkpoint("box", first)])
        await world.handlers.delete("box")

        async def body() -> AsyncIterator[bytes]:
            yield exported

        await world.handlers.import_checkpoint("box", body(), trust=True)
        assert (await world.handlers.resume("box")).boot_kind == "forked"
        await world.handlers.suspend("box")
        assert (await world.handlers.resume("box")).boot_kind == "warm"

    play(tmp_path, scene)
