"""Whether the host's disk has room for what a VM's next suspend may write.

    needed = the RAM that its machine has changed, and what of the memory that it came from is yet to be copied
             (never more than all of its RAM), and MARGIN for the layers and everything else

The RAM that a machine has changed is what the kernel counts as its VMM's anonymous memory: pages of the private mapping
that were written to. The VMM's own are among them, some tens of MB: they make the warning come a little early.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Final

from capsem.store import durable
from capsem.store.layout import CheckpointDir, Layout

MARGIN: Final = 128 << 20  # bytes


def needed(ram: int, changed: int, base: int, prepared: int) -> int:
    """Bytes; `base` is what the memory file that the machine came from takes, `prepared` what is copied of it already."""
    return min(ram, changed + max(0, base - prepared)) + MARGIN


def warning(vm_id: str, wanted: int, free: int) -> str | None:
    """What to tell the owner of a VM, for whose next suspend `wanted` bytes may be needed."""
    if free >= wanted:
        return None
    return (
        f"the host's disk is nearly full: {free >> 20} MiB are free, the next suspend of {vm_id} may need "
        f"{wanted >> 20} MiB; `capsem df` shows what takes room"
    )


def free_bytes(layout: Layout) -> int:
    """What is free where VMs are stored. Raises OSError."""
    disk = os.statvfs(layout.layers)
    return disk.f_bavail * disk.f_frsize


def changed_bytes(vmm_pid: int) -> int:
    """Anonymous memory of a process, swapped out or not; 0 when it is gone."""
    try:
        lines = Path(f"/proc/{vmm_pid}/status").read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return 0
    words = (line.split() for line in lines)
    return sum(int(word[1]) << 10 for word in words if word and word[0] in ("RssAnon:", "VmSwap:"))


def draft_bytes(layout: Layout, supervisor: int) -> int:
    """What the drafts of checkpoints take that this process is making: it has their locks open."""
    total, opened = 0, _open_files(supervisor)
    for files in map(CheckpointDir, layout.checkpoints.iterdir()):
        with contextlib.suppress(OSError):  # most have no such file
            lock = files.draft.stat()
            if (lock.st_dev, lock.st_ino) in opened:
                total += durable.allocated_bytes(files.memory)
    return total


def _open_files(pid: int) -> set[tuple[int, int]]:
    found = set()
    with contextlib.suppress(OSError):  # it has ended
        for descriptor in Path(f"/proc/{pid}/fd").iterdir():
            with contextlib.suppress(OSError):
                info = descriptor.stat()
                found.add((info.st_dev, info.st_ino))
    return found
