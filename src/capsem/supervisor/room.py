"""A VM whose writes find no room on the host's disk: it stands still, says so, and goes on when there is room again.

Nothing is lost meanwhile: the VMM keeps the writes that failed, and the guest's clock is put right by the next ping.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable
from pathlib import Path

from capsem.hypervisor.driver import Machine
from capsem.model.errors import MachineFailed

ENOUGH = 64 * 1024 * 1024  # bytes that have to be free, or a tenth of the file system if that is less
FULL = 1024 * 1024  # bytes
TURN = 3.0  # seconds between looks

log = logging.getLogger("capsem_process.room")


async def keep_going(machine: Machine, store: Path, warn: Callable[[str | None], None]) -> None:
    """Watch over a machine for as long as it runs. `warn` is told what to show of it, and None when it goes on."""
    while True:
        await machine.out_of_space()
        warning = f"the host's disk is full: the VM stands still until there is room in {store}"
        log.error("%s", warning)
        warn(warning)
        while True:  # a pause in any case: a machine that is paused on purpose stays out of space through a retry
            await asyncio.sleep(TURN)
            if has_room(store):
                break
        try:
            await machine.retry()
        except MachineFailed as error:
            log.error("the VM cannot go on: %s", error)
            return  # it has ended, or QEMU does not obey: both are told elsewhere
        warn(None)
        log.info("there is room on the host's disk again: the VM goes on")


def is_full(store: Path) -> bool:
    """Whether there is no room for anything of size: what a VMM that says no more than "I/O error" then means."""
    found = os.statvfs(store)
    return found.f_bavail * found.f_frsize < FULL


def has_room(store: Path) -> bool:
    """Whether enough is free that a VM which goes on will not stop at its next write."""
    found = os.statvfs(store)
    return found.f_bavail * found.f_frsize >= min(ENOUGH, found.f_blocks * found.f_frsize // 10)
