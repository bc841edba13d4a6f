"""Forks of a checkpoint or of this very instant: live ones, and disks alone."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from capsem import faults
from capsem.api.internal import Save, Stop
from capsem.api.operation import unknown_vm
from capsem.api.vm_types import ForkRequest, ForkResponse
from capsem.model.checkpoint import Checkpoint, Kind
from capsem.model.errors import WrongState, host_failed
from capsem.model.lifecycle import State
from capsem.service.checkpoints import ms
from capsem.service.lifecycle import lost
from capsem.service.rollback import Rollback
from capsem.service.vm import READY_LIMIT, Vm

STARTS = 4  # forks that are started at once


class Forks(Rollback):
    """See service.manager.Manager."""

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
                checkpoint = self._store.find(source.record, request.checkpoint or "")
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
                found = self._store.find(source.record, request.checkpoint).id
            elif source.running:
                with self._fleet.saving(source.id):
                    made = await self._save_live(source, Save(kind=Kind.FORK, go_on=True), "fork")
                    found, pause = made.checkpoint, ms(made.pause)
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
