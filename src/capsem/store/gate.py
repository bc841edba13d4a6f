"""The host-wide part of the gate: a flock for all services of a user, one that keeps it fair, and one for those at work.

    <path>        held by a service while an operation goes on: alone by one that must not overlap, shared by others
    <path>.turn   held while somebody waits for <path>, hence by one at a time
    <path>.work   held by the supervisor that carries the operation out, in the same way

Whoever wants the first takes the second before, waits with it in hand, and lets go of it then. So those that share
cannot keep out for ever one that wants to be alone: from when it waits, nobody gets past it. A service may be killed
while its supervisor is at work: so whoever has got the first waits until the third is free, too.

All are freed by the kernel when their process dies. The path lies outside of CAPSEM_HOME: services with homes of their
own (two checkouts, the workers of a test) run on the same hypervisor.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from capsem.model.errors import HostNotReady, Unavailable
from capsem.store.locks import Lock
from capsem.store.waiting import wait_for_lock

OFF: Final = "off"


def default_path(environ: Mapping[str, str]) -> Path | None:
    """Where this user's lock is; CAPSEM_GATE is another path, or "off", which gives None: nothing is kept apart."""
    chosen = environ.get("CAPSEM_GATE")
    if chosen == OFF:
        return None
    return Path(chosen or f"/tmp/capsem-vz-save-restore-{os.getuid()}.lock")  # noqa: S108 - the contract's; see O_NOFOLLOW


class HostLock:
    """The three of them."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._turn = path.with_name(f"{path.name}.turn")
        self._work = path.with_name(f"{path.name}.work")

    async def take(self, *, shared: bool) -> Lock:
        """Wait for as long as it takes; a caller that is cancelled holds nothing. Raises HostNotReady."""
        turn = await self._poll(self._turn, shared=False)
        try:
            lock = await self._poll(self._path, shared=shared)
            try:
                (await self._poll(self._work, shared=shared)).release()
            except BaseException:
                lock.release()
                raise
            return lock
        finally:
            turn.release()

    async def work(self, *, shared: bool, limit: float) -> Lock:
        """For who carries out what a service has taken the lock for. It is free then, unless that service was killed
        meanwhile and somebody else is at work. Raises HostNotReady, Unavailable after so many seconds.
        """
        try:
            async with asyncio.timeout(limit):
                return await self._poll(self._work, shared=shared)
        except TimeoutError:
            raise Unavailable(
                "another VM of this host is being started, stopped, saved or resumed",
                hint="nothing was done; try again",
            ) from None

    async def try_for(self, limit: float, unless: asyncio.Event) -> Lock | None:
        """Share it with others; None when that took longer than `limit` seconds, cannot be, or `unless` was set meanwhile."""
        taking = asyncio.ensure_future(self.take(shared=True))
        changed = asyncio.ensure_future(unless.wait())
        taken = False
        try:
            await asyncio.wait((taking, changed), timeout=limit, return_when=asyncio.FIRST_COMPLETED)
            taken = taking.done() and taking.exception() is None
            return taking.result() if taken else None
        finally:
            changed.cancel()
            if not taken:
                taking.add_done_callback(_let_go)
                taking.cancel()

    async def _poll(self, path: Path, *, shared: bool) -> Lock:
        try:
            return await wait_for_lock(path, shared=shared)
        except OSError as error:
            raise HostNotReady(
                f"the lock {path}, by which services of one user agree, cannot be used: {error.strerror}",
                hint="remove it if it is another user's, or name another with CAPSEM_GATE",
            ) from error


def _let_go(taking: asyncio.Future[Lock]) -> None:
    """Of a lock that came too late."""
    if not taking.cancelled() and taking.exception() is None:
        taking.result().release()
