"""The QEMU driver on real machines. The guest is a hundred bytes (tiny_guest.py), so each starts in a tenth of a second."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from qemu_bench import (
    PATIENCE,
    Bench,
    alive,
    ask,
    bench_fixture,  # noqa: F401
    hear,
    is_silent,
    machine,
    our_children,
    status_of,
    tell,
    vm_test,
)

from capsem.hypervisor.driver import Layer, MachineSpec
from capsem.hypervisor.qemu import driver
from capsem.model.errors import HostNotReady, MachineFailed
from capsem.store.locks import is_locked

pytestmark = pytest.mark.vm


# -- the life of a machine


@vm_test
async def test_starts_stopped_runs_pauses_and_powers_off(bench: Bench) -> None:
    async with machine(bench) as running:
        assert await running._monitor.status() == "prelaunch"
        assert await is_silent(running)
        await running.run()
        assert await hear(running) == b"R"
        assert await ask(running) == b"1"
        await running.pause()
        await tell(running, b"a")
        assert await is_silent(running)
        await running.run()
        assert await hear(running) == b"2"
        await tell(running, b"q")
        ending = await running.wait()
        assert ending.clean
        assert ending == await running.wait()
        await running.kill()
        assert ending == await running.wait()
        assert not alive(running.pid)
        with pytest.raises(MachineFailed, match="has ended: the guest powered off"):
            await running.pause()


@pytest.mark.parametrize(("word", "reason"), [(b"x", "reset itself"), (b"p", "panicked")])
def test_other_ends_are_not_clean(bench: Bench, word: bytes, reason: str) -> None:
    @vm_test
    async def run(bench: Bench) -> None:
        async with machine(bench) as running:
            await running.run()
            assert await hear(running) == b"R"
            await tell(running, word)
            ending = await running.wait()
            assert not ending.clean
            assert reason in ending.reason

    run(bench)


@vm_test
async def test_kill_at_any_time_any_number_of_times(bench: Bench) -> None:
    async with machine(bench) as running:
        waiting = asyncio.create_task(running.wait())
        await asyncio.gather(running.kill(), running.kill())
        await running.kill()
        assert not (await waiting).clean
        assert await waiting == await running.wait()
        assert not alive(running.pid)


@vm_test
async def test_a_crash_of_qemu_is_told(bench: Bench) -> None:
    async with machine(bench) as running:
        await running.run()
        os.kill(running.pid, signal.SIGSEGV)
        ending = await running.wait()
        assert not ending.clean
        assert "signal 11" in ending.reason


@vm_test
async def test_quit_and_sigterm(bench: Bench) -> None:
    async with machine(bench) as running:
        await running._monitor.quit()
        assert (await running.wait()).clean
    async with machine(bench) as running:
        os.kill(running.pid, signal.SIGTERM)
        ending = await running.wait()
        assert not ending.clean
        assert "from outside" in ending.reason


# -- nothing is left behind


@vm_test
async def test_the_vmm_lock_lives_as_long_as_the_vmm(bench: Bench) -> None:
    lock = bench.take_lock()
    async with machine(bench, lock=lock.fd) as running:
        lock.release()
        assert is_locked(bench.lock)
        await running.kill()
        assert not is_locked(bench.lock)


CHILD = """
import asyncio, os, sys
sys.path.insert(0, {tests!r})
from pathlib import Path
from qemu_bench import Bench
async def main():
    bench = Bench(Path({root!r}))
    lock = bench.take_lock()
    machine = await bench.driver.start(bench.spec(), vmm_lock=lock.fd)
    await machine.run()
    print(machine.pid, flush=True)
    await asyncio.sleep(60)
