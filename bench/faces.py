"""`python -m bench faces`: what the command line adds, what the record costs, and the processes themselves; `python -m bench
list`: `GET /list` at a fixed rate.

The rate is kept whatever the answers do: request N is due at N / RATE seconds, and its latency counts from then, so that one
slow answer is seen by all that had to wait behind it.
"""

from __future__ import annotations

import asyncio
import subprocess
import sys
import time
from pathlib import Path

from bench.boots import timed
from bench.host import command, cpu_seconds, in_turn, service, status
from bench.table import Row
from capsem.client.http import Answer
from capsem.client.sync import Client

RATE = 500  # requests a second
CONNECTIONS = 16
LISTED = 10  # VMs
LIST = b"GET /list HTTP/1.1\r\nHost: capsem\r\n\r\n"


async def listing(path: Path, seconds: float) -> list[float]:
    """Milliseconds of each `GET /list`, from when it was due, at RATE."""
    due: asyncio.Queue[float | None] = asyncio.Queue()
    taken: list[float] = []

    async def ask() -> None:
        reader, writer = await asyncio.open_unix_connection(path)
        while (at := await due.get()) is not None:
            writer.write(LIST)
            answer = Answer()
            while not answer.done:
                answer.feed(await reader.read(1 << 16))
            assert answer.status == 200
            taken.append((time.perf_counter() - at) * 1e3)
        writer.close()

    asking = [asyncio.create_task(ask()) for _ in range(CONNECTIONS)]
    began = time.perf_counter()
    for number in range(int(seconds * RATE)):
        at = began + number / RATE
        if (wait := at - time.perf_counter()) > 0:
            await asyncio.sleep(wait)
        due.put_nowait(at)
    for _ in asking:
        due.put_nowait(None)
    await asyncio.gather(*asking)
    return taken


def at_a_rate(directory: Path, seconds: float) -> list[Row]:
    """The rate, with simulated VMs: what a VM does is not asked about."""
    with service(directory / "rate", CAPSEM_HYPERVISOR="sim") as (client, pid):
        for number in range(LISTED):
            client.call("provision", body={"name": f"vm{number}", "persistent": True})
        path = directory / "rate" / "run" / "service.sock"
        asyncio.run(listing(path, 1))
        used, began = cpu_seconds(pid), time.perf_counter()
        taken = sorted(asyncio.run(listing(path, seconds)))
        share = (cpu_seconds(pid) - used) * 100 / (time.perf_counter() - began)
    p99 = taken[len(taken) * 99 // 100]
    return [
        Row(f"GET /list of {LISTED} VMs at {RATE}/s (ms)", taken),
        Row(f"GET /list of {LISTED} VMs at {RATE}/s: 99th percentile (ms)", [p99], (), "under 50"),
        Row(f"GET /list of {LISTED} VMs at {RATE}/s: CPU of the service (% of one)", [share]),
    ]


def exec_true(client: Client) -> float:
    """Milliseconds of it, in the VM `box`."""
    return timed(lambda: client.call("exec", vm_id="box", body={"command": "true"}))


def processes(directory: Path, runs: int) -> list[Row]:
    """`capsem exec` beside the exec itself, and what else a process of ours costs."""
    home = directory / "faces"
    with service(home) as (client, service_pid):
        client.call("provision", body={"name": "box", "ram_mb": 512, "cpus": 1})
        exec_true(client)
        times = in_turn(
            runs,
            {
                "exec": lambda: exec_true(client),
                "capsem exec": lambda: command(home, "exec", "box", "true"),
                "capsem list": lambda: command(home, "list"),
                "python": lambda: timed(lambda: subprocess.run([sys.executable, "-c", "pass"], check=True)),
            },
        )
        over = [process - itself for process, itself in zip(times["capsem exec"], times["exec"], strict=True)]
        supervisor = client.call("info", vm_id="box")["pid"]
        used, began = cpu_seconds(service_pid), time.perf_counter()
        time.sleep(runs / 2)
        idle = (cpu_seconds(service_pid) - used) * 100 / (time.perf_counter() - began)
        return [
            Row("capsem exec as a process, over the exec itself (ms)", over, (), "under 250"),
            Row(
                "capsem list as a process, beside python -c pass (ms)",
                times["capsem list"],
                times["python"],
                "under 150",
            ),
            Row("service, idle: CPU (% of one)", [idle], (), "0"),
            Row("service, idle: RSS (MB)", [status(service_pid, "VmRSS")], (), "under 80"),
            Row("supervisor: RSS (MB)", [status(supervisor, "VmRSS")], (), "under 60"),
        ]


def recorded(directory: Path, runs: int) -> Row:
    """An exec that goes into the ledger, beside one that does not: of two services, in turn."""
    with service(directory / "on") as (on, _), service(directory / "off", CAPSEM_LEDGER="off") as (off, _):
        for client in (on, off):
            client.call("provision", body={"name": "box", "ram_mb": 512, "cpus": 1})
            exec_true(client)
        times = in_turn(runs, {"on": lambda: exec_true(on), "off": lambda: exec_true(off)})
    return Row("exec true, recorded and not (ms)", times["on"], times["off"], "1.05 x")


def measure(directory: Path, runs: int) -> list[Row]:
    """Of processes and the record; `runs` of what takes a process each."""
    return [*processes(directory, runs), recorded(directory, 3 * runs)]
