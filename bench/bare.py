"""The floor of suspend, resume and pause: the product's QEMU and guest, and nothing of the product above them.

In the guest a second program serves a second port: a Python that runs what it is told with `bash -c`, whose standard
output is the port itself, and answers when that has ended. The guest agent idles beside it, so that the guest is the
same. A restored floor is asked for its first command through that port: no handshake, no identity, no clock, no
examination, no record of anything. Or, asked to, it does before that what a guest of ours has to: take time and entropy,
read what lies on its volume, write and flush it, and look what the kernel complains of.
"""

from __future__ import annotations

import asyncio
import json
import os
import shlex
import socket
import subprocess
import time
from pathlib import Path
from typing import Any

from bench.floor import SPARE_PORT, guest_of
from bench.host import milliseconds
from capsem.hypervisor.driver import Accelerator, Layer, MachineSpec
from capsem.hypervisor.qemu import qcow2
from capsem.hypervisor.qemu.command import TOP_NODE, Channels, argv
from capsem.hypervisor.qemu.memory import GuestMemory, Snapshot, stream
from capsem.image.catalog import Image
from capsem.store import durable
from capsem.wire.messages import Exec

GENERATION = "4a1f2c33-0000-4000-8000-%012d"
BOOT_LIMIT = 120.0  # seconds

FLUSH = "flush"  # no program, but what our agent does to the guest's file systems before a save
EXAMINE = "examine"  # and what it does after a restore; the time follows

SERVER = f"""
import fcntl, glob, mmap, os, struct, time
port = next(p for p in glob.glob("/sys/class/virtio-ports/*") if open(p + "/name").read().strip() == "{SPARE_PORT}")
fd = os.open("/dev/" + os.path.basename(port), os.O_RDWR)
mark, block = os.open("/root/.mark", os.O_RDWR | os.O_CREAT | os.O_DIRECT), mmap.mmap(-1, 4096)
random, log = os.open("/dev/random", os.O_WRONLY), os.open("/dev/kmsg", os.O_RDONLY | os.O_NONBLOCK)
os.write(fd, b".")
while True:
    command = os.read(fd, 4096).decode()
    if command == "{FLUSH}":
        os.pwrite(mark, block, 0)
        os.lseek(log, 0, os.SEEK_END)
        os.sync()
        os.fsync(mark)
        os.write(fd, b".")
        continue
    if command.startswith("{EXAMINE}"):
        time.clock_settime(time.CLOCK_REALTIME, float(command.split()[1]))
        fcntl.ioctl(random, 0x40085203, struct.pack("ii", 512, 64) + os.urandom(64))
        fcntl.ioctl(random, 0x5207)
        os.preadv(mark, [block], 0)
        os.pwrite(mark, block, 0)
        os.fsync(mark)
        try:
            while os.read(log, 8192):
                pass
        except BlockingIOError:
            pass
        os.write(fd, b".")
        continue
    actions = [(os.POSIX_SPAWN_DUP2, fd, 1)]
    os.waitpid(os.posix_spawn("/bin/bash", ["bash", "-c", command], os.environ, file_actions=actions), 0)
    os.write(fd, b".")
"""


class Qmp:
    """The barest client."""

    def __init__(self, sock: socket.socket) -> None:
        self._file = sock.makefile("rwb")
        self._next()
        self.do("qmp_capabilities")

    def _next(self) -> dict[str, Any]:
        answer: dict[str, Any] = json.loads(self._file.readline())
        return answer

    def do(self, command: str, **arguments: object) -> Any:
        """Carry out a command; a "_" in the name of an argument stands for "-"."""
        named = {key.replace("_", "-"): value for key, value in arguments.items()}
        self._file.write(json.dumps({"execute": command, "arguments": named}).encode() + b"\n")
        self._file.flush()
        while True:
            answer = self._next()
            if "error" in answer:
                raise RuntimeError(f"{command}: {answer['error']['desc']}")
            if "return" in answer:
                return answer["return"]


class Suspended:
    """What a suspend has left: layers that nothing writes to, RAM, device state."""

    def __init__(self, ram: Path, state: Path, layers: tuple[Layer, ...]) -> None:
        self.ram, self.state, self.layers = ram, state, layers


