"""`python -m bench.checkpoints`: suspend, resume, live fork and the pause of a checkpoint, beside QEMU alone doing the same.

The floors, each run beside ours in turn on the same host:

    suspend   stop, device state, the pages that the guest has changed, fsync, quit and reaped
    resume    a new layer, QEMU started and the state taken in, cont, the agent's first byte, and what `exec true` costs a guest
    pause     stop, a new layer, device state, the changed pages copied into memory that is there, cont

Then how ours grows: with RAM, with what the guest has changed, with the depth of the layer chain, with the number of forks.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Coroutine, Sequence
from pathlib import Path
from typing import Any

from bench.__main__ import exec_floor, milliseconds, service
from bench.floor import guest_of
from bench.table import Row, show
from capsem.client.sync import Client
from capsem.control.guest import Guest, Restored
from capsem.hypervisor.driver import Accelerator, Layer, MachineSpec
from capsem.hypervisor.qemu import qcow2
from capsem.hypervisor.qemu.command import TOP_NODE, Channels, argv
from capsem.hypervisor.qemu.driver import QemuDriver
from capsem.hypervisor.qemu.memory import GuestMemory, Snapshot, stream
from capsem.image.catalog import Catalog, Image
from capsem.wire.messages import Exec

DIRTY = "head -c %dM /dev/urandom > /dev/shm/dirty"
SETTLE = 2.5  # seconds between measurements, for what goes on in the background to end
GENERATION = "4a1f2c33-0000-4000-8000-%012d"


class Qmp:
    """The barest client."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._file = sock.makefile("rwb")
        self._next()
        self.do("qmp_capabilities")

    def _next(self) -> dict[str, Any]:
        answer: dict[str, Any] = json.loads(self._file.readline())
        return answer

    def do(self, command: str, **arguments: object) -> object:
        named = {key.replace("_", "-"): value for key, value in arguments.items()}
        self._file.write(json.dumps({"execute": command, "arguments": named}).encode() + b"\n")
        self._file.flush()
        while True:
            answer = self._next()
            if "error" in answer:
                raise RuntimeError(f"{command}: {answer['error']['desc']}")
            if "return" in answer:
                return answer["return"]


