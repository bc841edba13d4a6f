"""A driver whose machines are the real guest agent as a plain process: no sandbox, for tests of what is above a driver.

`InProcess` starts supervisors as tasks of the test's own event loop instead of processes, so that a whole service, its
supervisors and its guests run in milliseconds.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from agent_host import SOURCE, START
from capsem.api.internal import BOUND, Bootstrap, Stop
from capsem.hypervisor.driver import Accelerator, Ending, Features, Layer, MachineSpec, Merged, Saved, SaveFiles
from capsem.model.errors import CapsemError, MachineFailed
from capsem.store.layout import Layout, SessionDir
from capsem.supervisor.owned import Names
from capsem.supervisor.supervisor import Supervisor
from capsem.system import System
from capsem.system.real import RealProcesses, real_system
from capsem.wire.schema import decode_message


class ProcessMachine:
    """One agent process; `run` starts it."""

    def __init__(self, directory: Path, vmm_lock: int) -> None:
        self._lock = os.dup(vmm_lock)
        self.control, self._agent_end = socket.socketpair()
        self.console, self._console_end = socket.socketpair()
        self._directory = directory
        self._process: asyncio.subprocess.Process | None = None
        self._killed = False
        self._started = asyncio.Event()
        self.top_layer: Layer | None = None
        self.full = asyncio.Event()  # set by tests: the "disk"

    @property
    def pid(self) -> int:
        return self._process.pid if self._process else 0

    async def run(self) -> None:
        if self._process is not None:
            self._process.send_signal(signal.SIGCONT)
            return
        workspace = self._directory / "root"
        workspace.mkdir(exist_ok=True)
        fd = self._agent_end.fileno()
        # The lock lives as long as the agent: not as what that starts.
        code = f"import os, sys; os.set_inheritable({self._lock}, False); sys.path.insert(0, {str(SOURCE)!r}); " + START
        options = [
            "--fd",
            str(fd),
            "--workspace",
            str(workspace),
            "--memory",
            str(self._directory / "memory"),
            "--bystander",
        ]
        self._process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-I",
            "-S",
            "-c",
            code,
            *options,
            pass_fds=[fd, self._lock],
            stderr=self._console_end,
            env={"PATH": os.environ["PATH"]},
        )
        self._console_end.send(b"capsem: starting\n")
        self._let_go()

    def _let_go(self) -> None:
        """Of what is the agent's, or nobody's."""
        os.close(self._lock)
        self._agent_end.close()
        self._console_end.close()
        self._started.set()

    async def pause(self) -> None:
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)

    async def out_of_space(self) -> None:
        await self.full.wait()
        await self.pause()

    async def retry(self) -> None:
        self.full.clear()
        await self.run()

    async def add_layer(self, layer: Layer) -> None:
        """The "disk" of the frozen layer is what it is now; the agent goes on in the directory that it has."""
        shutil.copytree(self._directory / "root", layer.path.with_suffix(".frozen"))
        self.top_layer = layer

    version = "process 1"

    async def save(self, files: SaveFiles, layer: Layer, *, go_on: bool, **_: object) -> Saved:
        raise MachineFailed("a process cannot be saved")

    async def kill(self) -> None:
        self._killed = True
        if self._process is None:
            if not self._started.is_set():
                self._let_go()
        elif self._process.returncode is None:
            self._process.kill()
        await self.wait()

    async def wait(self) -> Ending:
        await self._started.wait()
        code = await self._process.wait() if self._process else 0
        if self._killed:
            return Ending(clean=False, reason="killed")
        return Ending(clean=code == 100, reason="guest powered off" if code == 100 else f"agent ended with {code}")


class FlatVolume:
    """A volume as a guest's would be, with the "disk" of a machine as its workspace."""

    def __init__(self, root: Path) -> None:
        with tempfile.TemporaryDirectory() as text:
            image, tree = Path(text) / "volume", Path(text) / "tree"
            shutil.copytree(root, tree / "workspace", symlinks=True)
            subprocess.run(["/usr/sbin/mke2fs", "-q", "-t", "ext4", "-d", tree, image, "64M"], check=True)
            self._file = image.open("rb")

    def read(self, offset: int, size: int) -> bytes:
        return os.pread(self._file.fileno(), size, offset).ljust(size, b"\0")

    def close(self) -> None:
        self._file.close()


