"""Many suspends in a row: the chain stays short, every byte right; and services and supervisors killed in a merge."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from capsem.image.catalog import Catalog
from capsem.model.vm import VmRecord, record_from_json
from capsem.store.flatten import MAX_DEPTH
from real_service import PATIENCE, Service, wait_for

TINY = {"ram_mb": 256, "cpus": 1}


def record(service: Service, vm_id: str = "box") -> VmRecord:
    path = service.run_dir / "persistent" / vm_id / "vm.json"
    return record_from_json(path.read_bytes(), source=str(path))


def layers_on_disk(service: Service) -> set[str]:
    return {path.stem for path in (service.run_dir / "store" / "layers").iterdir()}


def named(service: Service) -> set[str]:
    """Layers that a record or a manifest names."""
    its = record(service)
    found = {*its.layers, *its.attached}
    for manifest in (service.run_dir / "store" / "checkpoints").glob("*/manifest.json"):
        found.update(layer["id"] for layer in json.loads(manifest.read_bytes())["body"]["layers"])
    return found


def wait_until_short(service: Service) -> None:
    wait_for(lambda: len(record(service).layers) <= MAX_DEPTH + 1)
    wait_for(lambda: layers_on_disk(service) == named(service))


def check_volume(service: Service, directory: Path) -> None:
    """Read the chain as QEMU does, and check the file system. The VM must have been stopped."""
    node: dict[str, Any] = {
        "driver": "raw",
        "file": {"driver": "file", "filename": str(Catalog.from_environment(os.environ).find().volume)},
    }
    for layer in record(service).layers:
        path = service.run_dir / "store" / "layers" / f"{layer}.qcow2"
        node = {"driver": "qcow2", "file": {"driver": "file", "filename": str(path)}, "backing": node}
        subprocess.run(["qemu-img", "check", "-q", path], check=True)
    raw = directory / "volume.raw"
    subprocess.run(["qemu-img", "convert", "-O", "raw", "json:" + json.dumps(node), raw], check=True)
    done = subprocess.run(["e2fsck", "-fn", raw], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    raw.unlink()


def write(service: Service, number: int) -> None:
    """A new file, and a part of an old one again: left in the guest's memory, for the suspend to bring to its layer."""
    service.output(
        "box",
        f"mkdir -p keep && head -c 1500000 /dev/urandom > keep/{number} && rm -f keep/{number - 7} && "
        f"dd if=/dev/urandom of=keep/{max(0, number - 3)} bs=4096 seek=17 count=9 conv=notrunc status=none && "
        "sha256sum keep/* > sums",
    )


@pytest.mark.parametrize("cycles", [12, pytest.param(30, marks=pytest.mark.soak)])
def test_suspends_leave_a_short_chain_and_every_byte(own_service: Service, tmp_path: Path, cycles: int) -> None:
    service = own_service
    service.client.call("provision", body={"name": "box", "persistent": True, **TINY})
    deepest = 0
    for number in range(cycles):
        write(service, number)
        service.client.call("suspend", vm_id="box")
        deepest = max(deepest, len(record(service).layers))
        assert service.client.call("resume", vm_id="box")["boot_kind"] == "warm"
        service.output("box", "sha256sum --quiet -c sums; echo 3 > /proc/sys/vm/drop_caches; sha256sum --quiet -c sums")
    # A merge takes less than a cycle does, even on a busy machine; it is not waited for.
    assert deepest <= 2 * MAX_DEPTH
    service.output(
        "box", "echo 3 > /proc/sys/vm/drop_caches; sha256sum --quiet -c sums; ! dmesg --level=err | grep -i ext4"
    )
    wait_until_short(service)
    service.client.call("stop", vm_id="box")
    wait_for(lambda: layers_on_disk(service) == named(service) == set(record(service).layers))
    check_volume(service, tmp_path)
    service.client.call("resume", vm_id="box")
    service.output("box", "sha256sum --quiet -c sums")


def grow(service: Service, megabytes: int = 40) -> None:
    """A chain that is as deep as it may be, with something to copy in it."""
    service.client.call("provision", body={"name": "box", "persistent": True, **TINY})
    service.output("box", f"head -c {megabytes << 20} /dev/urandom > big; sha256sum big > sums; sync")
    for _ in range(MAX_DEPTH):
        service.client.call("fork", vm_id="box", body={"name": "child"})
        service.client.call("delete", vm_id="child")


def half_merged(service: Service) -> str:
    """The id of a layer that nobody names yet: a merge is under way."""
    deadline = time.monotonic() + PATIENCE
    while not (fresh := layers_on_disk(service) - named(service)):
        assert time.monotonic() < deadline, "no merge has begun"
    return fresh.pop()


def test_a_service_killed_in_a_merge_leaves_nothing(own_service: Service, tmp_path: Path) -> None:
    service = own_service
    grow(service)
    service.client.call("fork", vm_id="box", body={"name": "child"})
    fresh = half_merged(service)
    service.process.kill()
    service.process.wait()
    assert fresh not in record(service).layers
    service.restart()
    assert service.output("box", "sha256sum -c sums") == "big: OK\n"
    service.client.call("delete", vm_id="child")
    wait_until_short(service)
    assert fresh not in layers_on_disk(service)
    service.client.call("stop", vm_id="box")
    wait_for(lambda: layers_on_disk(service) == set(record(service).layers))
    check_volume(service, tmp_path)


def test_a_supervisor_killed_in_a_merge_harms_nothing(own_service: Service, tmp_path: Path) -> None:
    service = own_service
    grow(service)
    pid = service.client.call("info", vm_id="box")["pid"]
    service.client.call("fork", vm_id="box", body={"name": "child"})
    half_merged(service)
    os.kill(pid, signal.SIGKILL)
    wait_for(lambda: service.status("box") == "Defunct")
    service.client.call("delete", vm_id="child")
    wait_until_short(service)  # at rest it is done all the same
    service.client.call("resume", vm_id="box")
    assert service.output("box", "sha256sum -c sums") == "big: OK\n"
    service.client.call("stop", vm_id="box")
    wait_for(lambda: layers_on_disk(service) == set(record(service).layers))
    check_volume(service, tmp_path)


def test_a_vm_deleted_in_a_merge_leaves_nothing(own_service: Service) -> None:
    service = own_service
    grow(service)
    service.client.call("fork", vm_id="box", body={"name": "child"})
    half_merged(service)
    service.client.call("delete", vm_id="box")
    service.client.call("delete", vm_id="child")
    wait_for(lambda: not layers_on_disk(service))
