"""A service that is killed while its supervisor is at work: no other operation of the host comes in between.

Real processes with simulated guests, whose hypervisor does not tolerate what overlaps.
"""

from __future__ import annotations

import contextlib
import os
import signal
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from capsem import faults
from capsem.client.sync import Client
from capsem.model.errors import CapsemError
from real_service import SMALL, Service, start_process, wait_for, wait_until_it_answers


@pytest.fixture
def host() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="capsem-vm-") as text:  # a short path: sockets have to fit
        yield Path(text)


def environment(host: Path, home: Path) -> dict[str, str]:
    return {
        "CAPSEM_HYPERVISOR": "sim",
        "CAPSEM_SIM": f"host={host / 'simulated'}",
        "CAPSEM_GATE": str(host / "gate"),
        faults.VARIABLE: str(home / "orders"),
    }


@contextlib.contextmanager
def service(host: Path, name: str) -> Iterator[Service]:
    """One of several on a simulated host, with a VM, `box`."""
    home = host / name
    home.mkdir()
    it = Service(home, start_process(home, **environment(host, home)))
    try:
        wait_until_it_answers(it.client)
        ask(it, "provision", None, name="box", persistent=True, **SMALL)
        it.output("box", "count /root/n; tally n; sync")
        yield it
    finally:
        it.stop()


def ask(it: Service, operation: str, vm_id: str | None = "box", **body: object) -> dict[str, object]:
    return Client(it.socket, timeout=120).call(operation, vm_id=vm_id, body=body or None)


@pytest.mark.parametrize(
    ("step", "before", "operation", "other"),
    [
        ("suspend.saved", None, "suspend", "resume"),
        ("resume.running", "suspend", "resume", "resume"),
        ("boot.running", "stop", "resume", "suspend"),
    ],
)
def test_what_a_killed_service_has_begun_is_still_alone(
    host: Path, step: str, before: str | None, operation: str, other: str
) -> None:
    with service(host, "one") as one, service(host, "two") as two, ThreadPoolExecutor(2) as pool:
        if other == "resume":
            ask(two, "suspend")
        if before is not None:
            ask(one, before)
        # A simulated machine is in its supervisor, which stands still in the middle of its work.
        (one.home / "orders").write_text(f"{step} stop-vmm\n")
        begun = pool.submit(ask, one, operation)
        wait_for((one.home / "orders.taken").exists)
        [pid] = stopped(one.run_dir)
        try:
            one.process.kill()
            one.process.wait()
            with pytest.raises(CapsemError):
                begun.result()
            coming = pool.submit(ask, two, other)
            wait_for(lambda: coming.done() or ask(two, "info").get("waiting"))
            assert not coming.done(), "it did not wait"
        finally:
            os.kill(pid, signal.SIGCONT)
        coming.result()
        one.restart(**environment(host, one.home))
        for it in (one, two):
            ask(it, "resume")
            assert it.output("box", "count /root/n; tally n; sync; dmesg").splitlines()[2:] == []
        assert list((host / "simulated" / "struck").iterdir()) == []


def stopped(run_dir: Path) -> list[int]:
    """Supervisors that stand still."""
    found: list[int] = []

    def look() -> list[int]:
        for entry in Path("/proc").iterdir():
            if entry.name.isdecimal():
                with contextlib.suppress(OSError):
                    still = (entry / "stat").read_text().rpartition(")")[2].split()[0] == "T"
                    if still and f"{run_dir}/".encode() in (entry / "cmdline").read_bytes():
                        found.append(int(entry.name))
        return found

    wait_for(look)
    return found
