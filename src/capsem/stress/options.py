"""What a stress test is to do, and whether this host has room for it."""

from __future__ import annotations

import os
import random
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from capsem.model.errors import HostNotReady, InvalidInput

QEMU: Final = "qemu"
SIM: Final = "sim"
RAM_MB: Final = 256
DISK_MB: Final = 2048
OVERHEAD: Final = 160 << 20  # bytes of memory that QEMU and a supervisor take beside the guest's
ON_DISK: Final = 6  # times its memory that a VM may take: checkpoints, the one being made, layers
SIMULATED: Final = 48 << 20  # bytes of memory for a simulated VM


@dataclass(frozen=True, slots=True)
class Options:
    """`services` with `vms` each; `clients` that use all of them; until so many `cycles` of suspend, resume and check are
    done, by all together, or for `duration` seconds, whichever comes first. `light`: a cycle is a write, a suspend, a
    resume and a check, and nothing else."""

    hypervisor: str = QEMU
    gate: bool = True
    services: int = 1
    vms: int = 3
    cycles: int | None = 100
    clients: int = 6
    duration: float | None = None
    faults: bool = False
    light: bool = False
    seed: int = field(default_factory=lambda: random.randrange(1 << 32))

    def __post_init__(self) -> None:
        if not self.gate and self.hypervisor != SIM:
            raise InvalidInput(
                "--no-gate is for the simulated hypervisor alone",
                hint="add --hypervisor sim: without its gate it loses the disks of guests, to show that the gate is needed",
            )

    @property
    def machines(self) -> int:
        """How many may run at once: each VM, and a fork of it."""
        vms = self.services * self.vms
        return vms + min(vms, self.clients)

    def check_room(self, environ: Mapping[str, str]) -> None:
        """Raises HostNotReady, with what would fit, when memory or disk are too small."""
        each = RAM_MB << 20 if self.hypervisor == QEMU else 1 << 20
        resident = each + OVERHEAD if self.hypervisor == QEMU else SIMULATED
        place = Path(environ.get("TMPDIR") or tempfile.gettempdir())
        for what, needed, there in (
            ("memory", self.machines * resident, available_memory()),
            (f"room in {place}", self.machines * each * ON_DISK, shutil.disk_usage(place).free),
        ):
            if needed > there:
                raise HostNotReady(
                    f"{self.machines} VMs at once may need {needed >> 20} MiB of {what}; there are {there >> 20}",
                    hint="fewer --vms, --clients or --services; TMPDIR names another place",
                )


def available_memory() -> int:
    """Bytes that programs can still have (proc(5), MemAvailable)."""
    for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) << 10
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
