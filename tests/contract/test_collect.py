"""Which checkpoints and layers a service keeps, and which it removes."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from capsem.api.vm_types import ProvisionRequest
from capsem.model.checkpoint import Kind
from capsem.model.errors import Corrupt
from capsem.model.lifecycle import State
from capsem.model.spec import VmSpec
from capsem.model.vm import VmRecord
from capsem.service import holdings, space
from capsem.service.fleet import Fleet
from capsem.service.vm import Vm
from capsem.store import durable, records
from capsem.store.layout import Layout
from capsem.supervisor.supervisor import Supervisor
from checkpoint_files import add_layer, layout, make, new_id
from service_world import World, play

PATIENCE = 5.0  # seconds for what never comes where a test fails
ID, OTHER, LAYER, TOP = new_id(1), new_id(2), new_id(11), new_id(12)


@pytest.fixture
def where(tmp_path: Path) -> Layout:
    return layout(tmp_path)


@pytest.fixture
def fleet(where: Layout) -> Iterator[Fleet]:
    entropy = SimpleNamespace(token_bytes=bytes)
    clock = SimpleNamespace(boot_id=lambda: "boot", time=lambda: 1e9)
    return Fleet(SimpleNamespace(entropy=entropy, clock=clock), where, 10)  # type: ignore[arg-type]


def add(fleet: Fleet, name: str = "box", **changes: object) -> Vm:
    record = VmRecord(name, True, VmSpec(), "default", "d", (), 1e9, state=State.STOPPED)
    record = replace(record, **changes)  # type: ignore[arg-type]
    session = fleet.layout.session(name, persistent=True)
    session.path.mkdir()
    records.write(session, record)
    for layer in record.layers:
        if not fleet.layout.layer(layer).exists():
            add_layer(fleet.layout, layer)
    return fleet.add(session, record)


def carried_out(fleet: Fleet, work: Callable[[], None]) -> None:
    """A service does this on its event loop, and what is removed goes in the background."""

    async def run() -> None:
        work()
        await fleet.cleared()

    asyncio.run(run())


def remove(fleet: Fleet, vm: Vm) -> None:
    carried_out(fleet, lambda: fleet.remove(vm))


def kept(fleet: Fleet) -> set[str]:
    carried_out(fleet, fleet.collect)
    return {each.id for each in fleet.checkpoints.all()}


def test_what_people_made_stays_until_they_remove_it(fleet: Fleet) -> None:
    add(fleet)
    for number, kind in enumerate((Kind.MANUAL, Kind.AUTOMATIC, Kind.ROLLBACK), 1):
        make(fleet.checkpoints, new_id(number), kind=kind)
    assert len(kept(fleet)) == 3


@pytest.mark.parametrize("kind", [Kind.SUSPEND, Kind.FORK])
def test_what_an_operation_made_for_itself_goes_with_the_last_who_needs_it(fleet: Fleet, kind: Kind) -> None:
    add(fleet, layers=(LAYER, TOP))
    make(fleet.checkpoints, ID, (LAYER,), kind=kind)
    child = add(fleet, "child", state=State.SUSPENDED, layers=(LAYER,), checkpoint=ID)
    assert kept(fleet) == {ID}
    child.record = replace(child.record, checkpoint=None, saving=ID)
    assert kept(fleet) == {ID}
    child.record = replace(child.record, saving=None)
    with fleet.pinned(ID), fleet.pinned(ID):
        assert kept(fleet) == {ID}
    with fleet.saving("box"):
        assert kept(fleet) == {ID}
    with fleet.saving("child"):
        assert kept(fleet) == set()
    assert fleet.layout.layer(LAYER).exists(), "both volumes begin with it"


def test_a_hidden_one_that_the_owner_wants_to_see_stays(fleet: Fleet) -> None:
    vm = add(fleet, kept=(ID,))
    make(fleet.checkpoints, ID, kind=Kind.SUSPEND)
    make(fleet.checkpoints, OTHER, kind=Kind.SUSPEND)
    assert kept(fleet) == {ID}
    vm.record = replace(vm.record, kept=())
    assert kept(fleet) == set()


def test_the_checkpoints_of_a_vm_go_with_it_but_not_from_under_its_forks(fleet: Fleet) -> None:
    add_layer(fleet.layout, LAYER)
    vm = add(fleet, layers=(LAYER, TOP))
    make(fleet.checkpoints, ID, (LAYER,))
    make(fleet.checkpoints, OTHER, (LAYER,))
    child = add(fleet, "child", state=State.SUSPENDED, layers=(LAYER,), checkpoint=ID)
    remove(fleet, vm)
    assert kept(fleet) == {ID}
    assert {path.stem for path in fleet.layout.layers.glob("*.qcow2")} == {LAYER}
    fleet.checkpoints.verify(ID)
    remove(fleet, child)
    assert kept(fleet) == set()
    assert list(fleet.layout.layers.iterdir()) == [], "its checksum too"


def test_a_layer_that_a_checkpoint_alone_names_stays_as_long_as_that(fleet: Fleet) -> None:
    """As after a rollback: the VM has gone on from elsewhere."""
    add_layer(fleet.layout, LAYER)
    vm = add(fleet, layers=(TOP,))
    made = make(fleet.checkpoints, ID, (LAYER,))
    carried_out(fleet, lambda: fleet.remove_layers((LAYER, TOP)))
    assert {path.stem for path in fleet.layout.layers.glob("*.qcow2")} == {LAYER, TOP}
    carried_out(fleet, lambda: fleet.remove_checkpoint(made))
    assert {path.stem for path in fleet.layout.layers.glob("*.qcow2")} == set(vm.record.layers)


def test_nothing_goes_while_a_record_cannot_be_read(fleet: Fleet) -> None:
    """It would say what it needs."""
    vm, spoilt = add(fleet, layers=(LAYER,)), add(fleet, "spoilt")
    make(fleet.checkpoints, ID, (LAYER,), kind=Kind.SUSPEND, vm_id="spoilt")
    make(fleet.checkpoints, OTHER, kind=Kind.SUSPEND)
    spoilt.spoilt(Corrupt("its record"))
    remove(fleet, vm)
    assert kept(fleet) == {ID, OTHER}
    assert fleet.layout.layer(LAYER).exists()
    remove(fleet, spoilt)
    assert kept(fleet) == set()


def test_a_layer_of_a_checkpoint_is_frozen_and_no_other(fleet: Fleet) -> None:
    add(fleet, layers=(LAYER, TOP))
    make(fleet.checkpoints, ID, (LAYER,))
    assert fleet.is_frozen(LAYER)
    assert not fleet.is_frozen(TOP)


def test_a_rollback_that_was_cut_off_leaves_no_machine_writing_to_what_it_kept(tmp_path: Path) -> None:
    """The disk was kept, and the record still names the very layers: whoever starts the VM goes on above them."""

    async def scene(it: World) -> None:
        await it.handlers.provision(ProvisionRequest(name="box", persistent=True))
        await it.handlers.stop("box")
        before = records.read(it.layout.session("box", persistent=True)).layers
        make(it.fleet.checkpoints, ID, before, kind=Kind.ROLLBACK, memory=None, devices=None, guest=None)
        await it.restart()
        await it.handlers.resume("box")
        after = records.read(it.layout.session("box", persistent=True)).layers
        assert after[:-1] == before
        await it.handlers.stop("box")
        await it.handlers.resume("box")
        assert records.read(it.layout.session("box", persistent=True)).layers == after, "once is enough"

    play(tmp_path, scene)


def test_nobody_counts_as_ready_whose_supervisor_was_killed(fleet: Fleet) -> None:
    vm = add(fleet, state=State.FAILED)
    left = fleet.layout.ready_file("box"), fleet.layout.instance_socket("box")
    for path in left:
        path.touch()
    carried_out(fleet, lambda: vm.on_ended(vm))
    assert not any(path.exists() for path in left)


class SlowDisk:
    """A file system that takes its time over the removal of a layer, until it is `released`."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.released = threading.Event()
        self._unlink = Path.unlink
        patch.setattr(Path, "unlink", lambda path, missing_ok=False: self.unlink(path, missing_ok=missing_ok))

    def unlink(self, path: Path, *, missing_ok: bool) -> None:
        if path.suffix == ".qcow2":
            self.released.wait(PATIENCE)
        self._unlink(path, missing_ok=missing_ok)


