"""`python -m bench boots`: from nothing to the first exec, an exec of nothing, and one with much output.

Floors: from QEMU's exec to the agent's first byte; a word through a bare port to a Python in the guest that spawns
`bash -c true` and waits for it; the same with `head`, whose output is the port. Peers run the same commands.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

from bench.bare import BareMachine
from bench.floor import Bare
from bench.host import in_turn, milliseconds, service
from bench.peers import Peer, Refused
from bench.table import Row
from capsem.client.sync import Client
from capsem.hypervisor.driver import Accelerator
from capsem.image.catalog import Image

RAM_MB = 512
OUTPUT = 10_000_000  # bytes
LONG = 20_000.0  # milliseconds
WRITE = f"head -c {OUTPUT} /dev/zero"


def timed(step: Callable[[], object]) -> float:
    """Milliseconds that it takes."""
    began = time.perf_counter()
    step()
    return milliseconds(began)


def cold(client: Client) -> float:
    """Milliseconds of a boot to the end of the first exec."""
    began = time.perf_counter()
    vm_id = client.call("provision", body={"ram_mb": RAM_MB, "cpus": 1, "cold": True})["id"]
    client.call("exec", vm_id=vm_id, body={"command": "true"})
    took = milliseconds(began)
    client.call("delete", vm_id=vm_id)
    return took


def bare_boot(image: Image, accelerator: Accelerator, directory: Path) -> float:
    """Milliseconds to the agent's first byte."""
    bare = Bare(image, directory, accelerator, RAM_MB, 1)
    try:
        return bare.first_byte()
    finally:
        bare.end()


def output(client: Client) -> None:
    """All of it, as it comes."""
    with client.stream("box", {"command": WRITE}) as stream:
        assert sum(len(data) for _, data in stream) == OUTPUT


def row(name: str, found: dict[str, list[float]], target: str) -> Row:
    """Of times by who took them; all that are neither ours nor the floor's are peers'."""
    peers = {who: times for who, times in found.items() if who not in ("ours", "floor")}
    return Row(name, found["ours"], found["floor"], target, peers)


def willing(peers: Mapping[str, Peer], command: str, refused: dict[str, str]) -> dict[str, Peer]:
    """Those that have just run it; of the others, what they said."""
    able = {}
    for name, peer in peers.items():
        try:
            peer.run(command)
            able[name] = peer
        except Refused as reason:
            refused[f"{name} ({command})"] = str(reason)
    return able


def booting(
    client: Client, image: Image, accelerator: Accelerator, directory: Path, peers: Mapping[str, Peer], runs: int
) -> Row:
    """The first row. A peer that takes long is not booted again."""
    own: dict[str, Callable[[], float]] = {
        "ours": lambda: cold(client),
        "floor": lambda: bare_boot(image, accelerator, directory),
    }
    quick = {name: peer.boot for name, peer in peers.items() if peer.booted < LONG}
    found = in_turn(runs, own | quick)
    for name, peer in peers.items():
        found[name] = [peer.booted, *found.get(name, [])]
    return row(f"cold create to first exec, {RAM_MB} MiB (ms)", found, "1.5 x, under 7 s")


def commanding(
    client: Client, bare: BareMachine, peers: Mapping[str, Peer], refused: dict[str, str], runs: int
) -> list[Row]:
    """The others, in machines that run."""
    commands: list[tuple[str, str, int, dict[str, Callable[[], object]], str]] = [
        (
            "exec true (ms)",
            "true",
            20 * runs,
            {
                "ours": lambda: client.call("exec", vm_id="box", body={"command": "true"}),
                "floor": lambda: bare.do("true"),
            },
            "1.5 x",
        ),
        (
            "exec with 10 MB of output (ms)",
            WRITE,
            2 * runs,
            {"ours": lambda: output(client), "floor": lambda: bare.output(WRITE, OUTPUT)},
            "",
        ),
    ]
    rows = []
    for name, command, times, steps, target in commands:
        timers: dict[str, Callable[[], float]] = {who: partial(timed, step) for who, step in steps.items()}
        timers |= {who: partial(peer.run, command) for who, peer in willing(peers, command, refused).items()}
        in_turn(2, timers)  # the emulator has to have met each instruction once
        rows.append(row(name, in_turn(times, timers), target))
    return rows


def measure(
    directory: Path,
    image: Image,
    accelerator: Accelerator,
    peers: Mapping[str, Peer],
    refused: dict[str, str],
    runs: int,
) -> list[Row]:
    """All rows; `refused` gets to know what a peer did not do."""
    with contextlib.ExitStack() as stack:
        client, _ = stack.enter_context(service(directory / "boots"))
        first = booting(client, image, accelerator, directory, peers, runs)
        bare = BareMachine(image, directory, accelerator, RAM_MB)
        stack.callback(bare.close)
        client.call("provision", body={"name": "box", "ram_mb": RAM_MB, "cpus": 1})
        return [first, *commanding(client, bare, peers, refused, runs)]
