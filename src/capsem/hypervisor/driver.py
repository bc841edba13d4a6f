"""What a hypervisor driver offers. A driver turns a frozen `MachineSpec` into a running `Machine`; nothing above this
package knows how (no QMP, no command lines).

Call order, which the contract suite holds every driver to:

1. `Driver.start(spec)`, or `Driver.restore(spec, ...)` with the state that a `save` left, returns a `Machine` whose
   vCPUs have not run yet, with both channels connected on the host side, so that the guest never sees a port without a
   peer.
2. `Machine.run()` once, then `pause()` and `run()` in turn as often as wanted.
3. `Machine.save()` at any time after the first `run`, any number of times; it pauses the machine itself.
4. `Machine.kill()` at any time, any number of times; `wait()` returns how the machine ended, the same every time.

Calls on one machine are made one at a time; different machines are independent unless `Features` says otherwise.
"""

from __future__ import annotations

import socket
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, Protocol

from capsem.store.ram import RamWriter, Runs


class Accelerator(StrEnum):
    """What executes the guest's instructions."""

    KVM = "kvm"
    TCG = "tcg"


@dataclass(frozen=True, slots=True)
class Features:
    """What a driver can and cannot do; callers ask this instead of the driver's name."""

    name: str
    transitions_overlap: bool  # may save, restore, boot and teardown of different machines run at the same time?


@dataclass(frozen=True, slots=True)
class Layer:
    """One file of a volume's chain. `format` is "raw" or "qcow2"; what a file's own header says is never trusted."""

    path: Path
    format: str


@dataclass(frozen=True, slots=True)
class MachineSpec:
    """Everything that decides what the guest sees, and the files it runs on. All paths are absolute.

    `volume` is the layer chain, base first; only the last is written. `hardware` is the number of the virtual
    hardware list (docs/virtual-hardware.md): machines of different numbers cannot share a checkpoint.
    """

    vm_id: str
    cpus: int
    ram_mb: int
    accelerator: Accelerator
    kernel: Path
    initrd: Path
    root: Path  # the image's read-only root file system
    volume: tuple[Layer, ...]
    ram_file: Path  # mapped privately, never written
    command_line: str = ""  # appended to the kernel command line of the image
    hardware: int = 1


@dataclass(frozen=True, slots=True)
class Merged:
    """What a merge of layers has cost: bytes of data read and written (or shared), and the length of the new file."""

    copied_bytes: int
    file_bytes: int


@dataclass(frozen=True, slots=True)
class SaveFiles:
    """Where a save writes: `devices` does not exist yet; `ram` may hold a copy of an earlier save's already, then
    `compare` tells that it is one of this very machine, so that pages which are in it need not be written again."""

    devices: Path
    ram: RamWriter
    compare: bool


@dataclass(frozen=True, slots=True)
class Saved:
    """What a save did: seconds that the vCPUs stood still, what was written of RAM, bytes of it that were data."""

    pause: float
    runs: Runs
    written: int


@dataclass(frozen=True, slots=True)
class Ending:
    """How a machine ended: `clean` when the guest powered itself off or we asked the VMM to quit."""

    clean: bool
    reason: str  # for people, e.g. "guest powered off", "qemu-system-x86_64 was killed by signal 9"


