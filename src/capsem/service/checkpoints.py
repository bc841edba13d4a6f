"""Suspend, checkpoint, roll back, fork live. Every operation takes the turns of the VMs that it changes."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from capsem import __version__, faults
from capsem.api.checkpoint_types import (
    CheckpointInfo,
    CheckpointRequest,
    CheckpointResponse,
    CheckpointsResponse,
    OneCheckpointRequest,
    RollbackRequest,
    RollbackResponse,
    SuspendResponse,
)
from capsem.api.internal import CheckpointMade, Save, Stop
from capsem.api.operation import unknown_vm
from capsem.api.vm_types import ForkRequest, ForkResponse
from capsem.config import Settings
from capsem.model.checkpoint import Checkpoint, Kind
from capsem.model.errors import CapsemError, InvalidInput, MachineFailed, WrongState, host_failed
from capsem.model.lifecycle import Event, State, step
from capsem.service import space
from capsem.service.create import Maker
from capsem.service.fleet import Fleet
from capsem.service.gate import VISIT
from capsem.service.lifecycle import Lifecycle, lost
from capsem.service.vm import READY_LIMIT, Vm
from capsem.store import durable
from capsem.store.checkpoints import CheckpointStore
from capsem.tracing import span

EXIT_LIMIT = 10.0  # seconds from a committed suspend to its supervisor's exit
STARTS = 4  # forks that are started at once

log = logging.getLogger("capsem_service.checkpoints")


class Checkpoints(Lifecycle):
    """See service.manager.Manager."""

    def __init__(self, fleet: Fleet, maker: Maker, settings: Settings) -> None:
        super().__init__(fleet, maker, settings)
        self._asked: set[asyncio.Task[None]] = set()
        fleet.on_asked = self._suspend_asked

    @property
    def _store(self) -> CheckpointStore:
        return self._fleet.checkpoints

    # -- suspend

    async def suspend(self, vm_id: str) -> SuspendResponse:
        """Save a running VM and end its processes; the checkpoint is durable on return."""
        vm = self._vm("suspend", vm_id)
        self._require_persistent(vm, "suspended")
        async with vm.turn:
            made = await self._suspend(vm, Kind.SUSPEND)
        return SuspendResponse(
            success=True,
            checkpoint=made.checkpoint,
            bytes=made.written,
            pause_ms=_ms(made.pause),
            synced=made.synced,
            frozen=made.frozen,
            warning=self._space_warning(vm),
            lost={"streams": made.streams},
        )

    def _suspend_asked(self, vm: Vm, action: str) -> None:
        """Its own guest wants it: as if somebody had asked from outside, but that there is nobody to tell."""
        if action == "suspend":
            task = asyncio.create_task(self._suspend_quietly(vm.id), name=f"suspend {vm.id}")
            self._asked.add(task)
            task.add_done_callback(self._asked.discard)

    async def _suspend_quietly(self, vm_id: str) -> None:
        VISIT.set(None)  # whoever started the VM has no part in this
        try:
            await self.suspend(vm_id)
        except CapsemError as error:
            log.warning("%s was not suspended, as its guest had asked: %s", vm_id, error)

    def _space_warning(self, vm: Vm) -> str | None:
        """That the disk may be too full for the VM's next suspend; None when it is not, or the VM is never suspended."""
        layout, record, ram = self._fleet.layout, vm.record, vm.record.spec.ram_mb << 20
        free = space.free_bytes(layout)
        if free >= ram + space.MARGIN or not record.persistent:
            return None
        base = durable.allocated_bytes(layout.checkpoint(record.checkpoint).memory) if record.checkpoint else 0
        said = vm.link.state if vm.link is not None else None
        changed = space.changed_bytes(said.vmm_pid) if said is not None and said.vmm_pid else 0
        prepared = space.draft_bytes(layout, vm.pid) if vm.pid else 0
        return space.warning(vm.id, space.needed(ram, changed, base, prepared), free)

    def _require_persistent(self, vm: Vm, what: str) -> None:
        if not vm.record.persistent:
            raise InvalidInput(
                f"{vm.id}: ephemeral VMs cannot be {what}", hint=f"`capsem persist {vm.id} NAME` keeps it"
            )

    async def _suspend(self, vm: Vm, kind: Kind) -> CheckpointMade:
        self._vm("suspend", vm.id)
        with self._fleet.saving(vm.id):
            async with self._gate.change(vm, "suspend"):
                made = await self._save("suspend", vm, Save(kind=kind, go_on=False))
                faults.at("suspend.acknowledged")
                with span("wait for the supervisor's end"):
                    if not await vm.ended(EXIT_LIMIT):
                        await vm.stop(Stop(kill=True))
        faults.at("suspend.done")
        self._fleet.collect()
        if vm.record.state != State.SUSPENDED:
            raise MachineFailed(
                f"{vm.id} was saved, and then could not say so: it is {vm.record.state}", hint=f"capsem logs {vm.id}"
            )
        return made

    async def _save(self, operation: str, vm: Vm, order: Save) -> CheckpointMade:
        self._vm(operation, vm.id)
        link = await vm.ready_link()
        with span("have it saved"):
            made = await link.open(order).result()
        assert isinstance(made, CheckpointMade)
        self._fleet.sum_soon()
        vm.reload()
        return made

    # -- checkpoints

    async def checkpoint(self, vm_id: str, request: CheckpointRequest) -> CheckpointResponse:
        """Make a checkpoint of a running VM, which goes on running."""
        vm = self._vm("checkpoint", vm_id)
        self._require_persistent(vm, "checkpointed")
        async with vm.turn:
            made = await self._save_live(vm, Save(kind=Kind.MANUAL, go_on=True, message=request.message))
        return CheckpointResponse(
            id=made.checkpoint,
            bytes=made.written,
            pause_ms=_ms(made.pause),
            synced=made.synced,
            frozen=made.frozen,
            warning=self._space_warning(vm),
        )

    async def save_automatically(self, vm_id: str) -> None:
        """Make a checkpoint because it is time for one."""
        vm = self._vm("checkpoint", vm_id)
        async with vm.turn:
            await self._save_live(vm, Save(kind=Kind.AUTOMATIC, go_on=True))

    async def _save_live(self, vm: Vm, order: Save, operation: str = "checkpoint") -> CheckpointMade:
        self._vm(operation, vm.id)
        async with self._gate.change(vm, operation):
            return await self._save(operation, vm, order)

    async def checkpoints(self, vm_id: str, *, hidden: bool = False) -> CheckpointsResponse:
        """The checkpoints of a VM, oldest first."""
        vm = self._vm("checkpoints", vm_id)
        return CheckpointsResponse(checkpoints=await asyncio.to_thread(self._list, vm, hidden))

    def _list(self, vm: Vm, hidden: bool) -> list[CheckpointInfo]:
        everything = self._store.all()
        mine = [each for each in everything if each.vm_id == vm.id]
        named = [layer for each in everything for layer in each.layer_ids]
        named += [layer for other in self._fleet.known() for layer in other.record.layers]
        return [self._describe(vm, each, named) for each in mine if hidden or each.visible(vm.record.kept)]

    def _describe(self, vm: Vm, checkpoint: Checkpoint, named: list[str]) -> CheckpointInfo:
        layout = self._fleet.layout
        sizes = {layer: durable.allocated_bytes(layout.layer(layer)) for layer in checkpoint.layer_ids}
        own = sum(size for layer, size in sizes.items() if named.count(layer) == 1)
        return CheckpointInfo(
            id=checkpoint.id,
            kind=checkpoint.kind,
            created_at=checkpoint.created_at,
            memory_bytes=durable.allocated_bytes(layout.checkpoint(checkpoint.id).path),
            disk_bytes=own,
            shared_bytes=sum(sizes.values()) - own,
            warm=checkpoint.warm,
            current=checkpoint.id == vm.record.current,
            parent=checkpoint.parent,
            message=checkpoint.message,
            pause_ms=None if checkpoint.pause is None else _ms(checkpoint.pause),
            hidden=not checkpoint.visible(vm.record.kept),
        )

    async def remove_checkpoint(self, vm_id: str, request: OneCheckpointRequest) -> None:
        """Remove a checkpoint; what others share with it stays. Raises WrongState when a VM needs it."""
        vm = self._vm("remove_checkpoint", vm_id)
        async with vm.turn:
            checkpoint = self._store.find(vm_id, request.checkpoint)
            if self._fleet.is_referenced(checkpoint.id):
                users = [
                    it.id for it in self._fleet.known() if checkpoint.id in (it.record.checkpoint, it.record.saving)
                ]
                raise WrongState(
                    f"checkpoint {checkpoint.id[:12]} is what {', '.join(users) or vm_id} came from last",
                    hint="suspend or stop that VM first: it then needs it no more",
                )
            self._fleet.remove_checkpoint(checkpoint)
        await self._fleet.cleared()

    async def verify_checkpoint(self, vm_id: str, request: OneCheckpointRequest) -> None:
        """Read all of a checkpoint and hold it against its checksums. Raises Corrupt."""
        self._vm("verify_checkpoint", vm_id)
        checkpoint = self._store.find(vm_id, request.checkpoint)
        with self._fleet.pinned(checkpoint.id):
            await asyncio.to_thread(self._store.verify, checkpoint.id)

    # -- roll back

    async def rollback(self, vm_id: str, request: RollbackRequest) -> RollbackResponse:
        """Take a VM back to a checkpoint; its present is kept as another one, unless that is not wanted."""
        vm = self._vm("rollback", vm_id)
        self._require_persistent(vm, "rolled back")
        async with vm.turn:
            if vm.deleted:
                raise unknown_vm(vm_id)
            target, _files = self._store.open(self._store.find(vm_id, request.checkpoint).id)
            if target.warm:
                await self._maker.check_restorable(vm.record, target)
            was_running, saved = vm.running, None
            with self._fleet.pinned(target.id):
                if request.save:
                    saved = await self._keep_present(vm)
                elif was_running:
                    await self._end(vm, Stop(kill=True))
                try:
                    faults.at("rollback.kept")
                    self._go_back(vm, target)
                except OSError as error:
                    if saved is not None and vm.record.checkpoint != saved:  # of its disk alone, which it goes on with
                        self._store.remove(saved)
                    raise host_failed(f"{vm_id} could not be rolled back", error) from error
                faults.at("rollback.recorded")
        self._fleet.collect()
        await self._fleet.cleared()
        answer = RollbackResponse(success=True, checkpoint=target.id, saved=saved)
        if not was_running:
            return answer
        resumed = await self.resume(vm_id)
        return RollbackResponse(
            success=True,
            checkpoint=target.id,
            saved=saved,
            running=True,
            boot_kind=resumed.boot_kind,
            boot_note=resumed.boot_note,
        )

    async def _keep_present(self, vm: Vm) -> str:
        """A checkpoint of the VM as it is; it does not run afterwards. Returns its id."""
        if vm.running:
            return (await self._suspend(vm, Kind.ROLLBACK)).checkpoint
        if vm.record.state == State.SUSPENDED:
            present = vm.record.checkpoint
            assert present is not None
            if not self._store.read(present).visible(vm.record.kept):
                vm.rewrite(kept=(*vm.record.kept, present))
            return present
        return self._keep_disk(vm)

    def _keep_disk(self, vm: Vm) -> str:
        """A checkpoint without memory of a VM that does not run; the caller gives it other layers."""
        record = vm.record
        try:
            draft = self._store.prepare(self._fleet.system.entropy.token_bytes(16).hex())
            try:
                checkpoint = Checkpoint.of(
                    record,
                    id=draft.id,
                    kind=Kind.ROLLBACK,
                    created_at=self._fleet.system.clock.time(),
                    creator=__version__,
                    layers=self._store.freeze(record.layers),
                )
                self._store.commit(draft, checkpoint)
            except BaseException:
                self._store.discard(draft)
                raise
        except OSError as error:
            raise host_failed(f"{record.id} could not be kept as it is", error) from error
        return checkpoint.id

    def _go_back(self, vm: Vm, target: Checkpoint) -> None:
        """The one write that makes it so."""
        before = vm.record.layers
        if target.warm:
            state = step(vm.record.state, Event.ROLL_BACK)
            vm.rewrite(state=state, layers=target.layer_ids, checkpoint=target.id, current=target.id, last_exit=None)
        else:
            suspended = vm.record.state == State.SUSPENDED
            state = step(vm.record.state, Event.FORGET) if suspended else vm.record.state
            layer = self._maker.new_layer(vm.record)
            vm.rewrite(state=state, layers=(*target.layer_ids, layer), checkpoint=None, current=target.id)
        self._fleet.remove_layers(before)

    # -- fork

    async def fork(self, vm_id: str, request: ForkRequest) -> ForkResponse:
        """New VMs on a copy of this one's disk; with its memory too, and running, if they are to be live."""
        if not request.live:
            source = self._vm("fork", vm_id)
            return await (self._fork_disk(source, request) if request.checkpoint else super().fork(vm_id, request))
        try:
            return await self._fork_live(vm_id, request)
        except OSError as error:
            raise host_failed(f"{vm_id} could not be forked", error) from error
        finally:
            self._fleet.collect()

    async def _fork_live(self, vm_id: str, request: ForkRequest) -> ForkResponse:
        source = self._vm("fork", vm_id)
        async with contextlib.AsyncExitStack() as held:
            for name in request.names:
                self._fleet.take_name(name)
                held.callback(self._fleet.release, name)
            self._fleet.check_limit(len(request.names))
            checkpoint, pause = await self._instant(source, request, held)
            faults.at("fork.instant")
            children = []
            try:
                for name in request.names:
                    spec = replace(source.record.spec, cpus=checkpoint.cpus, ram_mb=checkpoint.ram_mb)
                    children.append(
                        self._maker.make_child(
                            name,
                            source.record,
                            checkpoint.layer_ids,
                            request.description,
                            spec=spec,
                            checkpoint=checkpoint.id,
                            network=_network_of(checkpoint, request),
                            secrets=self._inherited(source, request),
                        )
                    )
                faults.at("fork.recorded")
                await self._fleet.on_forked(source, children)
                await self._start_forks(children)
            except BaseException:
                for child in children:
                    async with child.turn:
                        await self._end(child, Stop(kill=True))
                        self._fleet.remove(child)
                raise
        return ForkResponse(
            name=request.names[0],
            size_bytes=self._fleet.chain_bytes(children[0].record),
            names=request.names,
            pause_ms=pause,
            lost=lost(children[0]),
        )

    async def _fork_disk(self, source: Vm, request: ForkRequest) -> ForkResponse:
        """A new, stopped VM on the disk of a checkpoint, whatever has become of its memory."""
        self._fleet.take_name(request.name)
        try:
            async with source.turn:
                if source.deleted:
                    raise unknown_vm(source.id)
                checkpoint = self._store.find(source.id, request.checkpoint or "")
                self._store.check_layers(checkpoint)
                child = self._maker.make_child(
                    request.name,
                    source.record,
                    checkpoint.layer_ids,
                    request.description,
                    network=_network_of(checkpoint, request),
                    secrets=self._inherited(source, request),
                )
                await self._fleet.on_forked(source, [child])
        finally:
            self._fleet.release(request.name)
        return ForkResponse(name=request.name, size_bytes=self._fleet.chain_bytes(child.record))

    async def _instant(
        self, source: Vm, request: ForkRequest, held: contextlib.AsyncExitStack
    ) -> tuple[Checkpoint, float | None]:
        """The checkpoint to fork from, kept as long as `held`; how many ms the source stood still for it."""
        pause = None
        async with source.turn:
            if source.deleted:
                raise unknown_vm(source.id)
            if request.checkpoint is not None:
                found = self._store.find(source.id, request.checkpoint).id
            elif source.running:
                with self._fleet.saving(source.id):
                    made = await self._save_live(source, Save(kind=Kind.FORK, go_on=True), "fork")
                    found, pause = made.checkpoint, _ms(made.pause)
                    held.enter_context(self._fleet.pinned(found))
            elif source.record.state == State.SUSPENDED and source.record.checkpoint is not None:
                found = source.record.checkpoint
            else:
                raise WrongState(
                    f"{source.id} does not run and is not suspended: it has no memory to fork",
                    hint="fork its disk alone, resume it first, or name a checkpoint",
                )
            held.enter_context(self._fleet.pinned(found))
        checkpoint, _files = self._store.open(found)
        await self._maker.check_restorable(source.record, checkpoint)
        return checkpoint, pause

    async def _start_forks(self, children: list[Vm]) -> None:
        bound = asyncio.Semaphore(STARTS)

        async def start(child: Vm) -> None:
            async with bound, child.turn:
                await self._restore(child)
            await self._wait_ready(child, READY_LIMIT)

        results = await asyncio.gather(*(start(child) for child in children), return_exceptions=True)
        for result in results:
            if isinstance(result, BaseException):
                raise result


def _network_of(checkpoint: Checkpoint, request: ForkRequest) -> Mapping[str, Any] | None:
    """The network policy of a fork: of an instant that was asked for, that of the instant; else, and where the checkpoint knows
    none, that which the source has now."""
    return None if request.checkpoint is None else checkpoint.network


def _ms(seconds: float) -> float:
    return round(seconds * 1000, 1)
