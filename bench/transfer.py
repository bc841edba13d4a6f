"""`python -m bench.transfer`: a file into a VM and out of it, beside the bare virtio port.

The floor is QEMU with the same guest and one more port: a socket on the host, and in the guest a Python that reads into
one kept buffer, or writes 32 KiB at a time; no protocol. It does what a file takes on its way. One that was sent is
durable when we say that it is there, so on the way in the floor is the port and then the same bytes written to a file and
synced by the guest. One that is fetched has to be read by the guest, so on the way out it is such a file sent piece by
piece: first from the disk, for what came in is in no cache of the guest (docs/decisions/0020), then from the cache. What
the port alone takes for bytes that lie in memory is told as well. Each of ours is taken right after these two.

A second table has what explains it: the port and the disk each alone, the CPU time of each process for one transfer (it
holds on a busy host too, where times do not), what the process of `capsem cp` costs, and the memory of the two ends.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import socket
import subprocess
import tempfile
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from time import perf_counter

from bench.floor import SPARE_PORT, Bare, guest_of
from bench.host import BIN, milliseconds, service, status
from bench.table import Row, show
from capsem.client.http import Answer
from capsem.hypervisor.qemu.driver import QemuDriver
from capsem.image.catalog import Catalog
from capsem.wire.messages import Exec

PIECE = 256 * 1024

# "i": read SIZE bytes, answer "."; "o": write SIZE bytes from memory; "f": write and fsync a file of SIZE bytes, answer
# "."; "c": write what is in it; "d": the same with nothing of it in the cache.
GUEST = """
import glob, os
SIZE = %d
port = next(p for p in glob.glob("/sys/class/virtio-ports/*") if open(p + "/name").read().strip() == "%s")
fd = os.open("/dev/" + os.path.basename(port), os.O_RDWR)
buffer = memoryview(bytearray(262144))
data = memoryview(os.urandom(1 << 20) * (SIZE // (1 << 20) + 1))
os.write(fd, b".")
while True:
    order, left, at = os.read(fd, 1), SIZE, 0
    if order == b"i":
        while left:
            left -= os.readv(fd, [buffer])
    elif order == b"o":
        while at < SIZE:
            at += os.write(fd, data[at:min(at + 32768, SIZE)])
        continue
    elif order in b"cd":
        file = os.open("/root/floor", os.O_RDONLY)
        if order == b"d":
            os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
        while left:
            size, at = os.readv(file, [buffer]), 0
            while at < size:
                at += os.write(fd, buffer[at:min(at + 32768, size)])
            left -= size
        os.close(file)
        continue
    else:
        file = os.open("/root/floor", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        while at < SIZE:
            at += os.write(file, data[at:min(at + 32768, SIZE)])
        os.fsync(file)
        os.close(file)
    os.write(fd, b".")
"""


class Floor:
    """The bare port; times in milliseconds."""

    def __init__(self, end: socket.socket, size: int) -> None:
        end.setblocking(True)
        self._end = end
        self._data = os.urandom(size)
        self._buffer = bytearray(PIECE)
        self.disk: list[float] = []
        assert self._end.recv(1) == b"."

    def into(self) -> float:
        """For bytes to have come."""
        began = perf_counter()
        self._end.sendall(b"i")
        self._end.sendall(self._data)
        assert self._end.recv(1) == b"."
        return milliseconds(began)

    def file_into(self) -> float:
        """For a file's bytes to have come, and then to have become durable."""
        port, began = self.into(), perf_counter()
        self._end.sendall(b"f")
        assert self._end.recv(1) == b"."
        self.disk.append(milliseconds(began))
        return port + self.disk[-1]

    def out_of(self) -> float:
        """For bytes to have gone."""
        return self._fetch(b"o")

    def file_out_of(self) -> float:
        """For the bytes of the file that `file_into` wrote to have gone, read from the guest's disk."""
        return self._fetch(b"d")

    def cached_out_of(self) -> float:
        """The same, from its cache."""
        return self._fetch(b"c")

    def _fetch(self, order: bytes) -> float:
        left, began = len(self._data), perf_counter()
        self._end.sendall(order)
        while left:
            left -= self._end.recv_into(self._buffer)
        return milliseconds(began)


@contextlib.asynccontextmanager
async def _echo(bare: Bare, size: int) -> AsyncIterator[None]:
    async with guest_of(bare.control) as guest:
        stream = guest.execute(Exec(job="floor", command=f"exec python3 -c '{GUEST % (size, SPARE_PORT)}'"))
        try:
            yield
        finally:
            stream.reset()


@contextlib.contextmanager
def floor(bare: Bare, size: int) -> Iterator[Floor]:
    """The port of a bare VM, served by the guest; the agent's own channel idles on another thread."""
    begun, ended = threading.Event(), threading.Event()

    async def serve() -> None:
        async with _echo(bare, size):
            begun.set()
            await asyncio.to_thread(ended.wait)

    thread = threading.Thread(target=lambda: asyncio.run(serve()))
    thread.start()
    try:
        begun.wait(120)
        yield Floor(bare.spare, size)
    finally:
        ended.set()
        thread.join()


def upload(path: Path, data: bytes) -> float:
    """Milliseconds of POST /files/box/content."""
    answer, began = Answer(), perf_counter()
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(str(path))
        connection.sendall(
            f"POST /files/box/content?path=ten HTTP/1.1\r\nHost: x\r\nContent-Length: {len(data)}\r\n\r\n".encode()
        )
        connection.sendall(data)
        while not answer.done:
            answer.feed(connection.recv(PIECE))
    assert answer.status == 200, answer.status
    return milliseconds(began)


def download(path: Path, data: bytes) -> float:
    """Milliseconds of GET /files/box/content."""
    got, left = bytearray(len(data) + PIECE), memoryview(b"")
    answer, began = Answer(), perf_counter()
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(str(path))
        connection.sendall(b"GET /files/box/content?path=ten&whole=1 HTTP/1.1\r\nHost: x\r\n\r\n")
        size = 0
        while not answer.status:
            first = answer.feed(connection.recv(PIECE))
            got[:size] = first
            size = len(first)
        left = memoryview(got)[size : len(data)]
        while left:
            left = left[connection.recv_into(left) :]
    taken = milliseconds(began)
    assert memoryview(got)[: len(data)] == data
    return taken


def cpu_milliseconds(pid: int) -> float:
    """CPU time of all threads of a process."""
    return sum(int(path.read_text().split()[0]) for path in Path(f"/proc/{pid}/task").glob("*/schedstat")) / 1e6


def children(pid: int) -> list[int]:
    """Processes that the main thread of `pid` started."""
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def command(home: Path, *words: str) -> float:
    """Milliseconds of `capsem` as a process."""
    env = {**os.environ, "CAPSEM_HOME": str(home), "CAPSEM_RUN_DIR": str(home / "run")}
    began = perf_counter()
    subprocess.run([BIN / "capsem", *words], env=env, check=True, stdout=subprocess.DEVNULL)
    return milliseconds(began)


@dataclass
class Taken:
    """Of one way of moving a file: milliseconds, and CPU milliseconds by process."""

    ours: list[float]
    floor: list[float]
    port: list[float]  # alone
    cpu: dict[str, list[float]]
    floor_cpu: list[float]


Steps = dict[str, tuple[Callable[[], float], Callable[[], float], Callable[[], float]]]  # port, floor and ours, by name


def take(steps: Steps, pids: dict[str, int], bare: int, runs: int) -> dict[str, Taken]:
    """Each step `runs` times in turn, right after the port alone and its floor."""
    found = {name: Taken([], [], [], {each: [] for each in pids}, []) for name in steps}
    for _ in range(runs):
        for name, (port_of, floor_of, ours_of) in steps.items():
            taken = found[name]
            taken.port.append(port_of())
            began = cpu_milliseconds(bare)
            taken.floor.append(floor_of())
            taken.floor_cpu.append(cpu_milliseconds(bare) - began)
            before = {each: cpu_milliseconds(pid) for each, pid in pids.items()}
            taken.ours.append(ours_of())
            for each, pid in pids.items():
                taken.cpu[each].append(cpu_milliseconds(pid) - before[each])
    return found


def measure(runs: int, size: int, ram_mb: int) -> tuple[list[Row], list[Row]]:
    """The ratios, and what explains them."""
    image = Catalog.from_environment(os.environ).find()
    data, what = os.urandom(size), f"{size // 1_000_000} MB"
    with contextlib.ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        home, local = directory / "home", directory / "ten"
        local.write_bytes(data)
        client, service_pid = stack.enter_context(service(home))
        accelerator = asyncio.run(QemuDriver(directory / "cache").accelerator())
        bare = Bare(image, directory, accelerator, ram_mb, 1, spare_port=True)
        stack.callback(bare.end)
        port = stack.enter_context(floor(bare, size))
        client.call("provision", body={"name": "box", "ram_mb": ram_mb, "cpus": 1})
        client.call("exec", vm_id="box", body={"command": "true"})
        supervisor, path = client.call("info", vm_id="box")["pid"], home / "run" / "service.sock"
        [vmm] = children(supervisor)
        pids = {"VMM": vmm, "supervisor": supervisor, "service": service_pid}
        memory = {name: status(pid, "VmHWM") for name, pid in pids.items() if name != "VMM"}

        def fetch() -> float:
            return command(home, "cp", "box:ten", str(local))

        def send() -> float:
            return command(home, "cp", str(local), "box:ten")

        steps: Steps = {
            "HTTP in": (port.into, port.file_into, lambda: upload(path, data)),
            "HTTP out": (port.out_of, port.file_out_of, lambda: download(path, data)),
            "HTTP out again": (port.out_of, port.cached_out_of, lambda: download(path, data)),
            "cp in": (port.into, port.file_into, send),
            "cp out": (port.out_of, port.file_out_of, fetch),
        }
        take(steps, pids, bare.process.pid, 2)  # the emulator has to have met each instruction once
        port.disk = []
        taken = take(steps, pids, bare.process.pid, runs)
        ratios = [Row(f"{what}, {name} (ms)", each.ours, each.floor, "1.5 x") for name, each in taken.items()]
        for name, each in taken.items():
            ratios.append(Row(f"{what}, {name}, beside the port alone (ms)", each.ours, each.port, "1.5 x"))
        explained = [Row(f"{what} written and synced in the guest (ms)", port.disk)]
        for name, each in taken.items():
            for process, used in each.cpu.items():
                floor_cpu = each.floor_cpu if process == "VMM" else ()
                explained.append(Row(f"{what}, {name}: CPU of the {process} (ms)", used, floor_cpu))
        explained.append(Row("capsem list as a process (ms)", [command(home, "list") for _ in range(runs)]))
        for name, before in memory.items():
            explained.append(Row(f"{name}: peak RSS before (MB)", [before]))
            explained.append(Row(f"{name}: peak RSS after (MB)", [status(pids[name], "VmHWM")]))
        return ratios, explained


def large(runs: int) -> list[Row]:
    """100 MB over HTTP, where what is done once per file does not count; and how far the memory of those on the way grows."""
    ratios, explained = measure(runs, 100_000_000, 512)
    rows = [replace(row, target="1.43 x" if "port alone" in row.name else "") for row in ratios if "HTTP" in row.name]
    return [*rows, *(row for row in explained if "peak RSS" in row.name)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=5, help="transfers of each kind (default 5)")
    parser.add_argument("--megabytes", type=int, default=10, help="how large the file is (default 10)")
    parser.add_argument("--ram", type=int, default=512, help="memory of the VMs in MiB (default 512)")
    arguments = parser.parse_args()
    ratios, explained = measure(arguments.runs, arguments.megabytes * 1_000_000, arguments.ram)
    print(show(ratios), show(explained), sep="\n\n")


if __name__ == "__main__":
    main()
