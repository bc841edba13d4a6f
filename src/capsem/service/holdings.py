"""What VMs and checkpoints share, layers and checkpoints themselves, and when it may go: when nobody names it any more."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator
from functools import partial

from capsem.model.checkpoint import Checkpoint, Kind
from capsem.model.errors import Corrupt
from capsem.service import space
from capsem.service.vm import Vm
from capsem.store.checkpoints import CheckpointStore, Draft
from capsem.store.layout import Layout
from capsem.system import System

SUM_AFTER = 10.0  # seconds from a checkpoint to the checksums of its layers: others want the disk first
SCARCE = 1 << 30  # bytes; with less of them free, room is what things are removed for

Removals = set[asyncio.Future[object]]  # under way, on threads

log = logging.getLogger("capsem_service.holdings")


class Holdings:
    """The VMs of a service, as far as they hold something together."""

    def __init__(self, system: System, layout: Layout) -> None:
        self.system = system
        self.layout = layout
        self._vms: dict[str, Vm] = {}
        self.stopping = False
        self.checkpoints = CheckpointStore(layout)
        self.spare: set[str] = set()  # layers that are being made, for a record to name
        self._skipped = False  # there are session directories that are no VM's, and were left alone
        self._taking_over = False  # what runs is being found out
        self._summing: asyncio.Task[None] | None = None
        self._pinned: Counter[str] = Counter()  # checkpoints that VMs are being made of
        self._clearing: Removals = set()
        self._sweeping: Removals = set()
        self._saving: set[str] = set()  # VMs of which a checkpoint is being made

    @contextlib.contextmanager
    def pinned(self, checkpoint_id: str) -> Iterator[None]:
        """Keep a checkpoint, to which no record points yet."""
        self._pinned[checkpoint_id] += 1
        try:
            yield
        finally:
            self._pinned[checkpoint_id] -= 1

    @contextlib.contextmanager
    def saving(self, vm_id: str) -> Iterator[None]:
        """Keep the checkpoints of a VM while one more is made, until a record or a pin points to it."""
        self._saving.add(vm_id)
        try:
            yield
        finally:
            self._saving.discard(vm_id)

    def is_referenced(self, checkpoint_id: str) -> bool:
        """Whether a VM is suspended in this checkpoint, or runs on its memory."""
        records = [vm.record for vm in self._vms.values() if not vm.deleted]
        return self._pinned[checkpoint_id] > 0 or any(checkpoint_id in (it.checkpoint, it.saving) for it in records)

    def is_frozen(self, layer: str) -> bool:
        """Whether a checkpoint holds this layer: then nothing may write to it."""
        return any(layer in checkpoint.layer_ids for checkpoint in self.checkpoints.all())

    def _knows_all(self) -> bool:
        """Whether every record could be read, and it is known who runs. One that could not would tell what it needs, so
        nothing shared may go; at the end of the take-over a sweep removes all at once."""
        unread = self._skipped or any(isinstance(vm.obstacle, Corrupt) for vm in self._vms.values())
        return not self._taking_over and not unread

    def collect(self) -> None:
        """Remove checkpoints that nobody needs any more, and the layers that only they named."""
        if not self._knows_all():
            return
        owners = {vm.id: vm for vm in self._vms.values() if not vm.deleted}
        for checkpoint in self.checkpoints.all():
            owner = owners.get(checkpoint.vm_id)
            if owner is not None and not checkpoint.is_of(owner.record):
                owner = None
            if checkpoint.kind == Kind.TEMPLATE:
                continue  # see service.templates
            if owner is not None and (owner.id in self._saving or checkpoint.visible(owner.record.kept)):
                continue  # about to be referred to, or the user's
            if not self.is_referenced(checkpoint.id):
                self.remove_checkpoint(checkpoint)

    def remove_checkpoint(self, checkpoint: Checkpoint) -> None:
        """Remove a checkpoint that nothing refers to, and its layers unless others name them."""
        log.info("removing checkpoint %s of %s", checkpoint.id, checkpoint.vm_id)
        self.checkpoints.withdraw(checkpoint.id)
        self.remove_layers(checkpoint.layer_ids)
        # Giving back hundreds of megabytes takes a file system longer than a suspend takes us: nobody waits for that.
        self._in_background(self._clearing, partial(self.checkpoints.clear, checkpoint.id))

    def sweep_drafts(self, vm_id: str) -> None:
        """Remove what a VM's supervisor had prepared, or had in the making when it was killed, while nobody waits for that."""
        self._in_background(self._sweeping, partial(self.checkpoints.sweep, vm_id))

    def discard(self, drafts: Collection[Draft]) -> None:
        """Remove these drafts, in the background."""

        def discard() -> None:
            for draft in drafts:
                self.checkpoints.discard(draft)

        if drafts:
            self._in_background(self._clearing, discard)

    def _in_background(self, those: Removals, remove: Callable[[], object]) -> None:
        def removed(removing: asyncio.Future[object]) -> None:
            those.discard(removing)
            if not removing.cancelled() and (error := removing.exception()) is not None:
                log.error("what is not needed any more stays until the service starts again: %s", error)

        task = asyncio.get_running_loop().run_in_executor(None, remove)
        those.add(task)
        task.add_done_callback(removed)

    async def cleared(self) -> None:
        """Wait until the files of all removed checkpoints and layers are gone. Raises OSError."""
        await asyncio.gather(*self._clearing)

    async def made_room(self) -> None:
        """Wait as `cleared` does where room is scarce: whoever removes something there is about to use it. Raises OSError."""
        if self._clearing and space.free_bytes(self.layout) < SCARCE:
            await self.cleared()

    def _used_layers(self) -> set[str]:
        """Layers that a VM or a checkpoint names; all there are while a checkpoint cannot tell which it needs: it may be of
        a newer Capsem, or come back from a backup."""
        used = {layer for vm in self._vms.values() if not vm.deleted for layer in vm.layers}
        used |= self.spare
        used |= {layer for checkpoint in self.checkpoints.all() for layer in checkpoint.layer_ids}
        if self.checkpoints.unreadable:
            used |= {path.stem for path in self.layout.layers.glob("*.qcow2")}
        return used

    def lasting_layers(self, vm: Vm) -> set[str]:
        """Layers that stay whatever a VM does next: those of others, and of checkpoints, except what its next suspend
        or stop takes along."""
        others = [other for other in self._vms.values() if other is not vm and not other.deleted]
        lasting = {layer for other in others for layer in other.layers}
        for checkpoint in self.checkpoints.all():
            hidden = checkpoint.is_of(vm.record) and not checkpoint.visible(vm.record.kept)
            if not hidden or any(other.record.checkpoint == checkpoint.id for other in others):
                lasting.update(checkpoint.layer_ids)
        return lasting

    def remove_layers(self, layers: Iterable[str]) -> None:
        """Remove those of these layers that neither a VM nor a checkpoint names, in the background: nothing can come to name
        them, and should we die meanwhile, the next service sweeps them."""
        if not self._knows_all():
            return  # swept when the service starts and all are known
        unused = set(layers) - self._used_layers()
        if unused:
            self._in_background(self._clearing, partial(self._unlink_layers, unused))

    def _unlink_layers(self, layers: Iterable[str]) -> None:
        for layer in layers:
            self.layout.layer(layer).unlink(missing_ok=True)
            self.layout.layer_sum(layer).unlink(missing_ok=True)

    def sum_soon(self) -> None:
        """Checkpoints were made: give their layers checksums, in a while and in the background."""
        if self._summing is None or self._summing.done():
            self._summing = asyncio.create_task(self._sum(), name="layer checksums")

    async def _sum(self) -> None:
        await asyncio.sleep(SUM_AFTER)
        try:
            await asyncio.to_thread(self.checkpoints.sum_layers, lambda: self.stopping)
        except OSError as error:  # a full disk; there will be another time
            log.warning("layers get no checksums: %s", error)
