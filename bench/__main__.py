"""`python -m bench`: how fast a VM starts and answers, beside QEMU alone; what the processes cost.

Ratios mean something, absolute times do not: the machine may be small, shared and noisy, so each of ours is taken right
beside a floor, in turn.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from bench.floor import Bare, guest_of, spawn_times
from bench.table import Row, show
from capsem.client.sync import Client
from capsem.hypervisor.driver import Accelerator
from capsem.hypervisor.qemu.driver import QemuDriver
from capsem.image.catalog import Catalog, Image

BIN = Path(sys.executable).parent


@contextlib.contextmanager
def service(directory: Path, **more: str) -> Iterator[tuple[Client, int]]:
    """A service of its own, with `more` in its environment; its client and process id."""
    env = {**os.environ, "CAPSEM_HOME": str(directory), "CAPSEM_RUN_DIR": str(directory / "run"), **more}
    process = subprocess.Popen([BIN / "capsem-service", "--foreground"], env=env)
    client = Client(directory / "run" / "service.sock")
    try:
        while True:
            with contextlib.suppress(Exception):
                client.call("version")
                break
            time.sleep(0.02)
        yield client, process.pid
    finally:
        process.terminate()
        process.wait(20)


def status(pid: int, key: str) -> float:
    """A field of /proc/<pid>/status in MB."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) / 1024
    raise KeyError(key)


def cpu_seconds(pid: int) -> float:
    """CPU time that a process has used."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def milliseconds(began: float) -> float:
    """Since `began`."""
    return (time.perf_counter() - began) * 1e3


def boots(
    client: Client, image: Image, accelerator: Accelerator, directory: Path, ram_mb: int, cpus: int, runs: int
) -> Row:
    """Create to first exec, cold, beside QEMU's exec to the agent's first byte."""
    ours, floor = [], []
    for _ in range(runs):
        bare = Bare(image, directory, accelerator, ram_mb, cpus)
        try:
            floor.append(bare.first_byte())
        finally:
            bare.end()
        began = time.perf_counter()
        vm_id = client.call("provision", body={"ram_mb": ram_mb, "cpus": cpus, "cold": True})["id"]
        client.call("exec", vm_id=vm_id, body={"command": "true"})
        ours.append(milliseconds(began))
        client.call("delete", vm_id=vm_id)
    limit = "1.5 x, under 7 s" if ram_mb == 512 else "under 10 s"
    return Row(f"create to first exec, cold, {ram_mb} MiB/{cpus} cpu (ms)", ours, floor, limit)


async def exec_floor(image: Image, accelerator: Accelerator, directory: Path, count: int) -> list[float]:
    """Fork+exec in the guest plus one ping."""
    bare = Bare(image, directory, accelerator, 512, 1)
    try:
        async with guest_of(bare.control) as guest:
            pings = [await guest.ping(5) * 1e3 for _ in range(count)]
            spawns = await spawn_times(guest, count)
            return [ping + spawn for ping, spawn in zip(sorted(pings), sorted(spawns), strict=True)]
    finally:
        bare.end()


def recorded(directory: Path, count: int) -> Row:
    """An exec that goes into the ledger, beside one that does not: of two services, in turn."""
    ours: list[float] = []
    floor: list[float] = []
    with (
        service(directory / "on") as (on, _),
        service(directory / "off", CAPSEM_LEDGER="off") as (off, _),
    ):
        for client in (on, off):
            client.call("provision", body={"name": "box", "ram_mb": 512, "cpus": 1})
            client.call("exec", vm_id="box", body={"command": "true"})
        for number in range(count):
            pair = [(on, ours), (off, floor)]
            for client, times in pair if number % 2 else pair[::-1]:
                began = time.perf_counter()
                client.call("exec", vm_id="box", body={"command": "true"})
                times.append(milliseconds(began))
    return Row("exec true, recorded and not (ms)", ours, floor, "1.05 x")


def measure(runs: int) -> list[Row]:
    """All rows."""
    image = Catalog.from_environment(os.environ).find()
    rows = []
    with tempfile.TemporaryDirectory() as text, service(Path(text) / "home") as (client, service_pid):
        directory = Path(text)
        driver = QemuDriver(directory / "cache")
        accelerator = asyncio.run(driver.accelerator())
        rows.append(boots(client, image, accelerator, directory, 512, 1, runs))
        rows.append(boots(client, image, accelerator, directory, 4096, 4, max(1, runs // 2)))

        floor = asyncio.run(exec_floor(image, accelerator, directory, 50))
        client.call("provision", body={"name": "box", "ram_mb": 512, "cpus": 1})
        client.call("exec", vm_id="box", body={"command": "true"})
        ours = []
        for _ in range(50):
            began = time.perf_counter()
            client.call("exec", vm_id="box", body={"command": "true"})
            ours.append(milliseconds(began))
        rows.append(Row("exec true (ms)", ours, floor, "1.5 x"))

        env = {**os.environ, "CAPSEM_HOME": str(directory / "home"), "CAPSEM_RUN_DIR": str(directory / "home" / "run")}
        for name, argv, limit in (
            ("capsem list as a process (ms)", [BIN / "capsem", "list"], "under 150"),
            ("  python -c pass (ms)", [sys.executable, "-c", "pass"], ""),
        ):
            times = []
            for _ in range(15):
                began = time.perf_counter()
                subprocess.run(argv, env=env, check=True, stdout=subprocess.DEVNULL)
                times.append(milliseconds(began))
            rows.append(Row(name, times, (), limit))

        supervisor = client.call("info", vm_id="box")["pid"]
        used, began = cpu_seconds(service_pid), time.perf_counter()
        time.sleep(10)
        rows.append(
            Row(
                "service, idle: CPU (%)",
                [(cpu_seconds(service_pid) - used) * 100 / (time.perf_counter() - began)],
                (),
                "0",
            )
        )
        rows.append(Row("service, idle: RSS (MB)", [status(service_pid, "VmRSS")], (), "under 80"))
        rows.append(Row("supervisor: RSS (MB)", [status(supervisor, "VmRSS")], (), "under 60"))
    with tempfile.TemporaryDirectory() as text:
        rows.append(recorded(Path(text), 100))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=5, help="boots of each size (default 5)")
    arguments = parser.parse_args()
    cpu = next(
        (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line),
        "",
    )
    print(f"{os.cpu_count()} x {cpu}, {platform.platform()}, Python {platform.python_version()}; medians (min-max)\n")
    print(show(measure(arguments.runs)))


if __name__ == "__main__":
    main()
