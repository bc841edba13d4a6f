"""The QEMU driver on real machines. The guest is a hundred bytes (tiny_guest.py), so each starts in a tenth of a second."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from array import array
from collections.abc import AsyncIterator, Callable, Coroutine
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import tiny_guest

from capsem.hypervisor.driver import Accelerator, Layer, MachineSpec
from capsem.hypervisor.qemu import command, driver, probe, probe_guest
from capsem.hypervisor.qemu.driver import QemuDriver
from capsem.hypervisor.qemu.machine import QemuMachine
from capsem.hypervisor.qemu.process import find_qemu
from capsem.hypervisor.qemu.qcow2 import Identity, create_layer, read_identity
from capsem.model.errors import HostNotReady, MachineFailed
from capsem.store.locks import Lock, is_locked, try_lock

pytestmark = pytest.mark.vm

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


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
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
from test_qemu_driver import Bench
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


def our_children() -> set[int]:
    return {int(pid) for pid in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()}


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


# -- the volume


def qemu_img(*args: str | Path) -> str:
    done = subprocess.run(["qemu-img", *map(str, args)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def qemu_io(path: Path, *commands: str) -> None:
    options = [word for command in commands for word in ("-c", command)]
    done = subprocess.run(["qemu-io", "-f", "qcow2", *options, str(path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("size_mb", [1, 512, 16 * 1024, 1024 * 1024, 5 * 1024 * 1024])
def test_qemu_takes_our_layers_for_its_own(tmp_path: Path, size_mb: int) -> None:
    path = tmp_path / "layer"
    create_layer(path, size_mb=size_mb, vm_id="box", layer_id=ID)
    assert "No errors" in qemu_img("check", path)
    info = json.loads(qemu_img("info", "--output=json", path))
    assert info["format"] == "qcow2"
    assert info["virtual-size"] == size_mb << 20
    assert info["cluster-size"] == 65536
    assert "backing-filename" not in info
    assert info["format-specific"]["data"]["corrupt"] is False


def test_the_identity_survives_whatever_qemu_does_to_a_layer(tmp_path: Path) -> None:
    path = tmp_path / "layer"
    create_layer(path, size_mb=1024, vm_id="box", layer_id=ID)
    qemu_io(path, "write -P 7 0 1M", "write -P 8 700M 3M", "discard 0 64k", "flush")
    qemu_img("snapshot", "-c", "x", path)
    qemu_img("snapshot", "-d", "x", path)
    qemu_img("amend", "-o", "lazy_refcounts=on", path)
    qemu_img("resize", path, "3G")
    qemu_img("rebase", "-u", "-f", "qcow2", "-F", "raw", "-b", "/some/where", path)
    qemu_img("rebase", "-u", "-f", "qcow2", "-b", "", path)
    qemu_img("check", path)
    assert read_identity(path) == Identity("box", ID)


@vm_test
async def test_backing_names_in_headers_are_never_followed(bench: Bench) -> None:
    """A layer whose header names a secret as its backing file: opened over what we say, or over nothing."""
    secret, layer = bench.root / "secret", bench.root / "evil.qcow2"
    secret.write_bytes(b"s" * 65536)
    qemu_img("create", "-q", "-f", "qcow2", "-b", secret, "-F", "raw", layer, "16M")
    for chain in ((Layer(layer, "qcow2"),), (Layer(bench.root / "base.img", "raw"), Layer(layer, "qcow2"))):
        async with machine(bench, bench.spec(volume=chain)) as running:
            links = {str(Path(each.path).readlink()) for each in os.scandir(f"/proc/{running.pid}/fd")}
            assert str(layer) in links
            assert str(secret) not in links


@vm_test
async def test_a_volume_serves_one_machine_at_a_time(bench: Bench) -> None:
    async with machine(bench):
        with pytest.raises(MachineFailed, match="lock") as caught:
            await bench.driver.start(bench.spec(), vmm_lock=0)
        assert "another process uses" in str(caught.value.hint)


async def open_files(running: QemuMachine) -> dict[str, bool]:
    """Block nodes over files: name -> writable."""
    answer = await running._monitor.execute("query-named-block-nodes", flat=True)
    assert isinstance(answer, list)
    return {Path(node["file"]).name: not node["ro"] for node in answer if node["drv"] == "file"}


@vm_test
async def test_layers_are_added_while_the_guest_runs(bench: Bench) -> None:
    spec = bench.spec()
    async with machine(bench, spec) as running:
        assert running.top_layer == spec.volume[-1]
        await running.run()
        assert await hear(running) == b"R"
        for count, name in enumerate(("second.qcow2", "third.qcow2"), start=1):
            await running.add_layer(bench.layer(name))
            assert running.top_layer == bench.layer(name)
            assert await ask(running) == str(count).encode()
        files = await open_files(running)
        assert {name for name, writable in files.items() if writable} == {"third.qcow2"}
        assert {"base.img", "top.qcow2", "second.qcow2"} <= files.keys()
        fork = (*spec.volume, bench.layer("second.qcow2"), bench.layer("fork.qcow2"))
        async with machine(bench, bench.spec(volume=fork)):  # what was frozen can be shared at once
            pass
    chain = (*spec.volume, bench.layer("second.qcow2"), bench.layer("third.qcow2"))
    async with machine(bench, bench.spec(volume=chain)):
        pass


@vm_test
async def test_a_layer_that_cannot_be_added_changes_nothing(bench: Bench) -> None:
    spec = bench.spec()
    (bench.root / "broken.qcow2").write_bytes(b"no image")
    async with machine(bench, spec) as running:
        before = await open_files(running)
        for name in ("nowhere.qcow2", "broken.qcow2"):
            with pytest.raises(MachineFailed):
                await running.add_layer(Layer(bench.root / name, "qcow2"))
        assert running.top_layer == spec.volume[-1]
        assert await open_files(running) == before
        await running.add_layer(bench.layer("good.qcow2"))
        assert running.top_layer == bench.layer("good.qcow2")


@vm_test
async def test_the_bulk_slot_can_be_filled_and_emptied(bench: Bench) -> None:
    (bench.root / "bulk").write_bytes(b"b" * 65536)
    async with machine(bench) as running:
        monitor = running._monitor
        await monitor.blockdev_add(
            {"driver": "file", "node-name": "bulk-1", "filename": str(bench.root / "bulk"), "read-only": True}
        )
        for node in ("bulk-1", "bulk"):
            await monitor.execute("qom-set", path="/machine/peripheral/bulk-disk", property="drive", value=node)
        await monitor.blockdev_del("bulk-1")


# -- the hardware can be saved and restored (design.md, "Proven"); the product does so from a later issue on


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


# -- the acceleration probe


def test_the_probes_guest_passes_under_emulation() -> None:
    before = our_children()
    trial = asyncio.run(probe.run_guest(find_qemu(), Accelerator.TCG))
    assert trial.passed, trial
    assert trial.stage == "leaving"
    assert our_children() == before


def test_a_guest_that_hangs_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe_guest, "rom", lambda: b"\xeb\xfe" * 0x8000)  # jmp to itself, wherever one enters
    before = our_children()
    trial = asyncio.run(probe.run_guest(find_qemu(), Accelerator.TCG))
    assert trial.timed_out
    assert trial.stage == "at its first instruction"
    assert our_children() == before


def test_the_probe_of_this_host(tmp_path: Path) -> None:
    """Whatever the verdict here: it has a reason, comes quickly, and from the cache at once."""
    before = our_children()

    async def twice() -> None:
        made = QemuDriver(tmp_path / "cache")
        first = await made.verdict()
        assert first.reason
        assert re.fullmatch(r"\d+\.\d+\.\d+", first.qemu_version)
        began = time.monotonic()
        assert await QemuDriver(tmp_path / "cache").verdict() == first
        assert time.monotonic() - began < 0.5
        assert await made.accelerator() is first.accelerator

    asyncio.run(twice())
    assert our_children() == before
    assert oct((tmp_path / "cache" / "accelerator.json").stat().st_mode)[-3:] == "600"
