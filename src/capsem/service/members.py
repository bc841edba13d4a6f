"""The VMs of a service by id: naming, making, finding and removing them. What the disk says is the truth; this is its index."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from capsem import faults
from capsem.api.operation import unknown_vm
from capsem.model.errors import AlreadyExists, Corrupt, LimitReached
from capsem.model.ids import generate_id
from capsem.model.lifecycle import State
from capsem.model.vm import VmRecord
from capsem.service.holdings import Holdings
from capsem.service.vm import Vm
from capsem.store import durable, records
from capsem.store.layout import Layout, SessionDir
from capsem.system import System

FAILED_KEPT = 32

log = logging.getLogger("capsem_service.members")


class Members(Holdings):
    """The VMs by id."""

    def __init__(self, system: System, layout: Layout, limit: int) -> None:
        super().__init__(system, layout)
        self.limit = limit
        self._reserved: set[str] = set()  # names that are being given
        self._starting: set[str] = set()  # those of them whose VMs are about to run
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
        self._index = b""  # as this service has written it
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
            raise unknown_vm(vm_id, (each.id for each in self.all()))
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
        if self._taking_over:  # else it would be written anew for each VM
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
        self.sweep_drafts(vm.id)
        self._ended(vm)

    def _ended(self, vm: Vm) -> None:
        if vm.deleted:
            return
        self._remove_instance(vm.id)  # left where its supervisor was killed: nobody is ready there
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

    # -- those that failed

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


async def _nothing_allowed(_own: Mapping[str, Any]) -> str:
    """Until somebody knows better."""
    return ""


async def _nothing(*_about: object) -> None:
    """What is done when nobody has asked for anything."""
