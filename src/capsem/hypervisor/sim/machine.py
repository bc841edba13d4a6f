"""A simulated machine: a guest, its RAM and its disk, in the process that started it, and dead with it."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import logging
import os
from collections.abc import Awaitable, Callable
from typing import Any

from capsem.hypervisor.driver import Ending, Layer, MachineSpec, Saved, SaveFiles
from capsem.hypervisor.sim import plan
from capsem.hypervisor.sim.guest import Guest
from capsem.hypervisor.sim.host import RESTORE, SAVE, TEARDOWN, Operation, SimHost
from capsem.hypervisor.sim.memory import Memory
from capsem.hypervisor.sim.plan import Dice
from capsem.hypervisor.sim.volume import Disk
from capsem.model.errors import MachineFailed
from capsem.system import System

VERSION = "sim 1"
SAVING = 0.02  # seconds that a save takes beyond its writing
ENDING = 0.01  # and a machine to go away

log = logging.getLogger("capsem.sim")


class SimMachine:
    """See `Machine` for the contract."""

    version = VERSION

    def __init__(
        self,
        system: System,
        host: SimHost,
        dice: Dice,
        spec: MachineSpec,
        memory: Memory,
        *,
        operation: Operation,
        saved_as: str | None,
        lock: int,
    ) -> None:
        """`operation` is what brings it up, `saved_as` the save that it is restored from; `lock`: a descriptor that it
        keeps open for as long as it lives. Raises Corrupt, OSError.
        """
        self.pid = system.processes.own_pid()
        self.control: Any = None
        self.console: Any = None
        self._system = system
        self._host = host
        self._dice = dice
        self._spec = spec
        self._operation = operation
        self._parked: Operation | None = None
        self._origins = [operation.name, *([saved_as] if saved_as else ())] if operation.kind == RESTORE else []
        self._lock = lock
        self._disk = Disk(spec.volume)
        self._top = spec.volume[-1]
        self._pages = len(memory.to_pages()) if saved_as else 0  # what the RAM file holds of it already
        self._paused = True
        self._full = asyncio.Event()
        self._ended: asyncio.Future[Ending] = asyncio.get_running_loop().create_future()
        self._ending: asyncio.Task[None] | None = None
        self._console_out: asyncio.WriteTransport | None = None
        self.guest = Guest(memory, self._disk, self, dice, restored=saved_as is not None)

    async def connect(self, pair: Callable[[], tuple[Any, Any]]) -> None:
        """Make both channels; `pair` makes a connected pair of what the system's network can attach to."""
        network = self._system.network
        (self.control, control), (self.console, console) = pair(), pair()
        await network.attach(control, lambda: self.guest)
        self._console_out = await network.attach(console, asyncio.Protocol)

    @property
    def gone(self) -> bool:
        """Whether it has ended."""
        return self._ended.done()

    # -- Board: the guest's side

    @property
    def struck(self) -> bool:
        """See Board."""
        return any(self._host.is_struck(name) for name in self._origins)

    def print(self, line: str) -> None:
        """See Board."""
        if self._console_out is not None:
            self._console_out.write(f"{line}\r\n".encode())

    def stall(self) -> None:
        """See Board."""
        self.guest.pause()
        self._full.set()

    def ready(self) -> None:
        """See Board."""
        self._operation.end()

    def power_off(self) -> None:
        """See Board."""
        self._tear_down(Ending(clean=True, reason="the guest powered off"))

    def panic(self) -> None:
        """See Board."""
        self.print("Kernel panic - not syncing: simulated")
        self.vanish(Ending(clean=False, reason="the guest's kernel panicked"))

    # -- Machine

    async def run(self) -> None:
        """See Machine."""
        self._check()
        if self._parked is not None:  # a suspend that came to nothing
            self._parked.end()
            self._parked = None
        self._paused = False
        self._full.clear()
        self.guest.run()

    async def pause(self) -> None:
        """See Machine."""
        self._check()
        self._paused = True
        self._full.clear()
        self.guest.pause()

    async def out_of_space(self) -> None:
        """See Machine."""
        await self._full.wait()

    async def retry(self) -> None:
        """See Machine."""
        if not self._paused:
            await self.run()

    @property
    def top_layer(self) -> Layer:
        """See Machine."""
        return self._top

    async def add_layer(self, layer: Layer) -> None:
        """See Machine."""
        self._check()
        try:
            self._disk.go_on(layer.path)
        except OSError as error:
            raise MachineFailed(f"the layer cannot be opened: {error.strerror}") from error
        self._top = layer

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
        """See Machine."""
        self._check()
        name = self._system.entropy.token_bytes(8).hex()
        self._operation = operation = self._host.begin(name, SAVE)
        saved = False
        try:
            if hold is not None:
                await hold()
            self._check()
            began = self._system.clock.monotonic()
            await self.pause()
            try:
                if self._dice.strikes(plan.SAVE_FAILS):
                    raise MachineFailed("the state of the devices could not be saved: simulated fault")
                await self.add_layer(layer)
                state = {"format": 1, "vmm": VERSION, "vm_id": self._spec.vm_id, "saved_as": name}
                self._write_devices(files, state)
                pages = self.guest.memory.to_pages()
                if instant is not None:
                    instant()
            finally:
                if go_on and not self._ended.done():
                    await self.run()
                    if release is not None:
                        release()
            pause = self._system.clock.monotonic() - began
            await asyncio.sleep(SAVING)
            self._check()
            if self._dice.strikes(plan.SAVE_FULL):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            piece = pages.ljust(self._pages, b"\0")
            runs, written = await asyncio.to_thread(files.ram.patch, [(0, memoryview(piece))], compare=files.compare)
            self._pages = len(pages)
            saved = True
            return Saved(pause, runs, written)
        finally:
            if go_on or not saved:
                operation.end()
            else:  # over when the machine has gone away, or runs again
                self._parked = operation

    def _write_devices(self, files: SaveFiles, state: dict[str, Any]) -> None:
        fd = os.open(files.devices, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            os.write(fd, json.dumps(state).encode())
        finally:
            os.close(fd)

    async def kill(self) -> None:
        """See Machine."""
        self._tear_down(Ending(clean=False, reason="the machine was killed on request"))
        await self.wait()

    async def wait(self) -> Ending:
        """See Machine."""
        return await asyncio.shield(self._ended)

    def _check(self) -> None:
        if self._ended.done():
            raise MachineFailed(f"the machine has ended: {self._ended.result().reason}", hint="start it again")

    # -- the end

    def _tear_down(self, ending: Ending) -> None:
        """Go away, which takes a while, and is an operation of its own unless one is going on."""
        if self._ended.done() or self._ending is not None:
            return
        if not self._operation.going_on:
            with contextlib.suppress(OSError):  # a host that is full: it goes away all the same
                self._operation = self._host.begin(self._system.entropy.token_bytes(8).hex(), TEARDOWN)
        self.guest.pause()

        async def go() -> None:
            await asyncio.sleep(ENDING)
            self.vanish(ending)

        self._ending = asyncio.create_task(go(), name=f"ending of {self._spec.vm_id}")

    def vanish(self, ending: Ending) -> None:
        """Be gone at once, as a process that is killed: what its disk has not been told is lost."""
        if self._ended.done():
            return
        self._ended.set_result(ending)
        self.guest.hang_up()
        if self._console_out is not None:
            self._console_out.close()
        self._disk.close()
        os.close(self._lock)
        self._operation.end()  # last: a host may not let us change a file any more
