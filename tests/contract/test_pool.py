"""The pool: VMs that wait, nobody's until somebody creates one; filled behind him, drained when the host runs short."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path

import pytest
from sim_world import RAM_MB, SimWorld, sim_world

from capsem.api.ledger_types import HistoryQuery
from capsem.api.vm_types import ProvisionRequest, ProvisionResponse, VmPolicy
from capsem.config import Settings
from capsem.model.errors import AlreadyExists, CapsemError
from capsem.service import pool
from capsem.service.memory import HostMemory
from capsem.store import records

PLENTY = HostMemory(total=1000, available=500)


def configure(world: SimWorld, **values: object) -> None:
    world.handlers._configure(Settings({**world.handlers.settings.values, **values}))


@pytest.fixture
def play(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Runs a scene in a world whose pool is to hold `size` VMs, and holds them."""
    monkeypatch.setattr(pool, "PAUSE", 0.0)
    monkeypatch.setattr(pool, "LOOK", 0.01)

    def run(scene: Callable[[SimWorld], Awaitable[None]], size: int = 1, plan: str = "") -> None:
        async def main() -> None:
            async with asyncio.timeout(60), sim_world(tmp_path, plan=plan, templates="on") as world:
                world.handlers.pool._memory = lambda: PLENTY
                configure(
                    world,
                    **{
                        "pool.size": size,
                        "vm.resources.ram_gb": RAM_MB / 1024,
                        "vm.resources.cpu_count": 1,
                    },
                )
                world.handlers.pool.begin()
                await ready(world, size)
                await scene(world)
                await world.handlers.pool.close()

        asyncio.run(main())

    return run


async def until(condition: Callable[[], object]) -> None:
    while not condition():
        await asyncio.sleep(0.005)


def members(world: SimWorld) -> list[str]:
    return [vm.id for vm in world.handlers.pool._members]


async def ready(world: SimWorld, count: int) -> None:
    await until(lambda: len(members(world)) == count)


async def create(world: SimWorld, name: str, **more: object) -> ProvisionResponse:
    return await world.handlers.provision(ProvisionRequest(name=name, **more))  # type: ignore[arg-type]


def test_a_create_takes_one_and_another_one_comes(play: Callable[..., None]) -> None:
    async def scene(world: SimWorld) -> None:
        [waiting] = members(world)
        pid = world.fleet._vms[waiting].pid
        answer = await create(world, "box", persistent=True, env={"WHO": "me"}, policy=VmPolicy(idle_secs=900))
        assert (answer.id, answer.boot_kind) == ("box", "pool")
        assert Path(answer.uds_path).exists()
        info = await world.handlers.info("box")
        assert (info.pid, info.started_from, info.persistent) == (pid, "pool", True)
        assert info.policy is not None
        assert info.policy.idle_secs == 900
        assert world.layout.ready_file("box").exists()
        assert await world.sh("box", "hostname; echo $WHO") == "box\nme\n"
        assert [job.command for job in (await world.handlers.jobs("box")).details] == ["hostname; echo $WHO"]
        commands = (await world.handlers.observation.history("box", HistoryQuery())).commands
        assert [each.command for each in commands] == ["hostname; echo $WHO"]
        session = world.layout.session("box", persistent=True)
        assert records.read(session).spec.env == {"WHO": "me"}
        await ready(world, 1)
        assert members(world) != [waiting]
        # It is a VM like any other: saved, and brought back with what it was told.
        await world.handlers.suspend("box")
        assert (await world.handlers.resume("box")).boot_kind == "warm"
        assert await world.sh("box", "hostname; echo $WHO") == "box\nme\n"

    play(scene)


def test_until_then_it_is_nobodys(play: Callable[..., None]) -> None:
    async def scene(world: SimWorld) -> None:
        world.fleet.limit = 1
        assert (await world.handlers.list()).sandboxes == []
        for name in members(world):
            with pytest.raises(CapsemError, match="no VM"):
                await world.handlers.info(name)
            with pytest.raises(AlreadyExists):
                await create(world, name)
        found = (await world.handlers.df()).pool
        assert found is not None
        assert (found.wanted, found.ready, found.short) == (2, 2, False)
        assert await world.ledgers.index() == []
        assert (await create(world, "box")).boot_kind == "pool"
        assert [row["name"] for row in await world.ledgers.index()] == ["box"]
        with pytest.raises(CapsemError, match="maximum is 1"):
            await create(world, "more")

    play(scene, size=2)


