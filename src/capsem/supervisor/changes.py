"""What a service may have done to a VM while it runs: another name, policy, layers; a checkpoint, a suspend.

Each is one write of the record, in the order that leaves the truth behind whenever it is cut off.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from capsem import faults
from capsem.api.internal import (
    AddLayer,
    Assign,
    Assigned,
    CheckpointMade,
    LayerAdded,
    LayersReplaced,
    Persist,
    Persisted,
    PolicySet,
    ReplaceLayers,
    Save,
    SetPolicy,
)
from capsem.control.guest import Identity
from capsem.hypervisor.driver import Layer
from capsem.model.checkpoint import Checkpoint, Kind
from capsem.model.errors import (
    CapsemError,
    GuestFailed,
    Interrupted,
    MachineFailed,
    TimedOut,
    WrongState,
)
from capsem.model.lifecycle import Event
from capsem.model.lifecycle import State as Lifecycle
from capsem.model.policy import Policy
from capsem.model.vm import Exit, VmRecord
from capsem.store import durable, records
from capsem.store.flatten import replaced
from capsem.store.layout import SessionDir
from capsem.store.naming import naming
from capsem.supervisor.owned import Next, Owned
from capsem.supervisor.policing import table_of
from capsem.supervisor.saving import Order

ASSIGN_LIMIT = 3.0  # seconds for a guest that waits to take its identity
FREEZE_LIMIT = 2.0  # seconds that the guest holds its writes for a new layer
SAVE_HINT = "the VM goes on; `capsem df` shows what takes room"

log = logging.getLogger("capsem_process")


def _suspended(checkpoint: Checkpoint) -> dict[str, Any]:
    """What a record says of a VM that is suspended in a checkpoint."""
    return {
        "checkpoint": checkpoint.id,
        "current": checkpoint.place(),
        "saving": None,
        "freezing": False,
        "layers": checkpoint.layer_ids,
        "last_exit": Exit("suspended", "suspended"),
    }


class Changes(Owned):
    """One VM whose machine runs. Changes of layers, checkpoints and the end are made one at a time."""

    async def persist(self, request: Persist) -> Persisted:
        """Take another name."""
        former = self._record.id
        await self._move(request, persistent=True)
        self.guest.rename(self._identity())
        self.policing.rename(request.name)
        self.recording.lifecycle("persisted", self._record.state, f"{former} is {request.name}")
        log.info("%s is persistent as %s", former, request.name)
        return Persisted()

    async def assign(self, request: Assign) -> Assigned:
        """Become somebody's. What was done while the VM waited for that, was done for nobody, and is told to nobody.

        The guest learns who it is while the record is written. Where this is cut off in between, the VM is still nobody's
        and is removed, or is who its record says with a guest that is told so by the next supervisor.

        Raises WrongState, TimedOut, Interrupted, OSError.
        """
        record = self._record
        if not record.pooled or record.state != Lifecycle.RUNNING or self._stop_asked is not None:
            raise WrongState(f"{record.id} is not in the pool any more", hint="create another VM")
        env = MappingProxyType(dict(request.env))
        self.lending.begin(request.secrets, None)
        environment = {**env, **self.lending.environment}
        identity = Identity(request.name, request.name, environment, record.machine_id, self._token)
        becoming = asyncio.create_task(self.guest.become(identity, ASSIGN_LIMIT), name="assign")
        try:
            await asyncio.sleep(0)  # let it speak to the guest first
            with self.activity.going_on():
                await self._move(
                    request,
                    persistent=request.persistent,
                    pooled=False,
                    spec=replace(record.spec, env=env),
                    policy=Policy.from_dict(request.policy),
                    network=MappingProxyType(table_of(request.network)),
                    secrets=MappingProxyType(self.lending.placeholders),
                    boot_kind="pool",
                    created_at=self._system.clock.time(),
                    started_at=self._system.clock.time(),
                )
                self.policing.begin(request.name, request.layers, self._record.network, None)
                self.jobs.forget_ended()
                await becoming
        finally:
            becoming.cancel()
            await asyncio.gather(becoming, return_exceptions=True)
        if request.ledger:
            self.recording.begin()
        self.recording.lifecycle("assigned", self._record.state, f"from the pool, as {request.name}")
        self._follow(request.parent_pid)
        if self._saver is not None and request.persistent:
            self._saver.prepare_soon()
        log.info("%s of the pool is %s", record.id, request.name)
        return Assigned()

    async def _move(self, to: Persist | Assign, **changes: object) -> None:
        """Take another name and directory. Of what makes that true the record goes first: from then on a service that finds
        the old directory moves it. Raises OSError: where the socket cannot lie nothing was changed."""
        old, session = self._names, SessionDir(Path(to.session_dir))
        names = replace(old, session=session, socket=Path(to.socket), ready_file=Path(to.ready_file))
        listener = await self._listen(names.socket)
        try:
            async with self.recording.set_aside(session.ledger):
                self._rewrite(id=to.name, **changes)
                durable.rename(old.session.path, session.path)
        except BaseException:
            listener.close()
            names.socket.unlink(missing_ok=True)
            raise
        self._names = names
        self._console.move(session.serial_log)
        self.transcript.move(session.pty_log)
        former, self._listener = self._listener, listener
        if former is not None:
            former.close()
        if old.ready_file.exists():
            self._names.ready_file.touch(mode=0o600)
        old.ready_file.unlink(missing_ok=True)
        old.socket.unlink(missing_ok=True)
        self._renamed(self._names)

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
        async with naming(self._names.layout, request.layer):
            self._rewrite(layers=(*before.layers, request.layer), freezing=True)
        faults.at("layer.named", self._machine.pid)
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
            self._rewrite(layers=before.layers, freezing=False)
            raise
        try:
            self._rewrite(freezing=False)
        except OSError as error:  # a full disk: the layer waits to be merged, for the next word in the record
            log.error("the record cannot be written: %s", error)
        faults.at("layer.added", self._machine.pid)
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
            faults.at("flatten.naming", self._machine.pid if self._machine else 0)
            async with naming(self._names.layout, request.new):
                self._rewrite(layers=(*layers, top), attached=(*self._record.attached, *request.old))
            faults.at("flatten.named", self._machine.pid if self._machine else 0)
        return LayersReplaced()

    async def save(self, request: Save) -> CheckpointMade:
        """Make a checkpoint, and go on or be suspended. A save that fails leaves the VM running."""
        async with self._saving, self._saves():
            saver, machine, before = self._saver, self._machine, self._record
            assert saver is not None
            assert machine is not None
            if before.state != Lifecycle.RUNNING or self._stop_asked is not None:
                raise WrongState(f"{before.id} is {before.state}", hint="try again in a moment")
            layer_id = self._system.entropy.token_bytes(16).hex()
            layer = Layer(self._names.layout.layer(layer_id), "qcow2")
            what = "checkpoint" if request.go_on else "suspend"  # see capsem.faults
            final: list[Next] = []
            try:
                checkpoint_id = await saver.reserve()
                faults.at(f"{what}.reserved", machine.pid)
                async with naming(self._names.layout):
                    self._driver.create_layer(
                        layer.path, size_mb=before.spec.disk_mb, vm_id=before.id, layer_id=layer_id
                    )
                    faults.at(f"{what}.layered", machine.pid)
                    # The record names the new layer before the machine writes to it, as in `add_layer`.
                    layers = (*before.layers, layer_id)
                    if request.go_on:
                        self._rewrite(layers=layers, freezing=True)
                    else:
                        self._advance(Event.SUSPEND, saving=checkpoint_id, layers=layers, freezing=True)
                        self._server.broadcast(self.state())
                faults.at(f"{what}.named", machine.pid)
                console = self._names.session.serial_log
                order = Order(Kind(request.kind), before.layers, layer, request.go_on, request.message, console)
                if request.go_on:
                    checkpoint = await saver.save(before, order)
                else:
                    checkpoint = await saver.save(before, order, lambda made: final.append(self._stage_suspended(made)))
            except BaseException as error:
                for each in final:
                    each.staged.discard()
                await self._go_on(before, layer_id, layer)
                if isinstance(error, OSError):
                    raise MachineFailed(
                        f"{before.id} could not be saved: {error.strerror or error}", hint=SAVE_HINT
                    ) from error
                raise
            if request.go_on:
                self._note_current(checkpoint)
                faults.at("checkpoint.recorded", machine.pid)
            else:
                await self._suspend(checkpoint, final[0])
                await self._gateway.close()
                faults.at("suspend.recorded", machine.pid)
                layer.path.unlink(missing_ok=True)
        memory, guest, pause = checkpoint.memory, checkpoint.guest, checkpoint.pause or 0.0
        assert memory is not None
        assert guest is not None
        log.info("saved as %s: %d bytes, paused %.3f s", checkpoint.id, memory.written, pause)
        return CheckpointMade(
            checkpoint=checkpoint.id,
            pause=pause,
            written=memory.written,
            synced=guest.synced,
            frozen=guest.frozen,
            streams=saver.streams,
        )

    @contextlib.asynccontextmanager
    async def _saves(self) -> AsyncIterator[None]:
        """At work, until the machine goes on, or else to the end of this process."""
        await self._at_work(shared=False)
        try:
            yield
        finally:
            if not self._suspended.is_set():
                self._work_done()

    def _note_current(self, checkpoint: Checkpoint) -> None:
        self._record = replace(self._record, current=checkpoint.place(), freezing=False)
        self.recording.lifecycle("checkpoint", self._record.state, f"{checkpoint.id} ({checkpoint.kind})")
        try:
            records.write(self._names.session, self._record)
        except OSError as error:  # a full disk; the checkpoint is made, and the next word in the record says so too
            log.error("the record cannot be written: %s", error)

    def _stage_suspended(self, checkpoint: Checkpoint) -> Next:
        return self._stage(Event.SUSPENDED, **_suspended(checkpoint))

    async def _suspend(self, checkpoint: Checkpoint, final: Next) -> None:
        """The word that makes it final. Raises Interrupted when the machine was killed on request meanwhile."""
        if self._record.state != Lifecycle.SUSPENDING:
            final.staged.discard()
            self._store.remove(checkpoint.id)
            raise Interrupted(f"{self._record.id} was stopped while it was being suspended")
        # With the checkpoint committed, SUSPENDING says the same (model.lifecycle.recover): it is done, and a machine that
        # went on now would make that a lie. So the machine's end and the record need not wait for one another.
        try:
            if self._record != final.before:  # its policy was changed meanwhile
                final.staged.discard()
                final = self._stage_suspended(checkpoint)
            final.staged.place(sync=False)  # here and now: no other change of the record comes in between
        except OSError as error:
            log.error("the record cannot be written: %s", error)
        self._record = self._record.after(final.event, **_suspended(checkpoint))
        self._suspended.set()
        self.recording.lifecycle(final.event, self._record.state)
        self.recording.rest()
        self.jobs.cut(self._job_waits)
        name = self._record.id
        self._server.cut(Interrupted(f"{name} was suspended meanwhile", hint=f"capsem resume {name}, then try again"))
        try:
            await asyncio.to_thread(durable.sync_directory, self._names.session.path)
        except OSError as error:
            log.error("the record cannot be made durable: %s", error)

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
        layers = (*before.layers, layer_id) if added else before.layers
        self._record = replace(self._record, saving=None, freezing=False, layers=layers)
        try:
            if self._record.state == Lifecycle.SUSPENDING:
                self._advance(Event.ABORTED)
            else:
                records.write(self._names.session, self._record)
            if not added:
                layer.path.unlink(missing_ok=True)
        except OSError as error:  # a full disk; what the record says is true enough: one empty layer more
            log.error("the record cannot be written: %s", error)
            if not added and layer.path.exists():  # it goes with the machine; by then the record can be written
                self._record = replace(self._record, attached=(*self._record.attached, layer_id))
        self.guest.channel.release()
        with contextlib.suppress(MachineFailed):  # it has ended: the run says why
            await self._machine.run()
        if self._saver is not None:
            await self._saver.let_go()
        self._server.broadcast(self.state())

    def set_policy(self, request: SetPolicy) -> PolicySet:
        """Write down another policy, which the service carries out. Raises InvalidInput, OSError."""
        self._rewrite(policy=Policy.from_dict(request.policy))
        return PolicySet()
