"""A running QEMU as a `Machine`.

How it ended is put together from three sources, in this order: what we did to it (kill), what it said before it went
(QMP events), how the kernel says it went (exit status, with its last complaint).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Final, NamedTuple

from capsem.hypervisor.driver import Ending, Layer, MachineSpec, Saved, SaveFiles
from capsem.hypervisor.qemu.command import TOP_NODE, layer_nodes
from capsem.hypervisor.qemu.memory import GuestMemory, Pieces, Snapshot, stream
from capsem.hypervisor.qemu.process import Process, complaint
from capsem.hypervisor.qemu.qmp import Event, Monitor
from capsem.model.errors import MachineFailed
from capsem.store.ram import Runs
from capsem.tracing import span

HEADROOM: Final = (
    32 << 20
)  # bytes that a guest may dirty between the estimate and the pause, without a second allocation
DRAIN_LIMIT: Final = 2.0  # seconds from QEMU's exit to the end of what it had written to its socket

# Reasons of the SHUTDOWN event (QAPI type ShutdownCause) -> (clean?, what to tell people)
SHUTDOWNS: Final = {
    "guest-shutdown": (True, "the guest powered off"),
    "host-qmp-quit": (True, "QEMU was asked to quit"),
    # We start QEMU with -no-reboot. A guest that means to restart is made to power off by our agent; what is left is a
    # kernel that panicked before it could say so, or a triple fault.
    "guest-reset": (False, "the guest reset itself: a kernel panic, or a reboot that went around the guest agent"),
    "guest-panic": (False, "the guest's kernel panicked"),
    "host-signal": (False, "QEMU was terminated from outside"),
    "host-error": (False, "QEMU met an error of the host"),
}

log = logging.getLogger("capsem.qemu")


class Record:
    """What QEMU told unasked, as far as it matters later."""

    def __init__(self) -> None:
        self.shutdown: str | None = None
        self.panicked = False
        self.out_of_space = asyncio.Event()

    def note(self, event: Event) -> None:
        """Take in one event."""
        if event.name == "SHUTDOWN":
            self.shutdown = str(event.data.get("reason", ""))
        elif event.name == "GUEST_PANICKED":
            self.panicked = True
            log.error("the guest's kernel panicked")
        elif event.name == "BLOCK_IO_ERROR" and event.data.get("nospace"):
            self.out_of_space.set()  # werror=enospc: the vCPUs stand still, and the request is kept
        elif event.name in {"BLOCK_IO_ERROR", "BLOCK_IMAGE_CORRUPTED", "MEMORY_FAILURE"}:
            log.error("QEMU: %s %s", event.name, dict(event.data))


def ending(status: int, *, killed: bool, record: Record, words: str) -> Ending:
    """How a QEMU ended: `status` is its exit status (negative for a signal), `killed` whether we did it."""
    if killed:
        return Ending(clean=False, reason="the machine was killed on request")
    if status < 0:
        name = signal.strsignal(-status) or "unknown"
        return Ending(clean=False, reason=_with(f"QEMU was killed by signal {-status} ({name})", words))
    if record.panicked:
        return Ending(clean=False, reason="the guest's kernel panicked")
    if status == 0 and record.shutdown in SHUTDOWNS:
        clean, reason = SHUTDOWNS[record.shutdown]
        return Ending(clean=clean, reason=reason)
    return Ending(clean=False, reason=_with(f"QEMU exited with status {status}", words))


def _with(what: str, words: str) -> str:
    return f"{what}: {words}" if words else what


class _Opened(NamedTuple):
    """A layer that can be put on top: the layer, its node, its place in the chain."""

    layer: Layer
    node: str
    place: int


def _room(memory: GuestMemory) -> Snapshot:
    """Room for what is changed now, and for what will be by the time that the machine stands still."""
    return Snapshot(memory, sum(length for _, length in memory.changed()) + HEADROOM)


def _patch(files: SaveFiles, pieces: Pieces) -> tuple[Runs, int]:
    # Closed also when the disk is full: they look into memory that is about to be given back.
    with contextlib.closing(pieces):
        return files.ram.patch(pieces, compare=files.compare)


class QemuMachine:
    """See `Machine` for the contract."""

    def __init__(
        self,
        process: Process,
        monitor: Monitor,
        record: Record,
        spec: MachineSpec,
        *,
        control: socket.socket,
        console: socket.socket,
    ) -> None:
        self._process = process
        self._monitor = monitor
        self._record = record
        self._spec = spec
        self._top = self._frozen = spec.volume[-1]
        self._top_node = self._frozen_node = TOP_NODE
        self._top_place = self._frozen_place = len(spec.volume) - 1
        self._next_place = len(spec.volume)
        self._layering = asyncio.Lock()
        self._control = control
        self._console = console
        self._killed = False
        self._hung: str | None = None
        monitor.on_hung = self._give_up
        self._paused = True
        self._ended = asyncio.create_task(self._conclude(), name=f"qemu {process.pid}")

    @property
    def pid(self) -> int:
        """See Machine."""
        return self._process.pid

    @property
    def control(self) -> socket.socket:
        """See Machine."""
        return self._control

    @property
    def console(self) -> socket.socket:
        """See Machine."""
        return self._console

    @property
    def version(self) -> str:
        """See Machine."""
        return f"qemu {self._monitor.version}"

    async def load(self, state: int) -> None:
        """Take in a device state from an inherited descriptor; the vCPUs stay stopped. Raises MachineFailed."""
        try:
            await self._command(self._monitor.load(f"fd:{state}"))
        except MachineFailed as error:
            # One that takes offence ends: whether it is heard to say so first, or is gone already, is chance.
            raise MachineFailed(f"QEMU did not take the device state in: {error.message}", hint=error.hint) from error

    async def run(self) -> None:
        """See Machine."""
        self._paused = False
        self._record.out_of_space.clear()  # first: writes that fail again may be told before the command is answered
        await self._command(self._monitor.cont())

    async def pause(self) -> None:
        """See Machine."""
        self._paused = True
        self._record.out_of_space.clear()  # it stands still for another reason now; QEMU tries again when it runs
        await self._command(self._monitor.stop())

    async def out_of_space(self) -> None:
        """See Machine."""
        await self._record.out_of_space.wait()

    async def retry(self) -> None:
        """See Machine."""
        if not self._paused:
            await self.run()

    @property
    def top_layer(self) -> Layer:
        """See Machine."""
        return self._top

    async def add_layer(self, layer: Layer) -> None:
        """See Machine. A caller that is cancelled meanwhile does not cut the change in two."""
        await self._command(asyncio.shield(self._add_layer(layer)))

    async def _add_layer(self, layer: Layer) -> None:
        async with self._opened(layer) as opened:
            await self._switch(opened)
        await self._seal()

    @contextlib.asynccontextmanager
    async def _opened(self, layer: Layer) -> AsyncIterator[_Opened]:
        """A layer that QEMU has open, for `_switch` to put on top; it is closed again if that does not happen."""
        async with self._layering:
            place = self._next_place
            self._next_place += 1  # also when this fails: names are not used twice
            file, node = layer_nodes(layer, place, name=f"volume-{place}", backing=None, top=True)
            with span("open a layer"):
                await self._monitor.blockdev_add(file)
            try:
                with span("open a layer"):
                    await self._monitor.blockdev_add(node)
                try:
                    yield _Opened(layer, node["node-name"], place)
                finally:
                    if self._top != layer:
                        await self._close_node(node["node-name"])
            finally:
                if self._top != layer:
                    await self._close_node(file["node-name"])

    async def _close_node(self, node: str) -> None:
        with contextlib.suppress(MachineFailed):  # what led here says more
            await self._monitor.blockdev_del(node)

    async def _switch(self, opened: _Opened) -> None:
        """Flush the top, which fails if that fails, and go on in another."""
        await self._monitor.blockdev_snapshot(self._top_node, opened.node)
        self._frozen, self._frozen_node, self._frozen_place = self._top, self._top_node, self._top_place
        self._top, self._top_node, self._top_place = opened

    async def _seal(self) -> None:
        """Let go of the frozen layer's write lock, or no fork could open the layer while this machine runs: the snapshot
        made its qcow2 node read-only, not its file, which says so explicitly.
        """
        frozen, _ = layer_nodes(self._frozen, self._frozen_place, name=self._frozen_node, backing=None, top=False)
        try:
            await self._monitor.blockdev_reopen(frozen)
        except MachineFailed as error:
            log.error("the frozen layer %s stays open for writing, though nothing writes: %s", self._frozen.path, error)

    async def save(
        self,
        files: SaveFiles,
        layer: Layer,
        *,
        go_on: bool,
        hold: Callable[[], Awaitable[None]] | None = None,
        instant: Callable[[], None] | None = None,
        release: Callable[[], None] | None = None,
    ) -> Saved:
        """See Machine. A caller that is cancelled meanwhile does not leave the machine standing."""
        return await asyncio.shield(self._save(files, layer, go_on, hold, instant, release))

    async def _save(
        self,
        files: SaveFiles,
        layer: Layer,
        go_on: bool,
        hold: Callable[[], Awaitable[None]] | None,
        instant: Callable[[], None] | None,
        release: Callable[[], None] | None,
    ) -> Saved:
        memory = GuestMemory(self.pid, self._spec.ram_file, self._spec.ram_mb << 20)
        snapshot = await asyncio.to_thread(_room, memory) if go_on else None
        saved = False
        try:
            async with self._opened(layer) as opened:
                if hold is not None:
                    await hold()
                began = time.monotonic()
                with span("stop the vCPUs"):
                    await self.pause()
                try:
                    # Flushes the top, and fails if that fails: `stop` alone would not say.
                    with span("go on in the new layer"):
                        await self._command(self._switch(opened))
                    with span("save the devices"):
                        await self._command(self._monitor.save_devices(files.devices))
                    if snapshot is not None:
                        snapshot.take()
                    if instant is not None:
                        instant()
                finally:
                    if go_on:
                        await self.run()
                        if release is not None:
                            release()
                pause = time.monotonic() - began
            pieces = stream(memory) if snapshot is None else snapshot.pieces()
            with span("write the memory"):
                runs, written = await asyncio.to_thread(_patch, files, pieces)
            if not go_on:
                # A word from it now, as its answer to `cont` is one where it goes on: the kernel may have begun to take the
                # memory of a process back that was killed meanwhile, and what is gone looks like what was never written to.
                await self._command(self._monitor.status())
            saved = True
            return Saved(pause, runs, written)
        finally:
            if snapshot is not None:
                snapshot.close()
            if self._top == layer and (go_on or not saved):  # it goes on; one that was suspended never will
                await self._seal()

    async def kill(self) -> None:
        """See Machine. Raises MachineFailed if the kernel does not let go of it within 10 s."""
        if not self._ended.done():
            self._killed = True
            with span("kill the VMM"):
                await self._process.end()
        await self.wait()

    async def wait(self) -> Ending:
        """See Machine."""
        return await asyncio.shield(self._ended)

    async def _command(self, command: Awaitable[object]) -> None:
        """Carry out a QMP command; if it fails because the machine is gone, say how that went. Raises MachineFailed."""
        try:
            await command
        except MachineFailed as error:
            if self._monitor.connected:
                raise
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(DRAIN_LIMIT):
                    how = await self.wait()
                    raise MachineFailed(f"the machine has ended: {how.reason}", hint="start it again") from error
            raise

    def _give_up(self, reason: str) -> None:
        """A QEMU that hangs cannot be saved, stopped or told to go on, and would keep who tries from anything else."""
        log.error("%s: killing process %d", reason, self.pid)
        self._hung = f"{reason}, and was killed"
        self._process.kill()

    async def _conclude(self) -> Ending:
        """Wait for the process to end, then for its last events."""
        status = await self._process.wait()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(DRAIN_LIMIT):
                await self._monitor.closed()
        await self._monitor.close()
        if self._hung is not None:
            return Ending(clean=False, reason=self._hung)
        return ending(
            status,
            killed=self._killed and status == -signal.SIGKILL,
            record=self._record,
            words=complaint(self._process.stderr()),
        )
