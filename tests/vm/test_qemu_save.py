"""A machine can be saved while it runs, and any number of machines started from that."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import itertools
import os
import signal
from pathlib import Path

import pytest
from qemu_bench import ID, RAM_MB, Bench, ask, bench_fixture, hear, machine, tell, vm_test  # noqa: F401

from capsem.hypervisor.driver import Saved, SaveFiles
from capsem.hypervisor.qemu import qmp
from capsem.hypervisor.qemu.machine import QemuMachine
from capsem.hypervisor.qemu.memory import GuestMemory
from capsem.model.errors import MachineFailed
from capsem.store.ram import PAGE, RamFile, RamIdentity, RamWriter, verify

pytestmark = pytest.mark.vm
SIZE = RAM_MB << 20


class Save:
    """One save's files."""

    def __init__(self, root: Path) -> None:
        root.mkdir()
        self.ram, self.sums, self.devices = root / "ram", root / "sums", root / "devices"
        self.writer = RamWriter(self.ram, self.sums, SIZE)
        self.digest = ""

    async def make(
        self, running: QemuMachine, bench: Bench, layer: str, *, go_on: bool, compare: bool = False
    ) -> Saved:
        saved = await running.save(SaveFiles(self.devices, self.writer, compare), bench.layer(layer), go_on=go_on)
        self.digest = self.writer.finish(RamIdentity("box", ID, SIZE))
        self.writer.close()
        return saved


async def other_ram_blocks(running: QemuMachine) -> dict[str, str]:
    """RAM that a checkpoint does not hold, because the same command line makes it anew, with sizes."""
    text = await running._monitor.execute("human-monitor-command", command_line="info ramblock")
    lines = [line.split() for line in str(text).splitlines()[1:] if " ram0" not in f" {line}"]
    return {words[0]: words[-1] for words in lines}


async def pmemsave(running: QemuMachine, path: Path) -> bytes:
    await running._monitor.execute("pmemsave", val=0, size=SIZE, filename=str(path))
    return path.read_bytes()


def test_memory_is_saved_byte_for_byte_and_forks_go_on_from_there(bench: Bench) -> None:
    @vm_test
    async def run(bench: Bench) -> None:
        save = Save(bench.root / "first")
        async with machine(bench) as running:
            await running.run()
            assert await hear(running) == b"R"
            assert [await ask(running) for _ in range(4)] == [b"1", b"2", b"3", b"4"]
            saved = await save.make(running, bench, "second.qcow2", go_on=False)
            assert running.top_layer == bench.layer("second.qcow2")
            assert saved.written
            blocks = await other_ram_blocks(running)
            # QEMU's own dump of the paused machine, hole for hole and byte for byte.
            assert save.ram.read_bytes()[:SIZE] == await pmemsave(running, bench.root / "dump")
        verify(save.ram, save.sums, SIZE, save.digest)
        assert save.ram.stat().st_mode & 0o777 == 0o600
        before = hashlib.sha256(save.ram.read_bytes()).digest()
        for fork in range(2):
            spec = bench.spec(ram_file=save.ram, volume=(*bench.spec().volume, bench.layer(f"fork{fork}.qcow2")))
            with open(os.devnull) as null:
                forked = await bench.driver.restore(spec, save.devices, vmm_lock=null.fileno())
            with forked.control, forked.console:
                try:
                    assert GuestMemory(forked.pid, save.ram, SIZE).changed() is not None
                    assert await other_ram_blocks(forked) == blocks
                    await forked.run()
                    assert await ask(forked) == b"5"
                    await tell(forked, b"q")
                    assert (await forked.wait()).clean
                finally:
                    await forked.kill()
        assert hashlib.sha256(save.ram.read_bytes()).digest() == before

    run(bench)


