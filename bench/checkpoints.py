"""`python -m bench.checkpoints`: suspend, resume, live fork and the pause of a checkpoint, beside QEMU alone doing the same.

The floors (bench.bare), each run beside ours in turn on the same host:

    suspend   stop, device state, the pages that the guest has changed, fsync of all that is kept, quit and reaped; a second
              one before all that has the guest flush its file systems, as ours has, and ask for nothing else
    resume    a new layer, QEMU started and the state taken in, cont, and the end of the first `bash -c true` in the guest; a
              second one whose guest before that takes the time and entropy, reads, writes and flushes a block of its
              volume, and reads its kernel's log, as ours has to, and nothing else
    pause     stop, a new layer, device state, the changed pages copied into memory that is there, cont

Then how ours grows: with RAM, with what the guest has changed, with the depth of the layer chain, with the number of forks.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.bare import BareMachine
from bench.host import milliseconds, service
from bench.table import Row, show
from capsem.client.sync import Client
from capsem.hypervisor.driver import Accelerator
from capsem.hypervisor.qemu.driver import QemuDriver
from capsem.image.catalog import Catalog

DIRTY = "head -c %dMB /dev/urandom > /dev/shm/dirty"  # half of the guest's memory fits: of 2048 MiB, 1000 MB do
SETTLE = 2.5  # seconds between measurements, for what goes on in the background to end


def vmm(client: Client, vm_id: str) -> int:
    """The process id of a VM's QEMU."""
    supervisor = client.call("info", vm_id=vm_id)["pid"]
    return int(Path(f"/proc/{supervisor}/task/{supervisor}/children").read_text().split()[0])


def cpu(pid: int) -> float:
    """Milliseconds of processor time that a process has used; finer than its ticks."""
    spent = (path.read_text().split()[0] for path in Path(f"/proc/{pid}/task").glob("*/schedstat"))
    return sum(map(int, spent)) / 1e6


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


def beside_the_floor(client: Client, directory: Path, accelerator: Accelerator, ram_mb: int, runs: int) -> list[Row]:
    """Suspend, resume and live fork of one size, little changed since the last time."""
    floor, vm_id = BareMachine(Catalog.from_environment(os.environ).find(), directory, accelerator, ram_mb), "box"
    floor.do("true; sync")
    _, point = floor.suspend()
    client.call("provision", body={"name": vm_id, "persistent": True, "ram_mb": ram_mb, "cpus": 1})
    client.call("exec", vm_id=vm_id, body={"command": "true"})
    cycle(client, vm_id)
    suspends, resumes, forks, used = ([[], []] for _ in range(4))  # ours, the floor's
    flushed, examined = [], []
    for _ in range(runs):
        examined.append(floor.resume(point, examine=True))
        time.sleep(SETTLE)
        took, point = floor.suspend(flush=True)
        flushed.append(took)
        time.sleep(SETTLE)
        resumes[1].append(floor.resume(point))
        used[1].append(cpu(floor.pid))
        time.sleep(SETTLE)
        took, point = floor.suspend()
        suspends[1].append(took)
        time.sleep(SETTLE)
        suspended, resumed, _ = cycle(client, vm_id)
        used[0].append(cpu(vmm(client, vm_id)))
        suspends[0].append(suspended)
        resumes[0].append(resumed)
    for resumed in resumes[0]:
        time.sleep(SETTLE)
        began = time.perf_counter()
        client.call("fork", vm_id=vm_id, body={"name": "child", "live": True})
        client.call("exec", vm_id="child", body={"command": "true"})
        forks[0].append(milliseconds(began))
        forks[1].append(resumed)
        client.call("delete", vm_id="child")
    client.call("delete", vm_id=vm_id)
    return [
        Row(f"suspend, {ram_mb} MiB (ms)", *suspends, "1.3 x"),
        Row("  the same, beside a floor whose guest is flushed (ms)", suspends[0], flushed),
        Row(f"resume to first exec, {ram_mb} MiB (ms)", *resumes, "1.3 x, under 500"),
        Row("  of that, the VMM's processor time (ms)", *used),
        Row("  the same, beside a floor whose guest is examined (ms)", resumes[0], examined),
        Row(f"live fork to first exec beside resume, {ram_mb} MiB (ms)", *forks, "1.3 x"),
    ]


