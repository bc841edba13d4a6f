"""The QEMU driver: finds QEMU, chooses the accelerator, starts machines."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import socket
import threading
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from capsem.hypervisor.driver import Accelerator, Features, Layer, MachineSpec, Merged
from capsem.hypervisor.qemu import qcow2
from capsem.hypervisor.qemu.chain import Chain
from capsem.hypervisor.qemu.command import Channels, argv, virtual_hardware
from capsem.hypervisor.qemu.machine import QemuMachine, Record
from capsem.hypervisor.qemu.merge import merge
from capsem.hypervisor.qemu.probe import Verdict, probe
from capsem.hypervisor.qemu.process import Process, complaint, find_qemu, lacking_features, query_version, spawn
from capsem.hypervisor.qemu.qmp import Monitor
from capsem.hypervisor.qemu.tsc import frequency_khz
from capsem.model.errors import CapsemError, HostNotReady, MachineFailed
from capsem.tracing import span

START_LIMIT: Final = 30.0  # seconds from exec to QMP's greeting, on a very busy host
CONSOLE_BUFFER: Final = 4 << 20  # bytes, accounted as used only; the host's net.core.wmem_max caps it
EXIT_LIMIT: Final = 2.0  # seconds from the end of QEMU's socket to its exit

# What QEMU says when it cannot start -> what the reader can do about it.
START_HINTS: Final = {
    'Failed to get "write" lock': "another process uses this VM's disk: see which QEMU processes run",
    "Cannot allocate memory": "the host has too little memory for this VM: choose a smaller ram_mb or stop another VM",
    "Could not access KVM": "KVM was there when it was last tried; restart the service to try again",
    "doesn't support requested feature": "the virtual hardware needs it: run this VM with software emulation (TCG)",
    "No such file or directory": "a file of this VM or of its image is missing: capsem image verify",
    "unsupported machine type": "this QEMU no longer knows it: start the VM cold with a newer Capsem",
    "No space left on device": "the host's disk is full: make room",
}
GENERAL_HINT: Final = "these are QEMU's own words; see the VM's process log"


class QemuDriver:
    """See `Driver` for the contract. `cache` is a directory for what is learnt about this host; it need not exist."""

    def __init__(self, cache: Path) -> None:
        self._cache = cache
        self._probing = asyncio.Lock()

    @property
    def features(self) -> Features:
        """See Driver: one process per VM, nothing shared but read-only files."""
        return Features(name="qemu", transitions_overlap=True)

    async def accelerator(self) -> Accelerator:
        """See Driver."""
        return (await self.verdict()).accelerator

    async def verdict(self) -> Verdict:
        """The accelerator, why it was chosen, and QEMU's version. Raises HostNotReady."""
        async with self._probing:
            return await probe(find_qemu(), self._cache / "accelerator.json")

    def create_layer(self, path: Path, *, size_mb: int, vm_id: str, layer_id: str, sync: bool = True) -> None:
        """See Driver; also raises OSError."""
        qcow2.create_layer(path, size_mb=size_mb, vm_id=vm_id, layer_id=layer_id, sync=sync)

    async def merge_layers(
        self, sources: Sequence[Path], target: Path, *, vm_id: str, layer_id: str, size_mb: int | None = None
    ) -> Merged:
        """See Driver. A thread does it; when cancelled, this returns once that has tidied up."""
        stop = threading.Event()
        call = functools.partial(
            merge, sources, target, vm_id=vm_id, layer_id=layer_id, size_mb=size_mb, cancelled=stop.is_set
        )
        work = asyncio.get_running_loop().run_in_executor(None, call)
        try:
            return await asyncio.shield(work)
        except asyncio.CancelledError:
            stop.set()
            while not work.done():
                with contextlib.suppress(asyncio.CancelledError):  # said once is enough
                    await asyncio.wait([work])
            if work.exception() is None:  # it was done before it looked
                target.unlink(missing_ok=True)
            raise

    def open_volume(self, volume: Sequence[Layer]) -> Chain:
        """See Driver."""
        return Chain(volume)

    def fingerprint(
        self, version: str, *, hardware: int, accelerator: Accelerator, cpus: int, ram_mb: int, command_line: str
    ) -> dict[str, Any]:
        """See Driver."""
        virtual = virtual_hardware(hardware)
        return {
            "vmm": version,
            "machine_type": virtual.machine,
            "cpu_model": virtual.cpu,
            "accelerator": str(accelerator),
            "cpus": cpus,
            "ram_mb": ram_mb,
            "devices": [*virtual.devices, *virtual.globals],
            "command_line": f"{virtual.command_line} {command_line}".rstrip(),
        }

    async def version(self) -> str:
        """See Driver."""
        return f"qemu {(await self.verdict()).qemu_version}"

    async def start(self, spec: MachineSpec, *, vmm_lock: int) -> QemuMachine:
        """See Driver; also raises InvalidInput."""
        emulated = spec.accelerator is Accelerator.TCG
        return await self._spawn(spec, vmm_lock, tsc_khz=await asyncio.to_thread(frequency_khz) if emulated else None)

    async def restore(self, spec: MachineSpec, devices: Path, *, vmm_lock: int) -> QemuMachine:
        """See Driver; also raises InvalidInput, OSError."""
        # A descriptor instead of a name: the sandbox forbids QEMU to start the program that a name would need.
        with devices.open("rb", buffering=0) as state:
            machine = await self._spawn(spec, vmm_lock, state=state.fileno())
            try:
                with span("load the devices"):
                    await machine.load(state.fileno())
            except BaseException:
                machine.control.close()
                machine.console.close()
                await machine.kill()
                raise
        return machine

    async def _spawn(
        self, spec: MachineSpec, vmm_lock: int, *, state: int | None = None, tsc_khz: int | None = None
    ) -> QemuMachine:
        binary = find_qemu()
        with contextlib.ExitStack() as ours, contextlib.ExitStack() as theirs:
            pairs: dict[str, tuple[socket.socket, socket.socket]] = {}
            for name in ("qmp", "control", "console"):
                host, vmm = socket.socketpair()
                pairs[name] = (ours.enter_context(host), theirs.enter_context(vmm))
                host.setblocking(False)
            # QEMU sends console output a byte at a time, each with a socket buffer's overhead: by default 278 bytes fill
            # the socket, and what a guest prints while it is full is lost (the kernel waits 10 ms for its UART, no more).
            pairs["console"][1].setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, CONSOLE_BUFFER)
            ends = {name: vmm.fileno() for name, (_, vmm) in pairs.items()}
            # A fresh generation id in each process tells the guest's kernel that it may be a copy of another.
            incoming, inherited = state is not None, (() if state is None else (state,))
            generation = str(uuid.uuid4())
            line = argv(
                spec,
                Channels(**ends),
                generation=generation,
                binary=str(binary),
                incoming=incoming,
                tsc_khz=tsc_khz,
            )
            with span("spawn QEMU"):
                process = spawn(line, keep=(*ends.values(), vmm_lock, *inherited))
            theirs.close()
            try:
                record = Record()
                monitor = Monitor(record.note)
                with span("wait for QEMU"):
                    await monitor.open(pairs["qmp"][0], START_LIMIT)
            except MachineFailed as error:
                raise await _start_failure(process, binary, error) from error
            except BaseException:  # cancelled half-way
                await process.end()
                raise
            ours.pop_all()
        return QemuMachine(process, monitor, record, spec, control=pairs["control"][0], console=pairs["console"][0])


async def _start_failure(process: Process, binary: Path, error: MachineFailed) -> CapsemError:
    """End a QEMU that does not speak, and find out why: the error to raise."""
    try:
        async with asyncio.timeout(EXIT_LIMIT):
            await process.wait()
    except TimeoutError:
        return MachineFailed(error.message, hint="the host may be overloaded: see its load, then try again")
    finally:
        await process.end()
    try:
        await query_version(binary)
    except HostNotReady as reason:
        return reason
    stderr = process.stderr()
    words = complaint(stderr) or error.message
    if lacking := lacking_features(stderr):
        words = f"this host's CPU lacks {', '.join(lacking)}"
    hint = next((hint for sign, hint in START_HINTS.items() if sign in stderr), GENERAL_HINT)
    return MachineFailed(f"QEMU did not start: {words}", hint=hint)
