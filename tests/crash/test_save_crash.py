"""The power goes at every durable operation of a suspend as the supervisor makes it: many parts at the same time, one after
the other here, in an order that is drawn anew for each."""

from __future__ import annotations

import asyncio
import os
import random
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from disk import every_cut
from test_checkpoints_crash import LAYER, NEXT, RECORD, look, running, store_of

from capsem.hypervisor.driver import Accelerator, Layer, MachineSpec, Saved, SaveFiles
from capsem.model.checkpoint import Checkpoint, Kind
from capsem.model.lifecycle import Event, State
from capsem.store import durable, records
from capsem.store.layout import Layout
from capsem.store.ram import PAGE
from capsem.supervisor import saving
from capsem.supervisor.jobs import JobTable
from capsem.supervisor.owned import Next
from capsem.supervisor.saving import Order, Saver
from capsem.system.real import real_system
from checkpoint_files import add_layer, new_id

RAM_MB = 1
TOP = new_id(13)
BEFORE = replace(RECORD, layers=(LAYER, TOP))


def world(root: Path) -> None:
    running(root)
    where = Layout(root / "run")
    add_layer(where, TOP)
    durable.sync_file(where.layer(TOP))
    durable.sync_directory(where.layers)
    records.write(where.session("box", persistent=True), BEFORE)


class Inline:
    """Work for threads, done when the last of it has come, in any order."""

    lot = random.Random(1)

    def __init__(self, count: int = 0) -> None:
        self._count = count
        self._work: list[tuple[Future[Any], Any, Any]] = []

    def shutdown(self, *, wait: bool) -> None:
        assert not self._work
        assert not wait

    def submit(self, work: Any, *args: Any) -> Future[Any]:
        future: Future[Any] = Future()
        self._work.append((future, work, args))
        if len(self._work) >= self._count:
            self.lot.shuffle(self._work)
            for each, what, how in self._work:
                try:
                    each.set_result(what(*how))
                except BaseException as error:  # noqa: BLE001 (a power cut is no Exception)
                    each.set_exception(error)
            self._work.clear()
        return future


class Channel:
    def hold(self) -> None:
        pass

    def release(self) -> None:
        pass


class Guest:
    """Flushes and holds still at once."""

    boot_id, epoch, next_nonce = "boot", 3, b"n" * 16
    channel = Channel()

    class identity:  # noqa: N801
        vm_id, token = "box", "token"

    async def quiesce(self, _limit: float, _mark: str) -> bool:
        return True

    def go_on(self) -> None:
        pass


class Machine:
    """Leaves what a save leaves, none of it durable."""

    pid, version = 0, "none 1"

    def __init__(self, layer: Path) -> None:
        self.top_layer = Layer(layer, "qcow2")

    async def save(self, files: SaveFiles, layer: Layer, *, hold: Any, instant: Any, **_: Any) -> Saved:
        await hold()
        instant()
        fd = os.open(self.top_layer.path, os.O_WRONLY)
        os.pwrite(fd, b"the last of it", 100)
        os.close(fd)
        fd = os.open(files.devices, os.O_WRONLY | os.O_CREAT, 0o600)
        os.write(fd, os.urandom(3000))
        os.close(fd)
        pieces = [(0, memoryview(os.urandom(PAGE))), (8 * PAGE, memoryview(os.urandom(2 * PAGE)))]
        self.top_layer = layer
        return Saved(0.01, *files.ram.patch(pieces, compare=False))


class Driver:
    def fingerprint(self, version: str, **_: Any) -> dict[str, Any]:
        return {"vmm": version}


async def suspend(root: Path) -> None:
    """The supervisor's order of things (supervisor.changes)."""
    where, store = Layout(root / "run"), store_of(root)
    session, layer = where.session("box", persistent=True), Layer(where.layer(NEXT), "qcow2")
    spec = MachineSpec(
        vm_id="box", cpus=1, ram_mb=RAM_MB, accelerator=Accelerator.TCG, kernel=root, initrd=root, root=root,
        volume=(), ram_file=root,
    )  # fmt: skip
    machine, guest = Machine(where.layer(TOP)), Guest()
    saver = Saver(
        real_system(), cast("Any", Driver()), store, cast("Any", machine), spec, cast("Any", guest),
        JobTable(lambda *_: None), cast("Any", SimpleNamespace(connections=0)),
        cast("Any", SimpleNamespace(known_names=lambda: b"")), {},
    )  # fmt: skip
    before: list[Any] = []

    def stage(made: Checkpoint) -> None:
        record = BEFORE.after(Event.SUSPEND, saving=made.id, layers=(*BEFORE.layers, NEXT))
        done = record.after(Event.SUSPENDED, checkpoint=made.id, current=made.id, saving=None, layers=made.layer_ids)
        before.append(Next(record, Event.SUSPENDED, done, records.stage(session, done)))

    checkpoint_id = await saver.reserve()
    layer.path.write_bytes(b"empty")
    durable.sync_file(layer.path)
    durable.sync_directory(where.layers)
    records.write(session, BEFORE.after(Event.SUSPEND, saving=checkpoint_id, layers=(*BEFORE.layers, NEXT)))
    await saver.save(BEFORE, Order(Kind.SUSPEND, BEFORE.layers, layer, go_on=False), stage)
    before[0].staged.place()


def test_a_suspend_with_all_its_parts_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the order in which they became durable: the VM is Stopped, or suspended in a whole checkpoint."""
    seen: set[object] = set()
    monkeypatch.setattr(saving, "ThreadPoolExecutor", Inline)

    async def run(root: Path) -> None:
        loop = asyncio.get_running_loop()
        loop.run_in_executor = in_turn(loop)  # type: ignore[method-assign]
        await suspend(root)

    def act(root: Path, _made: None) -> None:
        asyncio.run(run(root))
        seen.add("acknowledged")

    def judge(left: Path, _made: None) -> None:
        record, store = look(left)
        seen.add(record.state)
        if record.state == State.SUSPENDED:
            assert record.layers == BEFORE.layers
            assert record.checkpoint is not None
            assert store.verify(record.checkpoint).layer_ids == record.layers
            volume = Layout(left / "run").layer(TOP).read_bytes()
            assert volume[100:114] == b"the last of it"
        else:
            assert record.state == State.STOPPED
            assert "acknowledged" not in seen

    assert every_cut(tmp_path, world, act, judge) >= 30
    assert seen == {"acknowledged", State.STOPPED, State.SUSPENDED}


def in_turn(loop: asyncio.AbstractEventLoop) -> Any:
    """`run_in_executor` without threads of its own."""

    def run(executor: Any, work: Any, *args: Any) -> Any:
        future = (executor or Inline()).submit(work, *args)
        return asyncio.wrap_future(future, loop=loop)

    return run
