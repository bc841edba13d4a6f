"""A service of its own for a measurement, what its processes use, and what machine all of it was taken on."""

from __future__ import annotations

import contextlib
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from capsem.client.sync import Client
from capsem.model.errors import CapsemError

BIN = Path(sys.executable).parent


def environment(home: Path) -> dict[str, str]:
    """For a process that is to speak to the service whose state is in `home`."""
    return {**os.environ, "CAPSEM_HOME": str(home), "CAPSEM_RUN_DIR": str(home / "run")}


@contextlib.contextmanager
def service(directory: Path, **more: str) -> Iterator[tuple[Client, int]]:
    """A service of its own, with `more` in its environment; its client and process id."""
    process = subprocess.Popen([BIN / "capsem-service", "--foreground"], env={**environment(directory), **more})
    client = Client(directory / "run" / "service.sock")
    try:
        while True:
            with contextlib.suppress(CapsemError):  # it is not there yet
                client.call("version")
                break
            if process.poll() is not None:
                raise RuntimeError(f"capsem-service ended with status {process.returncode}")
            time.sleep(0.02)
        yield client, process.pid
    finally:
        process.terminate()
        process.wait(20)


def command(home: Path, *words: str) -> float:
    """Milliseconds of `capsem` as a process."""
    began = time.perf_counter()
    subprocess.run([BIN / "capsem", *words], env=environment(home), check=True, stdout=subprocess.DEVNULL)
    return milliseconds(began)


def status(pid: int, key: str) -> float:
    """A field of /proc/<pid>/status in MB."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) / 1024
    raise KeyError(key)


def cpu_seconds(pid: int) -> float:
    """CPU time that a process has used."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def milliseconds(began: float) -> float:
    """Since `began`."""
    return (time.perf_counter() - began) * 1e3


def in_turn(runs: int, steps: Mapping[str, Callable[[], float]]) -> dict[str, list[float]]:
    """What each step says, `runs` times: A B A B, and every other round from the end, so that none is always first."""
    found: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(runs):
        for name in list(steps)[:: -1 if number % 2 else 1]:
            found[name].append(steps[name]())
    return found


def facts() -> dict[str, Any]:
    """What machine this is."""
    models = (line.partition(":")[2] for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line)
    qemu = subprocess.run(["qemu-system-x86_64", "--version"], capture_output=True, text=True, check=True).stdout
    return {
        "cpus": f"{os.cpu_count()} x {next(models, 'unknown').strip()}",
        "memory_gib": round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "qemu": qemu.split()[3],
    }