class Floor:
    """QEMU with the product's command line and nothing above it."""

    count = 0
    top = TOP_NODE

    def __init__(self, image: Image, directory: Path, accelerator: Accelerator, ram_mb: int, cpus: int) -> None:
        self._image, self._directory, self._accelerator = image, directory, accelerator
        self._ram_mb, self._cpus = ram_mb, cpus
        self.layers: list[Layer] = []
        self.ram = directory / f"floor-{ram_mb}.ram"
        with self.ram.open("wb") as file:
            file.truncate(ram_mb << 20)
        self.nonce = b""
        self.process: subprocess.Popen[bytes]
        self.qmp: Qmp
        self.control: socket.socket
        self._others: list[socket.socket] = []

    def _layer(self) -> Layer:
        Floor.count += 1
        path = self._directory / f"floor-{Floor.count}.qcow2"
        qcow2.create_layer(path, size_mb=self._image.volume_mb, vm_id="floor", layer_id=f"{Floor.count:032x}")
        return Layer(path, "qcow2")

    def start(self, state: Path | None = None) -> None:
        """Spawn QEMU on a new layer; with a device state, take it in."""
        self.layers.append(self._layer())
        image = self._image
        spec = MachineSpec(
            vm_id="floor",
            cpus=self._cpus,
            ram_mb=self._ram_mb,
            accelerator=self._accelerator,
            kernel=image.kernel,
            initrd=image.initrd,
            root=image.root,
            volume=(Layer(image.volume, "raw"), *self.layers),
            ram_file=self.ram,
            command_line=image.kernel_command_line,
        )
        pairs = {name: socket.socketpair() for name in ("qmp", "control", "console")}
        ends = {name: theirs.fileno() for name, (_, theirs) in pairs.items()}
        line = argv(spec, Channels(**ends), generation=GENERATION % Floor.count, incoming=state is not None)
        fd = os.open(state, os.O_RDONLY) if state else -1
        keep = [*ends.values(), *([fd] if state else [])]
        self.process = subprocess.Popen(line, pass_fds=keep, stderr=subprocess.DEVNULL)
        for _, theirs in pairs.values():
            theirs.close()
        self.control = pairs["control"][0]
        self._others = [pairs["console"][0], pairs["qmp"][0]]
        self.qmp = Qmp(pairs["qmp"][0])
        if state:
            self.qmp.do("migrate-incoming", uri=f"fd:{fd}")
            os.close(fd)
            while True:
                status = self.qmp.do("query-migrate")
                assert isinstance(status, dict)
                if status.get("status") == "completed":
                    break
                time.sleep(0.001)

    async def meet(self, work: Callable[[Guest], Any]) -> None:
        """Speak with the guest as the product does; afterwards it waits for `nonce`."""
        restored = Restored(1, self.nonce, None) if self.nonce else None
        async with guest_of(self.control, restored) as guest:
            await work(guest)
            self.nonce = guest.next_nonce

    def suspend(self, state: Path, ram: Path) -> float:
        """To the end of the process, in ms; the machine's memory is then in `ram`, as far as it has changed."""
        began = time.perf_counter()
        self.qmp.do("stop")
        self.qmp.do("xen-save-devices-state", filename=str(state), live=True)
        memory = GuestMemory(self.process.pid, self.ram, self._ram_mb << 20)
        fd = os.open(ram, os.O_RDWR | os.O_CREAT, 0o600)
        os.ftruncate(fd, self._ram_mb << 20)
        for offset, piece in stream(memory):
            os.pwrite(fd, piece, offset)
        os.fsync(fd)
        os.close(fd)
        self.qmp.do("quit")
        self.process.wait()
        took = milliseconds(began)
        self.close()
        return took

    def resume(self, state: Path) -> float:
        """To the agent's first byte, in ms."""
        began = time.perf_counter()
        self.start(state)
        self.control.sendall(self.nonce)
        self.qmp.do("cont")
        assert self.control.recv(1, socket.MSG_PEEK)
        return milliseconds(began)

    def pause(self, state: Path) -> float:
        """How long the machine stands still for a checkpoint, in ms."""
        memory = GuestMemory(self.process.pid, self.ram, self._ram_mb << 20)
        snapshot = Snapshot(memory, sum(length for _, length in memory.changed()) + (32 << 20))
        layer = self._layer()
        state.unlink(missing_ok=True)
        file = {"driver": "file", "node-name": f"f{Floor.count}", "filename": str(layer.path)}
        node = {"driver": "qcow2", "node-name": f"n{Floor.count}", "file": f"f{Floor.count}", "backing": None}
        self.qmp.do("blockdev-add", **file)
        self.qmp.do("blockdev-add", **node)
        began = time.perf_counter()
        self.qmp.do("stop")
        self.qmp.do("blockdev-snapshot", node=self.top, overlay=f"n{Floor.count}")
        self.qmp.do("xen-save-devices-state", filename=str(state), live=True)
        snapshot.take()
        self.qmp.do("cont")
        took = milliseconds(began)
        self.top = f"n{Floor.count}"
        snapshot.close()
        return took

    def close(self) -> None:
        """End what is left."""
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        for end in (self.control, *self._others):
            end.close()


def dirty(client: Client, vm_id: str, megabytes: int) -> None:
    """Have the guest change so much of its memory, and keep it."""
    if megabytes:
        command = DIRTY % megabytes
        assert client.call("exec", vm_id=vm_id, body={"command": command})["exit_code"] == 0


def cycle(client: Client, vm_id: str) -> tuple[float, float, dict[str, Any]]:
    """Suspend, and resume to the first exec; ms each, and what the suspend said."""
    began = time.perf_counter()
    said = client.call("suspend", vm_id=vm_id)
    suspended = milliseconds(began)
    began = time.perf_counter()
    client.call("resume", vm_id=vm_id)
    client.call("exec", vm_id=vm_id, body={"command": "true"})
    return suspended, milliseconds(began), said


