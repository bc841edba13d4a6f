"""One VM's run, from the claim to the exit: the only writer of the VM's record while it lives.

    claim -> VMM lock -> record STARTING or RESUMING -> socket -> machine -> handshake -> record RUNNING, .ready
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
from dataclasses import dataclass, replace
from pathlib import Path

from capsem.api.internal import (
    AddLayer,
    Bootstrap,
    CheckpointMade,
    LayerAdded,
    LayersReplaced,
    Persist,
    Persisted,
    PolicySet,
    ReplaceLayers,
    Save,
    SetPolicy,
    ShutdownAsked,
    State,
    Stop,
)
from capsem.control.guest import Guest, Identity, Restored
from capsem.control.heartbeat import SILENCE, Heartbeat
from capsem.hypervisor.driver import Accelerator, Driver, Ending, Layer, Machine, MachineSpec
from capsem.model.checkpoint import Checkpoint, Kind
from capsem.model.errors import (
    CapsemError,
    Corrupt,
    GuestFailed,
    Interrupted,
    MachineFailed,
    NotRunning,
    TimedOut,
    Unavailable,
    WrongState,
)
from capsem.model.lifecycle import Event
from capsem.model.lifecycle import State as Lifecycle
from capsem.model.policy import Policy
from capsem.model.vm import Exit, VmRecord
from capsem.store import durable, records
from capsem.store.checkpoints import CheckpointStore
from capsem.store.flatten import replaced
from capsem.store.jobs import decode
from capsem.store.layout import CheckpointDir, Layout, SessionDir
from capsem.store.lines import CappedLog, last_lines
from capsem.store.locks import Lock, holders, take_lock, try_lock
from capsem.supervisor import room
from capsem.supervisor.activity import Activity
from capsem.supervisor.jobs import JobTable
from capsem.supervisor.saving import Order, Saver
from capsem.supervisor.server import Server
from capsem.system import Listener, System
from capsem.wire.messages import Message, ShutdownRequest

BOOT_LIMIT = 90.0  # seconds from the machine's first instruction to the guest's readiness; emulated and busy
ADMIT_LIMIT = 30.0  # seconds that a command or file operation waits for a guest that is not ready
POWER_OFF_MARGIN = 3.0  # seconds beyond the guest's grace until the machine is killed
FREEZE_LIMIT = 2.0  # seconds that the guest holds its writes for a new layer
ENDING_LIMIT = 2.0  # seconds between the loss of the control channel and the VMM's end
ORPHAN_LIMIT = 5.0  # seconds for the VMM of an earlier, killed supervisor to die
LOG_LINES = 20
ENDS = frozenset({Event.STOP, Event.EXITED, Event.LOST})
SAVE_HINT = "the VM goes on; `capsem df` shows what takes room"

log = logging.getLogger("capsem_process")


@dataclass(frozen=True, slots=True)
class Names:
    """The files of a run."""

    session: SessionDir
    layout: Layout
    socket: Path
    ready_file: Path


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


class Supervisor:
    """Owns one machine and speaks with its guest."""

    def __init__(
        self, system: System, driver: Driver, names: Names, bootstrap: Bootstrap, bound: Callable[[], None]
    ) -> None:
        self._system = system
        self._driver = driver
        self._names = names
        self._bootstrap = bootstrap
        self._bound = bound
        self._record: VmRecord
        self._machine: Machine | None = None
        self._warning: str | None = None
        self._token = ""
        self._stop_asked: Stop | None = None
        self._stop_changed = asyncio.Event()
        self.guest: Guest
        self._heartbeat: Heartbeat | None = None
        self.jobs = JobTable()
        self.activity = Activity(system.clock)
        self.pid = system.processes.own_pid()
        self._server = Server(self)
        self._listener: Listener | None = None
        self._console: Console
        self._store = CheckpointStore(names.layout)
        self._saver: Saver | None = None
        self._saving = asyncio.Lock()  # a checkpoint, a new layer, a stop: one at a time
        self._suspended = asyncio.Event()

    # -- for the server

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
        )

    def _warn(self, warning: str | None) -> None:
        self._warning = warning
        self._server.broadcast(self.state())

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

    async def persist(self, request: Persist) -> Persisted:
        """Take another name. The record goes first: from then on a service that finds the old directory moves it."""
        old, session = self._names, SessionDir(Path(request.session_dir))
        self._rewrite(id=request.name, persistent=True)
        durable.rename(old.session.path, session.path)
        self._names = replace(old, session=session, socket=Path(request.socket), ready_file=Path(request.ready_file))
        self._console.move(session.serial_log)
        former = self._listener
        self._listener = await self._listen()
        if former is not None:
            former.close()
        if old.ready_file.exists():
            self._names.ready_file.touch(mode=0o600)
        old.ready_file.unlink(missing_ok=True)
        old.socket.unlink(missing_ok=True)
        self.guest.rename(self._identity())
        log.info("%s is persistent as %s", old.session.path.name, request.name)
        return Persisted()

    async def add_layer(self, request: AddLayer) -> LayerAdded:
        """Freeze the volume's top layer and go on in a new one, with the guest's file system held still if it can be.

        The record names the new layer before the machine writes to it: a crash in between finds an empty layer on top,
        which changes nothing, where the other order would lose what was written to a layer nobody names.
        """
        async with self._saving:
            return await self._add_layer(request)

    async def _add_layer(self, request: AddLayer) -> LayerAdded:
        assert self._machine is not None
        before = self._record
        layer = Layer(self._names.layout.layer(request.layer), "qcow2")
        self._rewrite(layers=(*before.layers, request.layer))
        began, quiesced = self._system.clock.monotonic(), True
        try:
            try:
                async with self.guest.frozen(FREEZE_LIMIT):
                    await self._machine.add_layer(layer)
            except (GuestFailed, TimedOut, Interrupted) as error:
                log.warning("the volume's layer is taken without the guest's help: %s", error)
                quiesced = False
                if self._machine.top_layer != layer:
                    await self._machine.add_layer(layer)
        except CapsemError:
            self._rewrite(layers=before.layers)
            raise
        return LayerAdded(quiesced=quiesced, pause=self._system.clock.monotonic() - began)

    async def replace_layers(self, request: ReplaceLayers) -> LayersReplaced:
        """Name a layer in place of frozen ones that say the same. The machine has those open, and reads them to its end.

        Not while it is being resumed: a resume that fails goes back to the checkpoint's very layers.

        Raises WrongState: nothing was changed; OSError: the record on disk says which.
        """
        async with self._saving:
            *frozen, top = self._record.layers
            layers = replaced(frozen, request.old, request.new)
            if layers is None or self._record.state != Lifecycle.RUNNING:
                raise WrongState(f"{self._record.id} is {self._record.state}, and its layers are others")
            record = replace(self._record, layers=(*layers, top), attached=(*self._record.attached, *request.old))
            records.write(self._names.session, record)
            self._record = record
        return LayersReplaced()

    async def save(self, request: Save) -> CheckpointMade:
        """Make a checkpoint, and go on or be suspended. A save that fails leaves the VM running."""
        async with self._saving:
            saver, machine, before = self._saver, self._machine, self._record
            assert saver is not None
            assert machine is not None
            if before.state != Lifecycle.RUNNING or self._stop_asked is not None:
                raise WrongState(f"{before.id} is {before.state}", hint="try again in a moment")
            layer_id = self._system.entropy.token_bytes(16).hex()
            layer = Layer(self._names.layout.layer(layer_id), "qcow2")
            try:
                checkpoint_id = await saver.reserve()
                self._driver.create_layer(layer.path, size_mb=before.spec.disk_mb, vm_id=before.id, layer_id=layer_id)
                # The record names the new layer before the machine writes to it, as in `add_layer`.
                layers = (*before.layers, layer_id)
                if request.go_on:
                    self._rewrite(layers=layers)
                else:
                    self._advance(Event.SUSPEND, saving=checkpoint_id, layers=layers)
                    self._server.broadcast(self.state())
                order = Order(Kind(request.kind), before.layers, layer, request.go_on, request.message)
                checkpoint = await saver.save(before, order)
            except BaseException as error:
                await self._go_on(before, layer_id, layer)
                if isinstance(error, OSError):
                    raise MachineFailed(
                        f"{before.id} could not be saved: {error.strerror or error}", hint=SAVE_HINT
                    ) from error
                raise
            if request.go_on:
                self._note_current(checkpoint)
            else:
                self._suspend(checkpoint)
                layer.path.unlink(missing_ok=True)
        memory, guest, pause = checkpoint.memory, checkpoint.guest, checkpoint.pause or 0.0
        assert memory is not None
        assert guest is not None
        log.info("saved as %s: %d bytes, paused %.3f s", checkpoint.id, memory.written, pause)
        return CheckpointMade(
            checkpoint=checkpoint.id, pause=pause, written=memory.written, synced=guest.synced, frozen=guest.frozen
        )

    def _note_current(self, checkpoint: Checkpoint) -> None:
        self._record = replace(self._record, current=checkpoint.id)
        try:
            records.write(self._names.session, self._record)
        except OSError as error:  # a full disk; the checkpoint is made, and the next word in the record says so too
            log.error("the record cannot be written: %s", error)

    def _suspend(self, checkpoint: Checkpoint) -> None:
        """The word that makes it final. Raises Interrupted when the machine was killed on request meanwhile."""
        if self._record.state != Lifecycle.SUSPENDING:
            self._store.remove(checkpoint.id)
            raise Interrupted(f"{self._record.id} was stopped while it was being suspended")
        try:
            self._advance(
                Event.SUSPENDED,
                checkpoint=checkpoint.id,
                current=checkpoint.id,
                saving=None,
                layers=checkpoint.layer_ids,
                last_exit=Exit("suspended", "suspended"),
            )
        except OSError as error:
            # With the checkpoint committed, SUSPENDING says the same (model.lifecycle.recover): it is done, and a machine
            # that went on now would make that a lie.
            log.error("the record cannot be written: %s", error)
        finally:
            self._suspended.set()
            self.jobs.cut(self._job_waits)

    def _job_waits(self, job: str) -> Interrupted:
        """What the clients of commands are told at a suspend."""
        name = self._record.id
        return Interrupted(
            f"{name} was suspended; job {job} goes on when it is resumed",
            hint=f"capsem resume {name}, then capsem output {name} {job} --follow",
            job=job,
        )

    async def _go_on(self, before: VmRecord, layer_id: str, layer: Layer) -> None:
        """After a save that failed: the machine runs, and the record says on which layers."""
        assert self._machine is not None
        added = self._machine.top_layer == layer
        self._record = replace(self._record, saving=None, layers=(*before.layers, layer_id) if added else before.layers)
        try:
            if self._record.state == Lifecycle.SUSPENDING:
                self._advance(Event.ABORTED)
            else:
                records.write(self._names.session, self._record)
            if not added:
                layer.path.unlink(missing_ok=True)
        except OSError as error:  # a full disk; what the record says is true enough: one empty layer more
            log.error("the record cannot be written: %s", error)
        self.guest.channel.release()
        with contextlib.suppress(MachineFailed):  # it has ended: the run says why
            await self._machine.run()
        self.guest.go_on()
        self._server.broadcast(self.state())

    def set_policy(self, request: SetPolicy) -> PolicySet:
        """Write down another policy, which the service carries out. Raises InvalidInput, OSError."""
        self._rewrite(policy=Policy.from_dict(request.policy))
        return PolicySet()

    def _rewrite(self, **changes: object) -> None:
        """Change the record, durably, but for the VM's state. Raises OSError; then nothing was changed."""
        record = replace(self._record, **changes)  # type: ignore[arg-type]
        records.write(self._names.session, record)
        self._record = record

    # -- the run

    async def run(self) -> int:
        """Run the VM; returns the process's exit status: 0 when it ended as it should, 1 when it failed.

        Raises Unavailable when another supervisor owns the VM; then nothing was touched.
        """
        session = self._names.session
        claim = take_lock(session.claim, "this VM")
        try:
            self._record = self._recovered(records.read(session))
            self._begin()
            return await self._run_claimed()
        finally:
            claim.release()

    def _recovered(self, record: VmRecord) -> VmRecord:
        """A record that still speaks of a run: with the claim ours, that run is over, whatever kept it from saying so."""
        saved = record.saving is not None and self._store.is_committed(record.saving)
        return record.recovered(self._system.clock.boot_id(), saved=saved)

    def _begin(self) -> None:
        """The record of a run that begins. Raises CapsemError, OSError: nothing was changed."""
        bootstrap, clock, entropy, restored = self._bootstrap, self._system.clock, self._system.entropy, None
        token, kind = entropy.token_bytes(16).hex(), bootstrap.boot_kind
        if bootstrap.restore:
            assert self._record.checkpoint is not None
            checkpoint = self._store.read(self._record.checkpoint)
            assert checkpoint.guest is not None
            guest = checkpoint.guest
            mark = checkpoint.id if guest.synced else None
            restored = Restored(guest.epoch, bytes.fromhex(guest.next_nonce), mark, guest.frozen)
            if checkpoint.vm_id == self._record.id:
                kind, token = "warm", guest.token
            else:
                kind = "forked"
        self._advance(
            Event.RESUME if restored else Event.START,
            layers=(*self._record.layers, *([bootstrap.layer] if bootstrap.layer else ())),
            machine_id=self._record.machine_id or entropy.token_bytes(16).hex(),
            attached=(),
            started_at=clock.time(),
            host_boot_id=clock.boot_id(),
            boot_kind=kind,
            boot_note=bootstrap.boot_note,
            last_exit=None,
        )
        self._token = token
        self.guest = Guest(self._identity(), clock, entropy, restored)

    def _identity(self) -> Identity:
        record = self._record
        return Identity(record.id, record.id, record.spec.env, record.machine_id, self._token)

    async def _listen(self) -> Listener:
        self._names.socket.unlink(missing_ok=True)
        return await self._system.network.listen(self._names.socket, self._server.connection)

    async def _run_claimed(self) -> int:
        try:
            vmm_lock = await self._take_vmm_lock()
            self._listener = await self._listen()
            self._bound()
            ending = await self._run_machine(vmm_lock)
        except Exception as error:
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

    async def _take_vmm_lock(self) -> Lock:
        """The VMM lock; an orphan that holds it (its supervisor was killed) is killed first. Raises MachineFailed."""
        path = self._names.session.vmm_lock
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(ORPHAN_LIMIT):
                while (lock := try_lock(path)) is None:
                    for pid in holders(path):
                        log.warning("killing orphaned VMM %d", pid)
                        self._system.processes.signal(pid, 9)
                        await self._system.processes.gone(pid)
                return lock
        raise MachineFailed("an earlier VMM of this VM does not die", hint=f"look for processes that hold {path}")

    def _spec(self) -> MachineSpec:
        record, bootstrap, layout = self._record, self._bootstrap, self._names.layout
        return MachineSpec(
            vm_id=record.id,
            cpus=record.spec.cpus,
            ram_mb=record.spec.ram_mb,
            accelerator=Accelerator(bootstrap.accelerator),
            kernel=Path(bootstrap.kernel),
            initrd=Path(bootstrap.initrd),
            root=Path(bootstrap.root),
            volume=(
                Layer(Path(bootstrap.volume), "raw"),
                *(Layer(layout.layer(each), "qcow2") for each in record.layers),
            ),
            ram_file=Path(bootstrap.ram_file),
            command_line=bootstrap.kernel_command_line,
            hardware=record.hardware,
        )

    async def _run_machine(self, vmm_lock: Lock) -> Ending:
        """Start the machine, serve until it ends; returns how."""
        network = self._system.network
        began = self._system.clock.monotonic()
        spec, files = self._spec(), self._names.layout.checkpoint(self._record.checkpoint or "")
        restore = self._record.state == Lifecycle.RESUMING
        try:
            if restore:
                machine = await self._driver.restore(spec, files.devices, vmm_lock=vmm_lock.fd)
            else:
                machine = await self._driver.start(spec, vmm_lock=vmm_lock.fd)
            self._machine = machine
        finally:
            vmm_lock.release()
        self._saver = saver = Saver(
            self._system, self._driver, self._store, machine, spec, self.guest, self.jobs, self._bootstrap.assets
        )
        if restore:
            saver.restored_from(files)
            self._restore_jobs(files)
        self._console = Console(self._names.session.serial_log)
        await network.attach(machine.console, lambda: self._console)
        self.guest.on_request = self._guest_asked
        self.guest.on_ready = lambda _ready: self._server.broadcast(self.state())
        await network.attach(machine.control, lambda: self.guest.channel)
        await machine.run()
        log.info("machine %d runs after %.3f s", machine.pid, self._system.clock.monotonic() - began)

        self._heartbeat = heartbeat = Heartbeat(
            self.guest, self._system.clock, lambda: self._server.broadcast(self.state())
        )
        ended = asyncio.create_task(machine.wait(), name="machine")
        others = [
            asyncio.create_task(self._become_ready(began), name="boot"),
            asyncio.create_task(self._end_when_asked(machine), name="stop"),
            asyncio.create_task(heartbeat.run(), name="heartbeat"),
            asyncio.create_task(room.keep_going(machine, self._names.layout.layers, self._warn), name="room"),
            asyncio.create_task(self._end_when_suspended(machine), name="suspend"),
        ]
        if self._bootstrap.parent_pid is not None:
            others.append(asyncio.create_task(self._follow_parent(self._bootstrap.parent_pid), name="parent"))
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
            await (
                self._saving.acquire()
            )  # a save that is under way learns that the machine is gone, and puts things right
            await saver.close()

    def _restore_jobs(self, files: CheckpointDir) -> None:
        """The commands of that time go on. Those of a file that cannot be read do so, too, only nobody learns how."""
        try:
            if files.jobs.exists():
                self.jobs.restore(decode(files.jobs.read_bytes(), source=str(files.jobs)), self.guest)
        except (OSError, Corrupt) as error:
            log.error("the jobs of the checkpoint are lost: %s", error)

    async def _become_ready(self, began: float) -> None:
        await self.guest.wait_ready(BOOT_LIMIT)
        if self._stop_asked is None:
            self._advance(Event.READY)
            self._names.ready_file.touch(mode=0o600)
            log.info("guest ready after %.3f s", self._system.clock.monotonic() - began)
            if self._saver is not None and self._record.persistent:
                self._saver.prepare_soon()
        self._server.broadcast(self.state())

    async def _end_when_asked(self, machine: Machine) -> None:
        """Carry out stop requests: power off, then kill when the grace is over; or kill at once."""
        await self._stop_changed.wait()
        if self._record.state == Lifecycle.RESUMING:  # it has never run for anybody: it stays suspended
            await machine.kill()
            return
        if self._stop_asked is not None and self._stop_asked.kill:
            await self._end(machine)
        else:
            async with self._saving:  # to the end: what is being saved is saved, and nothing more
                if not self._suspended.is_set():
                    await self._end(machine)

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

    async def _follow_parent(self, pid: int) -> None:
        await self._system.processes.gone(pid)
        log.warning("process %d, whom this family follows, is gone; stopping", pid)
        self.stop(Stop(grace=1.0))

    def _guest_asked(self, message: Message) -> None:
        if isinstance(message, ShutdownRequest):
            log.info("the guest asked for its shutdown")
            self.stop(Stop())
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

    def _advance(self, event: Event, **changes: object) -> None:
        """Move the record on, durably. Raises OSError, but not on the way out: a full disk keeps no VM from ending."""
        self._record = self._record.after(event, **changes)
        try:
            records.write(self._names.session, self._record)
        except OSError as error:
            if event not in ENDS:
                raise
            log.error("the record cannot be written: %s", error)

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