def pauses(client: Client, directory: Path, accelerator: Accelerator, ram_mb: int, amounts: Sequence[int]) -> list[Row]:
    """The pause of a checkpoint of a running VM, by what it has changed."""
    image = Catalog.from_environment(os.environ).find()
    rows = []
    for megabytes in amounts:
        floors, ours, vm_id = [], [], "paused"
        with contextlib.closing(BareMachine(image, directory, accelerator, ram_mb)) as floor:
            floor.do(f"{DIRTY % megabytes if megabytes else 'true'}; sync")
            client.call(
                "provision", body={"name": vm_id, "persistent": True, "ram_mb": ram_mb, "cpus": 1, "cold": True}
            )
            dirty(client, vm_id, megabytes)
            for _ in range(3):
                floors.append(floor.pause())
                ours.append(client.call("checkpoint", vm_id=vm_id, body={})["pause_ms"])
        client.call("delete", vm_id=vm_id)
        target = "1.5 x" + {100: ", under 60", 1000: ", under 350"}.get(megabytes, "")
        name = f"pause of a checkpoint, {ram_mb} MiB, {megabytes} MB changed since a cold boot (ms)"
        rows.append(Row(name, ours, floors, target))
    return rows


def by_change(
    client: Client, directory: Path, accelerator: Accelerator, amounts: Sequence[int], runs: int
) -> list[Row]:
    """A suspend by what the guest has changed since the resume."""
    rows, vm_id = [], "changed"
    with contextlib.closing(
        BareMachine(Catalog.from_environment(os.environ).find(), directory, accelerator, 2048)
    ) as floor:
        floor.do("true; sync")
        _, point = floor.suspend()
        client.call("provision", body={"name": vm_id, "persistent": True, "ram_mb": 2048, "cpus": 1})
        client.call("exec", vm_id=vm_id, body={"command": "true"})
        cycle(client, vm_id)
        for megabytes in amounts:
            ours, floors = [], []
            for _ in range(runs):
                floor.resume(point)
                floor.do(DIRTY % megabytes)
                time.sleep(SETTLE)
                took, point = floor.suspend()
                floors.append(took)
                dirty(client, vm_id, megabytes)
                time.sleep(SETTLE)
                ours.append(cycle(client, vm_id)[0])
            rows.append(Row(f"suspend, 2048 MiB, {megabytes} MB changed since the resume (ms)", ours, floors))
    client.call("delete", vm_id=vm_id)
    return rows


def by_depth(client: Client, depths: Sequence[int]) -> list[Row]:
    """A resume by the depth of the chain."""
    rows, vm_id = [], "deep"
    client.call("provision", body={"name": vm_id, "persistent": True, "ram_mb": 512, "cpus": 1})
    client.call("exec", vm_id=vm_id, body={"command": "true"})
    for depth in depths:
        while len(client.call("checkpoints", vm_id=vm_id)["checkpoints"]) < depth:
            client.call("checkpoint", vm_id=vm_id, body={})
        taken = []
        for _ in range(3):
            time.sleep(SETTLE)
            taken.append(cycle(client, vm_id)[1])
        rows.append(Row(f"resume to first exec, {depth} checkpoints deep (ms)", taken))
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
        rows.append(Row(f"{count} live forks: all ready (ms)", [took]))
        rows.append(
            Row(
                f"{count} live forks: Private_Dirty of each QEMU (MB)",
                [private_dirty(vmm(client, name)) for name in names],
                (),
                "under 50",
            )
        )
        for name in names:
            client.call("delete", vm_id=name)
    client.call("delete", vm_id=vm_id)
    return rows


def said(rows: list[Row]) -> None:
    """Show what was found at once: what comes later may fail."""
    print(show(rows), end="\n\n", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--ram", type=int, nargs="+", default=[512, 2048, 8192], help="MiB")
    parser.add_argument("--dirty", type=int, nargs="+", default=[1, 10, 100, 1000], help="MB")
    parser.add_argument("--depth", type=int, nargs="+", default=[1, 10, 50])
    parser.add_argument("--forks", type=int, nargs="+", default=[1, 10, 30])
    parser.add_argument("--only", choices=("floor", "pause", "change", "depth", "forks"), action="append")
    arguments = parser.parse_args()
    wanted = arguments.only or ["floor", "pause", "change", "depth", "forks"]
    os.environ["CAPSEM_MAX_CONCURRENT_VMS"] = "100"  # for the service below
    with tempfile.TemporaryDirectory() as text, service(Path(text) / "home") as (client, _pid):
        directory = Path(text)
        accelerator = asyncio.run(QemuDriver(directory / "cache").accelerator())
        if "floor" in wanted:
            for ram_mb in arguments.ram:
                said(beside_the_floor(client, directory, accelerator, ram_mb, arguments.runs))
        if "pause" in wanted:
            for megabytes in (0, *arguments.dirty):
                said(pauses(client, directory, accelerator, 2048, [megabytes]))
        if "change" in wanted:
            said(by_change(client, directory, accelerator, arguments.dirty, arguments.runs))
        if "depth" in wanted:
            said(by_depth(client, arguments.depth))
        if "forks" in wanted:
            said(forks(client, arguments.forks))


if __name__ == "__main__":
    main()
