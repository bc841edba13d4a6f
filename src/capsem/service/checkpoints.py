"""Suspend and checkpoint, and what there is of that. Every operation takes the turns of the VMs that it changes."""

from __future__ import annotations

import asyncio
import logging

from capsem import faults
from capsem.api.checkpoint_types import (
    CheckpointInfo,
    CheckpointRequest,
    CheckpointResponse,
    CheckpointsResponse,
    OneCheckpointRequest,
    SuspendResponse,
)
from capsem.api.internal import CheckpointMade, Save, Stop
from capsem.config import Settings
from capsem.model.checkpoint import Checkpoint, Kind
from capsem.model.errors import CapsemError, InvalidInput, MachineFailed, WrongState
from capsem.model.lifecycle import State
from capsem.service import space
from capsem.service.create import Maker
from capsem.service.fleet import Fleet
from capsem.service.gate import VISIT
from capsem.service.lifecycle import Lifecycle
from capsem.service.vm import Vm
from capsem.store import durable
from capsem.store.checkpoints import CheckpointStore
from capsem.tracing import span

EXIT_LIMIT = 10.0  # seconds from a committed suspend to its supervisor's exit

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
            pause_ms=ms(made.pause),
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
            pause_ms=ms(made.pause),
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
        mine = [each for each in everything if each.is_of(vm.record)]
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
            pause_ms=None if checkpoint.pause is None else ms(checkpoint.pause),
            hidden=not checkpoint.visible(vm.record.kept),
        )

    async def remove_checkpoint(self, vm_id: str, request: OneCheckpointRequest) -> None:
        """Remove a checkpoint; what others share with it stays. Raises WrongState when a VM needs it."""
        vm = self._vm("remove_checkpoint", vm_id)
        async with vm.turn:
            checkpoint = self._store.find(vm.record, request.checkpoint)
            if self._fleet.is_referenced(checkpoint.id):
                raise self._needed(checkpoint.id)
            self._fleet.remove_checkpoint(checkpoint)
        await self._fleet.made_room()

    def _needed(self, checkpoint_id: str) -> WrongState:
        """By whom, and what would change that."""
        users = [it for it in self._fleet.known() if checkpoint_id in (it.record.checkpoint, it.record.saving)]
        if not users:
            return WrongState(
                f"checkpoint {checkpoint_id[:12]} is being read, for a fork, a rollback, an export or a check",
                hint="try again when that is done",
            )
        first = "suspend or stop" if all(it.running for it in users) else "resume, and then suspend or stop,"
        return WrongState(
            f"checkpoint {checkpoint_id[:12]} is what {', '.join(it.id for it in users)} came from last",
            hint=f"{first} {'that VM' if len(users) == 1 else 'those VMs'} first: it is then needed no more",
        )

    async def verify_checkpoint(self, vm_id: str, request: OneCheckpointRequest) -> None:
        """Read all of a checkpoint and hold it against its checksums. Raises Corrupt."""
        vm = self._vm("verify_checkpoint", vm_id)
        checkpoint = self._store.find(vm.record, request.checkpoint)
        with self._fleet.pinned(checkpoint.id):
            await asyncio.to_thread(self._store.verify, checkpoint.id)


def ms(seconds: float) -> float:
    """Milliseconds, as answers have them."""
    return round(seconds * 1000, 1)
