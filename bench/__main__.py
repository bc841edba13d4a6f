"""`python -m bench [PART...]`: ours beside the floor and beside peers, one after the other in turn; then the page of it.

Ratios mean something, absolute times do not: the machine may be small, shared and noisy, so each of ours is taken right
beside a floor. What a part has found goes to bench/results/PART.json, with the machine and its load; `bench.report` makes
docs/benchmarks.md of these. Without a PART it is all of them; a part that is not asked for keeps what it has.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from bench import boots, checkpoints, density, egress, faces, mcp, peers, policy, proxy, report, session, transfer, warm
from bench.host import facts, service
from bench.table import Row, show
from capsem.hypervisor.driver import Accelerator
from capsem.hypervisor.qemu.driver import QemuDriver
from capsem.image.catalog import Catalog, Image


class Bench(NamedTuple):
    """What a part is given. `few`: so much shall be measured that one sees it works; `alone`: nothing is to be installed."""

    directory: Path
    image: Image
    accelerator: Accelerator
    peers: dict[str, peers.Peer]
    refused: dict[str, str]
    few: bool
    alone: bool

    def runs(self, usual: int) -> int:
        """How often, of what is usually done so often."""
        return max(2, usual // 4) if self.few else usual


def _boots(given: Bench) -> list[Row]:
    return boots.measure(given.directory, given.image, given.accelerator, given.peers, given.refused, given.runs(3))


def _warm(given: Bench) -> list[Row]:
    return warm.measure(given.directory, given.image, given.accelerator, given.runs(6))


def _checkpoints(given: Bench) -> list[Row]:
    with service(given.directory / "c", CAPSEM_MAX_CONCURRENT_VMS="100") as (client, _):
        return checkpoints.beside_the_floor(client, given.directory, given.accelerator, 512, given.runs(5))


def _pauses(given: Bench) -> list[Row]:
    with service(given.directory / "u") as (client, _):
        amounts = [0, 100] if given.few else [0, 1, 10, 100, 1000]
        return checkpoints.pauses(client, given.directory, given.accelerator, 2048, amounts)


def _forks(given: Bench) -> list[Row]:
    with service(given.directory / "f", CAPSEM_MAX_CONCURRENT_VMS="100") as (client, _):
        return checkpoints.forks(client, [1, 3] if given.few else [1, 10, 30])


def _growth(given: Bench) -> list[Row]:
    with service(given.directory / "g", CAPSEM_MAX_CONCURRENT_VMS="100") as (client, _):
        rows = []
        for ram_mb in (2048,) if given.few else (2048, 8192):  # four times and sixteen times what "checkpoints" has
            rows += checkpoints.beside_the_floor(client, given.directory, given.accelerator, ram_mb, given.runs(3))
        amounts = [1, 10] if given.few else [1, 10, 100, 1000]
        rows += checkpoints.by_change(client, given.directory, given.accelerator, amounts, given.runs(2))
        return rows + checkpoints.by_depth(client, [1, 3] if given.few else [1, 10, 50])


def _transfer(given: Bench) -> list[Row]:
    return transfer.measure(given.runs(5), 10_000_000, 512)[0]


def _large(given: Bench) -> list[Row]:
    return transfer.large(given.runs(4))


def _density(given: Bench) -> list[Row]:
    return density.measure(given.directory / "d", (1, 3) if given.few else density.COUNTS)


def _session(given: Bench) -> list[Row]:
    return session.measure(given.directory, given.image, given.accelerator, given.runs(2))


def _faces(given: Bench) -> list[Row]:
    return faces.measure(given.directory, given.runs(16))


def _mcp(given: Bench) -> list[Row]:
    return asyncio.run(mcp.measure(given.runs(100)))


def _list(given: Bench) -> list[Row]:
    return faces.at_a_rate(given.directory, given.runs(10))


def _egress(given: Bench) -> list[Row]:
    return egress.measure(given.directory, given.runs(5))


def _proxy(given: Bench) -> list[Row]:
    program = None
    try:
        if not given.alone:
            program = str(peers.install("mitmproxy", given.directory).with_name("mitmdump"))
    except peers.Refused as reason:
        given.refused["mitmproxy"] = str(reason)
    return proxy.rows(given.directory, given.runs(3), 1 if given.few else 4, program)


def _policy(_given: Bench) -> list[Row]:
    return policy.measure()


PARTS: dict[str, Callable[[Bench], list[Row]]] = {
    "boots": _boots,
    "warm": _warm,
    "checkpoints": _checkpoints,
    "pauses": _pauses,
    "growth": _growth,
    "forks": _forks,
    "transfer": _transfer,
    "large": _large,
    "density": _density,
    "session": _session,
    "faces": _faces,
    "mcp": _mcp,
    "list": _list,
    "policy": _policy,
    "proxy": _proxy,
    "egress": _egress,
}


def take(part: str, given: Bench) -> dict[str, object]:
    """What a part has found, and what it was found on."""
    load, began = os.getloadavg()[0], time.time()
    rows = PARTS[part](given)
    print(f"\n{part}\n\n{show(rows)}", flush=True)
    return {
        "when": time.strftime("%Y-%m-%d", time.gmtime(began)),
        "seconds": round(time.time() - began),
        "machine": {**facts(), "accelerator": given.accelerator.value},
        "load": [round(load, 1), round(os.getloadavg()[0], 1)],
        "refused": given.refused if part in ("boots", "proxy") else {},
        "rows": [row.to_json() for row in rows],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", nargs="*", metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--quick", action="store_true", help="few of each, and nothing is written")
    parser.add_argument("--no-peers", action="store_true", help="install nothing")
    arguments = parser.parse_args()
    wanted = arguments.part or list(PARTS)
    if unknown := set(wanted) - set(PARTS):
        parser.error(f"there is no part {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    with tempfile.TemporaryDirectory(prefix="bench") as text, contextlib.ExitStack() as stack:
        directory = Path(text)
        others = tuple(peers.PEERS) if "boots" in wanted and not arguments.no_peers else ()
        able, refused = stack.enter_context(peers.running(directory, others))
        for name, reason in refused.items():
            print(f"{name} is left out: {reason}", file=sys.stderr)
        image = Catalog.from_environment(os.environ).find()
        accelerator = asyncio.run(QemuDriver(directory / "cache").accelerator())
        for part in wanted:
            place = directory / part
            place.mkdir()
            found = take(part, Bench(place, image, accelerator, able, refused, arguments.quick, arguments.no_peers))
            if not arguments.quick:
                path = report.RESULTS / f"{part}.json"
                path.parent.mkdir(exist_ok=True)
                path.write_text(json.dumps(found, indent=1) + "\n")
    if not arguments.quick:
        report.write()


if __name__ == "__main__":
    main()
