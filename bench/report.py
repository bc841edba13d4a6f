"""docs/benchmarks.md and its pictures, of what lies in bench/results: `python -m bench.report` makes them anew."""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bench import plot
from bench.table import Row, spread

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "bench" / "results"
PAGE = ROOT / "docs" / "benchmarks.md"
PICTURES = ROOT / "docs" / "benchmarks"

TITLES = {
    "boots": "From nothing to a command",
    "warm": "From a template, and from the pool",
    "checkpoints": "Suspend, resume, fork",
    "pauses": "The pause of a checkpoint",
    "growth": "How suspends and resumes grow",
    "forks": "Many forks of one VM",
    "transfer": "10 MB in and out",
    "large": "100 MB in and out",
    "density": "Idle VMs",
    "session": "A session of an agent",
    "faces": "The command line, the record, and the processes",
    "mcp": "MCP beside HTTP",
    "list": "Many requests",
    "policy": "Verdicts of a network policy",
    "proxy": "The proxy alone",
    "egress": "The network, from a VM",
}

HEAD = """\
# Benchmarks

Made by `make bench` ([what is measured and how](performance.md)); `python -m bench PART` does one part anew, `--quick`
looks whether it works. Everything here was taken **without KVM**: guests are emulated, so absolute times say little about
your machine. Look at the ratios: *ours* and the *floor*, QEMU alone run by the barest script that does the same, were
taken in turn, one after the other. Every figure is a median, with the least and the most beside it in brackets. *Load*
is how many processes wanted a core when the part began and when it ended; it includes the part's own, and what others
did on the machine meanwhile.
"""


def results() -> dict[str, dict[str, Any]]:
    """What there is, by part."""
    found = {part: RESULTS / f"{part}.json" for part in TITLES}
    return {part: json.loads(path.read_text()) for part, path in found.items() if path.exists()}


def rows_of(result: Mapping[str, Any]) -> list[Row]:
    """Its rows."""
    return [Row.from_json(row) for row in result["rows"]]


def _cell(text: str) -> str:
    return text.strip().replace("|", "\\|")


def _table(rows: list[Row]) -> list[str]:
    peers = list(dict.fromkeys(name for row in rows for name in row.peers))
    heads = ["", "ours", "floor", "ratio", "to reach", *peers]
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for row in rows:
        ratio = "" if row.ratio is None else f"{row.ratio:.2f}"
        others = [spread(row.peers[name]) if name in row.peers else "" for name in peers]
        floor = spread(row.floor) if row.floor else ""
        lines.append(
            "| " + " | ".join(map(_cell, [row.name, spread(row.ours), floor, ratio, row.target, *others])) + " |"
        )
    return lines


def pictures(found: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """Name -> SVG."""
    rows = [row for result in found.values() for row in rows_of(result)]
    made = {}
    dots = []
    for row in rows:
        if row.ratio is not None:
            middle = statistics.median(row.floor)
            dots.append(plot.Dot(row.name.strip(), row.ratio, min(row.ours) / middle, max(row.ours) / middle))
    if dots:
        made["ratios"] = plot.ratios("Ours, as a multiple of QEMU alone", dots)
    pauses: dict[str, list[tuple[float, float]]] = {"ours": [], "QEMU alone": []}
    memory: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        if said := re.fullmatch(r"pause of a checkpoint, .* (\d+) MB changed.*", row.name):
            pauses["ours"].append((int(said[1]), statistics.median(row.ours)))
            pauses["QEMU alone"].append((int(said[1]), statistics.median(row.floor)))
        elif said := re.fullmatch(r"PSS of each (.*), (\d+) VMs \(MB\)", row.name):
            memory.setdefault(said[1], []).append((int(said[2]), statistics.median(row.ours)))
    if pauses["ours"]:
        made["pauses"] = plot.lines("The pause of a checkpoint", "MB changed by the guest", "ms", pauses)
    if memory:
        made["memory"] = plot.lines("Memory of each idle VM (PSS)", "VMs at once", "MB", memory)
    return made


SHOWN_IN = {"pauses": "pauses", "memory": "density"}


def page(found: Mapping[str, Mapping[str, Any]]) -> str:
    """The page."""
    drawn = pictures(found)
    lines = [HEAD]
    if "ratios" in drawn:
        lines.append("![Ours as a multiple of QEMU alone](benchmarks/ratios.svg)\n")
    for part, result in found.items():
        machine, load = result["machine"], result["load"]
        lines.append(f"## {TITLES[part]}\n")
        lines += [*_table(rows_of(result)), ""]
        lines += [
            f"![{part}](benchmarks/{name}.svg)\n" for name, where in SHOWN_IN.items() if where == part and name in drawn
        ]
        for name, reason in result["refused"].items():
            lines.append(f"- {name} could not take part: {_cell(reason)}")
        lines += [""] if result["refused"] else []
        lines.append(
            f"`python -m bench {part}`, {result['when']}, {result['seconds']} s; load {load[0]} to {load[1]}; "
            f"{machine['cpus']}, {machine['memory_gib']} GiB, Linux {machine['kernel']}, QEMU {machine['qemu']} "
            f"({machine['accelerator']}), Python {machine['python']}.\n"
        )
    return "\n".join(lines)


def write() -> None:
    """The page and its pictures."""
    found = results()
    PICTURES.mkdir(exist_ok=True)
    for name, drawn in pictures(found).items():
        (PICTURES / f"{name}.svg").write_text(drawn)
    PAGE.write_text(page(found))


if __name__ == "__main__":
    write()
