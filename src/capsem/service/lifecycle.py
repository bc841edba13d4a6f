"""VMs come, go, and are copied. Every transition takes the VM's turn."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any, NamedTuple

import msgspec

from capsem import faults
from capsem.api.exec_types import ExecRequest, ExecResponse, RunRequest
from capsem.api.internal import AddLayer, LayerAdded, Persist, SetPolicy, Stop
from capsem.api.operation import unknown_vm
from capsem.api.vm_types import (
    ForkRequest,
    ForkResponse,
    PersistRequest,
    PersistResponse,
    PrepareRequest,
    PrepareResponse,
    ProvisionRequest,
    ProvisionResponse,
    PurgeRequest,
    PurgeResponse,
    ResumeRequest,
    StopResponse,
    VmPolicy,
)
from capsem.config import Settings
from capsem.image.recipe import DEFAULT_PROFILE
from capsem.model.errors import (
    CapsemError,
    Corrupt,
    InvalidInput,
    MachineFailed,
    NotFound,
    NotRunning,
    TimedOut,
    host_failed,
)
from capsem.model.ids import check_name
from capsem.model.lifecycle import State
from capsem.model.policy import OFF, Policy
from capsem.model.spec import DEFAULT_DISK_MB, VmSpec
from capsem.service.commands import Commands
from capsem.service.create import COLD, Maker
from capsem.service.fleet import Fleet
from capsem.service.gate import Pass
from capsem.service.launch import Boot
from capsem.service.lending import NOTHING, Lending, Lent
from capsem.service.network import Network
from capsem.service.pool import Order, Pool
from capsem.service.templates import Templates
from capsem.service.vm import READY_LIMIT, Vm
from capsem.store import durable
from capsem.store.layout import CheckpointDir
from capsem.store.locks import try_lock
from capsem.tracing import span

PROVISION_WAIT = 5.0  # seconds
BOOT_LIMIT = 95.0  # seconds; a supervisor gives up a guest that is not ready before
RESTORES = 2  # attempts to bring a machine back from its memory
RESUME = ResumeRequest()

log = logging.getLogger("capsem_service.lifecycle")


class _Copied(NamedTuple):
    """What a VM on a copy of another's disk has of its own."""

    persistent: bool
    policy: Policy
    network: Mapping[str, Any]
    secrets: Lent


def lost(vm: Vm) -> dict[str, int] | None:
    """What a VM that was just restored has lost by that; None if it was not."""
    state = vm.link.state if vm.link is not None else None
    if state is None or vm.record.boot_kind not in ("warm", "forked"):
        return None
    return {"streams": state.lost_streams}


