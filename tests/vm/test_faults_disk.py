"""A small file system that fills up: every operation finds it full, or nearly, and loses nothing that was acknowledged."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from fault_bench import Bench, bench
from small_disk import MIB, Disk, mounted

OPERATIONS = ("boot", "suspend", "resume", "checkpoint", "layer", "rollback", "fork", "delete")
# Bytes that are left: for nothing, for a record, for a layer; of real VMs, for some of the memory too.
SIMULATED = (0, 8 << 10, 64 << 10, MIB)
REAL = (0, 8 << 10, MIB, 30 * MIB)
CHOSEN = [("suspend", MIB), ("rollback", 8 << 10)]


class Place(NamedTuple):
    """A service whose run directory is small."""

    bench: Bench
    disk: Disk


def place(hypervisor: str, size_mb: int) -> Iterator[Place]:
    with (
        tempfile.TemporaryDirectory(prefix="capsem-vm-") as text,  # a short path: sockets have to fit
        mounted(Path(text) / "run", size_mb) as disk,
        bench(hypervisor, Path(text)) as it,
    ):
        yield Place(it, disk)


@pytest.fixture(scope="module")
def simulated() -> Iterator[Place]:
    yield from place("sim", 64)


@pytest.fixture(scope="module")
def real() -> Iterator[Place]:
    yield from place("qemu", 1500)


@pytest.mark.parametrize("room", SIMULATED)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_whatever_finds_no_room_nothing_acknowledged_is_lost(simulated: Place, operation: str, room: int) -> None:
    simulated.bench.squeeze(operation, simulated.disk, room)


@pytest.mark.parametrize(
    ("operation", "room"),
    [
        pytest.param(operation, room, marks=() if (operation, room) in CHOSEN else pytest.mark.soak)
        for operation in OPERATIONS
        for room in REAL
    ],
)
def test_the_same_of_real_vms(real: Place, operation: str, room: int) -> None:
    real.bench.squeeze(operation, real.disk, room)
