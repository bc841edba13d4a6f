"""`python -m bench.transfer`: 10 MB into a VM and out of it, beside the bare virtio port.

The floor is QEMU with the same guest and one more port: a socket on the host, and in the guest a Python that reads into
one kept buffer, or writes 32 KiB at a time; no protocol, no file, no fsync. Each of ours is taken right after its floor.
A second table tells what the fsync and the process of `capsem cp` cost of it, which no port could save, and the same
ratios in CPU time of the two VMMs, which hold on a busy host too.
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
from pathlib import Path
from time import perf_counter

from bench.__main__ import BIN, cpu_seconds, milliseconds, service, status
from bench.floor import SPARE_PORT, Bare, guest_of
from bench.table import Row, show
from capsem.client.http import Answer
from capsem.hypervisor.qemu.driver import QemuDriver
from capsem.image.catalog import Catalog
from capsem.wire.messages import Exec

SIZE = 10_000_000
PIECE = 256 * 1024

# "i": read SIZE bytes, answer "."; "o": write SIZE bytes; "f": write and fsync a file of SIZE bytes, answer ".".
GUEST = f"""
import glob, os
port = next(p for p in glob.glob("/sys/class/virtio-ports/*") if open(p + "/name").read().strip() == "{SPARE_PORT}")
fd = os.open("/dev/" + os.path.basename(port), os.O_RDWR)
buffer = memoryview(bytearray(65536))
os.write(fd, b".")
while True:
    order, left = os.read(fd, 1), {SIZE}
    if order == b"i":
        while left:
            left -= os.readv(fd, [buffer])
    elif order == b"o":
        while left:
            left -= os.write(fd, buffer[:min(left, 32768)])
        continue
    else:
        file = os.open("/root/floor", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        while left:
            left -= os.write(file, buffer[:min(left, 32768)])
        os.fsync(file)
        os.close(file)
    os.write(fd, b".")
"""


class Floor:
    """The bare port."""

    def __init__(self, end: socket.socket) -> None:
        end.setblocking(True)
        self._end = end
        self._data = bytes(SIZE)
        assert self._end.recv(1) == b"."

    def into(self) -> float:
        """Milliseconds for SIZE bytes to have come."""
        began = perf_counter()
        self._end.sendall(b"i")
        self._end.sendall(self._data)
        assert self._end.recv(1) == b"."
        return milliseconds(began)

    def out_of(self) -> float:
        """Milliseconds for SIZE bytes to have gone."""
        left, buffer, began = SIZE, bytearray(PIECE), perf_counter()
        self._end.sendall(b"o")
        while left:
            left -= self._end.recv_into(buffer)
        return milliseconds(began)

    def durable(self) -> float:
        """Milliseconds for the guest to write SIZE bytes to a file and fsync it."""
        began = perf_counter()
        self._end.sendall(b"f")
        assert self._end.recv(1) == b"."
        return milliseconds(began)


@contextlib.asynccontextmanager
async def _echo(bare: Bare) -> AsyncIterator[None]:
    async with guest_of(bare.control) as guest:
        stream = guest.execute(Exec(job="floor", command=f"exec python3 -c '{GUEST}'"))
        try:
            yield
        finally:
            stream.reset()


@contextlib.contextmanager
def floor(bare: Bare) -> Iterator[Floor]:
    """The port of a bare VM, served by the guest; the agent's own channel idles on another thread."""
    begun, ended = threading.Event(), threading.Event()

    async def serve() -> None:
        async with _echo(bare):
            begun.set()
            await asyncio.to_thread(ended.wait)

    thread = threading.Thread(target=lambda: asyncio.run(serve()))
    thread.start()
    try:
        begun.wait(120)
        yield Floor(bare.spare)
    finally:
        ended.set()
        thread.join()


def exchange(path: Path, head: bytes, body: bytes = b"") -> bytes:
    """One HTTP request over a Unix socket; returns the answer's body, in a list of pieces joined at the end."""
    answer, pieces = Answer(), []
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(str(path))
        connection.sendall(head)
        connection.sendall(body)
        while not answer.done:
            pieces.append(answer.feed(connection.recv(PIECE)))
    assert answer.status == 200, (answer.status, pieces)
    return b"".join(pieces)


def upload(path: Path, data: bytes) -> float:
    """Milliseconds of POST /files/box/content."""
    head = f"POST /files/box/content?path=ten HTTP/1.1\r\nHost: x\r\nContent-Length: {len(data)}\r\n\r\n"
    began = perf_counter()
    exchange(path, head.encode(), data)
    return milliseconds(began)


def download(path: Path, data: bytes) -> float:
    """Milliseconds of GET /files/box/content."""
    began = perf_counter()
    assert exchange(path, b"GET /files/box/content?path=ten HTTP/1.1\r\nHost: x\r\n\r\n") == data
    return milliseconds(began)


def children(pid: int) -> list[int]:
    """Processes that the main thread of `pid` started."""
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def command(home: Path, *words: str) -> float:
    """Milliseconds of `capsem` as a process."""
    env = {**os.environ, "CAPSEM_HOME": str(home), "CAPSEM_RUN_DIR": str(home / "run")}
    began = perf_counter()
    subprocess.run([BIN / "capsem", *words], env=env, check=True, stdout=subprocess.DEVNULL)
    return milliseconds(began)


def measure(runs: int) -> tuple[list[Row], list[Row]]:
    """The ratios, and what explains them."""
    image = Catalog.from_environment(os.environ).find()
    data = os.urandom(SIZE)
    with contextlib.ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        home, local = directory / "home", directory / "ten"
        local.write_bytes(data)
        client, service_pid = stack.enter_context(service(home))
        accelerator = asyncio.run(QemuDriver(directory / "cache").accelerator())
        bare = Bare(image, directory, accelerator, 512, 1, spare_port=True)
        stack.callback(bare.end)
        port = stack.enter_context(floor(bare))
        client.call("provision", body={"name": "box", "ram_mb": 512, "cpus": 1})
        client.call("exec", vm_id="box", body={"command": "true"})
        supervisor, path = client.call("info", vm_id="box")["pid"], home / "run" / "service.sock"
        peaks = {"service": service_pid, "supervisor": supervisor}
        before = {name: status(pid, "VmHWM") for name, pid in peaks.items()}

        steps: dict[str, tuple[Callable[[], float], Callable[[], float]]] = {
            "HTTP in": (port.into, lambda: upload(path, data)),
            "HTTP out": (port.out_of, lambda: download(path, data)),
            "cp in": (port.into, lambda: command(home, "cp", str(local), "box:ten")),
            "cp out": (port.out_of, lambda: command(home, "cp", "box:ten", str(local))),
        }
        [vmm] = children(supervisor)
        cpu = {name: Row(f"10 MB, {name}: CPU of the VMM (ms)", [], []) for name in steps}
        rows = {name: Row(f"10 MB, {name} (ms)", [], [], "1.5 x") for name in steps}
        extra: dict[str, list[float]] = {"write and fsync in the guest": [], "capsem list as a process": []}
        for _ in range(runs):
            for name, (floor_of, ours_of) in steps.items():
                for pid, take, times, used in (
                    (bare.process.pid, floor_of, rows[name].floor, cpu[name].floor),
                    (vmm, ours_of, rows[name].ours, cpu[name].ours),
                ):
                    before_it = cpu_seconds(pid)
                    times.append(take())
                    used.append((cpu_seconds(pid) - before_it) * 1e3)
            extra["write and fsync in the guest"].append(port.durable())
            extra["capsem list as a process"].append(command(home, "list"))
        explained = [*cpu.values(), *(Row(f"{name} (ms)", times) for name, times in extra.items())]
        for name, pid in peaks.items():
            explained.append(Row(f"{name}: peak RSS before (MB)", [before[name]]))
            explained.append(Row(f"{name}: peak RSS after (MB)", [status(pid, "VmHWM")]))
        return list(rows.values()), explained


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=5, help="transfers of each kind (default 5)")
    ratios, explained = measure(parser.parse_args().runs)
    print(show(ratios), show(explained), sep="\n\n")


if __name__ == "__main__":
    main()
