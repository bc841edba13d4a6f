"""All VMs of a service: making, finding, adopting and removing them. What the disk says is the truth; this is its index."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from capsem import faults
from capsem.api.operation import unknown_vm
from capsem.model.checkpoint import Checkpoint, Kind
from capsem.model.errors import AlreadyExists, CapsemError, Corrupt, LimitReached, Unavailable, Unsupported
from capsem.model.ids import check_name, generate_id
from capsem.model.lifecycle import State
from capsem.model.spec import VmSpec
from capsem.model.vm import VmRecord
from capsem.service.link import Link
from capsem.service.vm import Vm
from capsem.store import durable, records
from capsem.store.checkpoints import CheckpointStore
from capsem.store.layout import Layout, SessionDir
from capsem.store.locks import Lock, holders, is_locked, try_lock
from capsem.system import System

FAILED_KEPT = 32
POOLED = "pool-"  # how names of VMs of the pool begin
SUM_AFTER = 10.0  # seconds from a checkpoint to the checksums of its layers: others want the disk first
ADOPT_LIMIT = 10.0  # seconds for a living supervisor to answer
SUSPEND_LIMIT = 8.0  # seconds for all VMs together to be suspended when the service stops
TERMINATE_LIMIT = 2.0  # seconds between SIGTERM and SIGKILL for those that are not, or not in time

log = logging.getLogger("capsem_service.fleet")


class Fleet:
    """The VMs by id."""

    def __init__(self, system: System, layout: Layout, limit: int) -> None:
        self.system = system
        self.layout = layout
        self.limit = limit
        self._vms: dict[str, Vm] = {}
        self._reserved: set[str] = set()  # names that are being given
        self._starting: set[str] = set()  # those of them whose VMs are about to run
        self.stopping = False
        self.apart = False  # must VMs not be ended while others are suspended? (Features.transitions_overlap)
        self.on_asked: Callable[[Vm, str], None] = lambda _vm, _action: None  # see Vm
        self.on_gone: Callable[[Vm], Awaitable[None]] = _nothing  # see Vm
        # Awaited when VMs were made of another, before they run.
        self.on_forked: Callable[[Vm, Sequence[Vm]], Awaitable[None]] = _nothing
        # What supervisors are told of the network policy of a VM, by its own part of that.
        self.network_layers: Callable[[Mapping[str, Any]], Awaitable[str]] = _nothing_allowed
        # What a VM that was lent secrets, by such placeholders, is granted, as its supervisor is told.
        self.granted: Callable[[Mapping[str, tuple[str, ...]]], str] = lambda _lent: ""
        self.ledger = True  # whether commands and files of VMs that are started are recorded
        self._index_waits = False
        self._index = b""  # as this service has written it
        self._skipped = False  # there are session directories that are no VM's, and were left alone
        self.checkpoints = CheckpointStore(layout)
        self._summing: asyncio.Task[None] | None = None
        self._pinned: Counter[str] = Counter()  # checkpoints that VMs are being made of
        self._clearing: set[asyncio.Future[object]] = set()
        self._saving: set[str] = set()  # VMs of which a checkpoint is being made
        self.spare: set[str] = set()  # layers that are being made, for a record to name
        self.watchers: list[Callable[[Vm], None]] = []  # told of each change of a VM's record, and of whether it runs

    # -- finding

    def all(self) -> list[Vm]:
        """Every VM that has a status and an owner, oldest first."""
        listed = [vm for vm in self._vms.values() if vm.status is not None and not vm.deleted and not vm.record.nobodys]
        return sorted(listed, key=lambda vm: (vm.record.created_at, vm.id))

    def known(self) -> list[Vm]:
        """Every VM that has a record, those that are just being made or deleted too: what they name is in use."""
        return sorted((vm for vm in self._vms.values() if not vm.deleted), key=lambda vm: vm.id)

    def get(self, vm_id: str) -> Vm:
        """Raises NotFound."""
        vm = self._vms.get(vm_id)
        if vm is None or vm.deleted or vm.status is None or vm.record.nobodys:
            raise unknown_vm(vm_id)
        return vm

    # -- making

    def reserve(self, name: str | None) -> str:
        """Take a name, or a generated id, for a VM about to be made and run. Raises AlreadyExists, LimitReached."""
        self.check_limit()
        if name is None:
            name = generate_id(self.system.entropy.choose, {*self._vms, *self._reserved})
        self.take_name(name)
        self._starting.add(name)
        return name

    def take_name(self, name: str) -> None:
        """Keep a name from being taken by anybody else, until `release`. Raises AlreadyExists."""
        if name in self._vms or name in self._reserved:
            raise AlreadyExists(f"a VM named {name} already exists", hint="choose another name, or delete that one")
        self._reserved.add(name)

    def release(self, name: str) -> None:
        """The VM was made, or will not be."""
        self._reserved.discard(name)
        self._starting.discard(name)

    def check_limit(self, more: int = 1) -> None:
        """Raises LimitReached when so many `more` VMs would be more than may run."""
        running = sum(vm.running for vm in self.all() if vm.id not in self._starting) + len(self._starting)
        if running + more > self.limit:
            raise LimitReached(
                f"{running} VMs are running, the maximum is {self.limit}",
                hint="stop one, or raise vm.resources.max_concurrent_vms in the settings",
            )

    def add(self, session: SessionDir, record: VmRecord) -> Vm:
        """A VM whose record is on disk."""
        vm = Vm(self.system, session, record, self.checkpoints.is_committed)
        vm.on_gone = self._gone
        vm.on_ended = self._unsupervised
        vm.on_changed = self._changed
        vm.on_asked = self._guest_asked
        self._vms[record.id] = vm
        self.write_index()
        self._changed(vm)
        return vm

    async def _gone(self, vm: Vm) -> None:
        await self.on_gone(vm)

    def _changed(self, vm: Vm) -> None:
        for watcher in self.watchers:
            watcher(vm)

    def _guest_asked(self, vm: Vm, action: str) -> None:
        self.on_asked(vm, action)

    def renamed(self, vm: Vm, session: SessionDir) -> None:
        """A VM lies elsewhere under another name."""
        self._vms.pop(vm.id, None)
        vm.session, vm.moving, vm.becoming = session, False, None
        vm.reload()
        self._vms[vm.id] = vm
        self.write_index()

    def chain_bytes(self, record: VmRecord) -> int:
        """Allocated bytes of a VM's layers, shared ones included; the image below them does not count."""
        return sum(durable.allocated_bytes(self.layout.layer(layer)) for layer in record.layers)

    def write_index(self) -> None:
        """Bring the contract's registry file up to date."""
        if self._index_waits:
            return
        persistent = [vm for vm in self.all() if vm.record.persistent]
        index = records.registry((vm.record, vm.session.path) for vm in persistent)
        if index == self._index:  # as after all that becomes of VMs that are not in it
            return
        try:
            durable.write(self.layout.registry, index)
            self._index = index
        except OSError as error:  # an index can be made anew; a full disk must not fail what it describes
            log.error("the registry file cannot be written: %s", error)

    # -- ending

    def _unsupervised(self, vm: Vm) -> None:
        self._in_background(
            self.checkpoints.sweep, vm.id
        )  # after one that was killed; others have seen to their drafts
        self._ended(vm)

    def _ended(self, vm: Vm) -> None:
        if vm.deleted:
            return
        self._follow(vm)
        log.info("%s ended: %s", vm.id, vm.record.state)
        if not vm.record.persistent:
            if vm.record.state == State.FAILED and not vm.record.nobodys:
                self.keep_failed(vm)
            else:
                self.remove(vm)
        self.remove_layers(vm.record.attached)
        self.collect()
        self.write_index()
        self._changed(vm)

    def _follow(self, vm: Vm) -> None:
        """After a supervisor that was killed while it gave its VM another name (Changes.persist): where its record says so,
        it has that name. Its layers are its own there."""
        target = vm.becoming
        if target is None:
            return
        if vm.session.record.exists() and vm.record.persistent:
            durable.rename(vm.session.path, target.path)
        if target.record.exists() and not vm.session.record.exists():
            self._vms = {name: each for name, each in self._vms.items() if each is not vm}
            self.renamed(vm, target)
            vm.settle()

    def remove(self, vm: Vm) -> None:
        """Remove a VM that does not run, with its files. Doing it again is no error."""
        vm.deleted = True
        self._vms.pop(vm.id, None)
        self._remove_session(vm.session, vm.record)
        self._remove_instance(vm.id)
        self.write_index()
        self._changed(vm)

    def remove_remains(self, name: str, session: SessionDir) -> None:
        """Remove what is left of a VM that was removed, and had begun to be another one. The name is reserved."""
        self._remove_session(session, None)
        self._remove_instance(name)

    def _remove_instance(self, name: str) -> None:
        self.layout.instance_socket(name).unlink(missing_ok=True)
        self.layout.ready_file(name).unlink(missing_ok=True)

    def _remove_session(self, session: SessionDir, record: VmRecord | None) -> None:
        """The record goes first, for good: without it a directory is no VM, whatever else is still there; and were it to
        come back after a crash, it would name layers that are gone."""
        confined = session.path.resolve().parent in (self.layout.sessions.resolve(), self.layout.persistent.resolve())
        if session.path.is_symlink() or not confined:
            raise Corrupt(f"{session.path} does not lie where VMs lie; it is left alone")
        session.record.unlink(missing_ok=True)
        if session.path.exists():
            durable.sync_directory(session.path)
        faults.at("delete.unrecorded")
        durable.remove_tree(session.path)
        faults.at("delete.removed")
        if record is not None:
            self.remove_layers((*record.layers, *record.attached))
            self.collect()

    # -- what VMs and checkpoints share

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
        """Whether every record could be read. One that could not would tell what it needs, so nothing shared may go."""
        return not self._skipped and not any(isinstance(vm.obstacle, Corrupt) for vm in self._vms.values())

    def collect(self) -> None:
        """Remove checkpoints that nobody needs any more, and the layers that only they named."""
        if not self._knows_all():
            return
        owners = {vm.id: vm for vm in self._vms.values() if not vm.deleted}
        for checkpoint in self.checkpoints.all():
            owner = owners.get(checkpoint.vm_id)
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
        self._in_background(self.checkpoints.clear, checkpoint.id)

    def _in_background(self, remove: Callable[[str], object], which: str) -> None:
        removing = asyncio.get_running_loop().run_in_executor(None, remove, which)
        self._clearing.add(removing)
        removing.add_done_callback(self._clearing.discard)

    async def cleared(self) -> None:
        """Wait until the files of all removed checkpoints are gone. Raises OSError."""
        await asyncio.gather(*self._clearing)

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
            hidden = checkpoint.vm_id == vm.id and not checkpoint.visible(vm.record.kept)
            if not hidden or any(other.record.checkpoint == checkpoint.id for other in others):
                lasting.update(checkpoint.layer_ids)
        return lasting

    def remove_layers(self, layers: Iterable[str]) -> None:
        """Remove those of these layers that neither a VM nor a checkpoint names."""
        if not self._knows_all():
            return  # swept when the service starts and all are known
        used = self._used_layers()
        for layer in layers:
            if layer not in used:
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

    def keep_failed(self, vm: Vm) -> None:
        """Keep the logs of an ephemeral VM that failed, without its disk; the oldest beyond the bound go."""
        vm.deleted = True
        self._vms.pop(vm.id, None)
        self.remove_layers((*vm.record.layers, *vm.record.attached))
        self._changed(vm)
        suffix = self.system.entropy.token_bytes(4).hex()
        kept = self.layout.sessions / f"{vm.id}-failed-{suffix}"
        try:
            durable.rename(vm.session.path, kept)
        except FileNotFoundError:
            return
        failed = sorted(self.layout.sessions.glob("*-failed-*"), key=lambda path: path.stat().st_mtime)
        for old in failed[:-FAILED_KEPT]:
            durable.remove_tree(old)

    def failed_session(self, vm_id: str) -> SessionDir | None:
        """The newest kept directory of a failed ephemeral VM."""
        found = sorted(self.layout.sessions.glob(f"{vm_id}-failed-*"), key=lambda path: path.stat().st_mtime)
        return SessionDir(found[-1]) if found else None

    def failed_sessions(self) -> list[Path]:
        """All kept directories of failed ephemeral VMs."""
        return sorted(self.layout.sessions.glob("*-failed-*"))

    # -- the service's own start and end

    async def reconcile(self) -> None:
        """Take over what an earlier service left: adopt living supervisors, settle the rest, sweep remains.

        Meanwhile we hold the claim of every VM at rest: a supervisor that the earlier service has spawned may just be about
        to begin, with a layer of which no record tells yet. It finds the claim taken, and ends; or its layer gone.
        """
        found: list[tuple[Vm, Lock | None]] = []
        self._index_waits = True  # else it would be written anew for each of them
        with contextlib.ExitStack() as held:
            for session in records.sessions(self.layout):
                try:
                    claim = try_lock(session.claim)
                    if claim is not None:
                        held.callback(claim.release)
                    found.append((self._found(session), claim))
                except (CapsemError, OSError) as error:
                    self._skipped = True
                    log.error("%s is skipped: %s", session.path, error)
            await asyncio.gather(*(self._take_over(vm, claim) for vm, claim in found))
            self._index_waits = False
            self.write_index()
            self._sweep()
            if self._knows_all():
                self._sweep_layers()
        self.sum_soon()

    def _found(self, session: SessionDir) -> Vm:
        """The VM of a session directory. Raises InvalidInput for a directory that can be none's."""
        name = check_name(session.path.name)
        persistent = session.path.parent == self.layout.persistent
        try:
            record = records.read(session)
            assigned = name.startswith(POOLED) and record.id != name and not record.nobodys
            if assigned or (record.persistent and not persistent):
                # Its supervisor ended between the record and the move (Changes.persist, Changes.assign).
                target = self.layout.session(record.id, persistent=record.persistent)
                durable.rename(session.path, target.path)
                return self.add(target, record)
            if (record.id, record.persistent) != (name, persistent):
                raise Corrupt(f"{session.record} is the record of another VM, {record.id}")
        except (Corrupt, OSError) as error:
            made = session.record.stat().st_mtime
            vm = self.add(session, VmRecord(name, persistent, VmSpec(), "", "", (), made))
            vm.spoilt(error if isinstance(error, Corrupt) else Corrupt(f"{session.record}: {error}"))
            return vm
        return self.add(session, record)

    async def _take_over(self, vm: Vm, claim: Lock | None) -> None:
        if claim is None and await self._adopt(vm):
            return
        if vm.obstacle is not None:
            return
        try:
            vm.settle(claim=claim)
        except (CapsemError, OSError) as error:
            log.error("%s: %s", vm.id, error)
            return
        await self.on_gone(vm)
        if vm.record.state == State.DELETING:
            self.remove(vm)
        else:
            self._ended(vm)

    async def _adopt(self, vm: Vm) -> bool:
        """Take over a supervisor that outlived the service that started it; False: it ended meanwhile.

        One that cannot be spoken to is listed with the reason, and can be stopped.
        """
        link = Link()
        try:
            async with asyncio.timeout(ADOPT_LIMIT):
                await link.connect(self.system, self.layout.instance_socket(vm.id))
        except (CapsemError, OSError) as error:
            if not is_locked(vm.session.claim):
                return False
            log.error("the supervisor of %s cannot be spoken to: %s", vm.id, error)
            if not isinstance(error, Unsupported):
                error = Unavailable(f"its supervisor does not answer: {error}", hint="stop the VM and resume it")
            found = holders(vm.session.claim)
            vm.begin_apart(link.pid or (found[0] if len(found) == 1 else 0), error)
            return True
        log.info("adopted %s, supervised by process %d", vm.id, link.pid)
        vm.begin(None, link)
        return True

    def _sweep(self) -> None:
        """Remove what belongs to no VM: sockets, ready files, half-made session directories, half-written files."""
        known = set(self._vms)
        for path in self.layout.instances.iterdir():
            if path.stem not in known or not self._vms[path.stem].running:
                path.unlink(missing_ok=True)
        for parent in (self.layout.sessions, self.layout.persistent):
            for path in parent.iterdir():
                if "-failed-" not in path.name and not SessionDir(path).record.exists() and path.is_dir():
                    log.warning("removing half-made session directory %s", path)
                    durable.remove_tree(path)
        at_rest = (vm.session.path for vm in self._vms.values() if not vm.running)
        for parent in (self.layout.run_dir, self.layout.layers, self.layout.volumes, *at_rest):
            for path in parent.glob(f"{durable.TEMPORARY}*"):
                path.unlink(missing_ok=True)

    def _sweep_layers(self) -> None:
        for checkpoint_id in self.checkpoints.sweep():
            log.warning("removed the unfinished checkpoint %s", checkpoint_id)
        self.collect()
        used = self._used_layers()
        for checkpoint_id, error in self.checkpoints.unreadable.items():
            log.error("no layer is removed as long as checkpoint %s is there: %s", checkpoint_id, error)
        for path in self.layout.layers.iterdir():
            if path.stem not in used and path.suffix in (".qcow2", ".sum"):
                log.warning("removing unreferenced layer %s", path.name)
                path.unlink(missing_ok=True)

    async def stop_all(self, suspend: Callable[[str], Awaitable[object]] | None = None) -> None:
        """End every supervisor; ephemeral VMs go with it. `suspend` is tried first on what is persistent and ready."""
        self._stop()
        running = [vm for vm in self._vms.values() if vm.running]
        saved = [vm for vm in running if suspend and vm.record.persistent and vm.link is not None and vm.link.ready]
        suspending = [asyncio.ensure_future(suspend(vm.id)) for vm in saved if suspend is not None]
        saving = _within(SUSPEND_LIMIT, dict(zip(saved, suspending, strict=True)))
        ending = [] if self.apart else [vm for vm in running if vm not in saved]
        await asyncio.gather(saving, _terminate(ending))
        await _terminate([vm for vm in running if vm.running])
        await asyncio.gather(*self._clearing, return_exceptions=True)

    def leave_all(self) -> None:
        """Let go of every supervisor without a word, for the next service to find."""
        self._stop()
        for vm in self._vms.values():
            vm.let_go()

    def _stop(self) -> None:
        self.stopping = True
        if self._summing is not None:
            self._summing.cancel()


async def _nothing_allowed(_own: Mapping[str, Any]) -> str:
    """Until somebody knows better."""
    return ""


async def _nothing(*_about: object) -> None:
    """What is done when nobody has asked for anything."""


async def _within(limit: float, suspending: dict[Vm, asyncio.Future[object]]) -> None:
    """Wait for these to be suspended; what is not done in time is left to its supervisor."""
    if not suspending:
        return
    await asyncio.wait(suspending.values(), timeout=limit)
    for vm, task in suspending.items():
        if not task.done():
            log.warning("%s is not suspended after %.0f s and will be stopped", vm.id, limit)
            task.cancel()
        elif not task.cancelled() and (error := task.exception()) is not None:
            log.warning("%s cannot be suspended and will be stopped: %s", vm.id, error)
    await asyncio.gather(*suspending.values(), return_exceptions=True)


async def _terminate(vms: list[Vm]) -> None:
    """SIGTERM, two seconds, SIGKILL."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        for vm in vms:
            vm.terminate(number)
        await asyncio.gather(*(vm.ended(TERMINATE_LIMIT) for vm in vms))
