"""Keeps the layer chains of all VMs short, in the background and in nobody's way.

A chain is merged by copying: the frozen layers (`VmRecord.frozen`) that `store.flatten` picks are written into a new layer,
by a thread, one chain at a time, while the VM runs, stands still or is saved as it likes. Then one write of the VM's record
names the new layer in their place, under the VM's turn:

    at rest     the service writes it
    running     its supervisor does (ReplaceLayers); the machine goes on with the files that it has open, and a suspend's
                manifest names the merged layer, which holds the same bytes
    suspended   nobody may: its layers are its checkpoint's. The merged layer waits until the VM runs or rests

Until that write nobody names the new layer, and after it the old ones are removed as soon as nobody names them. So a
merge that ends anywhere harms nothing, and what it leaves in a crash the next service sweeps.
"""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass

from capsem import faults
from capsem.api.internal import ReplaceLayers
from capsem.hypervisor.driver import Driver
from capsem.model.errors import CapsemError, Interrupted
from capsem.model.lifecycle import State
from capsem.service.fleet import Fleet
from capsem.service.vm import Vm
from capsem.store import durable
from capsem.store.flatten import MAX_DEPTH, plan, replaced

AT_REST = frozenset({State.CREATED, State.STOPPED, State.FAILED})

log = logging.getLogger("capsem_service.flattening")


@dataclass(frozen=True, slots=True)
class Merged:
    """The layer `new` says the same as `old` together."""

    old: tuple[str, ...]
    new: str


class Flattening:
    """Merges layers of a fleet's VMs from `begin` to `close`."""

    def __init__(self, fleet: Fleet, driver: Driver, *, max_depth: int = MAX_DEPTH) -> None:
        self._fleet = fleet
        self._driver = driver
        self._max_depth = max_depth
        self._tasks: dict[Vm, asyncio.Task[None]] = {}
        self._again: set[Vm] = set()  # changed while their task was at work
        self._merged: dict[Vm, Merged] = {}  # waits to be named
        self._asked: set[Vm] = set()  # whose supervisor may have named it, and has not said so
        self._failed: dict[Vm, tuple[str, ...]] = {}  # chains that could not be merged: not again until they change
        self._one = asyncio.Lock()

    def begin(self) -> None:
        """Look at every VM, now and whenever one changes."""
        self._fleet.watchers.append(self._look)
        for vm in self._fleet.known():
            self._look(vm)

    async def close(self) -> None:
        """Give up what is under way, and leave nothing."""
        if self._look in self._fleet.watchers:
            self._fleet.watchers.remove(self._look)
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for vm in set(self._merged) - self._asked:
            self._discard(vm)

    @property
    def busy(self) -> bool:
        """Whether anything is under way."""
        return bool(self._tasks)

    def waiting(self, vm: Vm) -> str | None:
        """The layer that was merged for a VM and is not named yet."""
        merged = self._merged.get(vm)
        return merged.new if merged is not None else None

    def _look(self, vm: Vm) -> None:
        task = self._tasks.get(vm)
        if vm.deleted:
            if task is not None:
                task.cancel()
            else:
                self._forget(vm)
            for other in self._fleet.known():  # with which it may have shared layers
                self._look(other)
        elif task is not None:
            self._again.add(vm)
        elif vm in self._merged or len(vm.record.frozen) > self._max_depth:
            task = self._tasks[vm] = asyncio.create_task(self._work(vm), name=f"flatten {vm.id}")
            task.add_done_callback(lambda _task: self._done(vm))  # also of one that is cancelled before it begins

    async def _work(self, vm: Vm) -> None:
        try:
            self._again.add(vm)
            while vm in self._again:
                self._again.discard(vm)
                await self._flatten(vm)
        except (CapsemError, OSError) as error:
            log.warning("the layers of %s cannot be merged: %s", vm.id, error)
            self._failed[vm] = vm.record.frozen

    def _done(self, vm: Vm) -> None:
        self._again.discard(vm)
        del self._tasks[vm]
        if vm.deleted:
            self._forget(vm)

    def _forget(self, vm: Vm) -> None:
        self._discard(vm)
        self._failed.pop(vm, None)

    def _discard(self, vm: Vm) -> None:
        merged = self._merged.pop(vm, None)
        self._asked.discard(vm)
        if merged is not None:
            self._fleet.spare.discard(merged.new)
            self._fleet.remove_layers((merged.new,))

    async def _flatten(self, vm: Vm) -> None:
        merged = self._merged.get(vm)
        if merged is not None and replaced(vm.record.frozen, merged.old, merged.new) is None:
            self._discard(vm)  # the VM went back to another chain meanwhile
            merged = None
        if merged is None and self._failed.get(vm) != vm.record.frozen:
            async with self._one:
                merged = await self._merge(vm)
        if merged is not None:
            await self._name(vm, merged)

    async def _merge(self, vm: Vm) -> Merged | None:
        """Merge what the plan says. Raises CapsemError, OSError; then nothing is left of it."""
        layers, layout = vm.record.frozen, self._fleet.layout
        paths = [layout.layer(layer) for layer in layers]
        lasting = self._fleet.lasting_layers(vm)
        shared = max((place for place, layer in enumerate(layers, 1) if layer in lasting), default=0)
        places = plan([durable.allocated_bytes(path) for path in paths], self._max_depth, shared)
        if places is None:
            return None
        old, new = layers[places.start : places.stop], self._fleet.system.entropy.token_bytes(16).hex()
        self._fleet.spare.add(new)
        try:
            done = await self._driver.merge_layers(
                paths[places.start : places.stop], layout.layer(new), vm_id=vm.id, layer_id=new
            )
        except BaseException:
            self._fleet.spare.discard(new)
            raise
        log.info("merged %d of %d layers of %s: %d bytes", len(old), len(layers), vm.id, done.copied_bytes)
        self._merged[vm] = merged = Merged(old, new)
        faults.at("flatten.merged")
        return merged

    async def _name(self, vm: Vm, merged: Merged) -> None:
        """Let the VM's record name the merged layer, if that may be now."""
        async with vm.turn:
            frozen = vm.record.frozen
            layers = replaced(frozen, merged.old, merged.new)
            if layers is None or vm.deleted:
                self._discard(vm)
            elif vm.running:
                await self._tell(vm, merged)
            elif vm.state in AT_REST:
                vm.rewrite(layers=(*layers, *vm.record.layers[len(frozen) :]))
                self._named(vm, merged)

    async def _tell(self, vm: Vm, merged: Merged) -> None:
        if vm.state != State.RUNNING or vm.link is None:
            return
        self._asked.add(vm)
        try:
            await vm.link.open(ReplaceLayers(old=list(merged.old), new=merged.new)).result()
        except Interrupted:
            raise  # the record will tell, once its supervisor is gone: then the fleet says that the VM has changed
        except CapsemError:
            vm.reload()
            if merged.new not in vm.record.layers:
                self._discard(vm)
                raise
        vm.reload()
        self._named(vm, merged)

    def _named(self, vm: Vm, merged: Merged) -> None:
        del self._merged[vm]
        self._asked.discard(vm)
        self._fleet.spare.discard(merged.new)
        faults.at("flatten.replaced")
        self._fleet.remove_layers(merged.old)
