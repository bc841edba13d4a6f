"""The gate: which transitions of different VMs may go on at the same time, on this host.

    the driver's operations must not overlap (Features)
        alone       a save, a restore: from before the supervisor is told or spawned until it has exited, or its guest
                    has shown that it is well
        together    boots and teardowns
    they may
        at most `bound` saves, restores and boots of this service at once; teardowns as they come

Whoever comes to the gate waits in line: first in this service, in the order of arrival, so that those that go together
do not starve one that goes alone; then for the host-wide lock (store.gate), in the same way. Order: the VM's turn, the
gate, the claim, the VMM lock.

Waiting is no error for 60 s. It shows in the VM (`Vm.waiting`), it is told in the answer (`Visit.waited`), and it ends
when the client goes away (`Visit.leave`): an operation that has not passed the gate has not begun.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import deque
from collections.abc import AsyncIterator
from contextvars import ContextVar
from pathlib import Path
from typing import Final

from capsem.model.errors import Interrupted, Unavailable
from capsem.service.vm import Vm
from capsem.store.gate import HostLock
from capsem.store.locks import Lock
from capsem.system import Clock
from capsem.tracing import span

LIMIT: Final = 60.0  # seconds; interface.md 5.6
RETRY_AFTER: Final = 5.0
BOUND: Final = 8

log = logging.getLogger("capsem_service.gate")


class Visit:
    """One client's request, as far as the gate is concerned."""

    def __init__(self) -> None:
        self.waited = 0.0  # seconds at the gate
        self._gone = asyncio.Event()

    def leave(self) -> None:
        """The client is gone: what waits at the gate for it need not be done."""
        self._gone.set()

    async def left(self) -> None:
        """Return once the client is gone."""
        await self._gone.wait()


VISIT: ContextVar[Visit | None] = ContextVar("visit", default=None)  # of the request that is being served


class Pass:
    """Leave to go on; `release` it once, and once more for each `share`."""

    def __init__(self, gate: Gate, *, alone: bool, lock: Lock | None) -> None:
        self._gate = gate
        self._alone = alone
        self._lock = lock
        self._users = 1

    def share(self) -> None:
        """One more goes on with it."""
        self._users += 1

    def release(self) -> None:
        """The operation is over."""
        self._users -= 1
        if not self._users:
            if self._lock is not None:
                self._lock.release()
            self._gate.leave(self, alone=self._alone)


class Gate:
    """One service's."""

    def __init__(self, clock: Clock, *, overlap: bool, path: Path | None, bound: int = BOUND) -> None:
        """`overlap`: as the driver's features have it; `path`: of the host-wide lock, None for no gate at all."""
        self._clock = clock
        self._overlap = overlap
        self._off = path is None and not overlap
        self._host = HostLock(path) if path is not None and not overlap else None
        self._bound = bound
        self._inside = 0
        self._alone = False  # the one inside goes alone
        self._boots: dict[Vm, Pass] = {}
        self._line: deque[tuple[bool, asyncio.Future[None]]] = deque()
        if self._off:
            log.warning("the gate is off: operations of this hypervisor that must not overlap may do so")

    @property
    def booting(self) -> bool:
        """Whether a VM is in here that is being booted."""
        return bool(self._boots)

    @contextlib.asynccontextmanager
    async def change(self, vm: Vm, what: str) -> AsyncIterator[Pass]:
        """For a save or a restore; `what` is for people, such as "suspend". Raises Unavailable, Interrupted."""
        passed = await self._enter(vm, what, alone=not self._overlap)
        try:
            yield passed
        finally:
            passed.release()

    async def boot(self, vm: Vm) -> Pass:
        """For a cold boot; the caller lets go of it when the guest is ready. Raises Unavailable, Interrupted."""
        passed = self._boots[vm] = await self._enter(vm, "boot", alone=False)
        return passed

    @contextlib.asynccontextmanager
    async def teardown(self, vm: Vm) -> AsyncIterator[None]:
        """For the end of a VM; one that is still being booted is inside, and stays there. Raises Unavailable, Interrupted."""
        if self._overlap or not vm.running:
            yield
            return
        passed = self._boots.get(vm)
        if passed is None:
            passed = await self._enter(vm, "stop", alone=False)
        else:
            passed.share()
        try:
            yield
        finally:
            passed.release()

    async def _enter(self, vm: Vm, what: str, *, alone: bool) -> Pass:
        if self._off:
            return Pass(self, alone=False, lock=None)
        visit, began = VISIT.get(), self._clock.monotonic()
        entering = asyncio.ensure_future(self._wait(alone=alone))
        leaving = asyncio.ensure_future(visit.left() if visit is not None else asyncio.Event().wait())
        entered = False
        try:
            await asyncio.wait({entering}, timeout=0)
            if not entering.done():
                vm.wait_for(f"waits to {what}: {self._reason()}")
                with span("wait at the gate"):
                    await asyncio.wait({entering, leaving}, timeout=LIMIT, return_when=asyncio.FIRST_COMPLETED)
            if entering.done():
                passed = entering.result()
                entered = True
                return passed
            if leaving.done():
                raise Interrupted(f"{vm.id} still waited to {what} when its client went away: nothing was done")
            raise Unavailable(
                f"{vm.id} waited {LIMIT:.0f} s to {what}: {self._reason()}",
                hint="nothing was done; try again",
                retry_after=RETRY_AFTER,
            )
        finally:
            leaving.cancel()
            if not entered:
                entering.add_done_callback(_let_go)
                entering.cancel()
            vm.wait_for(None)
            if visit is not None:
                visit.waited += self._clock.monotonic() - began

    def _reason(self) -> str:
        if self._overlap:
            return f"{self._inside} VMs are being started, resumed or saved already"
        return "another VM of this host is being started, stopped, saved or resumed"

    async def _wait(self, *, alone: bool) -> Pass:
        await self._line_up(alone=alone)
        try:
            lock = await self._host.take(shared=not alone) if self._host is not None else None
        except BaseException:
            self.leave(None, alone=alone)
            raise
        return Pass(self, alone=alone, lock=lock)

    async def _line_up(self, *, alone: bool) -> None:
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        place = (alone, turn)
        self._line.append(place)
        self._admit()
        try:
            await turn
        except asyncio.CancelledError:
            if place in self._line:
                self._line.remove(place)
                self._admit()
            elif not turn.cancelled():
                self.leave(None, alone=alone)
            raise

    def _admit(self) -> None:
        while self._line:
            alone, turn = self._line[0]
            if turn.cancelled():
                self._line.popleft()
                continue
            full = self._inside >= (self._bound if self._overlap else 1 << 30)
            if self._alone or full or (alone and self._inside):
                return
            self._line.popleft()
            self._inside += 1
            self._alone = alone
            turn.set_result(None)

    def leave(self, passed: Pass | None, *, alone: bool) -> None:
        """For `Pass`: one is out."""
        self._boots = {vm: each for vm, each in self._boots.items() if each is not passed}
        if not self._off:
            self._inside -= 1
            self._alone = False if alone else self._alone
            self._admit()


def _let_go(entering: asyncio.Future[Pass]) -> None:
    """Of who has given up waiting, and may have got in all the same."""
    if not entering.cancelled() and entering.exception() is None:
        entering.result().release()
