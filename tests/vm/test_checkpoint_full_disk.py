"""The host's disk is full at every step of a suspend, a checkpoint, a fork: refused whole, and done when there is room."""

from __future__ import annotations

import contextlib
import fcntl
from collections.abc import Iterator
from pathlib import Path

import pytest
from test_full_disk import FullService, on_small_disk
from witness import Witness

from capsem.store.checkpoints import CheckpointStore
from capsem.store.layout import Layout
from real_service import SMALL, Service, wait_for

VM = "tight"
# MiB that are left: for nothing, for a record, for a layer, for some of the memory, for most of it.
ROOM = [0, *(pytest.param(each, marks=pytest.mark.soak) for each in (0.02, 1, 30)), 0.2, 6]


@pytest.fixture(scope="module")
def disk() -> Iterator[FullService]:
    with on_small_disk(900) as it:
        it.service.client.call("provision", body={"name": VM, "persistent": True, "disk_mb": 2048, **SMALL})
        it.service.output(VM, "true")
        yield it


@pytest.fixture(scope="module")
def witness(disk: FullService) -> Witness:
    """Its memory holds what no sparse copy makes small."""
    disk.service.output(VM, "head -c 60M /dev/urandom >/dev/shm/ballast")
    return Witness(disk.service, VM).begin()


def left_over(service: Service) -> set[str]:
    """Files in the store that belong to nothing; a machine that runs may hold one draft, for the next checkpoint."""
    layout, store = Layout(service.run_dir), CheckpointStore(Layout(service.run_dir))
    checkpoints = {each.id for each in store.all()}
    drafts = [path for path in layout.checkpoints.iterdir() if path.name not in checkpoints]
    held = [path.name for path in drafts if is_held(path / "draft")]
    return {
        *(path.name for path in drafts if path.name not in held[:1]),
        *(str(path) for path in service.run_dir.rglob("*tmp*")),
    }


def is_held(path: Path) -> bool:
    with contextlib.suppress(FileNotFoundError), path.open() as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def refused(service: Service, *words: str) -> None:
    done = service.cli(*words)
    assert done.returncode == 1, (words, done)
    assert b"No space left" in done.stderr, (words, done)
    assert b"\nhint: " in done.stderr, (words, done)


@pytest.mark.parametrize("room", ROOM)
def test_nothing_half_made_is_left(disk: FullService, witness: Witness, room: float) -> None:
    service = disk.service
    known = {each.id for each in CheckpointStore(Layout(service.run_dir)).all()}
    for words in (("checkpoint", VM), ("fork", VM, "other"), ("suspend", VM)):
        disk.fill(free=int(room * 1024 * 1024))
        try:
            refused(service, *words)
            assert left_over(service) == set(), words
            assert {each.id for each in CheckpointStore(Layout(service.run_dir)).all()} == known
            assert service.status(VM) == "Running"
        finally:
            disk.empty()
        witness.check()


def test_when_there_is_room_it_works(disk: FullService, witness: Witness) -> None:
    service = disk.service
    for _ in range(2):
        service.client.call("suspend", vm_id=VM)
        assert service.client.call("resume", vm_id=VM)["boot_kind"] == "warm"
        witness.check()
    service.client.call("stop", vm_id=VM)
    service.client.call("resume", vm_id=VM)
    assert left_over(service) == set()


def test_a_resume_without_room_leaves_it_suspended(disk: FullService, witness: Witness) -> None:
    service = disk.service
    witness.begin()
    service.client.call("suspend", vm_id=VM)
    layers = sorted((service.run_dir / "store/layers").glob("*.qcow2"))  # their checksums are written by and by
    for room in (0, 0.02, 0.2):
        disk.fill(free=int(room * 1024 * 1024))
        try:
            done = service.cli("resume", VM)
            if done.returncode == 0:  # enough for a layer and a record
                break
            assert b"No space left" in done.stderr or b"disk is full" in done.stderr, done
            assert b"\nhint: " in done.stderr, done
            assert service.status(VM) == "Suspended"
            assert sorted((service.run_dir / "store/layers").glob("*.qcow2")) == layers
        finally:
            disk.empty()
    service.client.call("resume", vm_id=VM)
    witness.check()
    service.client.call("suspend", vm_id=VM)
    wait_for(lambda: left_over(service) == set())  # nobody waits for what a suspend gives back
