"""`python -m bench density`: what idle VMs take: memory at 1, 10 and 30 of them, CPU of ten, and whether all thirty answer.

Memory is PSS: of a page that several processes have mapped, each counts its part. VMs are forks of one template, of
512 MiB and one CPU, each of which has run one command.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from bench.host import cpu_seconds, service
from bench.table import Row
from bench.warm import SIZE
from capsem.client.sync import Client
from capsem.service.memory import process_memory

COUNTS = (1, 10, 30)
IDLE_AT = 10  # VMs of which the CPU time is looked at
IDLE_FOR = 15.0  # seconds
SETTLE = 3.0
LIMITS = {10: ("under 60", "under 25")}  # MB of PSS for each VMM, for each supervisor


def child(pid: int) -> int:
    """The VMM of a supervisor: its only child."""
    words = [word for task in Path(f"/proc/{pid}/task").iterdir() for word in (task / "children").read_text().split()]
    [vmm] = map(int, words)
    return vmm


def memory(supervisors: list[int]) -> list[Row]:
    """MB of PSS of each VMM and of each supervisor."""
    count, limits = len(supervisors), LIMITS.get(len(supervisors), ("", ""))
    return [
        Row(f"PSS of each {what}, {count} VMs (MB)", [process_memory([pid]) / 1e6 for pid in pids], (), limit)
        for what, pids, limit in (
            ("QEMU", [child(pid) for pid in supervisors], limits[0]),
            ("supervisor", supervisors, limits[1]),
        )
    ]


def idle_cpu(supervisors: list[int], service_pid: int) -> float:
    """Percent of one CPU that VMs, supervisors and the service use while nobody wants anything."""
    pids = [service_pid, *supervisors, *map(child, supervisors)]
    began, before = time.perf_counter(), sum(map(cpu_seconds, pids))
    time.sleep(IDLE_FOR)
    return (sum(map(cpu_seconds, pids)) - before) * 100 / (time.perf_counter() - began)


def answered(client: Client, names: list[str]) -> Row:
    """Seconds until all have answered an exec each, sent at the same moment."""

    def answer(name: str) -> bool:
        found = client.call("exec", vm_id=name, body={"command": "hostname"})
        return bool(found["stdout"] == f"{name}\n")

    began = time.perf_counter()
    with ThreadPoolExecutor(len(names)) as pool:
        right = sum(pool.map(answer, names))
    took = time.perf_counter() - began
    assert right == len(names), f"{right} of {len(names)} answered"
    return Row(f"{len(names)} VMs at once: all have answered an exec (s)", [took])


def measure(directory: Path, counts: Sequence[int] = COUNTS) -> list[Row]:
    """All rows."""
    rows: list[Row] = []
    supervisors: dict[str, int] = {}
    with service(directory, CAPSEM_MAX_CONCURRENT_VMS="40", **SIZE) as (client, service_pid):
        for count in counts:
            while len(supervisors) < count:
                name = f"vm{len(supervisors)}"
                client.call("provision", body={"name": name})
                client.call("exec", vm_id=name, body={"command": "true"})
                supervisors[name] = client.call("info", vm_id=name)["pid"]
            time.sleep(SETTLE)
            rows += memory(list(supervisors.values()))
            if count == IDLE_AT:
                used = idle_cpu(list(supervisors.values()), service_pid)
                rows.append(Row(f"{IDLE_AT} idle VMs, all their processes: CPU (% of one)", [used], (), "under 5"))
        rows.append(answered(client, list(supervisors)))
        client.call("purge", body={"all": True})
    return rows
