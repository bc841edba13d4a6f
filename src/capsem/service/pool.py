"""The pool: forks of the template that run, idle and warmed, before anybody asks for them.

A create takes one and gives it its name, environment and policy, which costs a handshake; the pool makes another one when
the VM that was created has had a moment for itself. All are of the default image and the default size, as the settings
have them: what is created with another size is forked from the template of that size.

Until somebody takes it, a VM of the pool is the service's own: it is not listed, cannot be addressed, does not count
against the limit of VMs, and ends with the service. While the host runs short of memory there is no pool.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from capsem.api.internal import Assign, Stop
from capsem.api.usage_types import PoolUsage
from capsem.image.recipe import DEFAULT_PROFILE
from capsem.model.errors import CapsemError, HostNotReady
from capsem.model.policy import Policy
from capsem.model.spec import VmSpec
from capsem.service.create import Maker
from capsem.service.fleet import POOLED, Fleet
from capsem.service.gate import VISIT
from capsem.service.memory import HostMemory, host_memory, process_memory
from capsem.service.templates import Templates
from capsem.service.vm import Vm
from capsem.wire.messages import Exec

PAUSE = 2.0  # seconds after one was taken until the next is made: those belong to the VM that was created
AGAIN = 30.0  # seconds after one could not be made
LOOK = 5.0  # seconds between two looks at the host's memory
DRAIN_BELOW = 0.10  # of the host's memory available: then the pool goes
FILL_ABOVE = 0.15  # and from here on it comes back
READY_LIMIT = 30.0  # seconds for one to be ready
ASSIGN_LIMIT = 5.0  # seconds for one that is ready to become somebody's
ENV_LIMIT = 256 * 1024  # characters of an environment that are handed over; a VM with more is forked from the template
WARM_UP = "true"

log = logging.getLogger("capsem_service.pool")


class Order(NamedTuple):
    """What is created."""

    name: str
    spec: VmSpec
    profile: str
    persistent: bool
    policy: Policy
    network: Mapping[str, Any]
    secrets: Mapping[str, tuple[str, ...]]


class Pool:
    """That of one service: `begin` it, and `close` it before VMs are ended."""

    def __init__(
        self,
        fleet: Fleet,
        maker: Maker,
        templates: Templates,
        start: Callable[[Vm], Awaitable[None]],
        wanted: Callable[[], tuple[int, VmSpec]],
        memory: Callable[[], HostMemory] = host_memory,
    ) -> None:
        """`start` brings a VM made from a template to life; `wanted`: how many of what size, as the settings have it now."""
        self._fleet = fleet
        self._maker = maker
        self._templates = templates
        self._start = start
        self._wanted = wanted
        self._memory = memory
        self._members: list[Vm] = []  # that wait; oldest first
        self._short = False
        self._news = asyncio.Event()
        self._keeper: asyncio.Task[None] | None = None
        fleet.watchers.append(self._changed)

    # -- for those who create

    async def take(self, order: Order) -> Vm | None:
        """A VM that is what was ordered from here on, or None: there is none like that. The caller has reserved the name."""
        layers = await self._fleet.network_layers(order.network)
        vm = self._fitting(order)
        if vm is None or self._fleet.stopping:
            return None
        self._members.remove(vm)
        self._news.set()
        layout = self._fleet.layout
        session = layout.session(order.name, persistent=order.persistent)
        request = Assign(
            name=order.name,
            persistent=order.persistent,
            session_dir=str(session.path),
            socket=str(layout.instance_socket(order.name)),
            ready_file=str(layout.ready_file(order.name)),
            env=dict(order.spec.env),
            policy=order.policy.to_dict(),
            network=json.dumps(dict(order.network)),
            layers=layers,
            secrets=self._fleet.granted(order.secrets),
            ledger=self._fleet.ledger,
            parent_pid=self._maker.launcher.parent_pid,
        )
        former, vm.moving = vm.id, True
        try:
            async with vm.turn, asyncio.timeout(ASSIGN_LIMIT):
                link = await vm.ready_link(ASSIGN_LIMIT)
                layout.make_socket_directory(Path(request.socket))
                await link.open(request).result()
                self._fleet.renamed(vm, session)
        except (CapsemError, TimeoutError) as error:
            log.warning("%s could not become %s, another VM is made: %s", former, order.name, error)
            await self._end(vm)
            self._fleet.remove_remains(order.name, session)
            return None
        return vm

    def _fitting(self, order: Order) -> Vm | None:
        if sum(len(name) + len(value) for name, value in order.spec.env.items()) > ENV_LIMIT:
            return None
        for vm in self._members:
            record = vm.record
            like = replace(order.spec, env=MappingProxyType({})) == record.spec
            if (
                like
                and record.image == order.profile
                and self._is_current(vm)
                and vm.link is not None
                and vm.link.ready
            ):
                return vm
        return None

    def _is_current(self, vm: Vm) -> bool:
        """Whether what is created now would be made from the same image."""
        try:
            return self._maker.catalog.find(vm.record.image).digest == vm.record.image_digest
        except CapsemError:
            return False

    def usage(self) -> PoolUsage | None:
        """What it takes; None when there is to be none. Reads files of /proc."""
        wanted = self._size()
        if not wanted and not self._members:
            return None
        pids = [pid for vm in self._members for pid in (vm.pid, vm.vmm_pid) if pid]
        return PoolUsage(
            wanted=wanted,
            ready=sum(vm.link is not None and vm.link.ready for vm in self._members),
            memory_bytes=process_memory(pids),
            short=self._short,
        )

    # -- keeping it

    def begin(self) -> None:
        """Keep it as the settings have it, from here on."""
        self._keeper = asyncio.create_task(self._keep(), name="pool")

    def look_anew(self) -> None:
        """Settings have changed, or an image."""
        self._news.set()

    async def close(self) -> None:
        """Keep it no more; VMs that are in it are left to be ended with all others."""
        self._fleet.watchers.remove(self._changed)
        if self._keeper is not None:
            self._keeper.cancel()
            await asyncio.gather(self._keeper, return_exceptions=True)

    def _changed(self, vm: Vm) -> None:
        if vm in self._members and not vm.running:
            self._members.remove(vm)
            self._news.set()

    def _size(self) -> int:
        return self._wanted()[0]

    async def _keep(self) -> None:
        VISIT.set(None)
        wait: float | None = 0.0
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(wait):
                    await self._news.wait()
            if self._news.is_set():
                await asyncio.sleep(PAUSE)
                self._news.clear()
            try:
                wait = await self._look()
            except (CapsemError, OSError) as error:
                log.warning("the pool cannot be filled: %s", error)
                wait = AGAIN

    async def _look(self) -> float | None:
        """Bring it nearer to what it should be; returns in how many seconds to look again, None: when there is news."""
        wanted, spec = self._wanted()
        useless = [vm for vm in self._members if vm.record.spec != spec or not self._is_current(vm)]
        useful = [vm for vm in self._members if vm not in useless]
        self._short = bool(wanted) and self._is_short()
        for vm in (*useless, *useful[0 if self._short else wanted :]):
            log.info("%s is not kept any more", vm.id)
            self._members.remove(vm)
            await self._end(vm)
        if not wanted:
            return None
        if len(self._members) < wanted and not self._short:
            await self._add(spec)
            return 0.0
        return LOOK

    def _is_short(self) -> bool:
        """The one bound for going and another for coming back keep it from doing both in turn."""
        memory = self._memory()
        return memory.available < memory.total * (FILL_ABOVE if self._short else DRAIN_BELOW)

    async def _add(self, spec: VmSpec) -> None:
        """One more, which waits with what the first command needs in its memory. Raises CapsemError, OSError."""
        template = await self._templates.get(DEFAULT_PROFILE, spec)
        if template is None:
            raise HostNotReady("there is no template to fork", hint="the setting vm.templates allows them")
        token = self._fleet.system.entropy.token_bytes
        vm = self._maker.make(
            f"{POOLED}{token(6).hex()}",
            spec,
            persistent=False,
            profile=DEFAULT_PROFILE,
            template=template,
            pooled=True,
        )
        try:
            async with vm.turn:
                await self._start(vm)
                link = await vm.ready_link(READY_LIMIT)
                await link.open(Exec(job=token(8).hex(), command=WARM_UP)).result()
        except BaseException:
            await self._end(vm)
            raise
        self._members.append(vm)

    async def _end(self, vm: Vm) -> None:
        """Nobody will have it."""
        async with vm.turn, self._maker.gate.teardown(vm):
            await vm.stop(Stop(kill=True))
        if not vm.deleted:
            self._fleet.remove(vm)
