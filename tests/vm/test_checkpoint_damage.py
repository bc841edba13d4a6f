"""Checkpoints that were damaged, exchanged, or do not come up: refused with the reason, and always a way on."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType

import pytest
from witness import Witness, machines

from capsem.model.checkpoint import Checkpoint, checkpoint_from_json
from capsem.model.errors import CapsemError, Corrupt
from capsem.model.vm import record_from_json
from capsem.store.checkpoints import CheckpointStore
from capsem.store.layout import CheckpointDir, Layout
from capsem.store.ram import RamIdentity
from outside import ask
from real_service import SMALL, Service

VM = "brittle"


@pytest.fixture(scope="module")
def witness(service: Service) -> Iterator[Witness]:
    """A VM that tests leave suspended."""
    service.client.call("provision", body={"name": VM, "persistent": True, "disk_mb": 2048, **SMALL})
    service.output(VM, "true")
    it = Witness(service, VM).begin()
    service.output(VM, "head -c 3M /dev/urandom >/root/data; sync")
    service.client.call("suspend", vm_id=VM)
    yield it
    service.client.call("delete", vm_id=VM)


@pytest.fixture
def store(service: Service) -> CheckpointStore:
    return CheckpointStore(Layout(service.run_dir))


def the_checkpoint(service: Service, store: CheckpointStore) -> tuple[Checkpoint, CheckpointDir]:
    """What the VM is suspended in."""
    record = Layout(service.run_dir).session(VM, persistent=True).record
    return store.open(record_from_json(record.read_bytes(), source="vm.json").checkpoint or "")


@contextlib.contextmanager
def damaged(path: Path, change: Callable[[bytes], bytes]) -> Iterator[None]:
    """A file with other content."""
    before = path.read_bytes()
    path.write_bytes(change(before))
    try:
        yield
    finally:
        path.write_bytes(before)


def flipped(place: int) -> Callable[[bytes], bytes]:
    return lambda data: data[:place] + bytes([data[place] ^ 4]) + data[place + 1 :]


def flip(path: Path, place: int) -> None:
    with path.open("r+b", buffering=0) as file:
        (byte,) = os.pread(file.fileno(), 1, place)
        os.pwrite(file.fileno(), bytes([byte ^ 4]), place)


def refused(service: Service, status: int, code: str, reason: str) -> None:
    """A resume is refused with a reason and a way out, twice the same, and changes nothing."""
    record = Layout(service.run_dir).session(VM, persistent=True).record
    before, layers = record.read_bytes(), sorted((service.run_dir / "store/layers").iterdir())
    for _ in range(2):
        answered, body = ask(service.socket, "POST", f"/resume/{VM}", {})
        assert (answered, body.get("code")) == (status, code), body
        assert reason in body["message"], body
        assert "cold" in body["hint"] or "backup" in body["hint"], body
    assert record.read_bytes() == before
    assert sorted((service.run_dir / "store/layers").iterdir()) == layers
    assert service.status(VM) == "Suspended"
    assert not any(f"/{VM}/" in line for line in machines(service).values())


def test_what_was_damaged_or_exchanged_is_refused(service: Service, witness: Witness, store: CheckpointStore) -> None:
    checkpoint, files = the_checkpoint(service, store)
    assert checkpoint.memory is not None
    top = Layout(service.run_dir).layer(checkpoint.layer_ids[-1])
    with damaged(files.manifest, lambda data: data[:-100]):
        refused(service, 500, "corrupt", "no checkpoint manifest")
    with damaged(files.manifest, flipped(len(files.manifest.read_bytes()) // 2)):
        refused(service, 500, "corrupt", str(files.manifest))
    with damaged(files.devices, flipped(20_000)):
        refused(service, 500, "corrupt", "digest is wrong")
    for place in (0, 100, 4000):  # the header, and the identity in it
        flip(top, place)
        refused(service, 500, "corrupt", "is not the one that was frozen")
        flip(top, place)
    for place in (checkpoint.memory.size + 15, checkpoint.memory.size + 40):
        flip(files.memory, place)
        refused(service, 500, "corrupt", str(files.memory))
        flip(files.memory, place)
    os.truncate(files.memory, checkpoint.memory.size)
    refused(service, 500, "corrupt", "has not the size")
    os.truncate(files.memory, checkpoint.memory.size + 4096)
    refused(service, 500, "corrupt", "does not say whose")
    identity = RamIdentity(VM, checkpoint.id, checkpoint.memory.size)
    with files.memory.open("r+b", buffering=0) as file:
        os.pwrite(file.fileno(), replace(identity, vm_id="other").to_bytes(), identity.size)
        refused(service, 500, "corrupt", "is the memory of other")
        os.pwrite(file.fileno(), identity.to_bytes(), identity.size)
    for path in (files.memory, files.sums, files.devices, files.manifest, top):
        away = path.with_name("away")
        path.rename(away)
        refused(service, 500, "corrupt", "")
        away.rename(path)
    store.verify(checkpoint.id)
    assert service.client.call("resume", vm_id=VM)["boot_kind"] == "warm"
    witness.check()
    service.client.call("suspend", vm_id=VM)


def test_another_machine_is_told_what_differs_and_the_disk_comes_up_cold_all_the_same(
    service: Service, witness: Witness, store: CheckpointStore
) -> None:
    checkpoint, files = the_checkpoint(service, store)
    hypervisor = next(key for key, value in checkpoint.machine.items() if "qemu" in str(value))
    other = replace(checkpoint, machine=MappingProxyType({**checkpoint.machine, hypervisor: "qemu 6.6.6"}))
    with damaged(files.manifest, lambda _data: other.to_json()):
        assert checkpoint_from_json(files.manifest.read_bytes(), source="it") == other
        refused(service, 409, "wrong_state", "was qemu 6.6.6")
        done = service.cli("resume", VM)
        assert done.returncode == 1
        assert b"was qemu 6.6.6" in done.stderr
        assert b"capsem resume --cold" in done.stderr


def test_damage_of_data_is_found_by_verify(service: Service, witness: Witness, store: CheckpointStore) -> None:
    service.client.call("resume", vm_id=VM)
    made = service.client.call("checkpoint", vm_id=VM, body={"message": "to verify"})["id"]
    checkpoint, files = store.open(made)
    assert checkpoint.memory is not None
    assert service.cli("checkpoint", "verify", VM, made[:12]).returncode == 0
    top = Layout(service.run_dir).layer(checkpoint.layer_ids[-1])
    (page, count), *_ = [run for run in checkpoint.memory.runs if run[1] > 1]
    for path, place in (
        (files.memory, page * 4096 + 77),
        (files.memory, (page + count) * 4096 - 1),
        (files.sums, page * 4 + 1),
        (top, top.stat().st_size // 2),
        (top, 4096),
    ):
        flip(path, place)
        done = service.cli("checkpoint", "verify", VM, made[:12])
        assert done.returncode == 1, done
        assert str(path) in done.stderr.decode()
        flip(path, place)
    assert service.cli("checkpoint", "verify", VM, made[:12]).returncode == 0
    service.client.call("remove_checkpoint", vm_id=VM, body={"checkpoint": made})
    witness.check()
    service.client.call("suspend", vm_id=VM)


class Killer(threading.Thread):
    """Kills machines of the VM as they come up, so many of them."""

    def __init__(self, service: Service, count: int) -> None:
        super().__init__(daemon=True)
        self.service = service
        self.left = count
        self.killed: list[int] = []
        self.enough = threading.Event()

    def run(self) -> None:
        while self.left and not self.enough.is_set():
            for pid, line in machines(self.service).items():
                if "-incoming" in line and pid not in self.killed:
                    time.sleep(0.1 * len(self.killed))  # the first at once, the next when it speaks already
                    os.kill(pid, signal.SIGKILL)
                    self.killed.append(pid)
                    self.left -= 1
            time.sleep(0.002)


def log_of(service: Service) -> str:
    return (service.run_dir / "service.log").read_text()


def test_a_restore_that_fails_is_tried_again(service: Service, witness: Witness, store: CheckpointStore) -> None:
    before, _ = the_checkpoint(service, store)
    killer = Killer(service, 1)
    killer.start()
    assert service.client.call("resume", vm_id=VM)["boot_kind"] == "warm"
    killer.join(10)
    assert len(killer.killed) == 1
    assert f"{VM}: restore 1 of 2 failed" in log_of(service)
    witness.check()
    assert store.verify(before.id) == before
    service.client.call("suspend", vm_id=VM)


def test_one_that_fails_twice_comes_up_cold_and_says_so(
    service: Service, witness: Witness, store: CheckpointStore
) -> None:
    before, _ = the_checkpoint(service, store)
    killer = Killer(service, 2)
    killer.start()
    answer = service.client.call("resume", vm_id=VM)
    killer.join(10)
    assert len(killer.killed) == 2
    assert answer["boot_kind"] == "cold-after-failure"
    assert f"{VM} did not start" in answer["boot_note"]
    info = service.client.call("info", vm_id=VM)
    assert (info["boot_kind"], info["boot_note"]) == (answer["boot_kind"], answer["boot_note"])
    assert store.verify(before.id) == before, "kept for a second look"
    assert service.output(VM, "test -s /root/data && echo there") == "there\n"
    assert service.output(VM, "ls /dev/shm") == ""
    assert "restore 2 of 2 failed" in log_of(service)
    witness.begin()
    service.client.call("suspend", vm_id=VM)


def test_a_volume_of_another_instant_is_not_handed_out(
    service: Service, witness: Witness, store: CheckpointStore
) -> None:
    """The guest itself looks: every header is right, and the disk is not the one that its memory believes in."""
    checkpoint, files = the_checkpoint(service, store)
    mark, found = checkpoint.id.encode().ljust(4096, b"\0"), 0
    for layer in checkpoint.layer_ids:
        path = Layout(service.run_dir).layer(layer)
        data = path.read_bytes()
        while (at := data.find(mark)) >= 0:
            found += 1
            data = data[:at] + b"\1" + data[at + 1 :]
            with path.open("r+b", buffering=0) as file:
                os.pwrite(file.fileno(), b"f" * 32, at)
    assert found
    done = service.cli("resume", VM)
    assert done.returncode == 0, done
    assert b"cold" in done.stderr, done
    assert b"not of one checkpoint" in done.stderr, done
    info = service.client.call("info", vm_id=VM)
    assert info["boot_kind"] == "cold-after-failure"
    assert "memory and volume are not of one checkpoint" in info["boot_note"]
    assert "ffffffff" in info["boot_note"]
    assert store.read(checkpoint.id) == checkpoint
    assert service.output(VM, "test -s /root/data && echo there") == "there\n"
    witness.begin()
    service.client.call("suspend", vm_id=VM)


def test_a_checkpoint_that_is_no_good_any_more_costs_memory_and_nothing_else(
    service: Service, witness: Witness, store: CheckpointStore
) -> None:
    _, files = the_checkpoint(service, store)
    os.truncate(files.manifest, 1000)
    with pytest.raises(Corrupt):
        service.client.call("resume", vm_id=VM)
    done = service.cli("resume", "--cold", VM)
    assert (done.returncode, done.stdout) == (0, f"{VM}\n".encode()), done
    assert service.client.call("info", vm_id=VM)["boot_kind"] == "cold"
    assert service.output(VM, "test -s /root/data && echo there") == "there\n"
    witness.begin()
    service.client.call("suspend", vm_id=VM)
    with pytest.raises(CapsemError):
        store.open(files.id)
    service.client.call("resume", vm_id=VM)
    witness.check()
