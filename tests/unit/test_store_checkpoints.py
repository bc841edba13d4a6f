"""Checkpoints on disk: what was committed is opened; what was damaged or exchanged is refused, and told apart."""

import os
from pathlib import Path

import pytest

from capsem.model.errors import CapsemError, Corrupt, InvalidInput, NotFound
from capsem.model.spec import VmSpec
from capsem.model.vm import VmRecord
from capsem.store import checkpoints as module
from capsem.store.checkpoints import CheckpointStore
from capsem.store.layout import CheckpointDir, Layout
from capsem.store.locks import is_locked, try_lock
from checkpoint_files import SIZE, add_layer, fill, layout, make, new_id

ID, OTHER, LAYER, SECOND = new_id(1), new_id(2), new_id(11), new_id(12)
BOX = VmRecord("box", True, VmSpec(), "default", "d", (), 1e9)


@pytest.fixture
def where(tmp_path: Path) -> Layout:
    made = layout(tmp_path)
    add_layer(made, LAYER)
    add_layer(made, SECOND)
    return made


@pytest.fixture
def store(where: Layout) -> CheckpointStore:
    return CheckpointStore(where)


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1 << at % 8
    path.write_bytes(data)


def test_a_checkpoint_comes_into_being_with_its_manifest_and_not_before(store: CheckpointStore, where: Layout) -> None:
    draft = store.prepare(ID)
    assert is_locked(draft.files.draft)
    checkpoint = fill(store, draft, layers=(LAYER, SECOND))
    assert not store.is_committed(ID)
    assert store.all() == []
    with pytest.raises(NotFound):
        store.open(ID)
    store.commit(draft, checkpoint)
    assert store.is_committed(ID)
    assert store.open(ID) == (checkpoint, where.checkpoint(ID))
    assert store.verify(ID) == checkpoint
    assert store.all() == [checkpoint]
    assert checkpoint.layer_ids == (LAYER, SECOND)
    assert {path.name for path in where.checkpoint(ID).path.iterdir()} == {
        "manifest.json", "memory.ram", "memory.sums", "devices.state",
    }  # fmt: skip


def test_a_draft_that_is_given_up_leaves_nothing(store: CheckpointStore, where: Layout) -> None:
    before = len(os.listdir("/proc/self/fd"))
    draft = store.prepare(ID)
    fill(store, draft)
    store.discard(draft)
    assert list(where.checkpoints.iterdir()) == []
    assert len(os.listdir("/proc/self/fd")) == before


def test_one_draft_of_an_id_at_a_time(store: CheckpointStore) -> None:
    draft = store.prepare(ID)
    with pytest.raises(FileExistsError):
        store.prepare(ID)
    assert is_locked(draft.files.draft)


def test_a_manifest_is_never_anything_but_whole_corrupt_or_not_there(store: CheckpointStore, where: Layout) -> None:
    """Cut off at any byte; any byte flipped."""
    checkpoint, path = make(store, ID, (LAYER,)), where.checkpoint(ID).manifest
    data = path.read_bytes()
    for end in range(len(data) - 1):  # the last byte is the newline's
        path.write_bytes(data[:end])
        with pytest.raises(Corrupt) as caught:
            store.open(ID)
        assert caught.value.hint
    for at in range(len(data)):
        path.write_bytes(data[:at] + bytes([data[at] ^ 1 << at % 8]) + data[at + 1 :])
        try:
            found = store.read(ID)
        except Corrupt as error:
            found, told = None, error
            assert str(path) in told.message
            assert told.hint
        assert found in (None, checkpoint), "white space may become other white space"
        assert len(CheckpointStore(where).all()) <= 1
    path.unlink()
    with pytest.raises(NotFound):
        store.open(ID)


def test_a_manifest_of_another_version_says_so(store: CheckpointStore, where: Layout) -> None:
    make(store, ID)
    path = where.checkpoint(ID).manifest
    path.write_bytes(path.read_bytes().replace(b'"format": 1', b'"format": 2'))
    with pytest.raises(Corrupt, match="has format 2, this version of Capsem reads 1"):
        store.open(ID)


def test_what_is_no_file_is_corrupt(store: CheckpointStore, where: Layout) -> None:
    where.checkpoint(ID).manifest.mkdir(parents=True)
    (where.checkpoints / OTHER).touch()
    (where.checkpoints / "nonsense").mkdir()
    for each in (ID, OTHER):
        with pytest.raises(Corrupt):
            store.open(each)
    with pytest.raises(CapsemError):
        store.open("nonsense")
    assert store.all() == []


