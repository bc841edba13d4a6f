"""A trace shows all four processes of a command, each in its place within the one that waited for it."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

from real_service import Service


def test_a_command_through_all_processes(service: Service, box: str, tmp_path: Path) -> None:
    file = tmp_path / "trace.json"
    assert service.cli("--trace", str(file), "exec", box, "sleep 0.3").returncode == 0
    events = json.loads(file.read_text())["traceEvents"]
    names = {event["pid"]: event["args"]["name"] for event in events if event["name"] == "process_name"}
    spans = {(names[event["pid"]], event["name"]): event for event in events if event["ph"] == "X"}
    chain = [
        ("capsem", "stream"),
        ("capsem-service", f"POST /exec/{box}/stream"),
        (f"capsem-process {box}", "exec"),
        (f"guest of {box}", "run the command"),
    ]
    assert set(chain) <= set(spans)
    for outer, inner in itertools.pairwise(chain):
        assert spans[outer]["ts"] <= spans[inner]["ts"], (outer, inner)
    # A service may still be closing its answer when the client has the whole of it: ends are those of the command.
    command = spans[chain[-1]]
    assert command["dur"] >= 300_000
    for outer in chain[:-1]:
        assert spans[outer]["ts"] + spans[outer]["dur"] >= command["ts"] + command["dur"], outer
    assert len({event["pid"] for event in events if event["ph"] == "X"}) == 4
    # What comes next is none of its business.
    [kept] = (service.run_dir / "traces").glob("*.jsonl")
    size = kept.stat().st_size
    assert service.cli("exec", box, "true").returncode == 0
    assert kept.stat().st_size == size
