"""`python -m bench warm`: create to first exec from a template and from the pool, beside QEMU alone doing the same.

The floor has a machine of the same size saved beforehand; each time it makes a layer, starts QEMU, takes in the state of the
devices, lets it run, and has the guest run `bash -c true`: with nothing of the product above the driver's command line.
"""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from bench.bare import BareMachine, Suspended
from bench.host import command, in_turn, milliseconds, service
from bench.table import Row
from capsem.client.sync import Client
from capsem.hypervisor.driver import Accelerator
from capsem.image.catalog import Image

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


def from_pool(client: Client) -> float:
    """A create when the pool has been filled, and what was started for that has settled."""
    while not full(client):
        time.sleep(0.1)
    time.sleep(SETTLE)
    return create(client, "pool")


def restore(floor: BareMachine, saved: Suspended) -> float:
    """The floor: the same machine, as often as wanted."""
    took = floor.resume(saved)
    floor.close()
    return took


def batch(client: Client) -> float:
    """Seconds for so many creates, each to its first exec, two at a time."""
    began = time.perf_counter()
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda _number: create(client, "template"), range(BATCH)))
    return time.perf_counter() - began


def settled(seconds: float, took: float) -> float:
    """`took`, once what goes on in the background has had so long to end."""
    time.sleep(seconds)
    return took


def measure(directory: Path, image: Image, accelerator: Accelerator, runs: int) -> list[Row]:
    """All rows."""
    floor = BareMachine(image, directory, accelerator, RAM_MB)
    floor.do("true; sync")
    _, saved = floor.suspend()
    with (
        service(directory / "t", **SIZE) as (plain, _),
        service(directory / "p", CAPSEM_POOL_SIZE="1", **SIZE) as (pooled, _),
    ):
        create(plain, "template")  # the first one makes it
        times = in_turn(
            runs,
            {
                "floor": lambda: settled(0.5, restore(floor, saved)),
                "template": lambda: settled(SETTLE, create(plain, "template")),
                "pool": lambda: from_pool(pooled),
                "run": lambda: settled(SETTLE, command(directory / "t", "run", "true")),
            },
        )
    with service(directory / "t", **SIZE) as (plain, _):
        seconds = batch(plain)
    return [
        Row("warm create to first exec (ms)", times["template"], times["floor"], "1.5 x, under 600"),
        Row("the same with a pool (ms)", times["pool"], times["floor"], "under 200"),
        Row("capsem run true as a process (ms)", times["run"], times["floor"], "under 1200"),
        Row(f"{BATCH} warm creates, two at a time (s)", [seconds], (), "under 15"),
    ]