class Lifecycle(Commands):
    """See service.manager.Manager."""

    network: Network
    lending: Lending

    def __init__(self, fleet: Fleet, maker: Maker, settings: Settings) -> None:
        super().__init__(fleet)
        self._maker = maker
        self._gate = maker.gate
        self._templates = Templates(fleet, maker, lambda: self.settings.templates)
        self.pool = Pool(fleet, maker, self._templates, self._begin, self._pooled)  # not begun
        fleet.apart = not maker.driver.features.transitions_overlap
        self.settings = settings
        self._boots: set[asyncio.Task[None]] = set()

    async def provision(self, request: ProvisionRequest) -> ProvisionResponse:
        """Create and boot; returns when the guest is ready or after 5 s. Raises what went wrong before that."""
        vm = await self._create(request, request.name, request.source, persistent=request.persistent)
        try:
            await self._wait_ready(vm, PROVISION_WAIT)
        except TimedOut:
            log.info("%s is still booting after %.0f s", vm.id, PROVISION_WAIT)
        return self._provisioned(vm)

    async def prepare(self, request: PrepareRequest) -> PrepareResponse:
        """Have a template for VMs of a size, made in the background where there is none. Raises NotFound (no image)."""
        if not self.settings.templates:
            return PrepareResponse(ready=False, making=False)
        ready = await self._templates.prepare(request.profile or DEFAULT_PROFILE, self._spec(request))
        self.pool.look_anew()  # it may be that there is another image
        return PrepareResponse(ready=ready, making=not ready)

    def _pooled(self) -> tuple[int, VmSpec]:
        """How many VMs are to wait for somebody, and of what size: that of a VM that is created without any."""
        settings = self.settings
        return settings.pool_size if settings.templates else 0, VmSpec(settings.cpu_count, settings.ram_mb)

    def _spec(self, request: ProvisionRequest | RunRequest | PrepareRequest) -> VmSpec:
        env = {} if isinstance(request, PrepareRequest) else request.env or {}
        return VmSpec(
            cpus=self.settings.cpu_count if request.cpus is None else request.cpus,
            ram_mb=self.settings.ram_mb if request.ram_mb is None else request.ram_mb,
            disk_mb=request.disk_mb,
            env=MappingProxyType(dict(env)),
        )

    async def _create(
        self,
        request: ProvisionRequest | RunRequest,
        name: str | None = None,
        source: str | None = None,
        *,
        persistent: bool = False,
    ) -> Vm:
        spec = self._spec(request)
        policy = OFF
        if isinstance(request, ProvisionRequest) and request.policy is not None:
            policy = OFF.changed(msgspec.structs.asdict(request.policy))
            policy.require(persistent=persistent)
        before = self._fleet.get(source).record.network if source is not None else None
        network = await self.network.document(request.network, before)
        secrets = self.lending.lend(request.secrets or (), spec.env)
        name = self._fleet.reserve(None if name is None else check_name(name))
        try:
            if source is None:
                profile = request.profile or DEFAULT_PROFILE
                if not request.cold:
                    with span("take one of the pool"):
                        pooled = await self.pool.take(Order(name, spec, profile, persistent, policy, network, secrets))
                    if pooled is not None:
                        return pooled
                with span("find or make a template"):
                    template = None if request.cold else await self._templates.get(profile, spec)
                with span("write the record"):
                    vm = self._maker.make(
                        name,
                        spec,
                        persistent=persistent,
                        profile=profile,
                        policy=policy,
                        network=network,
                        secrets=secrets,
                        template=template,
                    )
            else:
                copied = _Copied(persistent=persistent, policy=policy, network=network, secrets=secrets)
                vm = await self._clone(name, spec, source, copied)
            async with vm.turn:
                await self._begin(vm)
        except OSError as error:
            raise host_failed(f"{name} could not be created", error) from error
        finally:
            self._fleet.release(name)
        return vm

    async def _clone(self, name: str, spec: VmSpec, source_id: str, own: _Copied) -> Vm:
        """A VM of its own size and environment on a copy of a persistent VM's disk."""
        source = self._fleet.get(source_id)
        if not source.record.persistent:
            raise InvalidInput(f"{source_id} is not persistent", hint=f"`capsem persist {source_id} NAME` makes it so")
        if spec.disk_mb not in (DEFAULT_DISK_MB, source.record.spec.disk_mb):
            raise InvalidInput(
                "a copy has the disk size of its source", hint=f"that is {source.record.spec.disk_mb} MiB"
            )
        async with source.turn:
            frozen = await self._freeze_top(source)
            spec = replace(spec, disk_mb=source.record.spec.disk_mb)
            return self._maker.make_child(name, source.record, frozen, None, spec=spec, **own._asdict())

    async def _begin(self, vm: Vm) -> None:
        """The first start of a VM, from the template it was made from if there is one; see `_start`."""
        if vm.record.state != State.SUSPENDED:
            await self._start(vm)
            return
        try:
            await self._restore(vm)
        except BaseException:
            if not vm.record.persistent and not vm.deleted:
                self._fleet.remove(vm)
            raise

    async def _start(self, vm: Vm, boot: Boot = COLD) -> None:
        """Start a VM, which is in the gate until its guest is ready; an ephemeral one that cannot be started is removed."""
        try:
            passed = await self._gate.boot(vm)
            try:
                await self._maker.start(vm, boot)
            except BaseException:
                passed.release()
                raise
        except BaseException:
            if not vm.record.persistent:
                (self._fleet.keep_failed if vm.record.state == State.FAILED else self._fleet.remove)(vm)
            raise
        self._hold_for_boot(vm, passed)

    def _hold_for_boot(self, vm: Vm, passed: Pass) -> None:
        async def hold() -> None:
            try:
                with contextlib.suppress(CapsemError):
                    await vm.ready_link(BOOT_LIMIT)
            finally:
                passed.release()

        task = asyncio.create_task(hold(), name=f"boot of {vm.id}")
        self._boots.add(task)
        task.add_done_callback(self._boots.discard)

    async def _wait_ready(self, vm: Vm, limit: float) -> None:
        """Raises TimedOut, MachineFailed with the end of the VM's log; NotRunning: somebody has stopped it meanwhile."""
        try:
            await vm.ready_link(limit)
        except (MachineFailed, NotRunning) as error:
            if isinstance(error, NotRunning) and vm.record.failure is None:
                raise
            raise MachineFailed(f"{vm.id} did not start: {error.message}", hint=f"capsem logs {vm.id}") from error

    def _provisioned(self, vm: Vm) -> ProvisionResponse:
        return ProvisionResponse(
            id=vm.id,
            uds_path=str(self._fleet.layout.instance_socket(vm.id)),
            boot_kind=vm.record.boot_kind,
            boot_note=vm.record.boot_note,
            lost=lost(vm),
        )

    async def _restore(self, vm: Vm) -> None:
        """Bring a suspended VM back from its checkpoint: twice, if need be; then cold, from the checkpoint's disk.

        Raises WrongState, Corrupt: the checkpoint cannot be used on this host, or at all; nothing was tried, and a
        cold start is for the user to ask for.
        """
        try:
            checkpoint, files = self._fleet.checkpoints.open(vm.record.checkpoint or "")
        except NotFound as error:  # it is the VM's own, and not a name that somebody gave us
            raise Corrupt(error.message, hint="the VM can be resumed cold (`capsem resume --cold`)") from error
        with span("compare host and checkpoint"):
            await self._maker.check_restorable(vm.record, checkpoint)
        async with self._gate.change(vm, "resume"):
            failure = await self._try_to_restore(vm, files)
        if failure is not None:
            await self._start(vm, Boot(kind="cold-after-failure", note=failure))

    async def _try_to_restore(self, vm: Vm, files: CheckpointDir) -> str | None:
        """None when the VM runs, and its guest is well; else why not, and it does not run."""
        failure = None
        for attempt in range(1, RESTORES + 1):
            try:
                await self._maker.start(vm, Boot(memory=files.memory))
                await self._wait_ready(vm, READY_LIMIT)
            except (MachineFailed, TimedOut) as error:
                log.error("%s: restore %d of %d failed: %s", vm.id, attempt, RESTORES, error)
                failure, full = error.message, vm.warning
                await vm.stop(Stop(kill=True))  # never two machines on one volume
                if full is not None:
                    raise MachineFailed(f"{vm.id}: {full}", hint="make room, then try again: `capsem df`") from error
            else:
                return None
        return failure

    async def resume(self, name: str, request: ResumeRequest = RESUME) -> ProvisionResponse:
        """Start a VM that does not run, a suspended one from its memory; one that runs is left alone."""
        vm = self._vm("resume", name)
        async with vm.turn:
            if vm.deleted:
                raise unknown_vm(name)
            if vm.ending or vm.vmm_gone:
                await vm.ended(READY_LIMIT)
            if not vm.running:
                vm.check()
                self._fleet.check_limit()
                try:
                    if vm.record.state == State.SUSPENDED and not request.cold:
                        await self._restore(vm)
                    else:
                        self._check_disk(vm)
                        lost = vm.record.failure if vm.record.state == State.FAILED else None
                        await self._start(vm, Boot(note=f"its last run failed: {lost}") if lost else COLD)
                except CapsemError as error:
                    raise type(error)(f"resume failed: {error.message}", hint=error.hint) from error
        await self._wait_ready(vm, READY_LIMIT)
        return self._provisioned(vm)

    def _check_disk(self, vm: Vm) -> None:
        """Before the memory of a suspended VM is given up: is its disk what was frozen, as far as headers tell? Where the
        manifest cannot be read, nobody knows. Raises Corrupt."""
        if vm.record.state == State.SUSPENDED:
            try:
                checkpoint = self._fleet.checkpoints.read(vm.record.checkpoint or "")
            except CapsemError as error:
                log.warning("%s is started cold, and its layers are not checked: %s", vm.id, error)
            else:
                self._fleet.checkpoints.check_layers(checkpoint)

    async def stop(self, vm_id: str) -> StopResponse:
        """Power off and wait until every process and socket is gone. Raises NotRunning."""
        vm = self._vm("stop", vm_id)
        async with vm.turn:
            self._vm("stop", vm_id)
            await self._end(vm, Stop())
        await self._fleet.made_room()
        return StopResponse(success=True, persistent=vm.record.persistent)

    async def delete(self, vm_id: str) -> None:
        """Kill and remove, at once."""
        vm = self._vm("delete", vm_id)
        async with vm.turn:
            if vm.deleted or vm.id != vm_id:  # it got another name meanwhile, and whoever gave it that keeps it
                raise unknown_vm(vm_id)
            async with self._gate.teardown(vm):
                vm.deleted = True
                try:
                    await vm.stop(Stop(kill=True, discard=True))
                except BaseException:
                    vm.deleted = False
                    raise
            faults.at("delete.stopped")
            self._fleet.remove(vm)
        await self._fleet.made_room()

    async def _end(self, vm: Vm, request: Stop) -> None:
        async with self._gate.teardown(vm):
            await vm.stop(request)

    async def persist(self, vm_id: str, request: PersistRequest) -> PersistResponse:
        """A running ephemeral VM becomes persistent under a name, without a pause; its old id is unknown afterwards."""
        vm, name = self._fleet.get(vm_id), request.name
        if vm.record.persistent:
            raise InvalidInput(f"{vm_id} is persistent already", hint=f"`capsem fork {vm_id} NAME` makes a copy")
        self._fleet.take_name(name)
        try:
            async with vm.turn:
                link = await self._vm("persist", vm_id).ready_link()
                layout = self._fleet.layout
                socket = layout.instance_socket(name)
                layout.make_socket_directory(socket)
                order = Persist(
                    name=name,
                    session_dir=str(layout.session(name, persistent=True).path),
                    socket=str(socket),
                    ready_file=str(layout.ready_file(name)),
                )
                vm.becoming = layout.session(name, persistent=True)
                await link.open(order).result()
                self._fleet.renamed(vm, layout.session(name, persistent=True))
        finally:
            self._fleet.release(name)
        return PersistResponse(success=True, name=name)

    async def set_policy(self, vm_id: str, request: VmPolicy) -> VmPolicy:
        """Change what becomes of a VM as time goes by; returns all that is on now."""
        vm = self._vm("policy", vm_id)
        async with vm.turn:
            if vm.deleted:
                raise unknown_vm(vm_id)
            policy = vm.record.policy.changed(msgspec.structs.asdict(request))
            policy.require(persistent=vm.record.persistent)
            try:
                if vm.running:
                    link = await vm.ready_link()
                    await link.open(SetPolicy(policy=policy.to_dict())).result()
                    vm.reload()
                else:
                    vm.rewrite(policy=policy)
            except OSError as error:
                raise host_failed(f"the policy of {vm_id} could not be written down", error) from error
        vm.on_changed(vm)
        return VmPolicy.of(vm.record.policy)

    async def purge(self, request: PurgeRequest) -> PurgeResponse:
        """Delete all ephemeral VMs, and if so asked the persistent ones."""
        doomed = [vm for vm in self._fleet.all() if request.all or not vm.record.persistent]
        gone = await asyncio.gather(*(self.delete(vm.id) for vm in doomed), return_exceptions=True)
        for error in gone:
            if isinstance(error, BaseException) and not isinstance(error, NotFound):
                raise error
        deleted = [vm for vm, error in zip(doomed, gone, strict=True) if error is None]
        persistent = sum(vm.record.persistent for vm in deleted)
        return PurgeResponse(
            purged=len(deleted), persistent_purged=persistent, ephemeral_purged=len(deleted) - persistent
        )

    async def fork(self, vm_id: str, request: ForkRequest) -> ForkResponse:
        """A new, stopped, persistent VM on a copy of this one's disk.

        Nothing is copied: the layer that was on top is frozen, and source and child each go on in one of their own.
        """
        source, name = self._vm("fork", vm_id), request.name
        self._fleet.take_name(name)
        try:
            async with source.turn:
                frozen = await self._freeze_top(source)
                faults.at("fork.frozen")
                child = self._maker.make_child(
                    name, source.record, frozen, request.description, secrets=self._inherited(source, request)
                )
                await self._fleet.on_forked(source, [child])
        finally:
            self._fleet.release(name)
        return ForkResponse(name=name, size_bytes=self._fleet.chain_bytes(child.record))

    def _inherited(self, source: Vm, request: ForkRequest) -> Lent:
        """What a fork is lent: nothing of its source's, unless that is asked for."""
        return self.lending.inherit(source.record) if request.inherit_secrets else NOTHING

    async def _freeze_top(self, source: Vm) -> tuple[str, ...]:
        """Put a new layer on top of a VM's volume; returns the layers below it, which nothing writes to any more."""
        if source.deleted:
            raise unknown_vm(source.id)
        frozen = source.record.layers
        if source.record.state == State.SUSPENDED:
            return frozen  # its checkpoint's, hence frozen already
        layer = self._maker.new_layer(source.record)
        try:
            if source.running:
                link = await source.ready_link()
                added = await link.open(AddLayer(layer=layer)).result()
                assert isinstance(added, LayerAdded)
                log.info("%s went on in a new layer, paused for %.3f s", source.id, added.pause)
                source.reload()
            else:
                await self._sync_top(source)
                source.rewrite(layers=(*frozen, layer))
        except BaseException:
            # A layer that the supervisor may just take stays, for a sweep.
            lock = try_lock(self._fleet.layout.naming_lock)
            if lock is not None:
                source.reload()
                if layer not in source.record.layers:
                    self._fleet.layout.layer(layer).unlink(missing_ok=True)
                lock.release()
            raise
        return frozen

    async def _sync_top(self, vm: Vm) -> None:
        """Before anybody builds on the top layer of a VM that does not run: a VMM that was killed may have left there what no
        disk has yet, and what is built on it must not outlive it. Raises OSError."""
        if vm.record.layers:  # of a record that cannot be read none is known, as who rewrites it will say
            await asyncio.to_thread(durable.sync_file, self._fleet.layout.layer(vm.record.layers[-1]))

    async def run(self, request: RunRequest) -> ExecResponse:
        """A command in a VM made for it alone."""
        with span("create"):
            vm = await self._create(request)
        try:
            await self._wait_ready(vm, READY_LIMIT)
            with span("execute"):
                order = ExecRequest(command=request.command, timeout_secs=request.timeout_secs)
                return await self.execute(vm.id, order)
        finally:
            with contextlib.suppress(NotFound), span("delete"):
                await asyncio.shield(self.delete(vm.id))
