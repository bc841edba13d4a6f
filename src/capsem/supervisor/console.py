"""What a guest shows, on its way to capped logs: its serial console, and its terminals."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path

from capsem.store.lines import CappedLog

log = logging.getLogger("capsem_process")


class Transcript:
    """A capped log that begins with the first byte; a full disk loses what was shown, not the VM."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._log: CappedLog | None = None
        self._failed = False

    def write(self, data: bytes) -> None:
        """Append."""
        try:
            self._log = self._log or CappedLog(self._path)
            self._log.write(data)
        except OSError as error:
            if not self._failed:
                log.error("%s cannot be written: %s", self._path.name, error)
            self._failed = True

    def move(self, path: Path) -> None:
        """The log was renamed."""
        self._path = path
        if self._log is not None:
            self._log.path = path

    def close(self) -> None:
        """No more will come."""
        if self._log is not None:
            self._log.close()
            self._log = None


class Console(asyncio.Protocol, Transcript):
    """Writes what comes from the guest's console."""

    def data_received(self, data: bytes) -> None:
        """See asyncio.Protocol."""
        self.write(data)

    def connection_lost(self, exc: Exception | None) -> None:
        """See asyncio.Protocol."""
        self.close()
