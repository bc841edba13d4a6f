"""The power goes at every single durable operation: what is found afterwards is the old or the new, never between."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest
from disk import LOST, Disk, PowerCut, every_cut

from capsem.model.errors import Corrupt, NotFound
from capsem.model.lifecycle import Event, State
from capsem.model.spec import VmSpec
from capsem.model.vm import VmRecord
from capsem.store import durable, records
from capsem.store.checkpoints import CheckpointStore
from capsem.store.layout import Layout
from checkpoint_files import add_layer, fill, layout, make, new_id

ID, OLD, LAYER, NEXT = new_id(1), new_id(2), new_id(11), new_id(12)
BOOT = "boot"


def store_of(root: Path) -> CheckpointStore:
    return CheckpointStore(Layout(root / "run"))


def swept(root: Path) -> CheckpointStore:
    """The store as the next service finds it, after its sweep: nothing that is neither whole nor gone."""
    store = store_of(root)
    store.sweep()
    assert {each.id for each in store.all()} == {path.name for path in Layout(root / "run").checkpoints.iterdir()}
    for each in store.all():
        store.verify(each.id)
    assert store.sweep() == []
    return store


def world(root: Path) -> None:
    where = layout(root)
    add_layer(where, LAYER)
    make(CheckpointStore(where), OLD, (LAYER,))


def test_a_commit(tmp_path: Path) -> None:
    acknowledged = []

    def act(root: Path, _made: None) -> None:
        store = store_of(root)
        draft = store.prepare(ID)
        checkpoint = fill(store, draft, layers=(LAYER,))
        durable.sync_file(draft.files.devices)  # the machine's part
        store.commit(draft, checkpoint)
        acknowledged.append(root)

    def judge(left: Path, _made: None) -> None:
        found = {each.id for each in swept(left).all()}
        assert OLD in found
        assert found <= {OLD, ID}
        if acknowledged:
            assert found == {OLD, ID}

    assert every_cut(tmp_path, world, act, judge) >= 12
    assert acknowledged


def test_a_draft_that_is_given_up(tmp_path: Path) -> None:
    def act(root: Path, _made: None) -> None:
        store = store_of(root)
        draft = store.prepare(ID)
        fill(store, draft, layers=(LAYER,))
        store.discard(draft)

    def judge(left: Path, _made: None) -> None:
        assert [each.id for each in swept(left).all()] == [OLD]

    assert every_cut(tmp_path, world, act, judge) >= 12


def test_a_removal(tmp_path: Path) -> None:
    """Layers stay: whoever removes a checkpoint takes them when nobody names them any more."""

    def prepare(root: Path) -> None:
        world(root)
        make(store_of(root), ID, (LAYER,))

    def act(root: Path, _made: None) -> None:
        store_of(root).remove(ID)

    def judge(left: Path, _made: None) -> None:
        found = {each.id for each in swept(left).all()}
        assert found in ({OLD}, {OLD, ID})

    assert every_cut(tmp_path, prepare, act, judge) >= 6


def test_a_commit_that_fails_is_no_checkpoint(tmp_path: Path) -> None:
    """The disk says no, rather than going away: at every step, and then the draft is given up."""
    number, done = 0, False
    while not done:
        root = tmp_path / str(number)
        root.mkdir()
        world(root)
        with pytest.MonkeyPatch.context() as patch:
            store, disk = store_of(root), Failing(root, number)
            draft = store.prepare(ID)
            checkpoint = fill(store, draft, layers=(LAYER,))
            disk.watch(patch)
            try:
                store.commit(draft, checkpoint)
                done = True
            except OSError:
                assert not store.is_committed(ID)
                store.discard(draft)
        assert store_of(root).sweep() == []
        assert store_of(root).is_committed(ID) == done
        assert not list((root / "run").rglob(f"{durable.TEMPORARY}*"))
        number += 1
    assert number >= 6


class Failing(Disk):
    """Refuses the one operation instead of going away."""

    def step(self, what: str) -> None:
        self.count += 1
        if self.count - 1 == self.cut_at:
            raise OSError(28, f"no space left: {what}")


# -- the record's part of a suspend and a resume, written as the supervisor does


RECORD = VmRecord(
    id="box", persistent=True, spec=VmSpec(), image="default", image_digest="d", layers=(LAYER,), created_at=1e9,
    state=State.RUNNING, host_boot_id=BOOT,
)  # fmt: skip


def running(root: Path) -> None:
    world(root)
    session = Layout(root / "run").session("box", persistent=True)
    session.path.mkdir()
    records.write(session, RECORD)
    durable.sync_directory(session.path.parent)


def suspend(root: Path) -> None:
    where, store = Layout(root / "run"), store_of(root)
    session = where.session("box", persistent=True)
    draft = store.prepare(ID)
    add_layer(where, NEXT)
    durable.sync_file(where.layer(NEXT))
    durable.sync_directory(where.layers)
    record = RECORD.after(Event.SUSPEND, saving=ID, layers=(LAYER, NEXT))
    records.write(session, record)
    checkpoint = fill(store, draft, layers=(LAYER,))
    durable.sync_file(draft.files.devices)
    store.commit(draft, checkpoint)
    record = record.after(Event.SUSPENDED, checkpoint=ID, current=ID, saving=None, layers=(LAYER,))
    records.write(session, record)


def look(root: Path) -> tuple[VmRecord, CheckpointStore]:
    """The VM as the next service finds it: its record, and only what exists is named in it."""
    store, where = store_of(root), Layout(root / "run")
    record = records.read(where.session("box", persistent=True))
    saved = record.saving is not None and store.is_committed(record.saving)
    record = record.recovered("another boot of the host", saved=saved)
    swept(root)
    for layer in record.layers:
        assert where.layer(layer).exists(), "a record names a layer that is not there"
    return record, store


def test_a_suspend(tmp_path: Path) -> None:
    """The VM is Stopped by the cut on the disk that it had, or suspended in a whole checkpoint: never neither."""
    seen = set()

    def act(root: Path, _made: None) -> None:
        suspend(root)
        seen.add("acknowledged")

    def judge(left: Path, _made: None) -> None:
        record, store = look(left)
        seen.add(record.state)
        if record.state == State.SUSPENDED:
            assert record.layers == (LAYER,)
            assert record.checkpoint == ID
            checkpoint = store.verify(ID)
            assert checkpoint.layer_ids == record.layers
        else:
            assert record.state == State.STOPPED
            assert record.layers in ((LAYER,), (LAYER, NEXT))
            assert "acknowledged" not in seen

    assert every_cut(tmp_path, running, act, judge) >= 25
    assert seen == {"acknowledged", State.STOPPED, State.SUSPENDED}


def test_a_resume_and_a_resume_that_is_given_up(tmp_path: Path) -> None:
    def prepare(root: Path) -> None:
        running(root)
        suspend(root)

    def resume(root: Path, *, well: bool) -> None:
        where = Layout(root / "run")
        session = where.session("box", persistent=True)
        add_layer(where, NEXT)
        durable.sync_file(where.layer(NEXT))
        durable.sync_directory(where.layers)
        record = records.read(session)
        record = record.after(Event.RESUME, layers=(*record.layers, NEXT), host_boot_id=BOOT)
        records.write(session, record)
        if well:
            records.write(session, record.after(Event.READY))
        else:
            records.write(session, record.after(Event.ABORTED, layers=record.layers[:-1]))
            where.layer(NEXT).unlink()

    def judge(left: Path, _made: None) -> None:
        record, store = look(left)
        assert record.checkpoint == ID
        if record.state == State.SUSPENDED:
            assert record.layers == store.verify(ID).layer_ids
        else:
            assert (record.state, record.layers) == (State.STOPPED, (LAYER, NEXT))  # it had run

    assert every_cut(tmp_path / "a", make_dir(tmp_path / "a", prepare), lambda r, _: resume(r, well=True), judge) >= 8
    assert every_cut(tmp_path / "b", make_dir(tmp_path / "b", prepare), lambda r, _: resume(r, well=False), judge) >= 8


def make_dir(parent: Path, prepare):  # type: ignore[no-untyped-def]
    parent.mkdir()
    return prepare


def test_a_record_that_a_cut_left_is_the_old_or_the_new(tmp_path: Path) -> None:
    def act(root: Path, _made: None) -> None:
        session = Layout(root / "run").session("box", persistent=True)
        records.write(session, replace(RECORD, description="new" * 1000))

    def judge(left: Path, _made: None) -> None:
        found = records.read(Layout(left / "run").session("box", persistent=True))
        assert found in (RECORD, replace(RECORD, description="new" * 1000))

    assert every_cut(tmp_path, running, act, judge) == 5


def test_the_disk_does_forget(tmp_path: Path) -> None:
    """The test of the test: without fsync, the content of a file or its name is gone."""

    def careless(root: Path, _made: None) -> None:
        (root / "run/a").mkdir()
        fd = os.open(root / "run/a/file", os.O_WRONLY | os.O_CREAT)
        os.write(fd, b"content")
        os.close(fd)
        durable.sync_directory(root / "run")

    disk_root = tmp_path / "it"
    disk_root.mkdir()
    (disk_root / "run").mkdir()
    disk = Disk(disk_root)
    with pytest.MonkeyPatch.context() as patch:
        careless_disk = disk.watch(patch)
        careless(disk_root, None)
    assert careless_disk.count >= 4
    left = disk.after_the_cut(tmp_path / "left", LOST)
    assert list(left.rglob("*")) == [left / "run", left / "run/a"]
    cut = Disk(disk_root, 0)
    with pytest.MonkeyPatch.context() as patch:
        cut.watch(patch)
        with pytest.raises(PowerCut):
            (disk_root / "new").mkdir()
    store = store_of(tmp_path)
    with pytest.raises((NotFound, Corrupt)):
        store.open(ID)
