"""`python -m bench.warm`: create to first exec from a template and from the pool, in turn with QEMU alone doing the same.

The floor has a machine of the same size saved beforehand; each time it makes a layer, starts QEMU, loads the devices, lets
it run, and has the agent take its identity and run `true`: with nothing of the product above the driver's command line.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from bench.__main__ import BIN, milliseconds, service
from bench.checkpoints import Floor, filled
from bench.table import Row, show
from capsem.client.sync import Client
from capsem.hypervisor.qemu.driver import QemuDriver
from capsem.image.catalog import Catalog

SIZE = {"CAPSEM_RAM_GB": "0.5", "CAPSEM_CPU_COUNT": "1"}
RAM_MB = 512
SETTLE = 3.0  # seconds; a spare supervisor and a VM of the pool are made behind each create
BATCH = 20


def create(client: Client, kind: str) -> float:
    """Milliseconds to the end of the first exec."""
    began = time.perf_counter()
    answer = client.call("provision", body={})
    assert answer["boot_kind"] == kind, answer
    client.call("exec", vm_id=answer["id"], body={"command": "true"})
    took = milliseconds(began)
    client.call("delete", vm_id=answer["id"])
    return took


def full(client: Client) -> bool:
    """Whether the pool is."""
    pool = client.call("df")["pool"]
    return bool(pool["ready"] == pool["wanted"])


def floor_of(floor: Floor, state: Path) -> float:
    """The same of QEMU alone."""
    began = time.perf_counter()
    floor.start(state)
    floor.control.sendall(floor.nonce)
    floor.qmp.do("cont")
    asyncio.run(floor.meet(filled(0)))
    return milliseconds(began)


def run_true(home: Path) -> float:
    """`capsem run true` as a whole process."""
    env = {**os.environ, "CAPSEM_HOME": str(home), "CAPSEM_RUN_DIR": str(home / "run")}
    began = time.perf_counter()
    subprocess.run([BIN / "capsem", "run", "true"], env=env, check=True)
    return milliseconds(began)


def batch(client: Client) -> float:
    """Seconds for so many creates, each to its first exec, two at a time."""
    began = time.perf_counter()
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda _number: create(client, "template"), range(BATCH)))
    return time.perf_counter() - began


def measure(directory: Path, runs: int) -> list[Row]:
    """All rows."""
    image = Catalog.from_environment(os.environ).find()
    accelerator = asyncio.run(QemuDriver(directory / "cache").accelerator())
    floor = Floor(image, directory, accelerator, RAM_MB, 1)
    floor.start()
    floor.qmp.do("cont")
    asyncio.run(floor.meet(filled(0)))
    state, ram, nonce = directory / "state", directory / "ram", floor.nonce
    floor.suspend(state, ram)
    frozen = tuple(floor.layers)
    times: dict[str, list[float]] = {"floor": [], "template": [], "pool": [], "run": []}
    with (
        service(directory / "template", **SIZE) as (plain, _),
        service(directory / "pool", CAPSEM_POOL_SIZE="1", **SIZE) as (pooled, _),
    ):
        create(plain, "template")  # the first one makes it
        for _ in range(runs):
            while not full(pooled):
                time.sleep(0.1)
            time.sleep(SETTLE)
            floor.ram, floor.layers, floor.nonce = ram, list(frozen), nonce
            times["floor"].append(floor_of(floor, state))
            floor.close()
            times["template"].append(create(plain, "template"))
            time.sleep(SETTLE)
            times["run"].append(run_true(directory / "template"))
            times["pool"].append(create(pooled, "pool"))
    with service(directory / "template", **SIZE) as (plain, _):
        seconds = batch(plain)
    return [
        Row("warm create to first exec (ms)", times["template"], times["floor"], "1.5 x, under 600"),
        Row("the same with a pool (ms)", times["pool"], times["floor"], "under 200"),
        Row("capsem run true as a process (ms)", times["run"], times["floor"], "under 1200"),
        Row(f"{BATCH} warm creates, two at a time (s)", [seconds], (), "under 15"),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=8, help="of each (default 8)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures to a file, too")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="bench") as text:
        rows = measure(Path(text), arguments.runs)
    print(show(rows))
    if arguments.json:
        figures = [
            {"name": row.name, "median": statistics.median(row.ours), "ours": list(row.ours), "floor": list(row.floor)}
            for row in rows
        ]
        arguments.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
