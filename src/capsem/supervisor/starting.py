"""How a run begins: the record, the VMM lock, a machine whose vCPUs have not run yet, and what it was when it was saved."""

from __future__ import annotations

import asyncio
import functools
import logging
from pathlib import Path

from capsem import faults
from capsem.control.guest import Guest, Restored
from capsem.hypervisor.driver import Accelerator, Layer, MachineSpec
from capsem.model.checkpoint import Kind
from capsem.model.errors import Corrupt, MachineFailed
from capsem.model.lifecycle import Event
from capsem.model.lifecycle import State as Lifecycle
from capsem.model.vm import VmRecord
from capsem.store import durable, records
from capsem.store.jobs import decode
from capsem.store.layout import CheckpointDir
from capsem.store.locks import Lock
from capsem.store.naming import naming
from capsem.store.orphans import take_from_orphan
from capsem.supervisor.changes import Changes
from capsem.supervisor.saving import Saver

log = logging.getLogger("capsem_process")


class Starting(Changes):
    """One VM from the claim to the machine."""

    def _recovered(self, record: VmRecord) -> VmRecord:
        """A record that still speaks of a run: with the claim ours, that run is over, whatever kept it from saying so."""
        saved = record.saving is not None and self._store.is_committed(record.saving)
        return record.recovered(self._system.clock.boot_id(), saved=saved)

    @property
    def _handed(self) -> tuple[str, ...]:
        """The layer that the machine is to write to, which the service has made and no record names yet."""
        return (self._bootstrap.layer,) if self._bootstrap.layer else ()

    def _at(self, step: str) -> None:
        """A step of the start; see capsem.faults."""
        what = "resume" if self._bootstrap.restore else "boot"
        faults.at(f"{what}.{step}", self._machine.pid if self._machine else 0)

    def _begin(self) -> None:
        """The record of a run that begins, not yet durable; see `_write_begun`. Raises CapsemError, OSError: nothing was
        changed."""
        bootstrap, clock, entropy, restored = self._bootstrap, self._system.clock, self._system.entropy, None
        token, kind = entropy.token_bytes(16).hex(), bootstrap.boot_kind
        if bootstrap.restore:
            assert self._record.checkpoint is not None
            checkpoint = self._store.read(self._record.checkpoint)
            assert checkpoint.guest is not None
            guest = checkpoint.guest
            mark = checkpoint.id if guest.synced else None
            restored = Restored(guest.epoch, bytes.fromhex(guest.next_nonce), mark, guest.frozen)
            # One that has never run is a fork, though it may have the name that its origin had.
            if self._record.machine_id and checkpoint.is_of(self._record):
                kind, token = "warm", guest.token
            else:
                kind = "template" if checkpoint.kind == Kind.TEMPLATE else "forked"
        event = Event.RESUME if restored else Event.START
        self._record = self._record.after(
            event,
            layers=(*self._record.layers, *self._handed),
            machine_id=self._record.machine_id or entropy.token_bytes(16).hex(),
            attached=(),
            freezing=False,
            started_at=clock.time(),
            host_boot_id=clock.boot_id(),
            boot_kind=kind,
            boot_note=bootstrap.boot_note,
            last_exit=None,
        )
        self.recording.lifecycle(event, self._record.state, kind)
        self._token = token
        record = self._record
        self.policing.begin(record.id, bootstrap.network, record.network, record.learning_since)
        self.lending.begin(bootstrap.secrets, record.forked_from)
        self.guest = Guest(self._identity(), clock, entropy, restored)
        self._begin_network()

    async def _write_begun(self) -> None:
        """Make durable the layer that the run writes to, then the record that names it. Raises OSError, Unavailable: nothing
        was changed."""

        def write() -> None:
            for layer in self._handed:
                durable.sync_file(self._names.layout.layer(layer))
                durable.sync_directory(self._names.layout.layers)
            records.write(self._names.session, self._record)

        async with naming(self._names.layout, *self._handed):
            await asyncio.to_thread(write)
            self._at("begun")

    async def _take_vmm_lock(self) -> Lock:
        """The VMM lock; an orphan that holds it (its supervisor was killed) is killed first. Raises MachineFailed."""
        path = self._names.session.vmm_lock
        lock = await take_from_orphan(self._system.processes, path)
        if lock is None:
            raise MachineFailed("an earlier VMM of this VM does not die", hint=f"look for processes that hold {path}")
        return lock

    def _spec(self) -> MachineSpec:
        record, bootstrap, layout = self._record, self._bootstrap, self._names.layout
        return MachineSpec(
            vm_id=record.id,
            cpus=record.spec.cpus,
            ram_mb=record.spec.ram_mb,
            accelerator=Accelerator(bootstrap.accelerator),
            kernel=Path(bootstrap.kernel),
            initrd=Path(bootstrap.initrd),
            root=Path(bootstrap.root),
            volume=(
                Layer(Path(bootstrap.volume), "raw"),
                *(Layer(layout.layer(each), "qcow2") for each in record.layers),
            ),
            ram_file=Path(bootstrap.ram_file),
            command_line=bootstrap.kernel_command_line,
            hardware=record.hardware,
        )

    async def _start_machine(self, vmm_lock: Lock) -> None:
        """Have the machine there, with its vCPUs stopped and all that it had when it was saved. Raises CapsemError, OSError."""
        spec, files = self._spec(), self._names.layout.checkpoint(self._record.checkpoint or "")
        restore = self._record.state == Lifecycle.RESUMING
        try:
            if restore:
                machine = await self._driver.restore(spec, files.devices, vmm_lock=vmm_lock.fd)
            else:
                machine = await self._driver.start(spec, vmm_lock=vmm_lock.fd)
            self._machine = machine
        finally:
            vmm_lock.release()
        self._saver = Saver(
            self._system,
            self._driver,
            self._store,
            machine,
            spec,
            self.guest,
            self.jobs,
            self._gateway,
            self._outlet,
            self._bootstrap.assets,
        )
        if restore:
            self._saver.restored_from(files)
            self._restore_jobs(files)
            self._restore_names(files)
            self._inherit_console(files)

    def _restore_jobs(self, files: CheckpointDir) -> None:
        """The commands of that time go on. Those of a file that cannot be read do so, too, only nobody learns how."""
        try:
            if files.jobs.exists():
                self.jobs.restore(decode(files.jobs.read_bytes(), source=str(files.jobs)), self.guest)
                for job in self.jobs:
                    job.on_ended = functools.partial(self.recording.command_ended, job)
        except (OSError, Corrupt) as error:
            log.error("the jobs of the checkpoint are lost: %s", error)

    def _restore_names(self, files: CheckpointDir) -> None:
        """What addresses meant to its programs they still mean. Without that, a name has to be looked up again."""
        try:
            if files.names.exists():
                self._outlet.remember_names(files.names.read_bytes())
        except (OSError, ValueError, RecursionError) as error:
            log.error("the names of the checkpoint are lost: %s", error)

    def _inherit_console(self, files: CheckpointDir) -> None:
        """A fork's log begins with what its machine had said before it was one."""
        log_file = self._names.session.serial_log
        try:
            if files.console.exists() and not log_file.exists():
                durable.write(log_file, files.console.read_bytes())
        except OSError as error:
            log.warning("the console's log begins with this run: %s", error)
