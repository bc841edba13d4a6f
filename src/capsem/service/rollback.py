"""Back to a checkpoint: the present is kept, unless that is not wanted, and one write of the record makes it so."""

from __future__ import annotations

from capsem import __version__, faults
from capsem.api.checkpoint_types import RollbackRequest, RollbackResponse
from capsem.api.internal import Stop
from capsem.api.operation import unknown_vm
from capsem.model.checkpoint import Checkpoint, Kind
from capsem.model.errors import host_failed
from capsem.model.lifecycle import Event, State, step
from capsem.service.checkpoints import Checkpoints
from capsem.service.vm import Vm


class Rollback(Checkpoints):
    """See service.manager.Manager."""

    async def rollback(self, vm_id: str, request: RollbackRequest) -> RollbackResponse:
        """Take a VM back to a checkpoint; its present is kept as another one, unless that is not wanted."""
        vm = self._vm("rollback", vm_id)
        self._require_persistent(vm, "rolled back")
        async with vm.turn:
            if vm.deleted:
                raise unknown_vm(vm_id)
            target, _files = self._store.open(self._store.find(vm.record, request.checkpoint).id)
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
        await self._fleet.made_room()
        answer = RollbackResponse(success=True, checkpoint=target.id, saved=saved)
        if not was_running:
            return answer
        resumed = await self.resume(vm_id)
        note = None if target.warm else "the checkpoint holds no memory"
        return RollbackResponse(
            success=True,
            checkpoint=target.id,
            saved=saved,
            running=True,
            boot_kind=resumed.boot_kind,
            boot_note=resumed.boot_note or note,
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
        return await self._keep_disk(vm)

    async def _keep_disk(self, vm: Vm) -> str:
        """A checkpoint without memory of a VM that does not run; the caller gives it other layers."""
        record = vm.record
        try:
            await self._sync_top(vm)
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
        before, place = vm.record.layers, target.place(vm.record.kept)
        if target.warm:
            state = step(vm.record.state, Event.ROLL_BACK)
            vm.rewrite(state=state, layers=target.layer_ids, checkpoint=target.id, current=place, last_exit=None)
        else:
            suspended = vm.record.state == State.SUSPENDED
            state = step(vm.record.state, Event.FORGET) if suspended else vm.record.state
            layer = self._maker.new_layer(vm.record)
            vm.rewrite(state=state, layers=(*target.layer_ids, layer), checkpoint=None, current=place)
        self._fleet.remove_layers(before)
