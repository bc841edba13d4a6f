"""Requests that wait for an answer, of all VMs, for those who follow: as long as somebody does, supervisors hold them."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from typing import Final

import msgspec

from capsem.api.network_messages import AskHeld, AskOver, FollowAsks
from capsem.api.network_types import AskInfo, AsksQuery, AsksResponse
from capsem.model.errors import CapsemError
from capsem.service.fleet import Fleet
from capsem.service.vm import Vm
from capsem.wire.schema import Message

QUIET: Final = 15.0  # seconds after which a client is told that nothing has happened, so that a dead one is noticed
BACKLOG: Final = 1000  # events that a slow client may be behind; then it is hung up on

log = logging.getLogger("capsem_service.asks")


@dataclass(eq=False, slots=True)
class _Follower:
    """Somebody who could answer. None ends what they are told."""

    vm: str | None
    events: asyncio.Queue[bytes | None] = field(default_factory=lambda: asyncio.Queue(BACKLOG))


class AskFeed:
    """Follows the supervisors of those VMs that somebody wants to be asked about."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet
        self._followers: set[_Follower] = set()
        self._following: dict[Vm, asyncio.Task[None]] = {}
        self._held: dict[tuple[str, str], AskInfo] = {}
        fleet.watchers.append(self._changed)

    async def answered(self, query: AsksQuery) -> AsksResponse:
        """What waits. Raises NotFound."""
        return self.waiting(query.id)

    def waiting(self, vm_id: str | None) -> AsksResponse:
        """What waits. Raises NotFound for a VM that there is not."""
        if vm_id is not None:
            self._fleet.get(vm_id)
        asks = [ask for ask in self._held.values() if vm_id in {None, ask.id}]
        return AsksResponse(asks=sorted(asks, key=lambda ask: ask.since), followers=len(self._followers))

    def follow(self, vm_id: str | None) -> AsyncGenerator[bytes, None]:
        """Server-sent events, until they are closed; of one VM, or of all that there are and will be. Raises NotFound."""
        if vm_id is not None:
            self._fleet.get(vm_id)
        return self._events(vm_id)

    async def _events(self, vm_id: str | None) -> AsyncGenerator[bytes, None]:
        follower = _Follower(vm_id)
        for ask in self.waiting(vm_id).asks:
            follower.events.put_nowait(_event("ask", ask))
        self._followers.add(follower)
        try:
            for vm in self._fleet.all():
                self._changed(vm)
            yield b": requests that a rule wants asked about wait from now on\n\n"
            while True:
                try:
                    async with asyncio.timeout(QUIET):
                        event = await follower.events.get()
                except TimeoutError:
                    event = b":\n\n"
                if event is None:
                    return
                yield event
        finally:
            self._followers.discard(follower)
            for vm, task in self._following.items():
                if not self._wanted(vm):
                    task.cancel()

    async def close(self) -> None:
        """Hang up on everybody."""
        for follower in self._followers:
            _tell(follower, None)
        tasks = list(self._following.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _wanted(self, vm: Vm) -> bool:
        return any(follower.vm in {None, vm.id} for follower in self._followers)

    def _changed(self, vm: Vm) -> None:
        """A VM is there, runs, or does not: those that run are followed."""
        if vm.link is not None and vm.running and not vm.deleted and vm not in self._following and self._wanted(vm):
            self._following[vm] = task = asyncio.create_task(self._follow(vm), name=f"asks of {vm.id}")
            task.add_done_callback(lambda _task: self._following.pop(vm, None))

    async def _follow(self, vm: Vm) -> None:
        link = vm.link
        assert link is not None
        mine: dict[str, tuple[str, str]] = {}  # by ask; the VM may get another name meanwhile

        def told(message: Message) -> None:
            if isinstance(message, AskHeld):
                ask = AskInfo(id=vm.id, **message.__dict__)
                mine[message.ask] = vm.id, message.ask
                self._held[mine[message.ask]] = ask
                self._spread(vm, _event("ask", ask))
            elif isinstance(message, AskOver):
                self._held.pop(mine.pop(message.ask, ("", "")), None)
                self._spread(vm, _event("over", {"id": vm.id, "ask": message.ask, "outcome": message.outcome}))

        try:
            stream = link.open(FollowAsks())
            stream.on_message = told
            try:
                await stream.result()
            finally:
                stream.reset()
        except CapsemError as error:
            if vm.running and not link.lost.is_set():
                log.warning("nobody can be asked about %s: %s", vm.id, error)
        finally:
            for key in mine.values():
                self._held.pop(key, None)

    def _spread(self, vm: Vm, event: bytes) -> None:
        for follower in self._followers:
            if follower.vm in {None, vm.id}:
                _tell(follower, event)


def _tell(follower: _Follower, event: bytes | None) -> None:
    if follower.events.full():
        while not follower.events.empty():
            follower.events.get_nowait()
        event = None
    follower.events.put_nowait(event)


def _event(name: str, data: object) -> bytes:
    return b"event: %b\ndata: %b\n\n" % (name.encode(), msgspec.json.encode(data))
