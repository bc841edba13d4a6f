"""The doctor's own VM, and its word about this host."""

from __future__ import annotations

import asyncio
import json

from capsem.hypervisor.driver import Accelerator
from capsem.hypervisor.qemu.driver import QemuDriver
from real_service import Service


async def _verdict(service: Service) -> tuple[Accelerator, str]:
    verdict = await QemuDriver(service.run_dir / "cache").verdict()
    return verdict.accelerator, verdict.reason


def test_the_doctor_finds_nothing_wrong(service: Service) -> None:
    done = service.cli("doctor", "--json", limit=300)
    checks = {check["name"]: check for check in json.loads(done.stdout)}
    assert [check for check in checks.values() if check["status"] == "failed"] == []
    assert done.returncode == 0
    accelerator, reason = asyncio.run(_verdict(service))
    assert reason in checks["accelerator"]["found"]
    assert checks["accelerator"]["status"] == ("ok" if accelerator is Accelerator.KVM else "warning")
    inside = {name for name in checks if name.startswith("vm ")}
    assert {"vm boots", "vm clock", "vm files", "vm network", "vm modules", "vm deleted"} <= inside
    vm_id = checks["vm hostname"]["found"]
    assert vm_id not in {box["id"] for box in service.client.call("list")["sandboxes"]}


def test_setup_does_no_more_than_look_when_all_is_there(service: Service) -> None:
    done = service.cli("setup")
    assert (done.returncode, done.stderr) == (0, b"")
    assert b"making it" not in done.stdout
    assert b"checks passed" in done.stdout


def test_disk_usage_of_a_running_vm(service: Service, box: str) -> None:
    service.output(box, "head -c 3000000 /dev/urandom > /root/three && sync; rm /root/three")
    answer = service.client.call("df")
    [mine] = [vm for vm in answer["vms"] if vm["id"] == box]
    assert mine["own_bytes"] + mine["shared_bytes"] >= 3_000_000
    assert any(box in image["vms"] for image in answer["images"])
    assert answer["unreferenced_bytes"] == 0
