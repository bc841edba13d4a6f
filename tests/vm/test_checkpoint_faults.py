"""Processes are killed at any instant of a suspend or a resume: what was acknowledged is there, and nothing is left over."""

from __future__ import annotations

import json
import os
import random
import signal
import threading
import time
from pathlib import Path

import pytest
from witness import machines

from capsem.client.sync import Client
from capsem.model.errors import CapsemError
from capsem.store.checkpoints import CheckpointStore
from capsem.store.flatten import MAX_DEPTH
from capsem.store.layout import Layout
from outside import traces
from real_service import SMALL, Service, alive, children, wait_for

VM = "hardy"


class Call(threading.Thread):
    """A request under way; `answer` is there when it was acknowledged."""

    def __init__(self, service: Service, operation: str) -> None:
        super().__init__(daemon=True)
        self.client, self.operation = Client(service.socket), operation
        self.answer: dict[str, object] | None = None
        self.error: CapsemError | None = None
        self.start()

    def run(self) -> None:
        try:
            self.answer = self.client.call(self.operation, vm_id=VM)
        except CapsemError as error:
            self.error = error


def victims(service: Service, what: str) -> list[int]:
    if what == "service":
        return [service.process.pid]
    return list(machines(service)) if what == "machine" else children(service.process.pid)


def kill(service: Service, what: str) -> None:
    """They are gone on return."""
    killed = victims(service, what)
    for pid in killed:
        os.kill(pid, signal.SIGKILL)
    if what == "service":
        service.process.wait()
    wait_for(lambda: not any(map(alive, killed)))


def as_seen(service: Service) -> bool:
    """Whether the service has noticed who is gone."""
    info = service.client.call("info", vm_id=VM)
    return bool(machines(service)) and alive(info["pid"]) if info["status"] == "Running" else not machines(service)


def nothing_left_over(service: Service) -> None:
    """Files, processes and locks are those of the VM as it is now."""
    layout = Layout(service.run_dir)
    store = CheckpointStore(layout)
    running = service.status(VM) == "Running"

    def unnamed() -> set[str]:
        layers = {path.stem for path in layout.layers.glob("*.qcow2")}
        record = json.loads(record_of(service))
        return layers - {layer for each in store.all() for layer in each.layer_ids} - set(record["layers"])

    record = json.loads(record_of(service))
    # A long chain's merged layer waits for the next run; it may be in the making now.
    wait_for(lambda: len(unnamed()) <= (len(record["layers"]) > MAX_DEPTH))

    def drafts() -> list[Path]:
        return [path for path in layout.checkpoints.iterdir() if not (path / "manifest.json").exists()]

    if not running:  # what a suspend gives back goes in the background
        wait_for(lambda: not drafts())
    assert {each.id for each in store.all()} <= {record.get("checkpoint"), record.get("current")}
    assert not list(service.run_dir.rglob(".tmp-*"))
    files, processes, locks = traces(service.run_dir)
    assert len(machines(service)) == running, processes
    assert any(lock.endswith("/claim") for lock in locks) == running
    assert any(lock.endswith("/vmm.lock") for lock in locks) == running


@pytest.mark.parametrize("rounds", [4, pytest.param(20, marks=pytest.mark.soak)])
def test_whoever_is_killed_whenever(own_service: Service, rounds: int) -> None:
    service, chance = own_service, random.Random(rounds)
    tell = "cat /proc/sys/kernel/random/boot_id /dev/shm/note /root/note"
    service.client.call("provision", body={"name": VM, "persistent": True, "disk_mb": 2048, **SMALL})
    service.output(VM, "true")
    acts = [(a, w) for w in ("supervisor", "machine", "service") for a in ("suspend", "resume")]
    for number in range(rounds):
        operation, what = acts[number % len(acts)]
        note = f"note-{number}"
        service.output(VM, f"echo {note} | tee /dev/shm/note >/root/note; sync")
        before = service.output(VM, tell)
        if operation == "resume":
            service.client.call("suspend", vm_id=VM)
        call = Call(service, operation)
        delay = chance.uniform(0, 0.8)
        time.sleep(delay)
        kill(service, what)
        said = f"round {number}: {what} killed {delay:.3f} s into a {operation}"
        call.join(60)
        assert not call.is_alive(), said
        if what == "service":
            service.restart()
        # A supervisor that outlived the service may still be at it.
        wait_for(lambda: json.loads(record_of(service))["state"] not in ("suspending", "resuming", "starting"))
        wait_for(lambda: service.status(VM) in ("Running", "Suspended", "Stopped", "Defunct"))
        wait_for(lambda: as_seen(service))
        status = service.status(VM)
        told = f"{said}: {status}, {call.answer or call.error}"
        if operation == "suspend" and call.answer is not None:
            assert status == "Suspended", told
        if operation == "resume" and what != "service":
            # Killed while it came up: tried again, or still suspended; killed just after: gone, and said so.
            assert status in ("Running", "Suspended", "Defunct"), told
        if status == "Running":
            assert service.output(VM, tell) == before, told
        if what != "service":
            service.stop()
            service.restart()  # and sweep
            status = service.status(VM)  # what ran was suspended
        if service.status(VM) != "Running":
            nothing_left_over(service)
            resumed = service.client.call("resume", vm_id=VM)
            assert (resumed["boot_kind"] == "warm") == (status == "Suspended"), (told, resumed)
            if status == "Suspended":
                assert service.output(VM, tell) == before, told
        assert service.output(VM, "cat /root/note").strip() == note, told
        nothing_left_over(service)
        service.output(VM, "echo >/dev/shm/note")


def record_of(service: Service) -> bytes:
    return Layout(service.run_dir).session(VM, persistent=True).record.read_bytes()
