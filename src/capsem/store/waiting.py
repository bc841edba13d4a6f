"""Waiting for a lock on an event loop; apart from `locks`, which clients without one import."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Final

from capsem.store.locks import Lock, try_lock

POLL: Final = 0.02  # seconds between two looks at a lock of another process


async def wait_for_lock(path: Path, *, shared: bool = False) -> Lock:
    """As `try_lock`, but waits for as long as it takes; a caller that is cancelled holds nothing. Raises OSError."""
    while (lock := try_lock(path, shared=shared)) is None:
        await asyncio.sleep(POLL)
    return lock
