"""What a supervisor owns, the record, the machine and the guest, and the two ways in which the record changes."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from capsem.api.internal import (
    Bootstrap,
    State,
    Stop,
)
from capsem.control.guest import Guest, Identity
from capsem.control.heartbeat import SILENCE, Heartbeat
from capsem.egress.floor import floor
from capsem.egress.resolve import is_own
from capsem.hypervisor.driver import Driver, Machine
from capsem.model.lifecycle import Event
from capsem.model.lifecycle import State as Lifecycle
from capsem.model.vm import VmRecord
from capsem.store import durable, records
from capsem.store.checkpoints import CheckpointStore
from capsem.store.gate import HostLock
from capsem.store.layout import Layout, SessionDir
from capsem.store.locks import Lock
from capsem.supervisor.activity import Activity
from capsem.supervisor.console import Console, Transcript
from capsem.supervisor.gateway import Gateway
from capsem.supervisor.jobs import JobTable
from capsem.supervisor.lending import Lending
from capsem.supervisor.outlet import Outlet, Outside
from capsem.supervisor.policing import Policing
from capsem.supervisor.recording import Recording
from capsem.supervisor.saving import Saver
from capsem.supervisor.server import Server
from capsem.system import Listener, System
from capsem.tracing import span

WORK_WAIT = 10.0  # seconds for an operation of a service that was killed to be over
ENDS = frozenset({Event.STOP, Event.EXITED, Event.LOST})

log = logging.getLogger("capsem_process")


@dataclass(frozen=True, slots=True)
class Names:
    """The files of a run."""

    session: SessionDir
    layout: Layout
    socket: Path
    ready_file: Path


@dataclass(frozen=True, slots=True)
class Next:
    """The record after an event that is expected, durable and ready to take the place of the one that it was made from."""

    before: VmRecord
    event: Event
    record: VmRecord
    staged: durable.Staged


class Owned:
    """One VM, from the claim on."""

    def __init__(
        self,
        system: System,
        driver: Driver,
        names: Names,
        bootstrap: Bootstrap,
        bound: Callable[[], None],
        renamed: Callable[[Names], None] = lambda _names: None,
        outside: Outside | None = None,
    ) -> None:
        """`bound` and `renamed` are called when the socket is there, and when the VM has another name."""
        self._system = system
        self._driver = driver
        self._names = names
        self._bootstrap = bootstrap
        self._bound = bound
        self._renamed = renamed
        self._outside = outside
        self._followed = bootstrap.parent_pid  # the process that this one ends with
        self._follows_other = asyncio.Event()
        self._record: VmRecord
        self._machine: Machine | None = None
        self._warning: str | None = None
        self._token = ""
        self._stop_asked: Stop | None = None
        self._stop_changed = asyncio.Event()
        self.guest: Guest
        self._heartbeat: Heartbeat | None = None
        self.transcript = Transcript(names.session.pty_log)
        self.jobs = JobTable(self.transcript.write)
        self.activity = Activity(system.clock)
        self.pid = system.processes.own_pid()
        self.recording: Recording
        self.lending = Lending()
        self._server: Server
        self.policing = Policing(system.clock, floor(is_own), self._write_network)
        self._outlet: Outlet
        self._gateway: Gateway
        self._lost_streams = 0  # by the restore that this run began with
        self._listener: Listener | None = None
        self._console: Console
        self._store = CheckpointStore(names.layout)
        self._saver: Saver | None = None
        self._saving = asyncio.Lock()  # a checkpoint, a new layer, a stop: one at a time
        self._suspended = asyncio.Event()
        self._work: Lock | None = None  # see `_at_work`

    def state(self) -> State:
        """Where the VM is now."""
        exit_ = self._record.last_exit
        reason = exit_.reason if exit_ else None
        if self._heartbeat is not None and self._heartbeat.silent:
            reason = f"the guest agent has not answered for {SILENCE:.0f} s or longer: the guest may hang"
        return State(
            state=self._record.state,
            ready=self._record.state == Lifecycle.RUNNING and self.guest.is_ready,
            vmm_pid=self._machine.pid if self._machine else 0,
            boot_kind=self._record.boot_kind,
            reason=reason,
            warning=self._warning,
            lost_streams=self._lost_streams,
        )

    def _begin_network(self) -> None:
        """What of the guest's connections is carried, and how."""
        recorder = self.recording.traffic
        self._outlet = Outlet(self.policing, self.lending, recorder, self._outside, self._open_network)
        self._gateway = Gateway(self._outlet)
        self.guest.serve_streams(self._gateway.opened)
        self.guest.on_epoch = self._epoch_began
        self.guest.set_authority(self._outlet.authority)
        self._open_network()

    def _epoch_began(self) -> None:
        """What the guest had open is gone: so is what that had led to."""
        self._gateway.cut()
        self._outlet.new_epoch()

    def _open_network(self) -> None:
        # A template's forks may have a network though it has none: it waits for its rules to be there.
        self.guest.set_network(on=self._outlet.open or self._record.template)

    def _follow(self, pid: int | None) -> None:
        """End with another process from here on, or with none."""
        self._followed = pid
        self._follows_other.set()

    def _warn(self, warning: str | None) -> None:
        self._warning = warning
        self._server.broadcast(self.state())

    def _identity(self) -> Identity:
        record = self._record
        env = {**record.spec.env, **self.lending.environment}
        return Identity(record.id, record.id, env, record.machine_id, self._token)

    async def _listen(self, socket: Path) -> Listener:
        socket.unlink(missing_ok=True)
        return await self._system.network.listen(socket, self._server.connection)

    async def _at_work(self, *, shared: bool) -> None:
        """From here on no other operation of this host goes on that must not, though the service that let this one pass
        may be killed (store.gate). Raises HostNotReady, Unavailable."""
        if self._work is None and self._bootstrap.gate:
            self._work = await HostLock(Path(self._bootstrap.gate)).work(shared=shared, limit=WORK_WAIT)

    def _work_done(self) -> None:
        """The operation is over; again is no error."""
        if self._work is not None:
            self._work.release()
            self._work = None

    def _rewrite(self, **changes: object) -> None:
        """Change the record, durably, but for the VM's state. Raises OSError; then nothing was changed."""
        record = replace(self._record, **changes)  # type: ignore[arg-type]
        records.write(self._names.session, record)
        self._record = record

    def _write_network(self, own: Mapping[str, Any], learning_since: float | None) -> None:
        """The VM's own network policy, into the record."""
        self._rewrite(network=MappingProxyType(dict(own)), learning_since=learning_since)

    def _advance(self, event: Event, **changes: object) -> None:
        """Move the record on, durably. Raises OSError, but not on the way out: a full disk keeps no VM from ending."""
        self._record = self._record.after(event, **changes)
        self.recording.lifecycle(event, self._record.state, self._detail(event))
        try:
            with span(f"record: {self._record.state}"):
                records.write(self._names.session, self._record, lasting=not self._discarded)
        except OSError as error:
            if event not in ENDS:
                raise
            log.error("the record cannot be written: %s", error)

    @property
    def _discarded(self) -> bool:
        """Whether the VM is to be deleted as soon as it has ended: then nobody waits for a disk to keep what is said of that."""
        return self._stop_asked is not None and self._stop_asked.discard

    def _stage(self, event: Event, **changes: object) -> Next:
        """Prepare a move of the record. Raises OSError."""
        before = self._record
        record = before.after(event, **changes)
        return Next(before, event, record, records.stage(self._names.session, record))

    def _detail(self, event: Event) -> str | None:
        """What there is to say of an event beside its name."""
        if event in (Event.START, Event.RESUME):
            return self._record.boot_kind
        if event in (Event.EXITED, Event.LOST, Event.ABORTED) and self._record.last_exit is not None:
            return self._record.last_exit.reason
        return None
