"""VMMs whose supervisor was killed. The kernel kills them too (PR_SET_PDEATHSIG), but they take their time to go: until
their lock is free they may still write to the volume, and nobody may read, share or start what they write to.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
from pathlib import Path

from capsem.store.locks import Lock, holders, try_lock
from capsem.store.waiting import POLL
from capsem.system import Processes

ORPHAN_LIMIT = 5.0  # seconds for the VMM of an earlier, killed supervisor to die

log = logging.getLogger("capsem.orphans")


async def take_from_orphan(processes: Processes, path: Path) -> Lock | None:
    """The VMM lock at `path`; whoever holds it is killed first. The caller holds the VM's claim, or knows that nobody does.

    None when it was not to be had in ORPHAN_LIMIT. Raises OSError.
    """
    seen: set[int] = set()
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(ORPHAN_LIMIT):
            while (lock := try_lock(path)) is None:
                found = set(holders(path))
                # Whoever has the file open once may only be looking whether it is locked.
                for pid in found & seen:
                    log.warning("killing orphaned VMM %d", pid)
                    processes.signal(pid, signal.SIGKILL)
                    await processes.gone(pid)
                if not found & seen:  # it may just be going
                    await asyncio.sleep(POLL)
                seen = found
            return lock
    return None
