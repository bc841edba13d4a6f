"""One VM as the service sees it: its record, and its supervisor while there is one."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from capsem.api.internal import Stop
from capsem.model.errors import CapsemError, MachineFailed, NotRunning, TimedOut, Unavailable
from capsem.model.lifecycle import LIVE, PUBLIC_STATUS, State, Status, recover
from capsem.model.vm import Exit, VmRecord
from capsem.service.link import Link
from capsem.store import records
from capsem.store.layout import SessionDir
from capsem.store.lines import last_lines
from capsem.store.locks import take_lock, try_lock
from capsem.system import Child, System

READY_LIMIT = 30.0  # seconds that a command waits for a guest that boots
EXIT_MARGIN = 2.0  # seconds for a supervisor to exit after its machine must have ended
POWER_OFF_MARGIN = 3.0  # what the supervisor adds to the grace before it kills the machine
LOG_LINES = 20

log = logging.getLogger("capsem_service.vm")


class Vm:
    """`turn` orders transitions: hold it to start, stop or delete; commands and files do not take it."""

    def __init__(self, system: System, session: SessionDir, record: VmRecord) -> None:
        self.session = session
        self.record = record
        self.turn = asyncio.Lock()
        self.link: Link | None = None
        self.on_ended: Callable[[Vm], None] = lambda _vm: None
        self.deleted = False
        self._system = system
        self._child: Child | None = None
        self._ended = asyncio.Event()
        self._ended.set()
        self._watcher: asyncio.Task[None] | None = None

    @property
    def id(self) -> str:
        """Its id, which is its name."""
        return self.record.id

    @property
    def pid(self) -> int:
        """The supervisor's process id, 0 when there is none."""
        if self._child is not None:
            return self._child.pid
        return self.link.pid if self.link else 0

    @property
    def running(self) -> bool:
        """Whether a supervisor is there."""
        return not self._ended.is_set()

    @property
    def state(self) -> State:
        """Where it is: the supervisor's last word while there is one, else the record's."""
        if self.running:
            if self.link is not None and self.link.state is not None and self.link.state.state in LIVE:
                return State(self.link.state.state)
            return State.STARTING
        return self.record.state

    @property
    def status(self) -> Status | None:
        """What clients are shown; None: not listed."""
        return PUBLIC_STATUS[self.state]

    def begin(self, child: Child | None, link: Link) -> None:
        """A supervisor was started (a child of ours) or adopted (not)."""
        self._child, self.link = child, link
        link.on_state = lambda _state: self.reload()
        self.reload()
        self._ended.clear()
        self._watcher = asyncio.create_task(self._watch(link), name=f"watch {self.id}")

    async def _watch(self, link: Link) -> None:
        """See the supervisor out, then read what it left."""
        if self._child is not None:
            await self._child.wait()
        else:
            await link.lost.wait()
            await self._system.processes.gone(link.pid)
        status = self._child.status if self._child is not None else None
        link.channel.hang_up()
        try:
            self.settle(status)
        except Exception:
            log.exception("the record of %s cannot be settled", self.id)
        self._child = self.link = None
        self._ended.set()
        self.on_ended(self)

    def settle(self, status: int | None = None) -> None:
        """With no supervisor: make the record say so. `status` is the supervisor's exit status where it is known."""
        if not self.session.record.exists():
            return
        self.record = records.read(self.session)
        same_boot = self.record.host_boot_id in (None, self._system.clock.boot_id())
        state = recover(self.record.state, supervisor_alive=False, same_host_boot=same_boot)
        if state == self.record.state:
            return
        claim = try_lock(self.session.claim)
        if claim is None:
            raise Unavailable(f"somebody else supervises {self.id}")
        try:
            if same_boot:
                how = f"by signal {-status}" if status is not None and status < 0 else "without a word"
                tail = last_lines(self.session.process_log, LOG_LINES)
                ending = Exit("failed", f"the supervisor ended {how}", tail)
            else:
                ending = Exit("clean", "host restarted")
            self.record = replace(self.record, state=state, last_exit=ending)
            records.write(self.session, self.record)
        finally:
            claim.release()

    def reload(self) -> None:
        """Read the record again, which the supervisor may have changed. One that cannot be read leaves what we had."""
        try:
            self.record = records.read(self.session)
        except (OSError, CapsemError) as error:
            log.error("the record of %s cannot be read: %s", self.id, error)

    def rewrite(self, **changes: Any) -> None:
        """Change the record of a VM that does not run. Raises Unavailable when somebody holds its claim."""
        claim = take_lock(self.session.claim, f"VM {self.id}")
        try:
            self.record = replace(self.record, **changes)
            records.write(self.session, self.record)
        finally:
            claim.release()

    async def ended(self, limit: float) -> bool:
        """Wait until no supervisor is there; False when `limit` seconds were not enough."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(limit):
                await self._ended.wait()
        return not self.running

    async def ready_link(self, limit: float = READY_LIMIT) -> Link:
        """The link to a guest that may be spoken to. Raises NotRunning, TimedOut, MachineFailed (it ended meanwhile)."""
        link = self.link
        if link is None:
            raise NotRunning(f"{self.id} is not running", hint=f"start it with `capsem resume {self.id}`")
        try:
            ready = await link.wait_ready(limit)
        except CapsemError:
            await self.ended(EXIT_MARGIN)
            raise MachineFailed(
                f"{self.id} ended before it was ready: {self.record.last_error or 'stopped'}",
                hint=f"capsem logs {self.id}",
            ) from None
        if not ready:
            raise TimedOut(f"{self.id} was not ready after {limit:.0f} s", hint=f"capsem logs {self.id}")
        return link

    async def stop(self, request: Stop) -> None:
        """End the supervisor and wait until it is gone; a supervisor that does not go is killed."""
        link = self.link
        if link is None:
            return
        limit = EXIT_MARGIN + (0.0 if request.kill else request.grace + POWER_OFF_MARGIN)
        with contextlib.suppress(CapsemError):
            link.open(request)
        if not await self.ended(limit):
            log.warning("the supervisor of %s did not end within %.1f s; killing it", self.id, limit)
            self._system.processes.signal(self.pid, 9)
            await self.ended(EXIT_MARGIN)

    def terminate(self, number: int) -> None:
        """Send the supervisor a signal, if there is one."""
        if self.running and self.pid:
            self._system.processes.signal(self.pid, number)
