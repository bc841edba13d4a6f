"""What the tests of the QEMU driver share: a directory with all that a machine needs, and ways to speak with its guest."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator, Callable, Coroutine
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import tiny_guest

from capsem.hypervisor.driver import Accelerator, Layer, MachineSpec
from capsem.hypervisor.qemu.driver import QemuDriver
from capsem.hypervisor.qemu.machine import QemuMachine
from capsem.hypervisor.qemu.qcow2 import create_layer
from capsem.store.locks import Lock, try_lock

RAM_MB = 64
ID = "0123456789abcdef0123456789abcdef"
PATIENCE = 30.0  # seconds for what takes a tenth of one; a hung test is worse than a slow one


@dataclass(frozen=True)
class Bench:
    """A directory with all that a machine needs."""

    root: Path

    @property
    def lock(self) -> Path:
        return self.root / "vmm.lock"

    @property
    def driver(self) -> QemuDriver:
        return QemuDriver(self.root / "cache")

    def layer(self, name: str) -> Layer:
        path = self.root / name
        if not path.exists():
            create_layer(path, size_mb=16, vm_id="box", layer_id=ID)
        return Layer(path, "qcow2")

    def spec(self, **changes: Any) -> MachineSpec:
        spec = MachineSpec(
            vm_id="box",
            cpus=1,
            ram_mb=RAM_MB,
            accelerator=Accelerator.TCG,
            kernel=self.root / "tiny-guest",
            initrd=self.root / "initrd",
            root=self.root / "root.img",
            volume=(Layer(self.root / "base.img", "raw"), self.layer("top.qcow2")),
            ram_file=self.root / "ram",
        )
        return replace(spec, **changes)

    def take_lock(self) -> Lock:
        lock = try_lock(self.lock)
        assert lock is not None
        return lock


@pytest.fixture(name="bench")
def bench_fixture(tmp_path: Path) -> Bench:
    tiny_guest.write(tmp_path)
    (tmp_path / "initrd").write_bytes(b"\0" * 512)
    for name, size in (("root.img", 4096), ("base.img", 16 << 20), ("ram", RAM_MB << 20)):
        with (tmp_path / name).open("wb") as file:
            file.truncate(size)
    return Bench(tmp_path)


@contextlib.asynccontextmanager
async def machine(
    bench: Bench, spec: MachineSpec | None = None, *, lock: int | None = None
) -> AsyncIterator[QemuMachine]:
    """A started machine, vCPUs stopped; killed at the end."""
    with contextlib.ExitStack() as stack:
        if lock is None:
            lock = os.open(os.devnull, os.O_RDONLY)
            stack.callback(os.close, lock)
        running = await bench.driver.start(spec or bench.spec(), vmm_lock=lock)
        stack.enter_context(running.control)
        stack.enter_context(running.console)
        try:
            yield running
        finally:
            await running.kill()


def vm_test(test: Callable[[Bench], Coroutine[Any, Any, None]]) -> Callable[[Bench], None]:
    """Run a coroutine as a test, with a limit."""

    def run(bench: Bench) -> None:
        async def limited() -> None:
            async with asyncio.timeout(PATIENCE):
                await test(bench)

        asyncio.run(limited())

    run.__name__ = test.__name__
    return run


async def hear(running: QemuMachine) -> bytes:
    return await asyncio.get_running_loop().sock_recv(running.console, 1)


async def tell(running: QemuMachine, data: bytes) -> None:
    await asyncio.get_running_loop().sock_sendall(running.console, data)


async def ask(running: QemuMachine) -> bytes:
    """One byte to the guest's counter, and its answer."""
    await tell(running, b"a")
    return await hear(running)


async def is_silent(running: QemuMachine) -> bool:
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(0.3):
            await hear(running)
            return False
    return True


def alive(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()


def status_of(pid: int) -> dict[str, str]:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}


def our_children() -> set[int]:
    return {int(pid) for pid in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()}


async def open_files(running: QemuMachine) -> dict[str, bool]:
    """Block nodes over files: name -> writable."""
    answer = await running._monitor.execute("query-named-block-nodes", flat=True)
    assert isinstance(answer, list)
    return {Path(node["file"]).name: not node["ro"] for node in answer if node["drv"] == "file"}
