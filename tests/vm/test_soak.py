"""VMs come and go, and leave nothing: no process, file, lock, descriptor or memory. `make soak` takes its time over it."""

from __future__ import annotations

import contextlib
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pytest

from capsem.client.sync import Client
from real_service import Service, children, wait_for

TINY = {"ram_mb": 256, "cpus": 1}
QUIET = 10  # looks, 20 ms apart, that see the same
GROWTH = 4.0  # MB that the service may gain while it warms up; a leak of 100 KB a round shows in fifty


class Traces(NamedTuple):
    """What a service has and holds."""

    files: list[str]
    descriptors: list[str]
    locks: int
    processes: int


def is_spare(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return b"--spare" in Path(f"/proc/{pid}/cmdline").read_bytes()
    return False


def settled(service: Service) -> Traces:
    """What it has when nothing is under way: its ends of connections and of the reserve's pipe close a moment late."""
    pid = service.process.pid
    wait_for(lambda: [is_spare(child) for child in children(pid)] == [True])  # the supervisor in reserve, and no other
    seen = [traces(service)]

    def unchanged() -> bool:
        seen.append(traces(service))
        return seen[-QUIET:].count(seen[-1]) == QUIET

    wait_for(unchanged)
    return seen[-1]


def traces(service: Service) -> Traces:
    pid = service.process.pid
    links = []
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # closed meanwhile
            links.append(str(entry.readlink()))
    return Traces(
        files=sorted(str(path.relative_to(service.run_dir)) for path in service.run_dir.rglob("*")),
        # Sockets and pipes have numbers of their own; that there are as many as before is what counts.
        descriptors=sorted(link.partition(":")[0] for link in links),
        locks=sum(line.split()[4] == str(pid) for line in Path("/proc/locks").read_text().splitlines()),
        processes=len(children(pid)),
    )


def resident(pid: int) -> float:
    """MB."""
    [line] = [line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("VmRSS")]
    return int(line.split()[1]) / 1024


def come_and_go(service: Service, number: int) -> float:
    """A VM, a command, a file, sometimes a fork; then all are deleted. Returns how long the VM's deletion took."""
    client, name = service.client, f"round-{number}"
    client.call("provision", body={"name": name, "persistent": number % 2 == 0, **TINY})
    assert service.output(name, "echo here") == "here\n"
    client.call("write_file", vm_id=name, body={"path": "a/b", "content": "x" * 10_000})
    if number % 4 == 0:
        client.call("fork", vm_id=name, body={"name": f"{name}-child"})
        client.call("delete", vm_id=f"{name}-child")
    began = time.monotonic()
    client.call("delete", vm_id=name)
    return time.monotonic() - began


@pytest.mark.parametrize("rounds", [5, pytest.param(50, marks=pytest.mark.soak)])
def test_what_comes_and_goes_leaves_nothing(own_service: Service, rounds: int) -> None:
    service = own_service
    come_and_go(service, 0)  # makes what all VMs share
    before, memory = settled(service), resident(service.process.pid)
    took = sorted(come_and_go(service, number) for number in range(1, rounds + 1))
    assert settled(service) == before
    grown = resident(service.process.pid) - memory
    sys.stderr.write(
        f"{rounds} rounds: deletes took {took[0]:.3f} to {took[-1]:.3f} s, {took[rounds // 2]:.3f} s in the middle; "
        f"the service has {memory + grown:.1f} MB, {grown:+.1f} MB\n"
    )
    assert grown < GROWTH


@pytest.mark.soak
def test_five_at_once(own_service: Service) -> None:
    socket = own_service.run_dir / "service.sock"

    def one(number: int) -> float:
        began, client, name = time.monotonic(), Client(socket), f"vm-{number}"
        client.call("provision", body={"name": name, "ram_mb": 512, "cpus": 1})
        answer = client.call("exec", vm_id=name, body={"command": f"echo {number}"})
        assert answer["stdout"] == f"{number}\n"
        return time.monotonic() - began

    with ThreadPoolExecutor(5) as pool:
        took = sorted(pool.map(one, range(5)))
    sys.stderr.write("five at once were ready after " + ", ".join(f"{each:.1f}" for each in took) + " s\n")
    assert own_service.client.call("purge", body={})["purged"] == 5
