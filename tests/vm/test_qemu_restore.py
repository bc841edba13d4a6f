"""The virtual hardware can be saved and restored (design.md, "Proven"). The product does so from a later issue on."""

from __future__ import annotations

import asyncio
import hashlib
import os
import socket
from array import array
from pathlib import Path
from typing import Any

import pytest
from qemu_bench import RAM_MB, Bench, ask, bench_fixture, hear, machine, tell, vm_test  # noqa: F401

from capsem.hypervisor.qemu import command, driver
from capsem.hypervisor.qemu.machine import QemuMachine

pytestmark = pytest.mark.vm


async def hand_over(running: QemuMachine, fd: int) -> None:
    """Send a descriptor ahead of the command that takes it."""
    writer = running._monitor._client._writer
    assert writer is not None
    with socket.socket(fileno=os.dup(writer.get_extra_info("socket").fileno())) as sock:
        sock.sendmsg([b" "], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array("i", [fd]))])


async def save(running: QemuMachine, state: Path, ram: Path) -> None:
    fd = os.open(state, os.O_WRONLY | os.O_CREAT, 0o600)
    await hand_over(running, fd)
    await running._monitor.execute("add-fd", fdset_id=1)
    await running._monitor.execute("xen-save-devices-state", filename="/dev/fdset/1", live=True)
    os.close(fd)
    maps = Path(f"/proc/{running.pid}/maps").read_text().splitlines()
    spans = [[int(x, 16) for x in line.split()[0].split("-")] for line in maps if line.endswith("/ram")]
    (start,) = [start for start, end in spans if end - start == RAM_MB << 20]
    with Path(f"/proc/{running.pid}/mem").open("rb", buffering=0) as memory, ram.open("wb") as file:
        memory.seek(start)
        file.write(memory.read(RAM_MB << 20))


async def restore(running: QemuMachine, state: Path) -> None:
    fd = os.open(state, os.O_RDONLY)
    await hand_over(running, fd)
    os.close(fd)
    await running._monitor.execute("getfd", fdname="state")
    await running._monitor.execute("migrate-incoming", uri="fd:state")
    status = None
    while status != "completed":
        answer = await running._monitor.execute("query-migrate")
        assert isinstance(answer, dict)
        status = answer.get("status")
        assert status != "failed", running._process.stderr()
        await asyncio.sleep(0.005)


async def other_ram_blocks(running: QemuMachine) -> dict[str, str]:
    """RAM that a checkpoint does not hold, because the same command line makes it anew: its sizes and digests."""
    text = await running._monitor.execute("human-monitor-command", command_line="info ramblock")
    return {line.split()[0]: line for line in str(text).splitlines()[1:] if " ram0" not in f" {line}"}


def test_the_hardware_can_be_saved_and_restored(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    @vm_test
    async def run(bench: Bench) -> None:
        state, ram = bench.root / "state", bench.root / "saved" / "ram"
        ram.parent.mkdir()
        async with machine(bench) as running:
            await running.run()
            assert await hear(running) == b"R"
            assert [await ask(running) for _ in range(4)] == [b"1", b"2", b"3", b"4"]
            await running.pause()
            await save(running, state, ram)
            blocks = set(await other_ram_blocks(running))
        digest = hashlib.sha256(ram.read_bytes()).digest()
        monkeypatch.setattr(driver, "argv", incoming_argv)
        for fork in range(2):
            spec = bench.spec(ram_file=ram, volume=(*bench.spec().volume, bench.layer(f"fork{fork}.qcow2")))
            async with machine(bench, spec) as running:
                await restore(running, state)
                assert set(await other_ram_blocks(running)) == blocks
                await running.run()
                assert await ask(running) == b"5"
                await tell(running, b"q")
                assert (await running.wait()).clean
        assert hashlib.sha256(ram.read_bytes()).digest() == digest

    run(bench)


def incoming_argv(*args: Any, **kwargs: Any) -> list[str]:
    return command.argv(*args, **kwargs, incoming=True)
