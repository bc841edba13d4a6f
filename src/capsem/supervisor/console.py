"""The guest's serial console, on its way to a capped log."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path

from capsem.store.lines import CappedLog

log = logging.getLogger("capsem_process")


class Console(asyncio.Protocol):
    """Writes what comes from the guest's console to a capped log."""

    def __init__(self, path: Path) -> None:
        self._log = CappedLog(path)
        self._failed = False

    def data_received(self, data: bytes) -> None:
        """See asyncio.Protocol. A full disk loses console output, not the VM."""
        try:
            self._log.write(data)
        except OSError as error:
            if not self._failed:
                log.error("the console cannot be logged: %s", error)
            self._failed = True

    def connection_lost(self, exc: Exception | None) -> None:
        """See asyncio.Protocol."""
        self._log.close()

    def move(self, path: Path) -> None:
        """The log was renamed."""
        self._log.path = path