def left(it: World) -> list[Path]:
    return list(it.layout.layers.glob("*.qcow2"))


def test_nobody_waits_for_room_but_who_asks_how_much_there_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scene(it: World) -> None:
        disk = SlowDisk(monkeypatch)
        kept = await it.handlers.provision(ProvisionRequest(name="box", persistent=True))
        gone = await it.handlers.provision(ProvisionRequest())
        assert len(left(it)) == 2
        await it.handlers.delete(kept.id)
        await it.handlers.stop(gone.id)
        assert (await it.handlers.list()).sandboxes == []
        assert len(left(it)) == 2, "the disk is at work, and nobody waits"
        asked = asyncio.ensure_future(it.handlers.df())
        await asyncio.sleep(0)
        disk.released.set()
        assert (await asked).layers_bytes == 0
        assert left(it) == []

    play(tmp_path, scene)


def test_a_start_waits_for_no_draft_to_be_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each VM that was killed with its service leaves one, as large as its memory."""

    async def scene(it: World) -> None:
        store = it.fleet.checkpoints
        for number in (1, 2):
            store.abandon(store.prepare(new_id(number), owner="box"))
        removed, remove = threading.Event(), durable.remove_tree

        def remove_slowly(path: Path) -> None:
            removed.wait(PATIENCE)
            remove(path)

        monkeypatch.setattr(durable, "remove_tree", remove_slowly)
        await it.restart()
        assert len(list(it.layout.checkpoints.iterdir())) == 2
        assert it.fleet.checkpoints.sweep() == [], "somebody is about it"
        removed.set()
        await it.fleet.cleared()
        assert not list(it.layout.checkpoints.iterdir())

    play(tmp_path, scene)


@pytest.mark.parametrize("how", ["delete", "stop"])
def test_where_room_is_scarce_it_is_there_afterwards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    async def scene(it: World) -> None:
        disk = SlowDisk(monkeypatch)

        def free(_layout: Layout) -> int:
            disk.released.set()
            return holdings.SCARCE - 1

        monkeypatch.setattr(space, "free_bytes", free)
        box = await it.handlers.provision(ProvisionRequest())
        await getattr(it.handlers, how)(box.id)
        assert left(it) == []

    play(tmp_path, scene)


def test_what_cannot_be_removed_is_told_of(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    add_layer(fleet.layout, LAYER)

    def refuse(_path: Path, missing_ok: bool = False) -> None:
        raise PermissionError(13, "not yours")

    with monkeypatch.context() as patch, pytest.raises(PermissionError):
        patch.setattr(Path, "unlink", refuse)
        carried_out(fleet, lambda: fleet.remove_layers((LAYER,)))
    assert "not yours" in caplog.text
    assert fleet.layout.layer(LAYER).exists()


def test_the_layer_of_a_vm_that_just_begins_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its supervisor has taken the claim, and no record tells of the layer yet, when another service comes up."""
    begun, go_on = threading.Event(), threading.Event()
    write = Supervisor._write_begun

    async def write_late(self: Supervisor) -> None:
        begun.set()
        assert await asyncio.to_thread(go_on.wait, 30)
        await write(self)

    monkeypatch.setattr(Supervisor, "_write_begun", write_late)

    async def scene(it: World) -> None:
        starting = asyncio.create_task(it.handlers.provision(ProvisionRequest(name="box", persistent=True)))
        await asyncio.to_thread(begun.wait, 30)
        restarting = asyncio.create_task(it.restart())
        done, _ = await asyncio.wait((restarting,), timeout=0.3)
        go_on.set()
        await asyncio.gather(starting, return_exceptions=True)
        await restarting
        assert not done
        vm = it.fleet.get("box")
        assert vm.obstacle is None
        assert all(it.layout.layer(layer).exists() for layer in vm.record.layers)
        assert len(vm.record.layers) == 1

    play(tmp_path, scene)
