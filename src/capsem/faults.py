"""Steps with names, at which a fault can be made to happen: what it leaves behind is tested at every one of them.

Off, and then one comparison with None, unless a service is started with CAPSEM_FAULTS=FILE; its supervisors are handed
the file with their parameters. Whoever comes to a step appends its name and pid to FILE.seen and looks into FILE, which may
hold one order:

    STEP KIND [SECONDS]         KIND: kill, kill-vmm, stop-vmm, enospc, delay

The first to come to that step takes the order, by renaming FILE to FILE.taken, and carries it out: every order happens
once, and who gave it can see that it did. To be used by tests; there is nothing here that a client or a guest reaches.
The steps are also points in a trace (capsem.tracing), where one is wanted.
"""

from __future__ import annotations

import errno
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from types import MappingProxyType
from typing import Final

from capsem import tracing

VARIABLE: Final = "CAPSEM_FAULTS"
KINDS: Final = ("kill", "kill-vmm", "stop-vmm", "enospc", "delay")

# In the supervisor. "boot" is a cold start, "resume" one from memory; "checkpoint" a save that lets the machine go on.
SUPERVISOR: Final = MappingProxyType(
    {
        "boot.claimed": "the VM is ours; its record is as it was",
        "boot.begun": "the record says starting; the VMM comes up",
        "boot.started": "the VMM is there, its vCPUs have not run",
        "boot.running": "the vCPUs run",
        "boot.ready": "the guest has shown that it is well; the record does not say so yet",
        "boot.recorded": "the record says running, nobody was told",
        "resume.claimed": "the VM is ours; its record is as it was",
        "resume.begun": "the record says resuming, and names the new layer; the VMM comes up",
        "resume.started": "the VMM has taken in its devices, its vCPUs have not run",
        "resume.running": "the vCPUs run",
        "resume.ready": "the guest has shown that it is well; the record does not say so yet",
        "resume.recorded": "the record says running, nobody was told",
        "suspend.reserved": "there is a draft, and the guest flushes",
        "suspend.layered": "there is a layer to go on in, which nothing names",
        "suspend.named": "the record says suspending, and names layer and draft",
        "suspend.held": "the guest's processes are held; the vCPUs are about to stop",
        "suspend.saved": "devices and memory are written, the manifest is not",
        "suspend.committed": "the checkpoint is there; the record does not name it",
        "suspend.recorded": "the record says suspended, the VMM is being killed",
        "checkpoint.reserved": "there is a draft, and the guest flushes",
        "checkpoint.layered": "there is a layer to go on in, which nothing names",
        "checkpoint.named": "the record names the layer",
        "checkpoint.held": "the guest's processes are held; the vCPUs are about to stop",
        "checkpoint.saved": "the machine goes on; devices and memory are written, the manifest is not",
        "checkpoint.committed": "the checkpoint is there; the record does not name it",
        "checkpoint.recorded": "the record names it, nobody was told",
        "layer.named": "for a fork of the disk: the record names a new layer, the VMM does not write to it yet",
        "layer.added": "the VMM writes to it, nobody was told",
        "flatten.naming": "the record is about to name a merged layer",
        "flatten.named": "the record names it, nobody was told",
    }
)
SERVICE: Final = MappingProxyType(
    {
        "start.layered": "a VM that will be started has a new layer where it needs one",
        "suspend.acknowledged": "the supervisor says that all is saved, and ends",
        "suspend.done": "it has ended; the client was not answered",
        "rollback.kept": "the present is a checkpoint, and nothing runs",
        "rollback.recorded": "the record is that of the checkpoint; what nobody needs now is still there",
        "fork.instant": "there is a checkpoint to fork from",
        "fork.recorded": "the forks are there, suspended",
        "fork.frozen": "for a fork of the disk: the source's layers are frozen, there is no child",
        "flatten.merged": "a merged layer is there, which nothing names",
        "flatten.replaced": "the record names it; those that it was merged from are still there",
        "delete.stopped": "nothing of the VM runs",
        "delete.unrecorded": "its record is gone, its files are not",
        "delete.removed": "its directory is gone, its layers and checkpoints are not",
    }
)

# What comes next there is a write that a full disk refuses: elsewhere "enospc" is a fault that cannot be.
WRITES: Final = frozenset(
    {
        "boot.claimed",
        "boot.ready",
        "resume.claimed",
        "resume.ready",
        "suspend.reserved",
        "suspend.layered",
        "suspend.saved",
        "checkpoint.reserved",
        "checkpoint.layered",
        "checkpoint.saved",
        "flatten.naming",
        "rollback.kept",
        "fork.instant",
        "fork.frozen",
    }
)

_hook: Callable[[str, int], None] | None = None


def at(step: str, vmm: int = 0) -> None:
    """This process is at a step; `vmm` is the process that a fault may be meant for. Raises OSError if that is the fault."""
    if (trace := tracing.active()) is not None:
        trace.instant(step)
    if _hook is not None:
        _hook(step, vmm)


def install(hook: Callable[[str, int], None] | None) -> None:
    """Have `hook` called at each step from here on, as `at` is; None: nothing."""
    global _hook
    _hook = hook


def load(file: str | None) -> None:
    """Take orders from a file, if one is named."""
    install(Orders(Path(file)) if file else None)


class Orders:
    """Carries out what a file orders, once."""

    def __init__(self, file: Path) -> None:
        self._file = file

    def __call__(self, step: str, vmm: int) -> None:
        """See `at`."""
        with self._file.with_name(f"{self._file.name}.seen").open("a") as seen:
            seen.write(f"{step} {os.getpid()}\n")
        try:
            wanted, kind, *rest = self._file.read_text().split()
            if wanted != step:
                return
            self._file.rename(self._file.with_name(f"{self._file.name}.taken"))
        except (FileNotFoundError, ValueError):  # there is no order, or somebody else took it, or it is being written
            return
        if kind == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        elif kind in ("kill-vmm", "stop-vmm") and vmm:
            os.kill(vmm, signal.SIGKILL if kind == "kill-vmm" else signal.SIGSTOP)
        elif kind == "enospc":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        elif kind == "delay":
            time.sleep(float(rest[0]))