class ProcessDriver:
    """Each VM's "disk" is a directory beside its layer, its memory directory is gone with every boot."""

    features = Features(name="process", transitions_overlap=True)

    def __init__(self) -> None:
        self.machines: list[ProcessMachine] = []
        self.fail_start: CapsemError | None = None

    async def accelerator(self) -> Accelerator:
        return Accelerator.TCG

    def fingerprint(self, version: str, **shape: object) -> dict[str, object]:
        return {"vmm": version, **shape}

    async def version(self) -> str:
        return "process 1"

    async def restore(self, spec: MachineSpec, devices: Path, *, vmm_lock: int) -> ProcessMachine:
        raise MachineFailed("a process cannot be restored")

    def create_layer(self, path: Path, *, size_mb: int, vm_id: str, layer_id: str, sync: bool = True) -> None:
        path.write_bytes(b"layer")
        path.with_suffix(".disk").mkdir()

    async def merge_layers(
        self, sources: Sequence[Path], target: Path, *, vm_id: str, layer_id: str, size_mb: int | None = None
    ) -> Merged:
        """A "disk" here is whole, not a difference to the one below: the highest says it all."""
        with target.open("xb") as file:
            file.write(b"layer")
        shutil.copytree(sources[-1].with_suffix(".disk"), target.with_suffix(".disk"))
        return Merged(copied_bytes=5, file_bytes=5)

    def open_volume(self, volume: Sequence[Layer]) -> FlatVolume:
        return FlatVolume(volume[-1].path.with_suffix(".disk") / "root")

    async def start(self, spec: MachineSpec, *, vmm_lock: int) -> ProcessMachine:
        if self.fail_start is not None:
            raise self.fail_start
        disk = spec.volume[-1].path.with_suffix(".disk")
        for left in (disk / "memory").glob("*"):
            left.unlink()
        machine = ProcessMachine(disk, vmm_lock)
        self.machines.append(machine)
        return machine


class InProcess(RealProcesses):
    """Runs supervisors in this process; everything else as on the real host."""

    pids = itertools.count(4_000_001)  # above any real process id

    def __init__(self, driver: ProcessDriver) -> None:
        self.driver = driver
        self.system: System = replace(real_system(), processes=self)
        self.children: dict[int, _Child] = {}

    async def spawn(
        self, argv: Sequence[str], *, env: Mapping[str, str], stdin: bytes, log: Path, keep: Sequence[int] = ()
    ) -> _Child:
        assert list(argv[1::2]) == ["--id", "--session-dir"]
        log.touch()
        child = _Child(next(self.pids), self, SessionDir(Path(argv[4])), stdin)
        self.children[child.pid] = child
        return child

    def signal(self, pid: int, number: int) -> None:
        child = self.children.get(pid)
        if child is None:
            super().signal(pid, number)
        elif child.status is None:
            child.supervisor.stop(Stop(grace=1.0, kill=number == signal.SIGKILL))

    async def gone(self, pid: int) -> None:
        child = self.children.get(pid)
        if child is None:
            await super().gone(pid)
        else:
            await child.wait()


class _OwnPid:
    """The processes as a supervisor with a pid of its own sees them."""

    def __init__(self, processes: InProcess, pid: int) -> None:
        self._processes = processes
        self._pid = pid

    def own_pid(self) -> int:
        return self._pid

    def __getattr__(self, name: str) -> object:
        return getattr(self._processes, name)


class _Child:
    def __init__(self, pid: int, processes: InProcess, session: SessionDir, stdin: bytes) -> None:
        self.pid = pid
        self.status: int | None = None
        self._lines: asyncio.Queue[bytes] = asyncio.Queue()
        bootstrap = decode_message(stdin, {Bootstrap.tag: Bootstrap})
        assert isinstance(bootstrap, Bootstrap)
        names = Names(session, Layout(Path(bootstrap.run_dir)), Path(bootstrap.socket), Path(bootstrap.ready_file))
        system = replace(processes.system, processes=_OwnPid(processes, pid))
        self.supervisor = Supervisor(system, processes.driver, names, bootstrap, lambda: self._lines.put_nowait(BOUND))
        self._task = asyncio.create_task(self._run())

    async def _run(self) -> int:
        try:
            self.status = await self.supervisor.run()
        finally:
            self._lines.put_nowait(b"")
        return self.status

    async def read_line(self) -> bytes:
        return await self._lines.get()

    async def wait(self) -> int:
        return await asyncio.shield(self._task)
