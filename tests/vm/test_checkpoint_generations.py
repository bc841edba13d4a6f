"""Many generations of suspend, resume, checkpoint, rollback and live fork: disk and memory stay those of one machine."""

from __future__ import annotations

import hashlib
import os
import random
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from witness import Witness, flattened, machines

from capsem.store.checkpoints import CheckpointStore
from capsem.store.layout import Layout
from real_service import SMALL, Service

DISK = {"disk_mb": 2048}


@pytest.fixture(scope="module")
def origin(service: Service) -> Iterator[Witness]:
    """A suspended VM with a witness in it."""
    service.client.call("provision", body={"name": "origin", "persistent": True, **SMALL, **DISK})
    service.output("origin", "true")
    witness = Witness(service, "origin").begin()
    service.client.call("suspend", vm_id="origin")
    yield witness
    service.client.call("delete", vm_id="origin")


@pytest.fixture
def witness(service: Service, origin: Witness) -> Iterator[Witness]:
    """Its live fork, for one test; whatever came of that goes when the test is over."""
    client = service.client
    others = {each["id"] for each in client.call("list")["sandboxes"]}
    client.call("fork", vm_id="origin", body={"name": "one", "live": True})
    yield origin.twin("one")
    for each in client.call("list")["sandboxes"]:
        if each["id"] not in others:
            client.call("delete", vm_id=each["id"])


def test_six_generations_deep(service: Service, witness: Witness) -> None:
    client, chance, now = service.client, random.Random(1), witness
    service.output("one", "setsid sh -c 'sleep 4; echo slept >/root/slept' >/dev/null 2>&1 &")
    for generation in range(1, 8):
        now.write(f"file-{generation}", chance)
        now.write("same-name", chance, 64)
        if generation in (1, 4, 7):
            assert client.call("suspend", vm_id=now.vm_id)["synced"]
            assert client.call("resume", vm_id=now.vm_id)["boot_kind"] == "warm"
        elif generation in (2, 5):
            made, then = client.call("checkpoint", vm_id=now.vm_id, body={}), now.twin(now.vm_id)
            now.check()
            now.write("not-kept", chance, 64)
            now.write("same-name", chance, 64)
            answer = client.call("rollback", vm_id=now.vm_id, body={"checkpoint": made["id"], "save": False})
            assert answer["boot_kind"] == "warm"
            now = then
            assert service.exec(now.vm_id, "test -e /root/not-kept")[0] == 1
        else:
            if generation == 6:  # from a VM that is suspended
                client.call("suspend", vm_id=now.vm_id)
            client.call("fork", vm_id=now.vm_id, body={"name": f"fork-{generation}", "live": True})
            source, now = now, now.twin(f"fork-{generation}")
            if generation == 3:
                source.check()
                client.call("delete", vm_id=source.vm_id)  # its layers and memory are still needed
        now.check(cold_cache=True)
    assert service.output(now.vm_id, "while ! cat /root/slept 2>/dev/null; do sleep 0.2; done") == "slept\n"
    store = CheckpointStore(Layout(service.run_dir))
    mine = [each.id for each in store.all() if each.vm_id == now.vm_id]
    assert len(mine) == 1, "the one it was resumed from"
    store.verify(mine[0])
    client.call("stop", vm_id=now.vm_id)
    assert client.call("resume", vm_id=now.vm_id)["boot_kind"] == "cold"
    lines = service.output(now.vm_id, "sha256sum " + " ".join(f"/root/{name}" for name in now.files)).splitlines()
    assert {line.split()[1].removeprefix("/root/"): line.split()[0] for line in lines} == now.files


def digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


CHURN = "head -c 20M /dev/urandom >/dev/shm/churn; head -c 8M /dev/urandom >/root/churn; sync"