def test_what_it_does_not_have_is_forked_or_booted(play: Callable[..., None]) -> None:
    async def scene(world: SimWorld) -> None:
        assert (await create(world, "larger", ram_mb=512)).boot_kind == "template"
        assert (await create(world, "booted", cold=True)).boot_kind == "cold"
        more = dict.fromkeys((f"V{number}" for number in range(3)), "x" * (pool.ENV_LIMIT // 3))
        assert (await create(world, "told", env=more)).boot_kind == "template"
        assert len(members(world)) == 1

    play(scene)


def test_one_that_ends_is_replaced(play: Callable[..., None]) -> None:
    async def scene(world: SimWorld) -> None:
        [waiting] = members(world)
        vm = world.fleet._vms[waiting]
        vm.terminate(9)
        await vm.ended(10)
        await until(lambda: members(world) not in ([], [waiting]))
        assert not world.layout.session(waiting, persistent=False).path.exists()
        assert list(world.layout.sessions.glob("*-failed-*")) == []

    play(scene)


def test_another_image_another_size_and_none(play: Callable[..., None]) -> None:
    async def scene(world: SimWorld) -> None:
        [waiting] = members(world)
        world.catalog.image.digest = "f" * 64
        assert (await create(world, "box")).boot_kind == "template"  # nobody is given what is out of date
        await until(lambda: members(world) not in ([], [waiting]))
        configure(world, **{"vm.resources.ram_gb": 0.5})
        await until(lambda: [vm.record.spec.ram_mb for vm in world.handlers.pool._members] == [512])
        configure(world, **{"pool.size": 0})
        await ready(world, 0)
        assert (await world.handlers.df()).pool is None
        await until(lambda: [vm.id for vm in world.fleet.known()] == ["box"])

    play(scene)


def test_a_host_that_runs_short_has_none(play: Callable[..., None]) -> None:
    async def scene(world: SimWorld) -> None:
        of = world.handlers.pool
        of._memory = lambda: replace_available(90)
        await ready(world, 0)
        found = (await world.handlers.df()).pool
        assert found is not None
        assert (found.wanted, found.ready, found.short) == (2, 0, True)
        looks = iter(range(1000))
        of._memory = lambda: (next(looks), replace_available(120))[1]
        await until(lambda: next(looks) > 20)
        assert members(world) == []  # a little more is not enough to begin anew
        of._memory = lambda: PLENTY
        await ready(world, 2)

    play(scene, size=2)


def replace_available(available: int) -> HostMemory:
    return PLENTY._replace(available=available)


def test_one_that_cannot_become_somebody_costs_time_alone(
    play: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scene(world: SimWorld) -> None:
        [waiting] = members(world)
        monkeypatch.setattr(pool, "ASSIGN_LIMIT", 0.0)
        configure(world, **{"pool.size": 0})
        assert (await create(world, "box")).boot_kind == "template"
        await until(lambda: [vm.id for vm in world.fleet.known()] == ["box"])
        assert [path.name for path in world.layout.sessions.iterdir()] == ["box"]
        assert not world.layout.instance_socket(waiting).exists()
        assert await world.sh("box", "hostname") == "box\n"

    play(scene)


def test_one_that_fails_half_way_leaves_nothing_under_the_name(
    play: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its record and its directory have the new name already."""

    async def scene(world: SimWorld) -> None:
        taken = world.processes.children[world.fleet._vms[members(world)[0]].pid].supervisor
        monkeypatch.setattr(taken.jobs, "forget_ended", lambda: 1 / 0)
        configure(world, **{"pool.size": 0})
        assert (await create(world, "box", persistent=True)).boot_kind == "template"
        assert [vm.id for vm in world.fleet.known()] == ["box"]
        assert list(world.layout.sessions.iterdir()) == []
        assert len(world.fleet._vms["box"].record.layers) == 2
        assert await world.sh("box", "hostname") == "box\n"

    play(scene)


def test_one_cut_off_between_record_and_directory_is_somebodys(tmp_path: Path) -> None:
    async def scene() -> None:
        async with sim_world(tmp_path) as world:
            await world.create("model")
            like = replace(records.read(world.layout.session("model", persistent=True)), persistent=False)
            left = world.layout.session("pool-0", persistent=False)
            left.path.mkdir()
            records.write(left, replace(like, id="box"))
            other = world.layout.session("pool-1", persistent=False)
            other.path.mkdir()
            records.write(other, replace(like, id="pool-1", pooled=True))
            for session in (left, other):
                vm = world.fleet._found(session)
                assert vm.obstacle is None
                assert vm.session.path.name == vm.id
            assert {vm.id for vm in world.fleet.all()} == {"model", "box"}
            for name in ("box", "pool-1"):
                world.fleet._vms.pop(name)

    asyncio.run(scene())
