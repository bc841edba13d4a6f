"""The power goes at every durable operation of a service at work on VMs that do not run. What the next service finds is
the world before or the world after: which VMs there are, their state, and what is on their disks."""

from __future__ import annotations

import asyncio
import json
import os
import random
import shutil
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from disk import LOST, PowerCut, every_cut
from disk import Disk as Plate

from capsem.api.checkpoint_types import OneCheckpointRequest, RollbackRequest
from capsem.api.vm_types import ForkRequest, VmPolicy
from capsem.hypervisor.qemu.driver import QemuDriver
from capsem.model.checkpoint import Kind
from capsem.model.lifecycle import State
from capsem.model.spec import VmSpec
from capsem.model.vm import VmRecord
from capsem.service import members
from capsem.store import durable, records
from capsem.store.checkpoints import CheckpointStore
from capsem.store.layout import Layout
from capsem.system.real import real_system
from checkpoint_files import layout, make, new_id
from layer_files import read_layer, write_layer
from service_world import World

BASE, TOP, PAST, NAP = new_id(11), new_id(12), new_id(1), new_id(2)
DISK_MB = 512

Disk = dict[int, int | None]
Found = dict[str, Any]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is durable is for the simulated disk to say: the real one need not hurry."""
    monkeypatch.setattr(os, "fsync", lambda _fd: None)


class Dice:
    """Ids that are the same in every run, so that what is found can be compared."""

    def __init__(self) -> None:
        self._dice = random.Random(5)

    def token_bytes(self, size: int) -> bytes:
        return self._dice.randbytes(size)

    def choose(self, words: Any) -> Any:
        return self._dice.choice(words)


class Inline(ThreadPoolExecutor):
    """Work for threads is done at once, so that operations have one order."""

    def submit(self, fn: Any, /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        try:
            future.set_result(fn(*args, **kwargs))
        except BaseException as error:  # noqa: BLE001 (a power cut is no Exception)
            future.set_exception(error)
        return future


class AtRest(World):
    """A service with real layers, on VMs that do not run."""

    def start(self, limit: int = 10) -> None:
        qemu = QemuDriver(self.layout.run_dir)
        self.driver.create_layer = qemu.create_layer  # type: ignore[method-assign]
        self.driver.merge_layers = qemu.merge_layers  # type: ignore[method-assign]
        self.processes.system = replace(real_system(), processes=self.processes, entropy=Dice())
        super().start(limit)


def play(root: Path, scene: Callable[[AtRest], Awaitable[Any]]) -> Any:
    async def run() -> Any:
        asyncio.get_running_loop().set_default_executor(Inline())
        it = AtRest(root)
        try:
            await it.fleet.reconcile()
            result = await scene(it)
            await it.fleet.cleared()
            it.fleet.leave_all()
        finally:
            await it.ledgers.close()  # SQLite's own; tests/crash/test_ledger_crash.py
        return result

    return asyncio.run(run())


def vm(where: Layout, name: str, *layers: str, **changes: Any) -> None:
    record = VmRecord(
        id=name, persistent=True, spec=VmSpec(1, 256, DISK_MB), image="default", image_digest="d" * 64, layers=layers,
        created_at=1e9, state=State.STOPPED,
    )  # fmt: skip
    record = replace(record, **changes)
    session = where.session(name, persistent=record.persistent)
    session.path.mkdir()
    records.write(session, record)


def prepare(root: Path) -> None:
    """A VM with a past, and one that is suspended on a disk of which it shares the base."""
    where = layout(root)
    for layer, content in ((BASE, {0: 1, 5: 2}), (TOP, {5: 7, 6: None})):
        write_layer(where.layer(layer), content, size_mb=DISK_MB, layer_id=layer)
    vm(where, "box", BASE, TOP)
    make(CheckpointStore(where), PAST, (BASE,), disk_mb=DISK_MB, memory=None, devices=None, guest=None)
    make(CheckpointStore(where), NAP, (BASE,), vm_id="nap", kind=Kind.SUSPEND)
    vm(where, "nap", BASE, state=State.SUSPENDED, checkpoint=NAP, current=NAP)


def disk(it: World, layers: tuple[str, ...]) -> Disk:
    """What a machine would read; no layer may be missing, or half of one."""
    content: Disk = {}
    for layer in layers:
        content |= read_layer(it.layout.layer(layer))
    return content


async def seen(it: AtRest) -> Found:
    """The world as a service finds it, by meaning: how many layers a disk lies in is nobody's business."""
    found: Found = {}
    for each in it.fleet.known():
        record = each.record
        assert each.obstacle is None, each.obstacle
        found[each.id] = (record.state, disk(it, record.layers), record.checkpoint, record.kept, record.policy)
        if record.state == State.SUSPENDED:
            assert it.fleet.checkpoints.read(record.checkpoint or "").layer_ids == record.layers
    for checkpoint in it.fleet.checkpoints.all():
        it.fleet.checkpoints.verify(checkpoint.id)
        found[checkpoint.id] = (checkpoint.kind, disk(it, checkpoint.layer_ids))
    used = {layer for each in it.fleet.known() for layer in each.layers}
    used |= {layer for each in it.fleet.checkpoints.all() for layer in each.layer_ids}
    assert {path.stem for path in it.layout.layers.iterdir()} == used, "what nobody names is swept"
    assert {path.name for path in it.layout.checkpoints.iterdir()} == {each.id for each in it.fleet.checkpoints.all()}
    homes = [*it.layout.sessions.iterdir(), *it.layout.persistent.iterdir()]
    assert {path.name for path in homes if "-failed-" not in path.name} == {each.id for each in it.fleet.known()}
    assert not list(it.layout.run_dir.rglob(f"{durable.TEMPORARY}*"))
    return found


