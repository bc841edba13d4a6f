"""The host's memory: what is left of it, and what processes take."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple


class HostMemory(NamedTuple):
    """In bytes. `available`: for new programs, without swapping, as the kernel estimates it."""

    total: int
    available: int


def host_memory() -> HostMemory:
    """As it is now. Raises OSError."""
    fields = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines())
    total, available = (int(fields[name].split()[0]) << 10 for name in ("MemTotal", "MemAvailable"))
    return HostMemory(total, available)


def process_memory(pids: Iterable[int]) -> int:
    """Bytes that processes take; of pages that several have mapped, each has its part. What has ended takes nothing."""
    total = 0
    for pid in pids:
        with contextlib.suppress(OSError):
            for line in Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="ascii").splitlines():
                if line.startswith("Pss:"):
                    total += int(line.split()[1]) << 10
    return total