def filled(megabytes: int) -> Callable[[Guest], Coroutine[Any, Any, None]]:
    """What the floor's guest does before it is saved: as `dirty`, and a flush."""

    async def work(guest: Guest) -> None:
        stream_ = guest.execute(Exec(job=f"dirty{Floor.count}", command=DIRTY % megabytes if megabytes else "true"))
        await stream_.result()
        await guest.sync(30)

    return work


def beside_the_floor(client: Client, directory: Path, accelerator: Accelerator, ram_mb: int, runs: int) -> list[Row]:
    """Suspend, resume and live fork of one size, little changed since the last time."""
    image = Catalog.from_environment(os.environ).find()
    spawn = sorted(asyncio.run(exec_floor(image, accelerator, directory, 20)))[10]
    floor, vm_id = Floor(image, directory, accelerator, ram_mb, 1), f"size{ram_mb}"
    floor.start()
    floor.qmp.do("cont")
    asyncio.run(floor.meet(filled(0)))
    state, ram, nonce = directory / "state", directory / "ram", floor.nonce
    floor.suspend(state, ram)
    frozen = tuple(floor.layers)
    client.call("provision", body={"name": vm_id, "persistent": True, "ram_mb": ram_mb, "cpus": 1})
    client.call("exec", vm_id=vm_id, body={"command": "true"})
    cycle(client, vm_id)
    times: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in ("suspend", "resume", "fork")}
    for run in range(runs):
        floor.ram, floor.layers, floor.nonce = ram, list(frozen), nonce
        times["resume"][1].append(floor.resume(state) + spawn)
        asyncio.run(floor.meet(filled(0)))
        times["suspend"][1].append(floor.suspend(directory / f"state-{run}", directory / f"ram-{run}"))
        time.sleep(SETTLE)
        suspended, resumed, _ = cycle(client, vm_id)
        times["suspend"][0].append(suspended)
        times["resume"][0].append(resumed)
        time.sleep(SETTLE)
        began = time.perf_counter()
        client.call("fork", vm_id=vm_id, body={"name": "child", "live": True})
        client.call("exec", vm_id="child", body={"command": "true"})
        times["fork"][0].append(milliseconds(began))
        times["fork"][1].append(resumed)
        client.call("delete", vm_id="child")
        time.sleep(SETTLE)
    client.call("delete", vm_id=vm_id)
    return [
        Row(f"suspend, {ram_mb} MiB (ms)", *times["suspend"], "1.3 x"),
        Row(f"resume to first exec, {ram_mb} MiB (ms)", *times["resume"], "1.3 x, under 500"),
        Row(f"live fork to first exec beside resume, {ram_mb} MiB (ms)", *times["fork"], "1.3 x"),
    ]


def pauses(client: Client, directory: Path, accelerator: Accelerator, ram_mb: int, amounts: Sequence[int]) -> list[Row]:
    """The pause of a checkpoint of a running VM, by what it has changed."""
    image = Catalog.from_environment(os.environ).find()
    rows = []
    for megabytes in amounts:
        floor, vm_id = Floor(image, directory, accelerator, ram_mb, 1), "paused"
        floor.start()
        floor.qmp.do("cont")
        asyncio.run(floor.meet(filled(megabytes)))
        floors = [floor.pause(directory / "state") for _ in range(3)]
        floor.close()
        client.call("provision", body={"name": vm_id, "persistent": True, "ram_mb": ram_mb, "cpus": 1})
        dirty(client, vm_id, megabytes)
        ours = [client.call("checkpoint", vm_id=vm_id, body={})["pause_ms"] for _ in range(3)]
        client.call("delete", vm_id=vm_id)
        target = "1.5 x" + {100: ", under 60", 1000: ", under 350"}.get(megabytes, "")
        rows.append(
            Row(
                f"pause of a checkpoint, {ram_mb} MiB, {megabytes} MB changed since a cold boot (ms)",
                ours,
                floors,
                target,
            )
        )
    return rows