def test_forks_are_machines_of_their_own_and_leave_the_checkpoint_alone(service: Service, witness: Witness) -> None:
    client = service.client
    made = client.call("checkpoint", vm_id="one", body={})["id"]
    files = service.run_dir / "store/checkpoints" / made
    before = {path.name: digest(path) for path in files.iterdir()}
    count = 8
    names = client.call("fork", vm_id="one", body={"name": "twin", "live": True, "count": count, "checkpoint": made})[
        "names"
    ]
    seen = []
    for it in (*(witness.twin(name) for name in names), witness):  # twins begin where the checkpoint was, not after it
        name = it.vm_id
        it.check()
        own = "hostname; cat /etc/machine-id /run/capsem/boot-token; head -c 16 /dev/urandom | base64"
        uuid = "python3 -c 'import uuid; print(uuid.uuid4())'"
        seen.append([*service.output(name, f"{own}; {uuid}").split(), str(it.before["drawn"]), str(it.before["uuid"])])
    for column in zip(*seen, strict=True):
        assert len(set(column)) == count + 1, column
    for name in names[:2]:
        service.output(name, CHURN)
    dying = [pid for pid, line in machines(service).items() if any(f"-name {name}," in line for name in names[:2])]
    assert len(dying) == 2
    for pid in dying:  # the hard way
        os.kill(pid, signal.SIGKILL)
    for name in names:
        client.call("delete", vm_id=name)
    assert {path.name: digest(path) for path in files.iterdir()} == before
    client.call("verify_checkpoint", vm_id="one", body={"checkpoint": made})
    witness.check()


def test_written_and_suspended_at_once(service: Service, witness: Witness) -> None:
    """What was not flushed is in memory; what was, on the disk; the last word counts either way."""
    client = service.client
    for number in range(5):
        flush = "sync" if number % 2 else "true"
        service.output(
            "one",
            f"echo {number} >/root/last; head -c 5M /dev/urandom | tee /root/blob | sha256sum >/root/sum; {flush}",
        )
        client.call("suspend", vm_id="one")
        assert client.call("resume", vm_id="one")["boot_kind"] == "warm"
        assert service.output("one", "echo 3 >/proc/sys/vm/drop_caches; cat /root/last") == f"{number}\n"
        assert (
            service.output("one", "sha256sum </root/blob; cat /root/sum").splitlines()[0]
            == service.output("one", "cat /root/sum").strip()
        )
    witness.check()


CHURNER = r"""
import hashlib, os, random, sys, time
chance, sums = random.Random(7), {}
os.makedirs("/root/churn", exist_ok=True)
step = 0
while not os.path.exists("/dev/shm/enough"):
    step += 1
    name = f"/root/churn/{chance.randrange(40)}"
    what = chance.random()
    if what < 0.15 and name in sums:
        os.unlink(name)
        del sums[name]
    else:
        data = os.urandom(chance.randrange(1, 200_000))
        with open(name, "ab" if what < 0.6 and name in sums else "wb") as file:
            if file.tell() == 0:
                sums[name] = hashlib.sha256()
            sums[name].update(data)
            file.write(data)
            if chance.random() < 0.3:
                file.flush()
                os.fsync(file.fileno())
    time.sleep(0.005)
with open("/root/sums", "w") as file:
    file.writelines(f"{digest.hexdigest()}  {name}\n" for name, digest in sums.items())
open("/root/steps", "w").write(str(step))
"""


@pytest.mark.parametrize("cycles", [6, pytest.param(20, marks=pytest.mark.soak)])
def test_churn_across_suspends(service: Service, witness: Witness, tmp_path: Path, cycles: int) -> None:
    client = service.client
    client.call("write_file", vm_id="one", body={"path": "/root/churner.py", "content": CHURNER})
    service.output("one", "setsid python3 /root/churner.py >/root/churner.log 2>&1 </dev/null &")
    for cycle in range(cycles):
        time.sleep(0.5 + cycle % 3 / 2)
        client.call("suspend", vm_id="one")
        assert client.call("resume", vm_id="one")["boot_kind"] == "warm"
        witness.check()
    service.output("one", "touch /dev/shm/enough; while ! test -s /root/steps; do sleep 0.1; done")
    assert int(service.output("one", "cat /root/steps")) > cycles
    service.output(
        "one", "sync; echo 3 >/proc/sys/vm/drop_caches; sha256sum --quiet -c /root/sums; cat /root/churner.log"
    )
    witness.check()
    client.call("suspend", vm_id="one")
    # As it was frozen: a journal to replay is no damage, so a copy replays it first.
    flat = flattened(service, "one", tmp_path / "volume.raw")
    subprocess.run(["/usr/sbin/e2fsck", "-E", "journal_only", "-y", flat], capture_output=True, check=False)
    found = subprocess.run(["/usr/sbin/e2fsck", "-fn", flat], capture_output=True, text=True)
    assert found.returncode == 0, found.stdout
    client.call("resume", vm_id="one")
    client.call("stop", vm_id="one")
    flat = flattened(service, "one", tmp_path / "volume.raw")
    found = subprocess.run(["/usr/sbin/e2fsck", "-fn", flat], capture_output=True, text=True)
    assert found.returncode == 0, found.stdout
