"""Checkpoints of one running machine: the draft that is prepared ahead of time, the save, the commit.

    prepare   a draft of the next checkpoint, its RAM file already holding what the machine's memory was mapped from,
              copied in the background where the file system cannot share it: the save then writes what has changed
    save      a mark and a flush in the guest, as far as it answers, and its commands held still; then RAM, devices,
              volume and jobs at one instant, after which the commands go on, in a restored machine once that is who it is
    commit    everything durable, the manifest last: all parts at the same time, for a file system makes many files durable
              in the time that it takes for one

A save that fails leaves no trace: the draft is removed, and whoever asked decides what becomes of the machine.
"""

from __future__ import annotations

import asyncio
import errno
import functools
import logging
import os
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from capsem import __version__, faults
from capsem.control.guest import Guest
from capsem.hypervisor.driver import Driver, Layer, Machine, MachineSpec, Saved, SaveFiles
from capsem.log import trace
from capsem.model.checkpoint import FORKED, Checkpoint, GuestState, Kind, Memory
from capsem.model.errors import CapsemError, MachineFailed
from capsem.model.vm import VmRecord
from capsem.store import durable
from capsem.store.checkpoints import CheckpointStore, Draft, describe
from capsem.store.jobs import encode
from capsem.store.layout import CheckpointDir
from capsem.store.lines import read_tail
from capsem.store.ram import PAGE, RamFile, RamIdentity, RamWriter
from capsem.supervisor import room
from capsem.supervisor.gateway import Gateway
from capsem.supervisor.jobs import JobTable, Mark, saved_jobs
from capsem.supervisor.outlet import Outlet
from capsem.system import System

PREPARE_AFTER = 1.0  # seconds that a machine has run before the next checkpoint's RAM file is begun
SYNC_LIMIT = 2.0  # seconds for the guest to flush its file systems
HOLD_LIMIT = 1.0  # seconds for it to hold its processes still
CONSOLE = 64 * 1024  # bytes of the console's log that forks are given

log = logging.getLogger("capsem_process.saving")


async def _together(*work: Callable[[], Any]) -> list[Any]:
    """Do all of it at the same time; what each has returned. Returns, or raises what the first has raised, when all of it has
    ended, even when the caller is cancelled: nobody may close a file that a thread still works on."""
    loop = asyncio.get_running_loop()
    threads = ThreadPoolExecutor(len(work))
    working = asyncio.gather(*(loop.run_in_executor(threads, each) for each in work), return_exceptions=True)
    cancelled: asyncio.CancelledError | None = None
    while not working.done():
        try:
            await asyncio.wait((working,))
        except asyncio.CancelledError as asked:
            cancelled = asked
    threads.shutdown(wait=False)
    if cancelled is not None:
        raise cancelled
    done: list[Any] = working.result()
    for error in done:
        if isinstance(error, BaseException):
            raise error
    return done


def _step(name: str) -> trace:
    return trace(f"save.{name}", log, level=logging.DEBUG)


@dataclass(frozen=True, slots=True)
class Order:
    """Which checkpoint is wanted: of the layers `frozen`, above which the volume goes on in `layer`."""

    kind: Kind
    frozen: tuple[str, ...]
    layer: Layer
    go_on: bool
    message: str | None = None
    console: Path | None = None  # where the machine's console is logged


def _what(order: Order) -> str:
    """What its steps are called (capsem.faults)."""
    return "checkpoint" if order.go_on else "suspend"


@dataclass(slots=True)
class _Prepared:
    draft: Draft
    writer: RamWriter
    copied: bool = False  # holds the base
    cancelled: bool = False


def _other_parts(prepared: _Prepared, identity: RamIdentity, order: Order, jobs: bytes, names: bytes) -> list[Path]:
    """Say whose memory it is, and write what there is of the parts that are not the machine's; returns their paths. Nothing
    of that is durable yet."""
    prepared.writer.identify(identity)
    files, said = prepared.draft.files, b""
    if order.kind in FORKED and order.console is not None:
        said = read_tail(order.console, CONSOLE).encode()
    parts = [(path, data) for path, data in ((files.jobs, jobs), (files.names, names), (files.console, said)) if data]
    for path, data in parts:
        durable.draft(path, data)
    return [path for path, _ in parts]