def test_a_manifest_that_is_too_large_is_not_read(
    store: CheckpointStore, where: Layout, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(store, ID)
    monkeypatch.setattr(module, "SIZE_LIMIT", 100)
    with pytest.raises(Corrupt, match="too large"):
        store.open(ID)


def test_a_checkpoint_in_the_place_of_another_is_refused(store: CheckpointStore, where: Layout) -> None:
    make(store, ID)
    make(store, OTHER)
    where.checkpoint(ID).manifest.write_bytes(where.checkpoint(OTHER).manifest.read_bytes())
    with pytest.raises(Corrupt, match="exchanged"):
        store.open(ID)


def test_the_memory_of_another_vm_or_checkpoint_is_refused(store: CheckpointStore, where: Layout) -> None:
    draft = store.prepare(ID)
    store.commit(draft, fill(store, draft, owner="other"))
    with pytest.raises(Corrupt, match="is the memory of other"):
        store.open(ID)
    make(store, OTHER)
    where.checkpoint(ID).memory.write_bytes(where.checkpoint(OTHER).memory.read_bytes())
    with pytest.raises(Corrupt, match=f"in checkpoint {OTHER[:12]}, not of box in {ID[:12]}") as caught:
        store.open(ID)
    assert caught.value.hint


@pytest.mark.parametrize("part", ["memory", "sums", "devices"])
def test_a_part_that_is_cut_off_or_gone_is_found(store: CheckpointStore, where: Layout, part: str) -> None:
    make(store, ID)
    path: Path = getattr(where.checkpoint(ID), part)
    os.truncate(path, path.stat().st_size - 1)
    with pytest.raises(Corrupt):
        store.verify(ID)
    path.unlink()
    with pytest.raises(Corrupt):
        store.verify(ID)


def test_every_flip_is_found_by_open_or_by_verify(store: CheckpointStore, where: Layout) -> None:
    make(store, ID, (LAYER,))
    files = where.checkpoint(ID)
    used = [*range(0, 3000, 97), 2999]
    for path, places in (
        (files.devices, used),
        (where.layer(LAYER), range(0, 4096, 97)),
        (files.memory, range(SIZE, SIZE + 100)),
    ):
        data = path.read_bytes()
        for at in places:
            flip(path, at)
            with pytest.raises(Corrupt):
                store.open(ID)
            path.write_bytes(data)
    for path, limit in ((files.memory, SIZE), (files.sums, SIZE // 1024)):
        data = path.read_bytes()
        for at in range(0, limit, 61):
            flip(path, at)
            with pytest.raises(Corrupt):
                store.verify(ID)
            path.write_bytes(data)
    store.verify(ID)


def test_a_layer_that_is_gone_or_another_s_is_refused(store: CheckpointStore, where: Layout) -> None:
    make(store, ID, (LAYER, SECOND))
    where.layer(LAYER).write_bytes(where.layer(SECOND).read_bytes())
    with pytest.raises(Corrupt, match="not the one that was frozen"):
        store.open(ID)
    where.layer(LAYER).unlink()
    with pytest.raises(Corrupt, match="is gone"):
        store.open(ID)


def test_find_takes_a_prefix_of_a_vm_s_own(store: CheckpointStore) -> None:
    first, second = make(store, "abc" + "0" * 29), make(store, "abd" + "0" * 29)
    make(store, "abe" + "0" * 29, vm_id="other")
    assert store.find(BOX, "ABC") == first
    assert store.find(BOX, second.id) == second
    with pytest.raises(InvalidInput, match="2 checkpoints of box begin with ab"):
        store.find(BOX, "ab")
    for missing in ("", "abe", "../etc", "x" * 1000):
        with pytest.raises(NotFound):
            store.find(BOX, missing)


def test_removing_leaves_the_layers_and_can_be_done_again(store: CheckpointStore, where: Layout) -> None:
    make(store, ID, (LAYER,))
    make(store, OTHER, (LAYER,))
    store.remove(ID)
    store.remove(ID)
    assert [each.id for each in store.all()] == [OTHER]
    assert where.layer(LAYER).exists()
    with pytest.raises(InvalidInput):
        store.remove("../../persistent")


def test_a_sweep_takes_what_a_crash_left_and_nothing_that_somebody_works_on(
    store: CheckpointStore, where: Layout
) -> None:
    kept = make(store, ID)
    working = store.prepare(OTHER)
    for number, names in enumerate(([], ["draft"], ["draft", "memory.ram"], ["memory.ram", "memory.sums"]), 50):
        path = where.checkpoints / new_id(number)
        path.mkdir()
        for name in names:
            (path / name).touch()
    half_removed = CheckpointDir(where.checkpoints / new_id(60))
    half_removed.path.mkdir()
    half_removed.devices.touch()
    where.checkpoint(ID).draft.touch()  # a crash between the last two steps of a commit
    assert sorted(store.sweep()) == [new_id(number) for number in (50, 51, 52, 53, 60)]
    assert sorted(path.name for path in where.checkpoints.iterdir()) == [ID, OTHER]
    assert store.open(ID)[0] == kept
    store.commit(working, fill(store, working))
    assert store.sweep() == []


def test_a_sweep_of_one_owners_drafts_leaves_all_others(store: CheckpointStore, where: Layout) -> None:
    for number, (owner, alive) in enumerate((("box", False), ("box", True), ("other", False), ("", False)), 70):
        draft = store.prepare(new_id(number), owner=owner)
        if not alive:
            store.abandon(draft)
    (where.checkpoints / new_id(74)).mkdir()  # which somebody is about to lock
    assert store.sweep("box") == [new_id(70)]
    assert sorted(path.name for path in where.checkpoints.iterdir()) == [new_id(number) for number in range(71, 75)]


def test_a_commit_between_the_looks_of_a_sweep_is_not_swept(
    store: CheckpointStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    draft = store.prepare(ID)
    checkpoint = fill(store, draft)

    def commit_first(path: Path) -> object:
        store.commit(draft, checkpoint)
        return try_lock(path)

    monkeypatch.setattr(module, "try_lock", commit_first)
    assert CheckpointStore(store._layout).sweep() == []
    assert store.verify(ID) == checkpoint
    assert not store._layout.checkpoint(ID).draft.exists()


def test_a_draft_that_a_sweep_took_before_it_was_locked_is_not_handed_out(
    store: CheckpointStore, where: Layout, monkeypatch: pytest.MonkeyPatch
) -> None:
    def sweep_first(path: Path) -> object:
        lock = try_lock(path)
        path.unlink()
        return lock

    monkeypatch.setattr(module, "try_lock", sweep_first)
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(FileNotFoundError):
        store.prepare(ID)
    assert list(where.checkpoints.iterdir()) == []
    assert len(os.listdir("/proc/self/fd")) == before
