"""Carries out the policies of VMs (model.policy): one task for each VM that runs and has one, asleep until it is due.

Nothing is remembered here that matters: when a run began and when a checkpoint was made is on disk, how long a VM has
been idle its supervisor knows. So a service that starts goes on where the last one was.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from dataclasses import dataclass, field
from typing import Protocol

from capsem.api.checkpoint_types import OneCheckpointRequest
from capsem.api.internal import JobList, Jobs
from capsem.model.checkpoint import Kind
from capsem.model.errors import CapsemError, NotFound
from capsem.model.lifecycle import State
from capsem.model.policy import LONGEST, Due
from capsem.service.fleet import Fleet
from capsem.service.gate import VISIT
from capsem.service.vm import Vm

AGAIN = 30.0  # seconds after something could not be done

log = logging.getLogger("capsem_service.timers")


class Operations(Protocol):
    """What can be due. Each takes the VM's turn, and raises CapsemError."""

    async def suspend(self, vm_id: str) -> object:
        """Save and end it."""

    async def stop(self, vm_id: str) -> object:
        """Power it off."""

    async def delete(self, vm_id: str) -> None:
        """Destroy it."""

    async def save_automatically(self, vm_id: str) -> None:
        """Make an automatic checkpoint."""

    async def remove_checkpoint(self, vm_id: str, request: OneCheckpointRequest) -> None:
        """Remove a checkpoint."""


@dataclass(slots=True)
class _Attendant:
    task: asyncio.Task[None]
    news: asyncio.Event = field(default_factory=asyncio.Event)


class Timers:
    """Begin before the fleet finds its VMs; `close` before they are ended."""

    def __init__(self, fleet: Fleet, operations: Operations) -> None:
        self._fleet = fleet
        self._operations = operations
        self._attendants: dict[Vm, _Attendant] = {}
        fleet.watchers.append(self.look_anew)
        self._jumps = asyncio.create_task(self._follow_clock(), name="timers")

    def look_anew(self, vm: Vm) -> None:
        """A VM runs, or does not any more, or has another policy."""
        if (attendant := self._attendants.get(vm)) is not None:
            attendant.news.set()
        elif self._wanted(vm):
            self._attendants[vm] = attendant = _Attendant(asyncio.create_task(self._attend(vm), name=f"timers {vm.id}"))

    def _wanted(self, vm: Vm) -> bool:
        return vm.running and not vm.deleted and bool(vm.record.policy.to_dict())

    async def _follow_clock(self) -> None:
        """Waiting is by a clock that neither sees the host sleep nor its time being set."""
        while True:
            await self._fleet.system.clock.jumped()
            for attendant in self._attendants.values():
                attendant.news.set()

    async def close(self) -> None:
        """Nothing is done any more."""
        self._fleet.watchers.remove(self.look_anew)
        tasks = [self._jumps, *(each.task for each in self._attendants.values())]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _attend(self, vm: Vm) -> None:
        VISIT.set(None)  # it was begun by somebody's request, and is not part of it
        try:
            while self._wanted(vm):
                news = self._attendants[vm].news
                news.clear()
                try:
                    wait = await self._look(vm)
                except (CapsemError, OSError) as error:
                    log.warning("%s: what is due could not be done: %s", vm.id, error)
                    wait = AGAIN
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(wait):
                        await news.wait()
        finally:
            del self._attendants[vm]

    async def _look(self, vm: Vm) -> float:
        """Do what is due; returns in how many seconds to look again."""
        record, policy, link = vm.record, vm.record.policy, vm.link
        if record.state != State.RUNNING or link is None or not link.ready or record.started_at is None:
            return LONGEST  # there will be news
        idle = None
        if policy.idle_secs is not None:
            answer = await link.open(Jobs()).result()
            assert isinstance(answer, JobList)
            idle = answer.idle
        made = await self._made(vm) if policy.checkpoint_every_secs is not None else {}
        due, wait = policy.decide(self._fleet.system.clock.time(), record.started_at, made.values(), idle)
        if due is not None:
            log.info("%s is due: %s", vm.id, due)
            await self._do(vm, due)
        return wait

    async def _made(self, vm: Vm) -> dict[str, float]:
        """The automatic checkpoints of a VM, and when they were made."""
        found = await asyncio.to_thread(self._fleet.checkpoints.all)
        return {it.id: it.created_at for it in found if it.is_of(vm.record) and it.kind == Kind.AUTOMATIC}

    async def _do(self, vm: Vm, due: Due) -> None:
        if due == Due.SUSPEND:
            await self._operations.suspend(vm.id)
        elif due == Due.CHECKPOINT:
            await self._operations.save_automatically(vm.id)
            await self._tidy(vm)
        elif vm.record.persistent:
            await self._operations.stop(vm.id)
        else:
            await self._operations.delete(vm.id)

    async def _tidy(self, vm: Vm) -> None:
        """Remove automatic checkpoints that the policy does not keep, and nobody needs."""
        now = self._fleet.system.clock.time()
        for checkpoint in vm.record.policy.superfluous(await self._made(vm), now):
            if not self._fleet.is_referenced(checkpoint):
                with contextlib.suppress(NotFound):  # its owner was faster
                    await self._operations.remove_checkpoint(vm.id, OneCheckpointRequest(checkpoint=checkpoint))
