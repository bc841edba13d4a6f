"""Templates: made once for a size, forked by every VM of it, replaced, bounded, and nobody's."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
from sim_world import RAM_MB, SimWorld, sim_world

from capsem.api.exec_types import ExecRequest, RunRequest
from capsem.api.vm_types import PrepareRequest, PrepareResponse, ProvisionRequest
from capsem.config import Settings
from capsem.model.checkpoint import Checkpoint, Kind
from capsem.model.errors import CapsemError, NotFound
from capsem.service import templates
from capsem.service.gate import VISIT, Visit


def play(root: Path, scene: Callable[[SimWorld], Awaitable[None]], plan: str = "") -> None:
    async def run() -> None:
        async with asyncio.timeout(60), sim_world(root, plan=plan, templates="on") as world:
            await scene(world)

    asyncio.run(run())


def made(world: SimWorld) -> list[Checkpoint]:
    return [each for each in world.fleet.checkpoints.all() if each.kind == Kind.TEMPLATE]


async def create(world: SimWorld, name: str, **more: object) -> str | None:
    request = ProvisionRequest(name=name, **{"ram_mb": RAM_MB, "cpus": 1, **more})  # type: ignore[arg-type]
    return (await world.handlers.provision(request)).boot_kind


def test_those_who_come_first_wait_for_the_same_one(tmp_path: Path) -> None:
    async def scene(world: SimWorld) -> None:
        names = ["a", "b", "c"]
        assert (
            await asyncio.gather(*(create(world, name, persistent=name != "b") for name in names)) == ["template"] * 3
        )
        [template] = made(world)
        listed = (await world.handlers.list()).sandboxes
        assert sorted(each.id for each in listed) == names
        assert {each.started_from for each in listed} == {"template"}
        assert {each.forked_from for each in listed} == {None}
        assert {(await world.sh(name, "echo here")) for name in names} == {"here\n"}
        assert (await world.handlers.jobs("a")).details[0].command == "echo here"
        assert await create(world, "d") == "template"
        assert made(world) == [template]
        ended = await world.handlers.run(RunRequest(command="exit 3", ram_mb=RAM_MB, cpus=1))
        assert ended.exit_code == 3

    play(tmp_path, scene)


def test_what_becomes_of_its_forks_is_their_own_affair(tmp_path: Path) -> None:
    async def scene(world: SimWorld) -> None:
        await create(world, "box", persistent=True)
        await world.sh("box", "echo 1 >file; sync")
        [template] = made(world)
        await world.handlers.suspend("box")
        assert (await world.handlers.resume("box")).boot_kind == "warm"
        assert (await world.handlers.checkpoints("box")).checkpoints == []
        await world.handlers.delete("box")
        assert made(world) == [template]
        world.fleet.checkpoints.open(template.id)
        await world.fleet.cleared()
        assert sorted(path.stem for path in world.layout.layers.glob("*.qcow2")) == sorted(template.layer_ids)
        assert await create(world, "box") == "template"

    play(tmp_path, scene)


def test_there_are_a_few_and_the_one_used_longest_ago_goes(tmp_path: Path) -> None:
    async def scene(world: SimWorld) -> None:
        for number in range(templates.KEPT):
            await create(world, f"vm{number}", ram_mb=256 + number)
        await world.handlers.delete("vm1")
        await create(world, "again", ram_mb=256)  # the oldest, but used
        await create(world, "more", ram_mb=1024)
        assert sorted(each.ram_mb for each in made(world)) == [256, 258, 259, 1024]
        await create(world, "most", ram_mb=2048)  # now vm2 runs on the one that should go
        assert sorted(each.ram_mb for each in made(world)) == [256, 258, 259, 1024, 2048]

    play(tmp_path, scene)


def test_one_can_be_ordered_ahead(tmp_path: Path) -> None:
    async def scene(world: SimWorld) -> None:
        order = PrepareRequest(ram_mb=RAM_MB, cpus=1)
        assert await world.handlers.prepare(order) == PrepareResponse(ready=False, making=True)
        while not made(world):
            await asyncio.sleep(0.005)
        assert await world.handlers.prepare(order) == PrepareResponse(ready=True, making=False)
        [template] = made(world)
        assert await create(world, "box") == "template"
        assert made(world) == [template]
        with pytest.raises(NotFound):
            await world.handlers.prepare(PrepareRequest(profile="nowhere"))
        world.handlers._configure(Settings({**world.handlers.settings.values, "vm.templates": "off"}))
        assert await world.handlers.prepare(order) == PrepareResponse(ready=False, making=False)

    play(tmp_path, scene)


def test_who_asked_first_may_go_away(tmp_path: Path) -> None:
    """The template waits at the gate when its client hangs up; others want it too."""

    async def scene(world: SimWorld) -> None:
        busy = await create(world, "busy", cold=True)
        assert busy == "cold"
        visit = Visit()
        async with world.gate.change(world.fleet.get("busy"), "suspend"):
            VISIT.set(visit)
            first = asyncio.create_task(create(world, "first"))
            VISIT.set(None)
            while not any(vm.waiting for vm in world.fleet.known()):
                await asyncio.sleep(0)
            second = asyncio.create_task(create(world, "second"))
            visit.leave()
            for _ in range(20):  # turns of the event loop, in which whoever notices would give up
                await asyncio.sleep(0)
        assert await second == "template"
        await asyncio.gather(first, return_exceptions=True)

    play(tmp_path, scene)


def test_another_image_has_another(tmp_path: Path) -> None:
    async def scene(world: SimWorld) -> None:
        await create(world, "before")
        await world.handlers.delete("before")
        world.catalog.image.digest = "f" * 64
        assert await create(world, "after") == "template"
        assert [each.image_digest for each in made(world)] == ["f" * 64]

    play(tmp_path, scene)


def test_cold_means_cold(tmp_path: Path) -> None:
    async def scene(world: SimWorld) -> None:
        assert await create(world, "box", cold=True) == "cold"
        assert made(world) == []
        assert (await world.handlers.info("box")).started_from == "disk"

    play(tmp_path, scene)


def test_one_that_cannot_be_saved_costs_time_alone(tmp_path: Path) -> None:
    """The VM boots; nothing is left of the attempt."""

    async def scene(world: SimWorld) -> None:
        assert await create(world, "box") == "cold"
        assert made(world) == []
        assert [vm.id for vm in world.fleet.known()] == ["box"]
        await world.fleet.cleared()
        assert len(list(world.layout.layers.glob("*.qcow2"))) == 1
        assert list(world.layout.checkpoints.iterdir()) == []

    play(tmp_path, scene, plan="save-fails=1.0")


def test_it_can_be_neither_seen_nor_touched_while_it_is_made(tmp_path: Path) -> None:
    async def scene(world: SimWorld) -> None:
        creating = asyncio.create_task(create(world, "box"))
        while not (hidden := [vm.id for vm in world.fleet.known()]):
            await asyncio.sleep(0)
        assert hidden[0].startswith("template-")
        assert (await world.handlers.list()).sandboxes == []
        with pytest.raises(CapsemError, match=r"no VM|not found|unknown"):
            await world.handlers.execute(hidden[0], ExecRequest(command="true"))
        with pytest.raises(CapsemError):
            await world.handlers.delete(hidden[0])
        assert await creating == "template"
        assert [row["name"] for row in await world.ledgers.index()] == ["box"]  # it counts for nobody

    play(tmp_path, scene)
