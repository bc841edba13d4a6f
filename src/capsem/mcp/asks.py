"""Requests of VMs that want an answer: from the first time that somebody looks, this server follows them, so that they wait."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from typing import Any, Final

from capsem.mcp.calls import Service
from capsem.mcp.translate import Call
from capsem.model.errors import CapsemError

AGAIN: Final = 2.0  # seconds until the service is followed again after it was lost
FIRST: Final = 5.0  # seconds for it to be followed for the first time

log = logging.getLogger("capsem_mcp.asks")


class Asks:
    """Follows the service from the first `look` to this program's end."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._following: asyncio.Task[None] | None = None
        self._heard = asyncio.Event()

    async def look(self, call: Call) -> Any:
        """What waits; with `wait`, once something does, or after so many seconds."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + call.here["wait"]
        if self._following is None:
            self._following = asyncio.create_task(self._follow(), name="asks")
            await self._hear(loop.time() + FIRST)
        while True:
            self._heard.clear()
            answer = await self._service.call(call)
            if answer["asks"] or loop.time() >= deadline:
                return answer
            await self._hear(deadline)

    async def _hear(self, deadline: float) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout_at(deadline):
                await self._heard.wait()

    async def _follow(self) -> None:
        while True:
            try:
                await self._service.follow("network_events", self._heard.set)
            except (CapsemError, OSError) as error:
                log.warning("requests that want an answer cannot be followed: %s", error)
            await asyncio.sleep(AGAIN)