asyncio.run(main())
"""


def test_qemu_dies_with_its_parent(bench: Bench) -> None:
    code = CHILD.format(tests=str(Path(__file__).parent), root=str(bench.root))
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        pidfd = os.pidfd_open(pid)
        assert is_locked(bench.lock)
        parent.kill()
        deadline = time.monotonic() + PATIENCE
        while is_locked(bench.lock) and time.monotonic() < deadline:
            time.sleep(0.01)
        # Reaped by init, or still a zombie where the container's init does not reap: dead in any case.
        with contextlib.suppress(ProcessLookupError, FileNotFoundError):
            assert status_of(pid)["State"].startswith(("Z", "X"))
        os.close(pidfd)
    assert not is_locked(bench.lock)


@pytest.mark.parametrize("delay", [0.0, 0.001, 0.02, 0.05, 0.1])
def test_a_cancelled_start_leaves_no_process(bench: Bench, delay: float) -> None:
    before = our_children()

    async def main() -> None:
        task = asyncio.create_task(bench.driver.start(bench.spec(), vmm_lock=0))
        await asyncio.sleep(delay)
        task.cancel()
        try:
            started = await task
        except asyncio.CancelledError:
            return
        for each in (started.control, started.console):  # it was quicker than we were
            each.close()
        await started.kill()

    asyncio.run(main())
    assert our_children() == before


def refusal(bench: Bench, spec: MachineSpec) -> MachineFailed:
    before = our_children()
    with pytest.raises(MachineFailed) as caught:
        asyncio.run(bench.driver.start(spec, vmm_lock=0))
    assert our_children() == before
    assert caught.value.hint
    return caught.value


def test_a_missing_layer_is_named(bench: Bench) -> None:
    error = refusal(bench, bench.spec(volume=(Layer(bench.root / "nowhere", "qcow2"),)))
    assert "nowhere" in error.message
    assert "-blockdev" not in error.message


def test_a_qemu_that_is_too_old_is_named(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    old = bench.root / "old-qemu"
    old.write_text('#!/bin/sh\n[ "$1" = --version ] && echo QEMU emulator version 6.2.0 && exit\necho no >&2\nexit 1\n')
    old.chmod(0o755)
    monkeypatch.setenv("CAPSEM_QEMU", str(old))
    with pytest.raises(HostNotReady, match="is too old"):
        asyncio.run(bench.driver.start(bench.spec(), vmm_lock=0))


def test_a_qemu_that_does_not_speak_is_ended(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    mute = bench.root / "mute-qemu"
    mute.write_text("#!/bin/sh\nexec sleep 60\n")
    mute.chmod(0o755)
    monkeypatch.setenv("CAPSEM_QEMU", str(mute))
    monkeypatch.setattr(driver, "START_LIMIT", 0.2)
    monkeypatch.setattr(driver, "EXIT_LIMIT", 0.2)
    assert "did not answer" in refusal(bench, bench.spec()).message


# -- confinement


@vm_test
async def test_confinement(bench: Bench) -> None:
    async with machine(bench) as running:
        status = status_of(running.pid)
        assert status["Seccomp"] == "2"
        assert status["Umask"] == "0077"
        environment = Path(f"/proc/{running.pid}/environ").read_bytes()
        assert {entry.partition(b"=")[0] for entry in environment.split(b"\0") if entry} == {b"PATH", b"LC_ALL"}
        assert os.getsid(running.pid) == running.pid
        names = [str(Path(each.path).readlink()) for each in os.scandir(f"/proc/{running.pid}/fd")]
        sockets = {name for name in names if name.startswith("socket:")}
        assert len(sockets) == 3
        inodes = {name[8:-1] for name in sockets}
        listed = [line.split() for line in Path("/proc/net/unix").read_text().splitlines()[1:]]
        assert all(len(fields) == 7 for fields in listed if fields[6] in inodes)  # an eighth field would be a path


# -- memory


@vm_test
async def test_one_ram_file_serves_many_machines_and_is_never_written(bench: Bench) -> None:
    ram = bench.root / "ram"
    ram.chmod(0o600)
    before = ram.stat()
    one, two = (bench.spec(volume=(bench.layer(f"{n}.qcow2"),)) for n in range(2))
    async with machine(bench, one) as first, machine(bench, two) as second:
        for running in (first, second):
            await running.run()
            assert await hear(running) == b"R"
        assert [await ask(first) for _ in range(3)] == [b"1", b"2", b"3"]
        assert await ask(second) == b"1"
    after = ram.stat()
    assert (after.st_blocks, after.st_mtime_ns, after.st_size) == (before.st_blocks, before.st_mtime_ns, before.st_size)
    assert after.st_blocks == 0