async def nothing(_it: AtRest) -> None:
    """The service comes up, and that is all."""


def cut(
    tmp_path: Path, scene: Callable[[AtRest], Awaitable[Any]], begin: Callable[[Path], None] = prepare
) -> tuple[Found, Found]:
    """Cut `scene` short everywhere; returns the worlds before and after it."""
    template = tmp_path / "template"
    (template / "sessions").mkdir(parents=True)  # of the ledger
    begin(template)
    worlds, ready = [], 0
    for name, plays in (("before", nothing), ("after", scene)):
        root = Path(shutil.copytree(template, tmp_path / name))
        disk = Plate(root)
        with pytest.MonkeyPatch.context() as patch:
            disk.watch(patch)
            play(root, plays)
        if plays is nothing:
            ready = disk.count
        worlds.append(play(root, seen))
    before, after = worlds
    acknowledged: set[Path] = set()

    def act(root: Path, _made: None) -> None:
        async def acted(it: AtRest) -> None:
            await scene(it)
            await it.fleet.cleared()
            acknowledged.add(root.with_name(f"{root.name}-left"))

        play(root, acted)

    def judge(left: Path, _made: None) -> None:
        found = play(left, seen)
        assert found in (before, after)
        if left in acknowledged:
            assert found == after, "what was acknowledged is lost"
        if left.name.endswith("kept-left"):
            assert play(left, seen) == found, "the service after the next finds the same"

    def copied(root: Path) -> None:
        shutil.copytree(template, root, dirs_exist_ok=True)

    # A service that comes up is cut short in one test, not in all of them.
    assert every_cut(tmp_path, copied, act, judge, torn=1, first=0 if scene is nothing else ready) >= 4
    assert acknowledged
    return before, after


def test_a_new_vm(tmp_path: Path) -> None:
    async def scene(it: AtRest) -> None:
        it.handlers._maker.make("new", VmSpec(1, 256, DISK_MB), persistent=True, profile="default")

    before, after = cut(tmp_path, scene)
    assert set(after) - set(before) == {"new"}


@pytest.mark.parametrize("source", ["box", "nap"])
def test_a_fork(tmp_path: Path, source: str) -> None:
    before, after = cut(tmp_path, lambda it: it.handlers.fork(source, ForkRequest(name="twin")))
    assert after["twin"][1] == before[source][1]


