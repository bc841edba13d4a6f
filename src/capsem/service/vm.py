"""One VM as the service sees it: its record, and its supervisor while there is one."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any

from capsem.api.internal import Stop
from capsem.ledger.queries import Work
from capsem.model.errors import CapsemError, Corrupt, MachineFailed, NotRunning, TimedOut, Unavailable
from capsem.model.lifecycle import LIVE, PUBLIC_STATUS, State, Status
from capsem.model.vm import Exit, VmRecord
from capsem.service.link import Link
from capsem.store import records
from capsem.store.layout import SessionDir
from capsem.store.lines import last_lines
from capsem.store.locks import Lock, is_locked, take_lock, try_lock
from capsem.store.orphans import ORPHAN_LIMIT, take_from_orphan
from capsem.system import Child, System
from capsem.tracing import span

READY_LIMIT = 30.0  # seconds that a command waits for a guest that boots
EXIT_MARGIN = 2.0  # seconds for a supervisor to exit after its machine must have ended
POWER_OFF_MARGIN = 3.0  # what the supervisor adds to the grace before it kills the machine
SIGTERM_GRACE = 1.0  # what a supervisor takes SIGTERM to mean
CLAIM_TURN = 1.0  # seconds between looks at a claim whose holder cannot be found
LOG_LINES = 20

log = logging.getLogger("capsem_service.vm")


class Vm:
    """`turn` orders transitions: hold it to start, stop or delete; commands and files do not take it."""

    def __init__(
        self,
        system: System,
        session: SessionDir,
        record: VmRecord,
        is_committed: Callable[[str], bool] = lambda _id: False,
    ) -> None:
        self.session = session
        self.record = record
        self.turn = asyncio.Lock()
        self.link: Link | None = None
        # Awaited when its supervisor is gone, before anybody may start another.
        self.on_gone: Callable[[Vm], Awaitable[None]] = _nothing
        self.work: Work | None = None  # what it had done by the end of its last run
        self.on_ended: Callable[[Vm], None] = lambda _vm: None
        self.on_changed: Callable[[Vm], None] = lambda _vm: None  # its record, or whether it runs or is ready
        self.on_asked: Callable[[Vm, str], None] = lambda _vm, _action: None  # its guest asks for "suspend"
        self.deleted = False
        self.moving = False  # its directory is about to be another one: the record is not read meanwhile
        self.becoming: SessionDir | None = None  # where it will be if its supervisor has done what it was told
        self.waiting: str | None = None  # for its turn at the gate, for people
        self.obstacle: CapsemError | None = None  # why it can be neither spoken to nor started; `check` raises it
        self._system = system
        self._is_committed = is_committed
        self._child: Child | None = None
        self._pid = 0
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
        return self._pid

    @property
    def vmm_pid(self) -> int:
        """Its VMM's process id, 0 when there is none."""
        return self.link.state.vmm_pid if self.link is not None and self.link.state is not None else 0

    @property
    def running(self) -> bool:
        """Whether a supervisor is there."""
        return not self._ended.is_set()

    @property
    def ending(self) -> bool:
        """Whether its supervisor has said how the run ended, or has hung up, and is about to be gone."""
        link = self.link
        if not self.running or link is None:
            return False
        return link.lost.is_set() or (link.state is not None and link.state.state not in LIVE)

    @property
    def vmm_gone(self) -> bool:
        """Whether its VMM has ended, and its supervisor, which may not have noticed yet, is about to."""
        return self.link is not None and self.link.ready and not is_locked(self.session.vmm_lock)

    @property
    def state(self) -> State:
        """Where it is: the supervisor's last word while there is one, else the record's."""
        if self.running:
            said = self.link.state if self.link is not None else None
            if said is not None and said.state in LIVE:
                return State(said.state)
            return self.record.state if self.record.state in LIVE else State.STARTING
        return self.record.state

    @property
    def status(self) -> Status | None:
        """What clients are shown; None: not listed."""
        return PUBLIC_STATUS[self.state]

    @property
    def reason(self) -> str | None:
        """Why it is as it is, where there is something to say beyond its status."""
        if self.obstacle is not None:
            return self.obstacle.message
        if self.running:
            return self.link.state.reason if self.link is not None and self.link.state is not None else None
        return self.record.last_exit.reason if self.record.last_exit is not None else None

    @property
    def layers(self) -> tuple[str, ...]:
        """All layers that it needs: its volume's, and those that its machine still reads while it runs."""
        return (*self.record.layers, *(self.record.attached if self.running else ()))

    def check(self) -> None:
        """Raises what keeps this VM from being spoken to or started."""
        if self.obstacle is not None:
            raise type(self.obstacle)(f"{self.id}: {self.obstacle.message}", hint=self.obstacle.hint)

    @property
    def warning(self) -> str | None:
        """What keeps it from getting on though it runs, for people."""
        return self.link.state.warning if self.link is not None and self.link.state is not None else None

    def wait_for(self, what: str | None) -> None:
        """It waits for something, or, None, does not any more."""
        if what != self.waiting:
            self.waiting = what
            self.on_changed(self)

    # -- its supervisor comes and goes

    def begin(self, child: Child | None, link: Link) -> None:
        """A supervisor was started (a child of ours) or adopted (not)."""
        self._child, self.link = child, link
        link.on_state = lambda _state: self._said()
        link.on_shutdown_asked = lambda action: self.on_asked(self, action)
        self._supervised(link.pid if child is None else child.pid)

    def _said(self) -> None:
        self.reload()
        self.on_changed(self)

    def begin_apart(self, pid: int, obstacle: CapsemError) -> None:
        """Somebody holds the claim who cannot be spoken to: process `pid`, which can be ended by signal; 0: not found."""
        self.obstacle = obstacle
        self._supervised(pid)

    def _supervised(self, pid: int) -> None:
        self._pid = pid
        self.reload()
        self._ended.clear()
        self._watcher = asyncio.create_task(self._watch(), name=f"watch {self.id}")
        self.on_changed(self)

    def let_go(self) -> None:
        """Hang up on the supervisor and look after it no more: another service will."""
        if self._watcher is not None:
            self._watcher.cancel()
        if self.link is not None:
            self.link.channel.hang_up()

    async def _watch(self) -> None:
        """See the supervisor out, then read what it left."""
        gone = asyncio.ensure_future(self._gone())
        try:
            if self.link is not None:
                await self._hung_up(self.link, gone)
            await gone
        finally:
            gone.cancel()
        await self.bury_vmm()
        await self.on_gone(self)
        status = self._child.status if self._child is not None else None
        if self.link is not None:
            self.link.channel.hang_up()
        self._child = self.link = self.obstacle = None
        self._pid = 0
        try:
            self.settle(status)
        except Exception:
            log.exception("the record of %s cannot be settled", self.id)
        self._ended.set()
        self.on_ended(self)
        self.on_changed(self)

    async def _gone(self) -> None:
        if self._child is not None:
            await self._child.wait()
        elif self._pid:
            await self._system.processes.gone(self._pid)
        else:
            while is_locked(self.session.claim):
                await asyncio.sleep(CLAIM_TURN)

    async def bury_vmm(self) -> None:
        """Wait until the VMM of a supervisor that was killed is gone too: until then it may write to the volume."""
        lock_path = self.session.vmm_lock
        if not is_locked(lock_path):
            return
        lock = await take_from_orphan(self._system.processes, lock_path)
        if lock is None:
            log.error("the VMM of %s does not die; look for processes that hold %s", self.id, lock_path)
        else:
            lock.release()

    async def _hung_up(self, link: Link, gone: asyncio.Future[None]) -> None:
        """Wait for the supervisor's end; one that hangs up and stays can only be stopped."""
        lost = asyncio.ensure_future(link.lost.wait())
        try:
            await asyncio.wait((gone, lost), return_when=asyncio.FIRST_COMPLETED)
        finally:
            lost.cancel()
        await asyncio.wait((gone,), timeout=EXIT_MARGIN)
        if not gone.done():
            log.error("the supervisor of %s hung up, and lives on", self.id)
            self.obstacle = Unavailable("its supervisor hung up on the service", hint="stop the VM and resume it")

    def settle(self, status: int | None = None, claim: Lock | None = None) -> None:
        """With no supervisor: make the record say so. `status` is the supervisor's exit status where it is known, `claim`
        the VM's, if the caller holds it."""
        if not self.session.record.exists():
            return
        try:
            self.record = records.read(self.session)
        except Corrupt as error:
            self.spoilt(error)
            return
        boot_id, saving = self._system.clock.boot_id(), self.record.saving
        record = self.record.recovered(boot_id, saved=saving is not None and self._is_committed(saving))
        if record == self.record:
            return
        own = None if claim is not None else try_lock(self.session.claim)
        if claim is None and own is None:
            raise Unavailable(f"somebody else supervises {self.id}")
        try:
            records.sweep(self.session)
            if record.state == State.SUSPENDED:
                ending = Exit("suspended", "its supervisor ended while it was being suspended or resumed")
            elif status == 0:  # it ended as it should, and could not say so
                record = replace(record, state=State.STOPPED)
                ending = Exit("clean", "stopped, while the record could not be written")
            elif self.record.host_boot_id in (None, boot_id):
                how = f"by signal {-status}" if status is not None and status < 0 else "without a word"
                tail = last_lines(self.session.process_log, LOG_LINES)
                ending = Exit("failed", f"the supervisor ended {how}", tail)
            else:
                ending = Exit("clean", "host restarted")
            self.record = replace(record, last_exit=ending)
            with contextlib.suppress(OSError):  # a full disk: then the next service finds this out anew
                records.write(self.session, self.record)
        finally:
            if own is not None:
                own.release()

    def reload(self) -> None:
        """Read the record again, which the supervisor may have changed. One that cannot be read leaves what we had."""
        if self.moving:
            return
        try:
            self.record = records.read(self.session)
        except (OSError, CapsemError) as error:
            log.error("the record of %s cannot be read: %s", self.id, error)
        else:
            if isinstance(self.obstacle, Corrupt):  # its supervisor has written a good one
                self.obstacle = None
            self.on_changed(self)

    def spoilt(self, error: Corrupt) -> None:
        """Its record cannot be read: it is Defunct, and nothing is written over what there is."""
        log.error("%s: %s", self.id, error)
        self.obstacle = error
        self.record = replace(self.record, state=State.FAILED, last_exit=Exit("failed", str(error)))

    def rewrite(self, **changes: Any) -> None:
        """Change the record of a VM that does not run. Raises Unavailable when somebody holds its claim; see `check`."""
        self.check()
        claim = take_lock(self.session.claim, f"VM {self.id}")
        try:
            record = replace(self.record, **changes)
            records.write(self.session, record)
            self.record = record  # not before it is true: what a record names is kept
        finally:
            claim.release()
        self.on_changed(self)

    async def ended(self, limit: float) -> bool:
        """Wait until no supervisor is there; False when `limit` seconds were not enough."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(limit):
                await self._ended.wait()
        return not self.running

    async def ready_link(self, limit: float = READY_LIMIT) -> Link:
        """The link to a guest that may be spoken to. Raises NotRunning, TimedOut, MachineFailed (it ended meanwhile)."""
        self.check()
        link = self.link
        if link is None:
            raise NotRunning(f"{self.id} is not running", hint=f"start it with `capsem resume {self.id}`")
        try:
            with span("wait for the guest"):
                ready = await link.wait_ready(limit)
        except CapsemError:
            await self.ended(EXIT_MARGIN)
            self.check()
            failure = self.record.last_error or self.record.failure
            if failure is None:  # as somebody else had asked
                raise NotRunning(
                    f"{self.id} was stopped before it was ready", hint=f"start it with `capsem resume {self.id}`"
                ) from None
            raise MachineFailed(
                f"{self.id} ended before it was ready: {failure}", hint=f"capsem logs {self.id}"
            ) from None
        if not ready and self.warning is not None:
            raise TimedOut(
                f"{self.id} was not ready after {limit:.0f} s: {self.warning}", hint="`capsem df` shows more"
            )
        if not ready:
            raise TimedOut(f"{self.id} was not ready after {limit:.0f} s", hint=f"capsem logs {self.id}")
        return link

    async def stop(self, request: Stop) -> None:
        """End the supervisor and wait until it is gone; a supervisor that does not go is killed.

        Raises Unavailable when somebody holds the claim who cannot be found, or nothing ends it.
        """
        if not self.running:
            with contextlib.suppress(FileNotFoundError):
                take_lock(self.session.claim, f"VM {self.id}").release()
            return
        if not self._pid:
            self.check()
        limit = EXIT_MARGIN + (0.0 if request.kill else request.grace + POWER_OFF_MARGIN)
        if self.link is not None and not self.link.lost.is_set():
            with contextlib.suppress(CapsemError):
                self.link.open(request)
        elif not request.kill:
            self.terminate(signal.SIGTERM)
            limit = EXIT_MARGIN + SIGTERM_GRACE + POWER_OFF_MARGIN
        else:
            limit = 0.0
        if not await self.ended(limit):
            log.warning("the supervisor of %s did not end within %.1f s; killing it", self.id, limit)
            self.terminate(signal.SIGKILL)
            if not await self.ended(EXIT_MARGIN + ORPHAN_LIMIT):
                raise Unavailable(f"{self.id} does not end, though its supervisor was killed", hint="try again later")

    def terminate(self, number: int) -> None:
        """Send the supervisor a signal, if there is one."""
        if self.running and self._pid:
            self._system.processes.signal(self._pid, number)


async def _nothing(_vm: Vm) -> None:
    """What is done when nobody has asked for anything."""