def growth(client: Client, amounts: Sequence[int], depths: Sequence[int]) -> list[Row]:
    """A suspend by what has changed since the resume; a resume by the depth of the chain."""
    rows, vm_id = [], "grown"
    client.call("provision", body={"name": vm_id, "persistent": True, "ram_mb": 2048, "cpus": 1})
    client.call("exec", vm_id=vm_id, body={"command": "true"})
    cycle(client, vm_id)
    for megabytes in amounts:
        times = []
        for _ in range(2):
            time.sleep(SETTLE)
            dirty(client, vm_id, megabytes)
            times.append(cycle(client, vm_id)[0])
        rows.append(Row(f"suspend, 2048 MiB, {megabytes} MB changed since the resume (ms)", times))
    client.call("exec", vm_id=vm_id, body={"command": "rm -f /dev/shm/dirty"})
    for depth in depths:
        while len(client.call("checkpoints", vm_id=vm_id)["checkpoints"]) < depth:
            client.call("checkpoint", vm_id=vm_id, body={})
        rows.append(
            Row(f"resume to first exec, {depth} checkpoints deep (ms)", [cycle(client, vm_id)[1] for _ in range(3)])
        )
    client.call("delete", vm_id=vm_id)
    return rows


def private_dirty(pid: int) -> float:
    """MB of memory that a process shares with nobody and has changed."""
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Private_Dirty:"):
            return int(line.split()[1]) / 1024
    raise KeyError(pid)


def forks(client: Client, counts: Sequence[int]) -> list[Row]:
    """What many forks of one idle VM cost in memory, and how long they take together."""
    rows, vm_id = [], "parent"
    client.call("provision", body={"name": vm_id, "persistent": True, "ram_mb": 512, "cpus": 1})
    client.call("exec", vm_id=vm_id, body={"command": "true"})
    for count in counts:
        began = time.perf_counter()
        names = client.call("fork", vm_id=vm_id, body={"name": "f", "live": True, "count": count})["names"]
        took = milliseconds(began)
        pids = [client.call("info", vm_id=name)["pid"] for name in names]
        machines = [int(Path(f"/proc/{pid}/task/{pid}/children").read_text().split()[0]) for pid in pids]
        rows.append(Row(f"{count} live forks: all ready (ms)", [took]))
        rows.append(
            Row(
                f"{count} live forks: Private_Dirty of each QEMU (MB)",
                [private_dirty(pid) for pid in machines],
                (),
                "under 50",
            )
        )
        for name in names:
            client.call("delete", vm_id=name)
    client.call("delete", vm_id=vm_id)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--ram", type=int, nargs="+", default=[512, 2048, 4096], help="MiB")
    parser.add_argument("--dirty", type=int, nargs="+", default=[1, 10, 100, 1000], help="MB")
    parser.add_argument("--depth", type=int, nargs="+", default=[1, 10, 50])
    parser.add_argument("--forks", type=int, nargs="+", default=[1, 10, 30])
    parser.add_argument("--only", choices=("floor", "pause", "growth", "forks"), action="append")
    arguments = parser.parse_args()
    wanted = arguments.only or ["floor", "pause", "growth", "forks"]
    rows: list[Row] = []
    os.environ["CAPSEM_MAX_CONCURRENT_VMS"] = "100"  # for the service below
    with tempfile.TemporaryDirectory() as text, service(Path(text) / "home") as (client, _pid):
        directory = Path(text)
        accelerator = asyncio.run(QemuDriver(directory / "cache").accelerator())
        if "floor" in wanted:
            for ram_mb in arguments.ram:
                rows += beside_the_floor(client, directory, accelerator, ram_mb, arguments.runs)
        if "pause" in wanted:
            rows += pauses(client, directory, accelerator, 2048, [0, *arguments.dirty])
        if "growth" in wanted:
            rows += growth(client, arguments.dirty, arguments.depth)
        if "forks" in wanted:
            rows += forks(client, arguments.forks)
    print(show(rows))


if __name__ == "__main__":
    main()
