"""The simulated driver: `make_driver("sim", ...)`, or made by hand for a host of a test's own."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from capsem.hypervisor.driver import Accelerator, Features, Layer, MachineSpec, Merged
from capsem.hypervisor.sim import plan, volume
from capsem.hypervisor.sim.host import BOOT, RESTORE, SimHost
from capsem.hypervisor.sim.machine import VERSION, SimMachine
from capsem.hypervisor.sim.memory import Memory
from capsem.hypervisor.sim.plan import Dice, Plan, default_host
from capsem.model.errors import MachineFailed
from capsem.system import System

STATE_LIMIT = 1 << 20  # bytes of a device state


def socket_pair() -> tuple[socket.socket, socket.socket]:
    """A channel on the real network."""
    pair = socket.socketpair()
    for each in pair:
        each.setblocking(False)
    return pair


class SimDriver:
    """See `Driver` for the contract. Its machines live in this process."""

    def __init__(
        self, system: System, plan: Plan | None = None, *, pair: Callable[[], tuple[Any, Any]] = socket_pair
    ) -> None:
        """`pair` makes two connected endpoints that `system.network.attach` takes. Raises OSError."""
        self._system = system
        self._plan = plan or Plan()
        self._pair = pair
        self.host = SimHost(self._plan.host or default_host(), hazard=not self._plan.tolerant)
        self.machines: list[SimMachine] = []  # all that were started, for tests

    @property
    def features(self) -> Features:
        """See Driver."""
        return Features(name="sim", transitions_overlap=self._plan.tolerant)

    async def accelerator(self) -> Accelerator:
        """See Driver."""
        return Accelerator.TCG

    async def version(self) -> str:
        """See Driver."""
        return VERSION

    def fingerprint(
        self, version: str, *, hardware: int, accelerator: Accelerator, cpus: int, ram_mb: int, command_line: str
    ) -> dict[str, Any]:
        """See Driver."""
        return {
            "vmm": version,
            "hardware": hardware,
            "accelerator": str(accelerator),
            "cpus": cpus,
            "ram_mb": ram_mb,
            "command_line": command_line,
        }

    def create_layer(self, path: Path, *, size_mb: int, vm_id: str, layer_id: str, sync: bool = True) -> None:
        """See Driver; also raises OSError."""
        volume.create(path, size_mb=size_mb, vm_id=vm_id, layer_id=layer_id)

    async def merge_layers(
        self, sources: Sequence[Path], target: Path, *, vm_id: str, layer_id: str, size_mb: int | None = None
    ) -> Merged:
        """See Driver."""
        files: volume.Files = {}
        for source in sources:
            found, _ = volume.read(source, size_mb=size_mb)
            files.update(found)
        size = size_mb or volume.size_mb(sources[0])
        volume.create(target, size_mb=size, vm_id=vm_id, layer_id=layer_id, files=files)
        copied = sum(len(file.data) for file in files.values() if file is not None)
        return Merged(copied_bytes=copied, file_bytes=target.stat().st_size)

    def open_volume(self, layers: Sequence[Layer]) -> volume.Ext4Image:
        """See Driver."""
        return volume.Ext4Image(layers)

    async def start(self, spec: MachineSpec, *, vmm_lock: int) -> SimMachine:
        """See Driver; also raises Corrupt, OSError."""
        return await self._make(spec, Memory(boot_id=self._id()), None, vmm_lock)

    async def restore(self, spec: MachineSpec, devices: Path, *, vmm_lock: int) -> SimMachine:
        """See Driver; also raises Corrupt, OSError."""
        with devices.open("rb") as file:
            data = file.read(STATE_LIMIT)
        try:
            state = json.loads(data)
            saved_as, theirs = str(state["saved_as"]), state["vmm"] != VERSION or state["format"] != 1
        except (ValueError, KeyError, TypeError, RecursionError):
            theirs, saved_as = True, ""
        if theirs or not saved_as.isalnum():
            raise MachineFailed(f"{devices} is not a device state of ours", hint="the VM can be resumed cold")
        return await self._make(spec, Memory.from_ram(spec.ram_file), saved_as, vmm_lock)

    def _id(self) -> str:
        return self._system.entropy.token_bytes(16).hex()

    async def _make(self, spec: MachineSpec, memory: Memory, saved_as: str | None, vmm_lock: int) -> SimMachine:
        dice = Dice(self._plan, self.host, f"{spec.vm_id} {spec.volume[-1].path.name}")
        operation = self.host.begin(self._system.entropy.token_bytes(8).hex(), RESTORE if saved_as else BOOT)
        lock = os.dup(vmm_lock)
        try:
            if dice.strikes(plan.RESTORE_FAILS if saved_as else plan.START_FAILS):
                raise MachineFailed("the simulated machine did not start: simulated fault")
            machine = SimMachine(
                self._system,
                self.host,
                dice,
                spec,
                memory,
                operation=operation,
                saved_as=saved_as,
                lock=lock,
            )
            await machine.connect(self._pair)
        except BaseException:
            os.close(lock)  # first: a host may not let us change a file any more
            operation.end()
            raise
        self.machines.append(machine)
        return machine
