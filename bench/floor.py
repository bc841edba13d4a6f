"""The floor: QEMU alone, run by the barest script that could do the same step."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import subprocess
import time
from collections.abc import AsyncIterator
from pathlib import Path

from capsem.control.guest import Guest, Identity, Restored
from capsem.hypervisor.driver import Accelerator, Layer, MachineSpec
from capsem.hypervisor.qemu import qcow2
from capsem.hypervisor.qemu.command import Channels, argv
from capsem.image.catalog import Image
from capsem.system.real import RealClock, RealEntropy
from capsem.wire.messages import STDOUT, Exec

SPARE_PORT = "org.capsem.spare"


class Bare:
    """One QEMU process with the product's command line, started with the vCPUs running."""

    def __init__(
        self,
        image: Image,
        directory: Path,
        accelerator: Accelerator,
        ram_mb: int,
        cpus: int,
        *,
        spare_port: bool = False,
    ) -> None:
        """`spare_port` adds a virtio port that the agent does not know; our end of it is `spare`."""
        layer, ram = directory / "layer.qcow2", directory / "ram"
        layer.unlink(missing_ok=True)
        with ram.open("wb") as file:
            file.truncate(ram_mb << 20)
        self.began = time.perf_counter()
        qcow2.create_layer(layer, size_mb=image.volume_mb, vm_id="floor", layer_id="0" * 32)
        spec = MachineSpec(
            vm_id="floor",
            cpus=cpus,
            ram_mb=ram_mb,
            accelerator=accelerator,
            kernel=image.kernel,
            initrd=image.initrd,
            root=image.root,
            volume=(Layer(image.volume, "raw"), Layer(layer, "qcow2")),
            ram_file=ram,
            command_line=image.kernel_command_line,
        )
        pairs = {name: socket.socketpair() for name in ("qmp", "control", "console", "spare")}
        ends = {name: theirs.fileno() for name, (_, theirs) in pairs.items()}
        spare = ends.pop("spare")
        line = [
            word
            for word in argv(spec, Channels(**ends), generation="4a1f2c33-0000-4000-8000-000000000000")
            if word != "-S"
        ]
        if spare_port:
            line += ["-chardev", f"socket,id=spare,fd={spare}"]
            line += ["-device", f"virtserialport,id=spare-port,bus=ports.0,nr=2,chardev=spare,name={SPARE_PORT}"]
        self.process = subprocess.Popen(line, pass_fds=[*ends.values(), spare], stderr=subprocess.DEVNULL)
        for _, theirs in pairs.values():
            theirs.close()
        self.control, self.console, self.qmp = pairs["control"][0], pairs["console"][0], pairs["qmp"][0]
        self.spare = pairs["spare"][0]

    def first_byte(self) -> float:
        """Milliseconds from before exec to the agent's first byte."""
        assert self.control.recv(1)
        return (time.perf_counter() - self.began) * 1e3

    def end(self) -> None:
        """Kill it."""
        self.process.kill()
        self.process.wait()
        for end in (self.control, self.console, self.qmp, self.spare):
            end.close()


@contextlib.asynccontextmanager
async def guest_of(control: socket.socket, restored: Restored | None = None) -> AsyncIterator[Guest]:
    """The host end of the control channel, with nothing of the product above it."""
    guest = Guest(Identity("floor", "floor", {}), RealClock(), RealEntropy(), restored)
    control.setblocking(False)
    await asyncio.get_running_loop().create_unix_connection(lambda: guest.channel, sock=control)
    await guest.wait_ready(120)
    try:
        yield guest
    finally:
        guest.channel.hang_up()


# What `exec true` cannot do without: a bash that runs `true`, and its end noticed.
SPAWN = """
import os, time
times = []
for _ in range(%d):
    began = time.perf_counter()
    os.waitpid(os.posix_spawn("/bin/bash", ["bash", "-c", "true"], os.environ), 0)
    times.append((time.perf_counter() - began) * 1e3)
print(*times)
"""


async def spawn_times(guest: Guest, count: int) -> list[float]:
    """Milliseconds of fork+exec of `bash -c true` in the guest, by the guest's own clock."""
    stream = guest.execute(Exec(job="spawn", command=f"python3 -c '{SPAWN % count}'"))
    text = bytearray()
    while data := await stream.read(STDOUT):
        text += data
    await stream.result()
    return [float(word) for word in text.split()]
