"""Persisted, forked and purged VMs: real disks, shared layers."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from capsem.hypervisor.qemu.qcow2 import read_identity
from capsem.model.errors import AlreadyExists, InvalidInput, NotFound
from real_service import SMALL, Service, wait_for


def layers(service: Service) -> set[str]:
    service.client.call("df")  # once what was removed before is gone
    return {path.stem for path in (service.run_dir / "store" / "layers").iterdir()}


def test_fork_of_a_running_vm(service: Service) -> None:
    client, before = service.client, layers(service)
    client.call("provision", body={"name": "source", "persistent": True, "env": {"SECRET": "x"}, **SMALL})
    service.output(
        "source", "echo one > /root/a; dd if=/dev/urandom of=/root/big bs=1M count=8 2>/dev/null; md5sum big > big.md5"
    )
    # Written and not synced: the fork's own freeze must bring it to the disk.
    service.output("source", "echo late > /root/late")
    answer = client.call("fork", vm_id="source", body={"name": "child", "description": "a copy"})
    assert 8 << 20 < answer["size_bytes"] < 300 << 20
    info = client.call("info", vm_id="child")
    assert (info["status"], info["forked_from"], info["description"]) == ("Stopped", "source", "a copy")
    # The source goes on, in a layer of its own.
    service.output("source", "echo two > /root/a; md5sum -c big.md5; sync")
    with pytest.raises(AlreadyExists):
        client.call("fork", vm_id="source", body={"name": "child"})
    with pytest.raises(InvalidInput):
        client.call("fork", vm_id="source", body={"name": "../x"})

    client.call("resume", vm_id="child")
    assert (
        service.output("child", "cat a late; md5sum -c big.md5; hostname; echo $SECRET")
        == "one\nlate\nbig: OK\nchild\n\n"
    )
    assert "recovering" not in service.output("child", "dmesg | grep EXT4")
    service.output("child", "echo three > /root/a")
    assert service.output("source", "cat a") == "two\n"

    # The parent may be deleted while its child lives, and the layers go with the last who needs them.
    client.call("delete", vm_id="source")
    assert service.output("child", "cat a; md5sum -c big.md5") == "three\nbig: OK\n"
    client.call("stop", vm_id="child")
    client.call("resume", vm_id="child")
    assert service.output("child", "cat a; md5sum -c big.md5") == "three\nbig: OK\n"
    client.call("delete", vm_id="child")
    assert layers(service) == before


def test_persist_moves_a_running_vm(service: Service) -> None:
    client = service.client
    old = client.call("provision", body={**SMALL})["id"]
    service.output(old, "echo kept > /root/a; sleep 1000 & echo $! > /root/pid")
    pid = client.call("info", vm_id=old)["pid"]
    assert client.call("persist", vm_id=old, body={"name": "kept"}) == {"success": True, "name": "kept"}
    with pytest.raises(NotFound):
        client.call("info", vm_id=old)
    info = client.call("info", vm_id="kept")
    assert (info["pid"], info["persistent"], info["status"]) == (pid, True, "Running")
    assert service.output("kept", "hostname; echo $CAPSEM_VM_NAME; kill -0 $(cat pid) && cat a") == "kept\nkept\nkept\n"
    assert not (service.run_dir / "sessions" / old).exists()
    client.call("stop", vm_id="kept")
    client.call("resume", vm_id="kept")
    assert service.output("kept", "cat a") == "kept\n"
    client.call("delete", vm_id="kept")


def test_purge_asks_and_takes_all(own_service: Service) -> None:
    client = own_service.client
    client.call("provision", body={"name": "kept", "persistent": True, **SMALL})
    client.call("stop", vm_id="kept")
    ephemeral = client.call("provision", body={**SMALL})["id"]
    done = own_service.cli("purge", "--all", stdin=b"n\n")
    assert (done.returncode, b"Aborted." in done.stdout) == (0, True)
    done = own_service.cli("purge")
    assert b"Purged 1" in done.stdout
    assert [each["id"] for each in client.call("list")["sandboxes"]] == ["kept"]
    done = own_service.cli("purge", "--all", stdin=b"y\n")
    assert b"Purged" in done.stdout
    assert client.call("list")["sandboxes"] == []
    assert layers(own_service) == set()
    assert ephemeral not in [path.name for path in (own_service.run_dir / "sessions").iterdir()]


def test_the_volume_is_a_clean_file_system(service: Service, tmp_path: Path) -> None:
    """After a clean stop nothing is left for the journal to replay."""
    client = service.client
    client.call("provision", body={"name": "clean", "persistent": True, "disk_mb": 1024, **SMALL})
    service.output("clean", "for i in $(seq 50); do head -c 20000 /dev/urandom > f$i; done; rm f1*")
    client.call("stop", vm_id="clean")
    before = layers(service)
    [layer] = [
        path
        for path in (service.run_dir / "store" / "layers").iterdir()
        if path.stem in before and _is_of(path, "clean")
    ]
    base = service.run_dir / "store" / "volumes" / "1024.raw"
    chain = {
        "driver": "qcow2",
        "file": {"driver": "file", "filename": str(layer)},
        "backing": {"driver": "raw", "file": {"driver": "file", "filename": str(base)}},
    }
    raw = tmp_path / "volume.raw"
    subprocess.run(["qemu-img", "convert", "-O", "raw", "json:" + json.dumps(chain), raw], check=True)
    done = subprocess.run(["e2fsck", "-fn", raw], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    client.call("delete", vm_id="clean")


def _is_of(layer: Path, vm_id: str) -> bool:
    return read_identity(layer).vm_id == vm_id


def test_delete_leaves_nothing(service: Service) -> None:
    client, before = service.client, layers(service)
    for _ in range(2):
        vm_id = client.call("provision", body={**SMALL})["id"]
        client.call("delete", vm_id=vm_id)
    assert layers(service) == before
    wait_for(lambda: not list((service.run_dir / "instances").glob("*-tmp.*")))