class BareMachine:
    """One QEMU, or none between a suspend and a resume."""

    count = 0

    def __init__(self, image: Image, directory: Path, accelerator: Accelerator, ram_mb: int) -> None:
        """Boot it, and start the guest's server; all files are made in `directory`."""
        self._image, self._directory, self._accelerator, self._ram_mb = image, directory, accelerator, ram_mb
        ram = directory / f"floor-{ram_mb}.ram"
        with ram.open("wb") as file:
            file.truncate(ram_mb << 20)
        self._top = TOP_NODE
        self._start(ram, ())
        self._qmp.do("cont")
        asyncio.run(self._serve())

    async def _serve(self) -> None:
        # A second descriptor: the guest agent is not to see its host hang up.
        async with guest_of(self._control.dup()) as guest:
            guest.execute(Exec(job="floor", command=f"exec python3 -c {shlex.quote(SERVER)}"))
            assert await asyncio.to_thread(self._port.recv, 1) == b"."

    def _layer(self) -> Layer:
        BareMachine.count += 1
        path = self._directory / f"floor-{BareMachine.count}.qcow2"
        qcow2.create_layer(path, size_mb=self._image.volume_mb, vm_id="floor", layer_id=f"{BareMachine.count:032x}")
        return Layer(path, "qcow2")

    def _start(self, ram: Path, layers: tuple[Layer, ...], state: Path | None = None) -> None:
        """Spawn QEMU on a new layer; with a device state, take it in."""
        image = self._image
        self._ram, self._layers = ram, (*layers, self._layer())
        spec = MachineSpec(
            vm_id="floor",
            cpus=1,
            ram_mb=self._ram_mb,
            accelerator=self._accelerator,
            kernel=image.kernel,
            initrd=image.initrd,
            root=image.root,
            volume=(Layer(image.volume, "raw"), *self._layers),
            ram_file=ram,
            command_line=image.kernel_command_line,
        )
        pairs = {name: socket.socketpair() for name in ("qmp", "control", "console", "port")}
        ends = {name: theirs.fileno() for name, (_, theirs) in pairs.items()}
        port = ends.pop("port")
        line = argv(spec, Channels(**ends), generation=GENERATION % BareMachine.count, incoming=state is not None)
        line += ["-chardev", f"socket,id=spare,fd={port}"]
        line += ["-device", f"virtserialport,id=spare-port,bus=ports.0,nr=2,chardev=spare,name={SPARE_PORT}"]
        fds = [*ends.values(), port]
        if state is not None:
            fds.append(os.open(state, os.O_RDONLY))
        self._process = subprocess.Popen(line, pass_fds=fds, stderr=subprocess.DEVNULL)
        for _, theirs in pairs.values():
            theirs.close()
        self._control, self._port = pairs["control"][0], pairs["port"][0]
        self._others = [pairs["console"][0], pairs["qmp"][0]]
        self._qmp = Qmp(pairs["qmp"][0])
        if state is not None:
            self._qmp.do("migrate-incoming", uri=f"fd:{fds[-1]}")
            os.close(fds[-1])
            while self._qmp.do("query-migrate").get("status") != "completed":
                time.sleep(0.001)

    @property
    def pid(self) -> int:
        """QEMU's process id."""
        return self._process.pid

    def do(self, command: str) -> None:
        """Have the guest run a command to its end, which writes nothing."""
        self._port.sendall(command.encode())
        assert self._port.recv(1) == b"."

    def output(self, command: str, size: int) -> None:
        """Have the guest run a command that writes so many bytes, and take them."""
        buffer, left = bytearray(1 << 18), size + 1
        self._port.sendall(command.encode())
        while left:
            left -= self._port.recv_into(buffer)

    def suspend(self, *, flush: bool = False) -> tuple[float, Suspended]:
        """Milliseconds to the end of the process, with all that it leaves durable; with `flush`, of the guest as well."""
        BareMachine.count += 1
        ram, state = (self._directory / f"floor-{BareMachine.count}.{kind}" for kind in ("ram", "state"))
        subprocess.run(["cp", "--sparse=auto", self._ram, ram], check=True)  # ahead of time, as ours is
        fd = os.open(ram, os.O_RDWR)
        os.fsync(fd)
        began = time.perf_counter()
        if flush:
            self.do(FLUSH)
        self._qmp.do("stop")
        self._qmp.do("xen-save-devices-state", filename=str(state), live=True)
        for offset, piece in stream(GuestMemory(self.pid, self._ram, self._ram_mb << 20)):
            os.pwrite(fd, piece, offset)
        os.fsync(fd)
        for path in (state, self._layers[-1].path):
            durable.sync_file(path)
        durable.sync_directory(self._directory)
        self._qmp.do("quit")
        self._process.wait()
        took = milliseconds(began)
        os.close(fd)
        self.close()
        return took, Suspended(ram, state, self._layers)

    def resume(self, point: Suspended, *, examine: bool = False) -> float:
        """Milliseconds to the end of the first command."""
        began = time.perf_counter()
        self._start(point.ram, point.layers, point.state)
        self._port.sendall(f"{EXAMINE} {time.time()}".encode() if examine else b"true")
        self._qmp.do("cont")
        assert self._port.recv(1) == b"."
        if examine:
            self._port.sendall(b"true")
            assert self._port.recv(1) == b"."
        return milliseconds(began)

    def pause(self) -> float:
        """How many milliseconds the machine stands still for a checkpoint."""
        memory = GuestMemory(self.pid, self._ram, self._ram_mb << 20)
        snapshot = Snapshot(memory, sum(length for _, length in memory.changed()) + (32 << 20))
        layer, name = self._layer(), f"n{BareMachine.count}"
        state = self._directory / "pause.state"
        state.unlink(missing_ok=True)
        file = {"driver": "file", "node-name": f"{name}-file", "filename": str(layer.path)}
        self._qmp.do("blockdev-add", **file)
        self._qmp.do("blockdev-add", **{"driver": "qcow2", "node-name": name, "file": f"{name}-file", "backing": None})
        began = time.perf_counter()
        self._qmp.do("stop")
        self._qmp.do("blockdev-snapshot", node=self._top, overlay=name)
        self._qmp.do("xen-save-devices-state", filename=str(state), live=True)
        snapshot.take()
        self._qmp.do("cont")
        took = milliseconds(began)
        self._top = name
        snapshot.close()
        return took

    def close(self) -> None:
        """End what is left."""
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()
        for end in (self._control, self._port, *self._others):
            end.close()