class Saver:
    """Makes checkpoints of one machine."""

    def __init__(
        self,
        system: System,
        driver: Driver,
        store: CheckpointStore,
        machine: Machine,
        spec: MachineSpec,
        guest: Guest,
        jobs: JobTable,
        gateway: Gateway,
        outlet: Outlet,
        assets: Mapping[str, str],
    ) -> None:
        """`assets`: the digests of what the machine boots from, for the manifest."""
        self._system = system
        self._driver = driver
        self._store = store
        self._machine = machine
        self._spec = spec
        self._guest = guest
        self._jobs = jobs
        self._gateway = gateway
        self._outlet = outlet
        self._assets = assets
        self._base: RamFile | None = None  # what the next RAM file begins with; None: with nothing
        self._own = False  # the base is this machine's own
        self._prepared: _Prepared | None = None
        self._preparing: asyncio.Task[None] | None = None
        self._syncing: asyncio.Task[tuple[bool, bool | None]] | None = None
        self._frozen = False  # at the last save
        self.streams = 0  # connections of the guest at the last save

    def restored_from(self, files: CheckpointDir) -> None:
        """The machine's memory was mapped from this checkpoint. Raises OSError."""
        self._base = RamFile(files.memory, files.sums)

    def prepare_soon(self) -> None:
        """Begin the next draft in the background, if that saves anything."""
        if self._base is not None and self._preparing is None:
            self._preparing = asyncio.create_task(self._prepare_later(), name="prepare")

    async def _prepare_later(self) -> None:
        await asyncio.sleep(PREPARE_AFTER)
        try:
            await self._prepare()
        except OSError as error:  # the save will try again, and say so
            log.warning("the next checkpoint cannot be prepared: %s", error)
            self._drop_prepared()

    async def _prepare(self) -> _Prepared:
        prepared = self._prepared
        if prepared is None:
            draft = self._store.prepare(self._system.entropy.token_bytes(16).hex(), owner=self._guest.identity.vm_id)
            try:
                writer = RamWriter(draft.files.memory, draft.files.sums, self._spec.ram_mb << 20)
            except BaseException:
                self._store.discard(draft)
                raise
            prepared = self._prepared = _Prepared(draft, writer)
        if self._base is not None and not prepared.copied:
            base = self._base
            prepared.copied = await asyncio.to_thread(prepared.writer.copy, base, lambda: prepared.cancelled)
        return prepared

    def _drop_prepared(self) -> None:
        prepared, self._prepared = self._prepared, None
        if prepared is not None:
            prepared.cancelled = True
            prepared.writer.close()
            self._store.discard(prepared.draft)

    async def _finish_preparing(self) -> _Prepared:
        """The draft, whatever of it there is already. Raises OSError."""
        task, self._preparing = self._preparing, None
        if task is not None:
            if self._prepared is None:
                task.cancel()  # it only waits for its time
            await asyncio.gather(task, return_exceptions=True)
        return await self._prepare()

    async def reserve(self) -> str:
        """Make sure that there is a draft, and have the guest begin to flush, and then to hold its processes; returns the id
        of the next checkpoint. `save` or `let_go` follows.

        Raises OSError; then no draft is left, which may have filled the disk.
        """
        try:
            with _step("prepare"):
                draft = (await self._finish_preparing()).draft
        except BaseException:
            self._drop_prepared()
            raise
        assert self._syncing is None
        self._syncing = asyncio.create_task(self._quiesce(draft.id), name="quiesce")
        return draft.id

    async def save(
        self, record: VmRecord, order: Order, alongside: Callable[[Checkpoint], object] = lambda _checkpoint: None
    ) -> Checkpoint:
        """Make the checkpoint that `reserve` announced; committed on return.

        `alongside` is called on a thread with what will be one, while its parts are made durable: to make something durable
        that counts after it. Raises CapsemError, OSError: nothing is left of the checkpoint; the machine may stand still,
        and its volume may have gone on to the order's layer.
        """
        prepared, syncing = self._prepared, self._syncing
        assert prepared is not None
        assert syncing is not None
        frozen = self._machine.top_layer
        try:
            files = SaveFiles(prepared.draft.files.devices, prepared.writer, compare=self._own)
            with _step("machine"):
                saved, jobs, names, synced = await self._save(files, order, syncing)
            faults.at(f"{_what(order)}.saved", self._machine.pid)
            identity = RamIdentity(record.id, prepared.draft.id, self._spec.ram_mb << 20)
            with _step("parts"):
                parts = await asyncio.to_thread(_other_parts, prepared, identity, order, jobs, names)

            def write_down() -> tuple[Checkpoint, durable.Staged]:
                checkpoint = self._describe(prepared, record, order, saved, synced)
                manifest = self._store.stage(prepared.draft, checkpoint)
                alongside(checkpoint)
                return checkpoint, manifest

            with _step("sync"):
                layers = (frozen, order.layer) if order.go_on else (frozen,)
                written, *_ = await _together(
                    write_down,
                    prepared.writer.sync,
                    prepared.writer.sync_sums,
                    functools.partial(durable.sync_file, files.devices),
                    *(functools.partial(durable.sync_file, layer.path) for layer in layers),
                    *(functools.partial(durable.sync_file, part) for part in parts),
                    functools.partial(self._store.enter, prepared.draft),
                )
                checkpoint: Checkpoint = written[0]
            with _step("commit"):
                await asyncio.to_thread(self._store.publish, prepared.draft, written[1])
        except BaseException as error:
            full = isinstance(error, MachineFailed) and room.is_full(prepared.draft.files.path)
            self._drop_prepared()
            if full:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) from error
            raise
        self._prepared = self._syncing = None
        prepared.writer.close()
        faults.at(f"{_what(order)}.committed", self._machine.pid)
        if order.go_on:
            try:
                self._rebase(prepared.draft.files)
                if record.persistent:  # no other VM is suspended, and a fork of it is seldom one of many
                    self.prepare_soon()
            except OSError as error:  # the checkpoint is made; the next one begins with what this one began with
                log.error("the next checkpoint will take longer: %s", error)
        return checkpoint

    async def _save(
        self, files: SaveFiles, order: Order, syncing: asyncio.Task[tuple[bool, bool | None]]
    ) -> tuple[Saved, bytes, bytes, bool]:
        """RAM, devices, volume, and the jobs and names of the same instant; whether the guest had flushed its file systems.

        Around that instant nothing is sent to the guest. So what its memory holds as confirmed is not beyond what the
        jobs have here, and what they have here is not beyond what it had written: between the two nothing is missing.
        """
        channel = self._guest.channel
        marks: list[Mark] = []
        names = b""
        synced = False
        what = _what(order)

        async def hold() -> None:
            nonlocal synced
            with _step("flush"):
                synced, frozen = await syncing
            self._frozen = await self._hold() if frozen is None else frozen
            channel.hold()
            faults.at(f"{what}.held", self._machine.pid)

        def instant() -> None:
            nonlocal names
            names = self._outlet.known_names()
            marks.extend(self._jobs.marks())
            self.streams = self._gateway.connections

        def release() -> None:
            channel.release()
            self._guest.go_on()

        try:
            saved = await self._machine.save(
                files,
                order.layer,
                go_on=order.go_on,
                hold=hold,
                instant=instant,
                release=release,
            )
        except BaseException:
            channel.release()
            raise
        if order.kind == Kind.TEMPLATE:  # what it was warmed up with is no business of its forks
            return saved, b"", b"", synced
        jobs = saved_jobs(marks)
        return saved, encode(jobs) if jobs else b"", names, synced

    async def _quiesce(self, mark: str) -> tuple[bool, bool | None]:
        """Whether it has flushed its file systems, and holds its processes still: None when it was not heard to try."""
        try:
            return True, await self._guest.quiesce(SYNC_LIMIT, mark)
        except CapsemError as error:
            log.warning("the guest did not flush its file systems: %s", error)
            return False, None

    async def _hold(self) -> bool:
        try:
            return await self._guest.hold(HOLD_LIMIT)
        except CapsemError as error:
            log.warning("the guest did not hold its processes still: %s", error)
            return False

    async def let_go(self) -> None:
        """After a save that failed: the guest goes on, whatever it was about to do for it."""
        await self._stop_quiescing()
        self._guest.go_on()

    async def _stop_quiescing(self) -> None:
        """It must not hold anything after it was told to go on."""
        syncing, self._syncing = self._syncing, None
        if syncing is not None:
            syncing.cancel()
            await asyncio.gather(syncing, return_exceptions=True)

    def _rebase(self, files: CheckpointDir) -> None:
        before, self._base, self._own = self._base, RamFile(files.memory, files.sums), True
        if before is not None:
            # Of a checkpoint that was removed already this is the last that holds its file, and giving that back takes time.
            asyncio.get_running_loop().run_in_executor(None, before.close)

    def _describe(self, prepared: _Prepared, record: VmRecord, order: Order, saved: Saved, synced: bool) -> Checkpoint:
        """What was saved."""
        runs = tuple((offset // PAGE, length // PAGE) for offset, length in saved.runs)
        guest = GuestState(
            boot_id=self._guest.boot_id,
            epoch=self._guest.epoch,
            next_nonce=self._guest.next_nonce.hex(),
            token=self._guest.identity.token or "",
            synced=synced,
            frozen=self._frozen,
        )
        return Checkpoint.of(
            record,
            id=prepared.draft.id,
            kind=order.kind,
            created_at=self._system.clock.time(),
            creator=__version__,
            layers=self._store.freeze(order.frozen),
            message=order.message,
            machine=MappingProxyType(self.fingerprint()),
            memory=Memory(self._spec.ram_mb << 20, prepared.writer.digest(), runs, saved.written),
            devices=describe(prepared.draft.files.devices),
            jobs=describe(prepared.draft.files.jobs) if prepared.draft.files.jobs.exists() else None,
            names=describe(prepared.draft.files.names) if prepared.draft.files.names.exists() else None,
            guest=guest,
            pause=round(saved.pause, 6),
        )

    def fingerprint(self) -> dict[str, Any]:
        """What a host must offer to restore this machine."""
        spec = self._spec
        machine = self._driver.fingerprint(
            self._machine.version,
            hardware=spec.hardware,
            accelerator=spec.accelerator,
            cpus=spec.cpus,
            ram_mb=spec.ram_mb,
            command_line=spec.command_line,
        )
        return {**machine, **self._assets}

    async def close(self) -> None:
        """The machine has ended: a draft that was prepared for nothing is the service's to remove, for whom nobody waits."""
        task, self._preparing = self._preparing, None
        await self._stop_quiescing()
        if self._prepared is not None:
            self._prepared.cancelled = True
        if task is not None:
            if self._prepared is None:
                task.cancel()
            await asyncio.gather(task, return_exceptions=True)
        prepared, self._prepared = self._prepared, None
        if prepared is not None:
            prepared.writer.close()
            self._store.abandon(prepared.draft)
        if self._base is not None:
            self._base.close()
            self._base = None