def test_a_fork_from_a_checkpoint(tmp_path: Path) -> None:
    before, after = cut(tmp_path, lambda it: it.handlers.fork("box", ForkRequest(name="twin", checkpoint=PAST)))
    assert after["twin"][1] == before[PAST][1] != before["box"][1]


@pytest.mark.parametrize("doomed", ["box", "nap"])
def test_a_delete(tmp_path: Path, doomed: str) -> None:
    before, after = cut(tmp_path, lambda it: it.handlers.delete(doomed))
    assert set(before) - set(after) == ({"box", PAST} if doomed == "box" else {"nap", NAP})


def test_a_rollback_without_regret(tmp_path: Path) -> None:
    before, after = cut(tmp_path, lambda it: it.handlers.rollback("box", RollbackRequest(checkpoint=PAST, save=False)))
    assert after["box"][1] == before[PAST][1]


def test_a_removed_checkpoint(tmp_path: Path) -> None:
    before, after = cut(
        tmp_path, lambda it: it.handlers.remove_checkpoint("box", OneCheckpointRequest(checkpoint=PAST))
    )
    assert set(before) - set(after) == {PAST}


def test_a_changed_policy(tmp_path: Path) -> None:
    _, after = cut(tmp_path, lambda it: it.handlers.set_policy("box", VmPolicy(idle_secs=60)))
    assert after["box"][4].idle_secs == 60


def test_a_merge_of_layers_changes_nothing_that_anybody_can_read(tmp_path: Path) -> None:
    third, fourth = new_id(13), new_id(14)

    def deep(root: Path) -> None:
        prepare(root)
        where = layout(root)
        for layer, content in ((third, {6: 3, 9: 9}), (fourth, {0: 4})):
            write_layer(where.layer(layer), content, size_mb=DISK_MB, layer_id=layer)
        session = where.session("box", persistent=True)
        records.write(session, replace(records.read(session), layers=(BASE, TOP, third, fourth)))

    async def scene(it: AtRest) -> None:
        it.handlers.flattening._max_depth = 1
        it.handlers.flattening.begin()
        while it.handlers.flattening._tasks:
            results = await asyncio.gather(*it.handlers.flattening._tasks.values(), return_exceptions=True)
            for result in results:
                if isinstance(result, BaseException):
                    raise result
        assert len(it.fleet.get("box").record.layers) < 4
        await it.handlers.flattening.close()

    before, after = cut(tmp_path, scene, deep)
    assert before == after
    assert before["box"][1] == {0: 4, 5: 7, 6: 3, 9: 9}


def test_a_name_for_an_ephemeral_vm(tmp_path: Path) -> None:
    """As its supervisor does it (Changes.persist)."""

    def ephemeral(root: Path) -> None:
        prepare(root)
        write_layer(layout(root).layer(new_id(15)), {1: 1}, size_mb=DISK_MB, layer_id=new_id(15))
        vm(layout(root), "guest", new_id(15), persistent=False, state=State.RUNNING, host_boot_id="another boot")

    def act(root: Path, _made: None) -> None:
        where = layout(root)
        old, new = where.session("guest", persistent=False), where.session("kept", persistent=True)
        records.write(old, replace(records.read(old), id="kept", persistent=True))
        durable.rename(old.path, new.path)
        done.append(root)

    def judge(left: Path, _made: None) -> None:
        names = {name for name in play(left, seen) if len(name) < 32}
        assert names in ({"box", "nap"}, {"box", "nap", "kept"})  # a VM without a name does not outlive its host
        if left.with_name(left.name.removesuffix("-left")) in done:
            assert "kept" in names
        outcomes.add("kept" in names)

    done: list[Path] = []
    outcomes: set[bool] = set()
    assert every_cut(tmp_path, ephemeral, act, judge) >= 6
    assert outcomes == {True, False}


def test_the_checksum_of_a_layer(tmp_path: Path) -> None:
    async def scene(it: AtRest) -> None:
        it.fleet.checkpoints.verify(PAST)

    before, after = cut(tmp_path, scene)
    assert before == after


