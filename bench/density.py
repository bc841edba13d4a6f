"""`python -m bench.density`: what idle VMs take: memory at 1, 10 and 30 of them, CPU of ten, and whether all thirty answer.

Memory is PSS: of a page that several processes have mapped, each counts its part. VMs are forks of one template, of
512 MiB and one CPU, each of which has run one command.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from bench.__main__ import cpu_seconds, service
from capsem.client.sync import Client
from capsem.service.memory import process_memory

COUNTS = (1, 10, 30)
IDLE_AT = 10  # VMs of which the CPU time is looked at
IDLE_FOR = 15.0  # seconds
SETTLE = 3.0


def child(pid: int) -> int:
    """The VMM of a supervisor: its only child."""
    words = [word for task in Path(f"/proc/{pid}/task").iterdir() for word in (task / "children").read_text().split()]
    [vmm] = map(int, words)
    return vmm


def memory(supervisors: list[int]) -> dict[str, float]:
    """MB of PSS, the median of VMMs and of supervisors, and the largest of each."""
    found: dict[str, float] = {}
    for name, pids in (("qemu", [child(pid) for pid in supervisors]), ("supervisor", supervisors)):
        each = [process_memory([pid]) / 1e6 for pid in pids]
        found |= {name: round(statistics.median(each), 1), f"{name}_max": round(max(each), 1)}
    return found


def idle_cpu(supervisors: list[int], service_pid: int) -> float:
    """Percent of one CPU that VMs, supervisors and the service use while nobody wants anything."""
    pids = [service_pid, *supervisors, *map(child, supervisors)]
    began, before = time.perf_counter(), sum(map(cpu_seconds, pids))
    time.sleep(IDLE_FOR)
    return round((sum(map(cpu_seconds, pids)) - before) * 100 / (time.perf_counter() - began), 2)


def measure(client: Client, service_pid: int) -> dict[str, Any]:
    """All figures."""
    result: dict[str, Any] = {"memory_mb": {}}
    supervisors: dict[str, int] = {}
    for count in COUNTS:
        while len(supervisors) < count:
            name = f"vm{len(supervisors)}"
            client.call("provision", body={"name": name})
            client.call("exec", vm_id=name, body={"command": "true"})
            supervisors[name] = client.call("info", vm_id=name)["pid"]
        time.sleep(SETTLE)
        result["memory_mb"][str(count)] = memory(list(supervisors.values()))
        if count == IDLE_AT:
            result["idle_cpu_percent"] = idle_cpu(list(supervisors.values()), service_pid)

    def answer(name: str) -> bool:
        found = client.call("exec", vm_id=name, body={"command": "hostname"})
        return bool(found["stdout"] == f"{name}\n")

    began = time.perf_counter()
    with ThreadPoolExecutor(len(supervisors)) as pool:
        result["answered"] = sum(pool.map(answer, supervisors))
    result["all_answered_within_s"] = round(time.perf_counter() - began, 1)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures to a file, too")
    arguments = parser.parse_args()
    settings = {"CAPSEM_MAX_CONCURRENT_VMS": "40", "CAPSEM_RAM_GB": "0.5", "CAPSEM_CPU_COUNT": "1"}
    with tempfile.TemporaryDirectory(prefix="bench") as text, service(Path(text) / "h", **settings) as (client, pid):
        figures = measure(client, pid)
        client.call("purge", body={"all": True})
    for count, found in figures["memory_mb"].items():
        print(
            f"{count:>2} VMs: PSS of each, median (largest): QEMU {found['qemu']} ({found['qemu_max']}) MB, "
            f"supervisor {found['supervisor']} ({found['supervisor_max']}) MB"
        )
    print(f"{IDLE_AT} idle VMs with all their processes: {figures['idle_cpu_percent']} % of one CPU")
    print(f"{COUNTS[-1]} VMs at once: {figures['answered']} answered, within {figures['all_answered_within_s']} s")
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
