"""VMs that are forks of a template are machines of their own, and the template holds nothing of any of them."""

from __future__ import annotations

import json
import mmap
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from real_service import SMALL, Service, alive, children, running_service, wait_for

OWN = "hostname; cat /etc/machine-id /run/capsem/boot-token; head -c 16 /dev/urandom | base64; echo $SECRET"
SECRET = "s3cr3t-of-the-first-one"


@pytest.fixture(scope="module")
def warm() -> Iterator[Service]:
    """A service that makes templates, as services do."""
    with running_service(CAPSEM_TEMPLATES="on") as it:
        yield it


def templates(service: Service) -> list[Path]:
    found = service.run_dir.glob("store/checkpoints/*/manifest.json")
    return [path.parent for path in found if json.loads(path.read_text())["body"]["kind"] == "template"]


def test_forks_of_a_template(warm: Service) -> None:
    service, client, seen = warm, warm.client, []
    for number, secret in enumerate((SECRET, "other")):
        name = f"forked{number}"
        answer = client.call("provision", body={"name": name, "env": {"SECRET": secret}, **SMALL})
        assert answer["boot_kind"] == "template"
        assert client.call("info", vm_id=name)["started_from"] == "template"
        seen.append(service.output(name, OWN).split())
        assert seen[-1][0] == name
        assert seen[-1][-1] == secret
    assert all(len(set(column)) == 2 for column in zip(*seen, strict=True)), seen
    assert "capsem" in client.call("logs", vm_id="forked1")["logs"].lower()
    assert not any(vm["id"].startswith("template") for vm in client.call("list")["sandboxes"])
    for template in templates(service):
        with (template / "memory.ram").open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as memory:
            assert memory.find(SECRET.encode()) < 0
            assert memory.find(b"template-") >= 0  # it is looked at: this is what the machine was called
    for name in ("forked0", "forked1"):
        client.call("delete", vm_id=name)


def test_a_service_killed_while_it_makes_one_leaves_nothing(warm: Service) -> None:
    service, size = warm, {"ram_mb": 320, "cpus": 1}
    creating = service.start_cli("create", "-n", "box", "--ram", "0.3125", "--cpu", "1")
    wait_for(lambda: list(service.run_dir.glob("sessions/template-*/process.log")))
    machines = children(service.process.pid)
    os.kill(service.process.pid, signal.SIGKILL)
    service.process.wait()
    creating.kill()
    creating.wait()
    service.restart(CAPSEM_TEMPLATES="on")
    wait_for(lambda: not list(service.run_dir.glob("sessions/template-*")))
    wait_for(lambda: not any(alive(pid) for pid in machines))
    assert service.client.call("list")["sandboxes"] == []
    assert service.client.call("provision", body={"name": "box", **size})["boot_kind"] == "template"
    service.output("box", "true")
