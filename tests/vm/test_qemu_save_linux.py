"""The memory of a real guest in the middle of its work, saved, against QEMU's own dump of it."""

from __future__ import annotations

import asyncio
import hashlib
import os
from pathlib import Path

import pytest
from qemu_bench import ID, Bench, bench_fixture, machine  # noqa: F401

from capsem.hypervisor.driver import Layer, SaveFiles
from capsem.hypervisor.qemu.qcow2 import create_layer
from capsem.image.catalog import Catalog
from capsem.store.ram import RamFile, RamIdentity, RamWriter, verify

pytestmark = pytest.mark.vm
RAM_MB = 512
SIZE = RAM_MB << 20
BOOT_LIMIT = 90.0  # seconds; emulated and busy


def digest(path: Path) -> str:
    """Of the RAM in a file."""
    result, left = hashlib.sha256(), SIZE
    with path.open("rb", buffering=0) as file:
        while left:
            data = file.read(min(1 << 20, left))
            result.update(data)
            left -= len(data)
    return result.hexdigest()


def test_every_byte_of_a_linux_guest_is_saved(bench: Bench) -> None:
    async def run() -> None:
        image = Catalog.from_environment(os.environ).find()
        layers = [Layer(bench.root / f"{name}.qcow2", "qcow2") for name in ("one", "two", "three")]
        for layer in layers[:1]:
            create_layer(layer.path, size_mb=image.volume_mb, vm_id="box", layer_id=ID)
        for layer in layers[1:]:
            create_layer(layer.path, size_mb=image.volume_mb, vm_id="box", layer_id=ID[::-1])
        os.truncate(bench.root / "ram", SIZE)
        spec = bench.spec(
            kernel=image.kernel,
            initrd=image.initrd,
            root=image.root,
            volume=(Layer(image.volume, "raw"), layers[0]),
            ram_mb=RAM_MB,
            command_line=image.kernel_command_line,
        )
        loop = asyncio.get_running_loop()
        async with machine(bench, spec) as running:
            await running.run()

            async def drain() -> None:
                while await loop.sock_recv(running.console, 65536):
                    pass

            draining = asyncio.create_task(drain())
            async with asyncio.timeout(BOOT_LIMIT):
                assert await loop.sock_recv(running.control, 1)  # its agent is up, and knocks
            base = None
            for number, go_on in ((1, True), (2, False)):
                ram, sums = bench.root / f"ram-{number}", bench.root / f"sums-{number}"
                writer = RamWriter(ram, sums, SIZE)
                if base is not None:
                    assert writer.copy(base)
                    base.close()
                files = SaveFiles(bench.root / f"devices-{number}", writer, compare=base is not None)
                saved = await running.save(files, layers[number], go_on=go_on)
                table = writer.finish(RamIdentity("box", ID, SIZE))
                writer.close()
                verify(ram, sums, SIZE, table)
                assert saved.written
                base = RamFile(ram, sums)
            assert base is not None
            base.close()
            dump = bench.root / "dump"
            await running._monitor.execute("pmemsave", val=0, size=SIZE, filename=str(dump))
            assert dump.stat().st_size == SIZE
            assert digest(bench.root / "ram-2") == digest(dump)
            draining.cancel()

    asyncio.run(run())