class Machine(Protocol):
    """A VMM process that belongs to us."""

    @property
    def pid(self) -> int:
        """Process id of the VMM."""

    @property
    def control(self) -> socket.socket:
        """Host end of the control channel: a connected, non-blocking stream socket. The caller owns it from here."""

    @property
    def console(self) -> socket.socket:
        """Host end of the guest's serial console, likewise."""

    async def run(self) -> None:
        """Let the vCPUs run. Raises MachineFailed."""

    async def pause(self) -> None:
        """Stop the vCPUs; memory stays. Raises MachineFailed."""

    async def out_of_space(self) -> None:
        """Return once the VMM has stopped the vCPUs because the host's disk is full; at once when they still are.

        What the guest was writing is kept, and written when the machine runs again.
        """

    async def retry(self) -> None:
        """Let a machine that is out of space run again, unless it was paused meanwhile. If the disk is full still, it
        is out of space again. Raises MachineFailed.
        """

    @property
    def top_layer(self) -> Layer:
        """The layer that is written to."""

    async def add_layer(self, layer: Layer) -> None:
        """Go on writing to `layer`, an existing empty one; the present top is flushed and never written again.

        Raises MachineFailed; the machine then goes on with the top it had.
        """

    @property
    def version(self) -> str:
        """Name and version of the VMM, such as "qemu 7.2.22"."""

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
        """Save RAM and devices at one instant, at which the volume's present top is frozen and `layer` put above it.

        With `go_on` the machine runs again before anything is written to disk; without it, it stays paused. `hold` is
        called right before the vCPUs are stopped, when all else is prepared, `instant` while they stand still, the last
        thing before they go on, and `release` as soon as they run again, if they do.

        What was saved is whole on return, and not durable: the caller syncs device state, frozen layer and RAM, as it
        suits best. Raises MachineFailed, OSError: the machine is then paused or runs as before, and `top_layer` says
        whether the layer was added.
        """

    async def kill(self) -> None:
        """End the VMM at once and reap it. Safe to call again."""

    async def wait(self) -> Ending:
        """Return how the machine ended, once it has."""


class Volume(Protocol):
    """A volume that no machine runs on, as its guest would read it."""

    def read(self, offset: int, size: int) -> bytes:
        """That many bytes. Raises OSError, Corrupt."""

    def close(self) -> None:
        """Let go of its files."""


class Driver(Protocol):
    """Makes machines."""

    @property
    def features(self) -> Features:
        """What this driver can do on this host."""

    async def accelerator(self) -> Accelerator:
        """The best accelerator that was seen working on this host; the verdict is cached. Raises HostNotReady."""

    def fingerprint(
        self, version: str, *, hardware: int, accelerator: Accelerator, cpus: int, ram_mb: int, command_line: str
    ) -> dict[str, Any]:
        """Everything about a machine that must be equal where its RAM is saved and where it is restored; `version` is
        `Machine.version`. Raises InvalidInput.
        """

    async def version(self) -> str:
        """What `Machine.version` would be of a machine started now. Raises HostNotReady."""

    def create_layer(self, path: Path, *, size_mb: int, vm_id: str, layer_id: str, sync: bool = True) -> None:
        """Write a new, empty qcow2 layer of `size_mb` MiB, mode 0600, that carries both ids; durable on return, unless the
        caller is to `sync` it and its directory."""

    async def merge_layers(
        self, sources: Sequence[Path], target: Path, *, vm_id: str, layer_id: str, size_mb: int | None = None
    ) -> Merged:
        """Write a new layer `target`, mode 0600, that can take the place of `sources`: frozen layers that are adjacent in
        a chain, lowest first. They are only read, and machines may run on them meanwhile. Durable on return.

        Sources may be anybody's: of what they say nothing is believed, and nothing but clusters gets into the target.

        Raises Corrupt, when a source is not a layer of ours, damaged or not of `size_mb`, and OSError, among others
        FileExistsError and ENOSPC. On any error and when cancelled nothing is left; after a crash there may be a target
        that nobody names.
        """

    def open_volume(self, volume: Sequence[Layer]) -> Volume:
        """Open a layer chain, base first, that no machine writes to. Raises OSError, Corrupt."""

    async def start(self, spec: MachineSpec, *, vmm_lock: int) -> Machine:
        """Spawn the VMM, vCPUs stopped. It inherits the locked descriptor `vmm_lock`, so that the lock lives exactly as
        long as it does, and it dies with the calling process. Raises HostNotReady, MachineFailed."""

    async def restore(self, spec: MachineSpec, devices: Path, *, vmm_lock: int) -> Machine:
        """As `start`, with the device state of a save and `spec.ram_file` the RAM that it wrote; vCPUs stopped."""