def test_a_live_save_lets_the_machine_go_on_and_the_next_writes_only_what_changed(bench: Bench) -> None:
    @vm_test
    async def run(bench: Bench) -> None:
        first, second = Save(bench.root / "first"), Save(bench.root / "second")
        async with machine(bench) as running:
            await running.run()
            assert await hear(running) == b"R"
            assert await ask(running) == b"1"
            whole = await first.make(running, bench, "second.qcow2", go_on=True)
            assert await ask(running) == b"2"
            assert second.writer.copy(RamFile(first.ram, first.sums))
            less = await second.make(running, bench, "third.qcow2", go_on=True, compare=True)
            assert await ask(running) == b"3"
            assert 0 < sum(length for _, length in less.runs) < sum(length for _, length in whole.runs)
            changed = GuestMemory(running.pid, bench.root / "ram", SIZE).changed()
            assert all(offset % PAGE == 0 and length % PAGE == 0 for offset, length in changed)
            await running.pause()
            assert await pmemsave(running, bench.root / "dump")
        verify(second.ram, second.sums, SIZE, second.digest)
        spec = bench.spec(ram_file=second.ram, volume=(*bench.spec().volume, bench.layer("fork.qcow2")))
        with open(os.devnull) as null:
            forked = await bench.driver.restore(spec, second.devices, vmm_lock=null.fileno())
        with forked.control, forked.console:
            try:
                await forked.run()
                assert await ask(forked) == b"3"
            finally:
                await forked.kill()

    run(bench)


def test_a_state_that_is_none_is_refused(bench: Bench) -> None:
    from capsem.model.errors import MachineFailed

    @vm_test
    async def run(bench: Bench) -> None:
        (bench.root / "devices").write_bytes(b"no device state" * 100)
        with open(os.devnull) as null, pytest.raises(MachineFailed, match="device state"):
            await bench.driver.restore(bench.spec(), bench.root / "devices", vmm_lock=null.fileno())
        assert not asyncio.all_tasks() - {asyncio.current_task()}

    run(bench)


@pytest.mark.parametrize("go_on", [True, False])
def test_a_qemu_that_hangs_during_a_save_is_killed(bench: Bench, monkeypatch: pytest.MonkeyPatch, go_on: bool) -> None:
    """It would keep whoever saves it for as long as it hangs, and everybody else from the VM."""

    @vm_test
    async def run(bench: Bench) -> None:
        save = Save(bench.root / "save")
        async with machine(bench) as running:
            await running.run()
            assert await hear(running) == b"R"
            os.kill(running.pid, signal.SIGSTOP)
            monkeypatch.setattr(qmp, "COMMAND_LIMIT", 0.5)
            with pytest.raises(MachineFailed, match="did not answer"):
                await save.make(running, bench, "second.qcow2", go_on=go_on)
            ending = await running.wait()
            assert not ending.clean
            assert ending.reason == "QEMU did not answer 'blockdev-add' within 0.5 s, and was killed"
        save.writer.close()

    run(bench)


@pytest.mark.parametrize("go_on", [True, False])
def test_a_qemu_that_is_killed_during_a_save_is_not_saved(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, go_on: bool
) -> None:
    """Once that its memory was looked at, and so that all of it seems to be there: the kernel may have taken some back."""
    calls, found = itertools.count(1), GuestMemory.changed
    at = 2 if go_on else 1  # first to know how much room it takes, while it runs

    def changed_and_killed(memory: GuestMemory) -> list[tuple[int, int]]:
        if next(calls) < at:
            return found(memory)
        os.kill(memory._pid, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):  # the loop has reaped it
            os.waitid(os.P_PID, memory._pid, os.WEXITED | os.WNOWAIT)
        return []

    @vm_test
    async def run(bench: Bench) -> None:
        save = Save(bench.root / "save")
        async with machine(bench) as running:
            await running.run()
            assert await hear(running) == b"R"
            monkeypatch.setattr(GuestMemory, "changed", changed_and_killed)
            with pytest.raises(MachineFailed, match="the machine has ended"):
                await save.make(running, bench, "second.qcow2", go_on=go_on)
            assert not (await running.wait()).clean
        save.writer.close()

    run(bench)