def test_an_import(tmp_path: Path) -> None:
    stream: list[bytes] = []

    async def export(it: AtRest) -> None:
        stream.extend([piece async for piece in await it.handlers.export_checkpoint("box", PAST)])

    (tmp_path / "source").mkdir()
    prepare(tmp_path / "source")
    play(tmp_path / "source", export)

    async def body() -> AsyncIterator[bytes]:
        for piece in stream:
            yield piece

    before, after = cut(tmp_path, lambda it: it.handlers.import_checkpoint("come", body(), trust=False))
    assert after["come"][1] == before[PAST][1]


def test_a_start_that_finds_a_vm_that_failed(tmp_path: Path) -> None:
    def failed(root: Path) -> None:
        prepare(root)
        write_layer(layout(root).layer(new_id(15)), {1: 1}, size_mb=DISK_MB, layer_id=new_id(15))
        vm(layout(root), "guest", new_id(15), persistent=False, state=State.FAILED)

    before, after = cut(tmp_path, nothing, failed)
    assert before == after


def test_the_index_for_others_is_the_old_or_the_new(tmp_path: Path) -> None:
    def act(root: Path, _made: None) -> None:
        where = layout(root)
        both = [(records.read(each), each.path) for each in records.sessions(where)]
        durable.write(where.registry, records.registry(both))
        durable.write(where.registry, records.registry(both[:1]))

    def judge(left: Path, _made: None) -> None:
        path = layout(left).registry
        if path.exists():
            assert len(json.loads(path.read_bytes())["vms"]) in (1, 2)

    assert every_cut(tmp_path, prepare, act, judge) >= 10


def test_a_cut_is_not_lost_among_tasks(tmp_path: Path) -> None:
    """The test of the test: what `play` runs comes out of it as itself."""

    async def scene(it: AtRest) -> None:
        def work() -> None:
            raise PowerCut

        await asyncio.to_thread(work)

    with pytest.raises(PowerCut):
        play(tmp_path, scene)
    assert members.FAILED_KEPT > 1


def lost_power_after(tmp_path: Path, scene: Callable[[AtRest], Awaitable[Any]]) -> tuple[Found, Found]:
    """What a service sees after `scene`, of a VM whose VMM was killed with writes that no disk had yet; and what the next one
    sees after a power cut that takes all of which nobody has said that it must be durable."""
    root = tmp_path / "root"
    (root / "sessions").mkdir(parents=True)
    where = layout(root)
    for layer in (BASE, TOP):
        write_layer(where.layer(layer), {0: 1}, size_mb=DISK_MB, layer_id=layer)
    vm(where, "box", BASE, TOP, state=State.FAILED)
    make(CheckpointStore(where), PAST, (BASE,), disk_mb=DISK_MB, memory=None, devices=None, guest=None)
    plate = Plate(root)
    where.layer(TOP).unlink()
    write_layer(where.layer(TOP), {0: 1, 5: 7}, size_mb=DISK_MB, layer_id=TOP)
    durable.sync_directory(where.layers)
    with pytest.MonkeyPatch.context() as patch:
        plate.watch(patch)
        play(root, scene)
    acknowledged = play(Path(shutil.copytree(root, tmp_path / "acknowledged")), seen)
    return acknowledged, play(plate.after_the_cut(tmp_path / "left", LOST), seen)


def test_a_fork_holds_what_a_killed_vmm_had_written(tmp_path: Path) -> None:
    acknowledged, left = lost_power_after(tmp_path, lambda it: it.handlers.fork("box", ForkRequest(name="twin")))
    assert left["twin"][1] == acknowledged["twin"][1] == {0: 1, 5: 7}


def test_so_does_what_a_rollback_keeps(tmp_path: Path) -> None:
    acknowledged, left = lost_power_after(
        tmp_path, lambda it: it.handlers.rollback("box", RollbackRequest(checkpoint=PAST))
    )
    (kept,) = (key for key in acknowledged if key not in ("box", PAST))
    assert left[kept] == acknowledged[kept] == (Kind.ROLLBACK, {0: 1, 5: 7})
