"""Suspend, resume, checkpoint, roll back and fork live, on real VMs, as their owner sees it."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from real_service import SMALL, Service, alive

TELL = "cat /proc/sys/kernel/random/boot_id; cat /root/note /dev/shm/note; pgrep -x sleep"


@pytest.fixture(scope="module")
def saved(service: Service) -> Iterator[str]:
    """A persistent VM that runs, with a process of its own and a note on disk and in memory."""
    service.client.call("provision", body={"name": "saved", "persistent": True, **SMALL})
    service.output("saved", "echo one | tee /root/note > /dev/shm/note; setsid sleep 100000 > /dev/null 2>&1 &")
    yield "saved"
    service.client.call("delete", vm_id="saved")


def info(service: Service, vm_id: str) -> dict[str, object]:
    return service.client.call("info", vm_id=vm_id)


def test_a_suspended_vm_comes_back_as_it_was(service: Service, saved: str) -> None:
    before = service.output(saved, TELL)
    assert before.count("one") == 2
    pid = info(service, saved)["pid"]
    answer = service.client.call("suspend", vm_id=saved)
    assert answer["success"]
    assert answer["synced"]
    assert not alive(int(str(pid)))
    assert info(service, saved)["status"] == "Suspended"
    code = service.cli("exec", saved, "true")
    assert code.returncode != 0
    assert b"resume" in code.stderr
    resumed = service.client.call("resume", vm_id=saved)
    assert resumed["boot_kind"] == "warm"
    assert service.output(saved, TELL) == before
    # Written at once and saved at once: the last word counts.
    service.output(saved, "echo two > /root/note")
    assert service.cli("suspend", saved).stdout == b"Session suspended.\n"
    assert service.cli("resume", saved).returncode == 0
    assert service.output(saved, "cat /root/note; dmesg --level=err | grep -ci 'error' || true") == "two\n0\n"
    service.output(saved, "echo one > /root/note")


def test_the_clock_is_right_after_a_resume(service: Service, saved: str) -> None:
    service.output(saved, "date -s '30 seconds ago'")
    service.client.call("suspend", vm_id=saved)
    service.client.call("resume", vm_id=saved)
    before = time.time()
    guest = float(service.output(saved, "date +%s.%N"))
    assert before - 0.1 < guest < time.time() + 0.1


def test_a_checkpoint_can_be_gone_back_to_as_often_as_wanted(service: Service, saved: str) -> None:
    before = service.output(saved, TELL)
    made = json.loads(service.cli("checkpoint", saved, "-m", "before the change", "--json").stdout)
    assert made["pause_ms"] > 0
    service.output(saved, "echo other | tee /root/note > /dev/shm/note; pkill sleep; sync")
    assert service.cli("fork", "--cold", "--at", made["id"][:8], saved, "older").stdout == b"older\n"
    assert service.cli("cp", "older:note", "-").stdout == b"one\n"
    service.client.call("delete", vm_id="older")
    for _ in range(2):
        answer = service.client.call("rollback", vm_id=saved, body={"checkpoint": made["id"][:8]})
        assert answer["running"]
        assert service.output(saved, TELL) == before
    listed = service.client.call("checkpoints", vm_id=saved)["checkpoints"]
    assert [each["kind"] for each in listed] == ["manual", "rollback", "rollback"]
    assert listed[0]["message"] == "before the change"
    assert listed[0]["current"]
    # The present of the first time is there as well.
    service.client.call("rollback", vm_id=saved, body={"checkpoint": listed[1]["id"], "save": False})
    assert service.output(saved, "cat /root/note /dev/shm/note; pgrep -xc sleep || true") == "other\nother\n0\n"
    service.client.call("verify_checkpoint", vm_id=saved, body={"checkpoint": made["id"]})
    service.client.call("rollback", vm_id=saved, body={"checkpoint": made["id"], "save": False})
    for each in listed[1:]:
        assert service.cli("checkpoint", "rm", saved, each["id"][:10]).returncode == 0
    assert service.output(saved, TELL) == before


def test_live_forks_go_on_as_machines_of_their_own(service: Service, saved: str) -> None:
    before = service.output(saved, TELL)
    service.output(saved, "echo 10.0.0.7 db >> /etc/hosts")
    answer = service.client.call("fork", vm_id=saved, body={"name": "twin", "live": True, "count": 2})
    assert answer["names"] == ["twin-1", "twin-2"]
    try:
        own = "hostname; cat /etc/machine-id /run/capsem/boot-token; head -c 16 /dev/urandom | base64; echo $CAPSEM_VM_NAME"
        seen = [service.output(name, own).split() for name in (saved, *answer["names"])]
        assert [words[0] for words in seen] == [saved, "twin-1", "twin-2"]
        assert [words[-1] for words in seen] == [saved, "twin-1", "twin-2"]
        for column in zip(*seen, strict=True):
            assert len(set(column)) == 3, column
        for name in answer["names"]:
            assert service.output(name, TELL) == before
            assert info(service, name)["boot_kind"] == "forked"
            hosts = service.output(name, "getent hosts db $(hostname)")
            assert [line.split() for line in hosts.splitlines()] == [["10.0.0.7", "db"], ["127.0.1.1", name]]
            service.output(name, f"echo {name} > /root/note")
        assert service.output(saved, TELL) == before
    finally:
        for name in answer["names"]:
            service.client.call("delete", vm_id=name)


def test_a_suspended_vm_can_be_started_cold_and_forked(service: Service, saved: str) -> None:
    service.client.call("suspend", vm_id=saved)
    child = service.client.call("fork", vm_id=saved, body={"name": "child"})
    assert child["size_bytes"] > 0
    assert info(service, "child")["status"] == "Stopped"
    service.client.call("delete", vm_id="child")
    answer = service.client.call("resume", vm_id=saved, body={"cold": True})
    assert answer["boot_kind"] == "cold"
    assert service.output(saved, "cat /root/note; ls /dev/shm | wc -l") == "one\n0\n"
    service.output(saved, "echo one > /dev/shm/note; setsid sleep 100000 > /dev/null 2>&1 &")


def test_what_is_left(service: Service, saved: str) -> None:
    """Files of checkpoints are their owner's alone, and go when nobody needs them."""
    service.client.call("suspend", vm_id=saved)
    service.client.call("resume", vm_id=saved)
    store = service.run_dir / "store"
    for path in (*store.glob("checkpoints/*/*"), *store.glob("layers/*")):
        assert path.stat().st_mode & 0o777 == 0o600, path
    service.client.call("stop", vm_id=saved)
    listed = [each["id"] for each in service.client.call("checkpoints", vm_id=saved)["checkpoints"]]
    for checkpoint in listed:
        service.client.call("remove_checkpoint", vm_id=saved, body={"checkpoint": checkpoint})
    service.client.call("df")  # once what was removed is gone
    assert [path for path in Path(store / "checkpoints").iterdir() if "saved" in manifest_owner(path)] == []


def manifest_owner(path: Path) -> str:
    manifest = path / "manifest.json"
    return str(json.loads(manifest.read_bytes())["body"]["vm_id"]) if manifest.exists() else ""
