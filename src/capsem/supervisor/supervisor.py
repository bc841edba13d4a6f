"""One VM's run, from the claim to the exit: the only writer of the VM's record while it lives.

    claim -> VMM lock -> record STARTING or RESUMING, and meanwhile the VMM -> socket -> handshake -> record RUNNING, .ready
    -> ... -> machine's end -> record STOPPED or FAILED with the reason -> .ready and socket removed -> exit

A step that fails ends the run through the same last three steps, so that whoever looks afterwards finds a record that
says how it ended. If this process is killed, the VMM dies with it and the record still says RUNNING: with the claim
free, that reads as lost.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from capsem.api.internal import (
    Bootstrap,
    ShutdownAsked,
    Stop,
)
from capsem.control.heartbeat import Heartbeat
from capsem.hypervisor.driver import Driver, Ending, Machine
from capsem.model.errors import (
    CapsemError,
    NotRunning,
    Unavailable,
)
from capsem.model.lifecycle import Event
from capsem.model.lifecycle import State as Lifecycle
from capsem.model.vm import Exit
from capsem.store import records
from capsem.store.gate import HostLock
from capsem.store.lines import last_lines
from capsem.store.locks import Lock, take_lock
from capsem.store.naming import require
from capsem.supervisor import room
from capsem.supervisor.console import Console
from capsem.supervisor.outlet import Outside
from capsem.supervisor.owned import Names, Next
from capsem.supervisor.recording import Recording
from capsem.supervisor.server import Server
from capsem.supervisor.starting import Starting
from capsem.system import System
from capsem.tracing import span
from capsem.wire.messages import ShutdownRequest
from capsem.wire.schema import Message

BOOT_LIMIT = 90.0  # seconds from the machine's first instruction to the guest's readiness; emulated and busy
ADMIT_LIMIT = 30.0  # seconds that a command or file operation waits for a guest that is not ready
POWER_OFF_MARGIN = 3.0  # seconds beyond the guest's grace until the machine is killed
ENDING_LIMIT = 2.0  # seconds between the loss of the control channel and the VMM's end
GATE_WAIT = 60.0  # seconds that a guest's own shutdown waits for the gate
ORPHAN_WAIT = 5.0  # and one because the parent of the family is gone
LOG_LINES = 20

log = logging.getLogger("capsem_process")


class Supervisor(Starting):
    """Owns one machine and speaks with its guest."""

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
        super().__init__(system, driver, names, bootstrap, bound, renamed, outside)
        self._server = Server(self)
        self._began = system.clock.monotonic()

    # -- for the server

    async def admit(self) -> None:
        """Wait until the guest may be spoken to. Raises NotRunning, Unavailable, TimedOut, Interrupted."""
        if self._stop_asked is not None:
            raise NotRunning(f"{self._record.id} is being stopped", hint=f"capsem resume {self._record.id}")
        if self._record.state == Lifecycle.SUSPENDING:
            raise Unavailable(f"{self._record.id} is being suspended", hint=f"capsem resume {self._record.id}")
        await self.guest.wait_ready(ADMIT_LIMIT)

    def stop(self, request: Stop) -> None:
        """Begin to end the machine; a later, harsher request takes over."""
        self._stop_asked = request
        self._stop_changed.set()

    # -- the run

    async def run(self) -> int:
        """Run the VM; returns the process's exit status: 0 when it ended as it should, 1 when it failed.

        Raises Unavailable when another supervisor owns the VM; then nothing was touched.
        """
        session = self._names.session
        claim = take_lock(session.claim, "this VM")
        try:
            records.sweep(session)
            self._record = self._recovered(records.read(session))
            require(self._names.layout, *self._handed)
            self._at("claimed")
            self.recording = Recording(
                self._system.clock, session.ledger, on=self._bootstrap.ledger, resumed=self._bootstrap.restore
            )
            try:
                self._begin()
                return await self._run_claimed()
            finally:
                with span("close the ledger"):
                    await self.recording.close(lasting=not self._discarded)
        finally:
            self._work_done()
            claim.release()

    async def _run_claimed(self) -> int:
        # The VMM takes longer to come up than a disk takes to remember that it does: neither waits for the other.
        begun = asyncio.create_task(self._write_begun(), name="record")
        try:
            await self._at_work(shared=not self._bootstrap.restore)
            with span("take the VMM lock"):
                vmm_lock = await self._take_vmm_lock()
            starting = asyncio.create_task(self._start_machine(vmm_lock), name="start")
            try:
                with span("write the record"):
                    await begun
                with span("listen"):
                    self._listener = await self._listen(self._names.socket)
                self._bound()
            finally:
                started = await asyncio.gather(starting, return_exceptions=True)
            if isinstance(started[0], BaseException):
                raise started[0]
            ending = await self._run_machine()
        except Exception as error:
            await asyncio.wait((begun,))
            if begun.exception() is not None:
                raise
            if not isinstance(error, CapsemError):
                log.exception("the run failed")
            ending = Ending(clean=False, reason=str(error))
        finally:
            if self._machine is not None:
                await self._machine.kill()
            self._names.ready_file.unlink(missing_ok=True)
        code = self._conclude(ending)
        if self._listener is not None:
            self._listener.close()
        self._names.socket.unlink(missing_ok=True)
        self._server.close()
        return code

    async def _run_machine(self) -> Ending:
        """Let the machine run, serve until it ends; returns how."""
        machine, saver, network = self._machine, self._saver, self._system.network
        assert machine is not None
        assert saver is not None
        self._at("started")
        self._console = Console(self._names.session.serial_log)
        await network.attach(machine.console, lambda: self._console)
        self.guest.on_request = self._guest_asked
        self.guest.on_ready = self._guest_ready
        await network.attach(machine.control, lambda: self.guest.channel)
        with span("let the vCPUs run"):
            await machine.run()
        self._at("running")
        log.info("machine %d runs after %.3f s", machine.pid, self._system.clock.monotonic() - self._began)

        self._heartbeat = heartbeat = Heartbeat(
            self.guest, self._system.clock, lambda: self._server.broadcast(self.state())
        )
        ended = asyncio.create_task(machine.wait(), name="machine")
        ready = asyncio.create_task(asyncio.to_thread(self._stage, Event.READY), name="record")
        others = [
            asyncio.create_task(self._become_ready(ready), name="boot"),
            asyncio.create_task(self._end_when_asked(machine), name="stop"),
            asyncio.create_task(heartbeat.run(), name="heartbeat"),
            asyncio.create_task(room.keep_going(machine, self._names.layout.layers, self._warn), name="room"),
            asyncio.create_task(self._end_when_suspended(machine), name="suspend"),
            asyncio.create_task(self._follow_family(), name="parent"),
        ]
        boot = others[0]
        try:
            await asyncio.wait((ended, boot), return_when=asyncio.FIRST_COMPLETED)
            if boot.done() and boot.exception() is not None and self._stop_asked is None:
                # A machine that ended says more than the channel that it took along.
                await asyncio.wait((ended,), timeout=ENDING_LIMIT)
                if not ended.done():
                    return Ending(clean=False, reason=str(boot.exception()))
            return await ended
        finally:
            for task in (ended, *others):
                task.cancel()
            await asyncio.gather(ended, *others, return_exceptions=True)
            for next_ in await asyncio.gather(ready, return_exceptions=True):
                if isinstance(next_, Next):
                    next_.staged.discard()
            # A save that is under way learns that the machine is gone, and puts things right.
            with span("wait for what is being saved"):
                await self._saving.acquire()
            with span("end what is carried"):
                await self._gateway.close()
                await self._outlet.close()
            with span("give up what is prepared"):
                await saver.close()

    def _guest_ready(self, ready: bool) -> None:
        if ready and self.guest.boot_ready is not None:
            self.recording.files_written(self.guest.boot_ready.written)
            if self._record.state == Lifecycle.RESUMING:
                self._lost_streams = self.guest.boot_ready.reset
        self._server.broadcast(self.state())

    async def _become_ready(self, ready: asyncio.Task[Next]) -> None:
        """Let others in. `ready` is the record that says so, made while the guest shows that it is well."""
        with span("wait for the guest"):
            await self.guest.wait_ready(BOOT_LIMIT)
        self._work_done()
        with span("wait for the ledger"):
            await self.recording.opened()
        await asyncio.wait((ready,))
        if self._stop_asked is None:
            self._at("ready")
            with span("write the record"):
                if ready.exception() is None and ready.result().before == self._record:
                    ready.result().staged.place()
                    self._record = ready.result().record
                    self.recording.lifecycle(Event.READY, self._record.state)
                else:
                    if ready.exception() is None:
                        ready.result().staged.discard()
                    self._advance(Event.READY)
            self._at("recorded")
            self._names.ready_file.touch(mode=0o600)
            log.info("guest ready after %.3f s", self._system.clock.monotonic() - self._began)
            if self._saver is not None and self._record.persistent:
                self._saver.prepare_soon()
        self._server.broadcast(self.state())

    async def _end_when_asked(self, machine: Machine) -> None:
        """Carry out stop requests: power off, then kill when the grace is over; or kill at once."""
        await self._stop_changed.wait()
        if self._record.state == Lifecycle.RESUMING:  # it has never run for anybody: it stays suspended
            await machine.kill()
            return
        # Not with `_saving` in hand: who waits for that may be inside of the gate.
        lock = await self._pass_gate()
        try:
            if self._stop_asked is not None and self._stop_asked.kill:
                await self._end(machine)
            else:
                async with self._saving:  # to the end: what is being saved is saved, and nothing more
                    if not self._suspended.is_set():
                        await self._end(machine)
        finally:
            if lock is not None:
                lock.release()

    async def _pass_gate(self) -> Lock | None:
        """Where the service has not done it: wait until nobody is saved or restored, or somebody else wants the end."""
        request = self._stop_asked
        if request is None or not self._bootstrap.gate:
            return None
        if not request.wait:
            with contextlib.suppress(Unavailable):  # the end comes all the same
                await self._at_work(shared=True)
            return None
        self._stop_changed.clear()
        return await HostLock(Path(self._bootstrap.gate)).try_for(request.wait, self._stop_changed)

    async def _end(self, machine: Machine) -> None:
        if self._record.state != Lifecycle.STOPPING:
            self._advance(Event.STOP)
        self._names.ready_file.unlink(missing_ok=True)
        self._server.broadcast(self.state())
        while True:
            request = self._stop_asked
            assert request is not None
            self._stop_changed.clear()
            if request.kill or not self.guest.is_ready:
                with span("end the machine"):
                    await machine.kill()
                return
            self.guest.power_off(request.grace)
            try:
                async with asyncio.timeout(request.grace + POWER_OFF_MARGIN):
                    await self._stop_changed.wait()
            except TimeoutError:
                log.warning(
                    "the guest did not power off within %.1f s; killing the machine", request.grace + POWER_OFF_MARGIN
                )
                await machine.kill()
                return

    async def _end_when_suspended(self, machine: Machine) -> None:
        """What is saved does not run on, not even to end properly: nothing may be written to its volume any more."""
        await self._suspended.wait()
        await machine.kill()

    async def _follow_family(self) -> None:
        """Stop when the process to follow is gone; which one that is may change."""
        pid, other = None, self._follows_other
        while pid is None:
            other.clear()
            changed = asyncio.ensure_future(other.wait())
            waits: set[asyncio.Future[Any]] = {changed}
            if (followed := self._followed) is not None:
                waits.add(asyncio.ensure_future(self._system.processes.gone(followed)))
            try:
                await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
                if not changed.done():
                    pid = followed
            finally:
                for each in waits:
                    each.cancel()
        log.warning("process %d, whom this family follows, is gone; stopping", pid)
        self.stop(Stop(grace=1.0, wait=ORPHAN_WAIT))

    def _guest_asked(self, message: Message) -> None:
        if isinstance(message, ShutdownRequest):
            log.info("the guest asked for its shutdown")
            self.stop(Stop(wait=GATE_WAIT))
        elif self._record.persistent:
            log.info("the guest asked to be suspended")
            self._server.broadcast(ShutdownAsked(action="suspend"))
        else:
            log.warning("the guest asked to be suspended; it is not persistent: nothing is done")
            self._warn(f"asked to be suspended, which it cannot be; `capsem persist {self._record.id} NAME` would help")

    def _give_up_resume(self, ending: Ending) -> int:
        """The VM is as suspended as before; only the layer that this attempt wrote to goes."""
        asked = self._stop_asked is not None
        log.error("the resume %s: %s", "was given up" if asked else "failed", ending.reason)
        *layers, layer = self._record.layers
        tail = last_lines(self._names.session.process_log, LOG_LINES)
        try:
            self._advance(Event.ABORTED, layers=tuple(layers), last_exit=Exit("failed", ending.reason, tail))
        except OSError as error:  # RESUMING with nobody there says the same (model.lifecycle.recover)
            log.error("the record cannot be written: %s", error)
        self._names.layout.layer(layer).unlink(missing_ok=True)
        self._server.broadcast(self.state())
        return 0 if asked else 1

    def _conclude(self, ending: Ending) -> int:
        """The last word in the record; returns the exit status."""
        if self._record.state == Lifecycle.SUSPENDED:
            self._server.broadcast(self.state())
            return 0
        if self._record.state == Lifecycle.RESUMING:
            return self._give_up_resume(ending)
        asked = self._stop_asked is not None
        expected = ending.clean or asked
        if expected:
            reason = "stopped" if asked else ending.reason
            self._record = replace(self._record, last_exit=Exit("clean", reason))
            self._advance(Event.EXITED, checkpoint=None, saving=None)  # older than the disk is now
            log.info("ended: %s", ending.reason)
        else:
            log.error("failed: %s", ending.reason)
            tail = last_lines(self._names.session.process_log, LOG_LINES)
            self._advance(Event.LOST, saving=None, last_exit=Exit("failed", ending.reason, tail))
        self._server.broadcast(self.state())
        return 0 if expected else 1
