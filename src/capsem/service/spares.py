"""A supervisor that waits for its VM: what takes a process longest, importing, is done before anybody waits for it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

from capsem.system import Child, System

ROOM = 512  # bytes for the arguments that a spare will show
PAUSE = 0.5  # seconds after one was taken until the next is made: those belong to the VM that starts

log = logging.getLogger("capsem_service.spares")


class Spares:
    """Keeps one supervisor in reserve. A service that ends, however it ends, takes it along: its standard input closes."""

    def __init__(
        self, system: System, argv: Sequence[str], hypervisor: str, env: Mapping[str, str], log_file: Path
    ) -> None:
        """`argv` is a supervisor's, without options; until it has a VM, its complaints go to `log_file`."""
        self._system = system
        self._argv = [*argv, "--spare", "_" * ROOM, "--hypervisor", hypervisor]
        self._env = env
        self._log_file = log_file
        self._child: Child | None = None
        self._making: asyncio.Task[None] | None = None

    def prepare(self, pause: float = PAUSE) -> None:
        """Make one in a while, unless there is one or it is on its way."""
        if self._child is None and self._making is None:
            self._making = asyncio.create_task(self._make(pause), name="spare")

    async def _make(self, pause: float) -> None:
        await asyncio.sleep(pause)
        try:
            self._child = await self._system.processes.spawn(self._argv, env=self._env, stdin=None, log=self._log_file)
        except OSError as error:  # then VMs start without one, and say what is wrong
            log.warning("no spare supervisor: %s", error)
        finally:
            self._making = None

    async def take(self, bootstrap: bytes, room: int) -> Child | None:
        """The spare, told what to do; None when there is none, or its arguments would not show in full."""
        child, self._child = (self._child, None) if room <= ROOM else (None, self._child)
        self.prepare()
        if child is None or child.status is not None:
            return None
        try:
            await child.feed(bootstrap)
        except OSError as error:
            log.warning("the spare supervisor has ended: %s", error)
            await child.wait()
            return None
        return child

    async def close(self) -> None:
        """End it."""
        if self._making is not None:
            self._making.cancel()
            await asyncio.gather(self._making, return_exceptions=True)
        child, self._child = self._child, None
        if child is not None and child.status is None:
            self._system.processes.signal(child.pid, 9)
            await child.wait()
