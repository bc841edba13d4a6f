"""A guard against clear regressions of speed: ours beside QEMU alone doing the same, in turn, on the machine as it is.

The least of each side is compared, since other work on the machine only ever adds to a time. Rounds are repeated until
the ratio is within its limit: on a busy machine that takes more of them, and what has become slow never gets there.
docs/performance.md says where the limits come from.
"""

from __future__ import annotations

import asyncio
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

from bench.bare import BareMachine, Suspended
from bench.boots import timed
from bench.host import service
from bench.warm import RAM_MB, SIZE, create, restore
from capsem.client.sync import Client
from capsem.hypervisor.qemu.driver import QemuDriver
from capsem.image.catalog import Catalog

ROUNDS = 8
SETTLE = 2.5  # seconds after a start: the next supervisor is made ready, memory is copied ahead of the next suspend
BOX = {"name": "box", "persistent": True}


@dataclass
class Sides:
    """Both, ready: a service with a template and a VM that runs, and a saved machine of QEMU alone."""

    client: Client
    floor: BareMachine
    saved: Suspended

    def exec(self) -> tuple[float, float]:
        """`true` in a VM that runs; a word through a bare port, and `bash -c true` at its end. Milliseconds."""
        ours = min(timed(lambda: self.client.call("exec", vm_id="box", body={"command": "true"})) for _ in range(5))
        self.floor.resume(self.saved)
        floor = min(timed(lambda: self.floor.do("true")) for _ in range(5))
        self.floor.close()
        return ours, floor

    def create(self) -> tuple[float, float]:
        """From a template, or what was saved, to the end of the first command."""
        time.sleep(SETTLE)
        return create(self.client, "template"), restore(self.floor, self.saved)

    def suspend(self) -> tuple[float, float]:
        """To the end of the process, everything durable, of a VM that has done little since its resume."""
        self.floor.resume(self.saved)
        time.sleep(SETTLE)
        floor, _ = self.floor.suspend()
        ours = timed(lambda: self.client.call("suspend", vm_id="box"))
        self.client.call("resume", vm_id="box")
        self.client.call("exec", vm_id="box", body={"command": "true"})
        return ours, floor


@pytest.fixture(scope="module")
def sides() -> Iterator[Sides]:
    with tempfile.TemporaryDirectory(prefix="guard") as text:
        directory = Path(text)
        image = Catalog.from_environment(os.environ).find()
        accelerator = asyncio.run(QemuDriver(directory / "cache").accelerator())
        with service(directory / "s", **SIZE) as (client, _), ThreadPoolExecutor(1) as beside:
            made = beside.submit(client.call, "provision", body=BOX)  # makes the template first
            floor = BareMachine(image, directory, accelerator, RAM_MB)
            floor.do("true; sync")
            _, saved = floor.suspend()
            assert made.result()["boot_kind"] == "template"
            client.call("exec", vm_id="box", body={"command": "true"})
            yield Sides(client, floor, saved)
            client.call("delete", vm_id="box")


@pytest.mark.parametrize(
    ("take", "limit"),
    [(Sides.exec, 2.5), (Sides.create, 4.0), (Sides.suspend, 10.0)],
    ids=["exec", "create", "suspend"],
)
def test_ours_is_not_far_from_the_floor(
    sides: Sides,
    take: Callable[[Sides], tuple[float, float]],
    limit: float,
    record_property: Callable[[str, object], None],
) -> None:
    least = (float("inf"), float("inf"))
    for number in range(1, ROUNDS + 1):
        ours, floor = take(sides)
        least = min(least[0], ours), min(least[1], floor)
        print(f"round {number}: ours {ours:.1f} ms, floor {floor:.1f} ms, ratio of the least {least[0] / least[1]:.2f}")
        record_property("ratio", round(least[0] / least[1], 2))
        if number >= 2 and least[0] / least[1] <= limit:
            return
    raise AssertionError(
        f"{least[0]:.1f} ms is {least[0] / least[1]:.2f} times the floor's {least[1]:.1f}, not {limit}"
    )
