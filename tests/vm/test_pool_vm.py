"""The pool with real machines: who takes one gets a machine of his own, and it outlives the service that kept it."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from real_service import Service, alive, running_service, wait_for

SIZE = {"CAPSEM_RAM_GB": "0.5", "CAPSEM_CPU_COUNT": "1", "CAPSEM_TEMPLATES": "on"}
WHO = "hostname; cat /etc/machine-id /run/capsem/boot-token; echo $SECRET; env | grep -c CAPSEM_VM_ID=$(hostname)"


@pytest.fixture(scope="module")
def pooled() -> Iterator[Service]:
    with running_service(CAPSEM_POOL_SIZE="1", **SIZE) as it:
        wait_for(lambda: waiting(it))
        yield it


def waiting(service: Service) -> bool:
    pool = service.client.call("df")["pool"]
    return bool(pool["ready"] == pool["wanted"])


def test_each_is_a_machine_of_its_own(pooled: Service) -> None:
    client, seen = pooled.client, []
    for name, secret in (("first", "a"), ("second", "b")):
        wait_for(lambda: waiting(pooled))
        answer = client.call("provision", body={"name": name, "env": {"SECRET": secret}})
        assert answer["boot_kind"] == "pool"
        seen.append(pooled.output(name, WHO).split())
        assert seen[-1][0] == name
        assert seen[-1][-2:] == [secret, "1"]
        assert all(each["command"].endswith(WHO) for each in client.call("history", vm_id=name)["commands"])
        argv = Path(f"/proc/{client.call('info', vm_id=name)['pid']}/cmdline").read_bytes().rstrip(b"\0").split(b"\0")
        assert argv[-4:] == [b"--id", name.encode(), b"--session-dir", str(pooled.run_dir / "sessions" / name).encode()]
    assert all(len(set(column)) == 2 for column in list(zip(*seen, strict=True))[:-1]), seen
    for name in ("first", "second"):
        client.call("delete", vm_id=name)


def test_a_service_that_is_killed_takes_the_pool_along_and_leaves_what_was_taken(pooled: Service) -> None:
    service, client = pooled, pooled.client
    wait_for(lambda: waiting(service))
    assert client.call("provision", body={"name": "taken"})["boot_kind"] == "pool"
    wait_for(lambda: waiting(service))
    taken = client.call("info", vm_id="taken")["pid"]
    [member] = [vm["id"] for vm in client.call("df")["vms"] if vm["id"] != "taken"]
    os.kill(service.process.pid, signal.SIGKILL)
    service.process.wait()
    service.restart(CAPSEM_POOL_SIZE="0", **SIZE)
    wait_for(lambda: not (service.run_dir / "sessions" / member).exists())
    assert alive(taken)
    assert [box["id"] for box in client.call("list")["sandboxes"]] == ["taken"]
    assert service.output("taken", "hostname") == "taken\n"
