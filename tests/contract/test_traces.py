"""A request with an id in its header is seen through: by service, supervisor and guest, in one place."""

from __future__ import annotations

import http.client
import json
import os
import socket
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from served_world import served_world

from capsem import tracing
from capsem.model.errors import InvalidInput, NotFound
from capsem.service import traces
from capsem.service.traces import Traces

ONE, TWO = "1" * 32, "2" * 32


@pytest.fixture(scope="module")
def service() -> Iterator[str]:
    with served_world() as path:
        yield path


def ask(service: str, method: str, path: str, trace: str | None = None, **body: object) -> tuple[int, Any]:
    connection = http.client.HTTPConnection("localhost")
    connection.sock = socket.socket(socket.AF_UNIX)
    connection.sock.connect(service)
    headers = {"Content-Type": "application/json", **({tracing.HEADER: trace} if trace else {})}
    connection.request(method, path, json.dumps(body), headers)
    answer = connection.getresponse()
    try:
        return answer.status, json.loads(answer.read())
    finally:
        connection.close()


def work(service: str, trace: str) -> dict[str, list[dict[str, Any]]]:
    """By process: what it did, in the order of the beginnings."""
    status, answer = ask(service, "GET", f"/trace/{trace}")
    assert status == 200, answer
    events = answer["events"]
    names = {event["pid"]: event["args"]["name"] for event in events if event["name"] == "process_name"}
    found = defaultdict(list)
    for event in sorted(events, key=lambda event: event["ts"]):
        if event["ph"] == "X":
            found[names[event["pid"]]].append(event)
    return found


def test_a_create_and_a_command(service: str) -> None:
    assert ask(service, "POST", "/provision", ONE, name="box", ram_mb=256, cpus=1)[0] == 200
    assert ask(service, "POST", "/exec/box", ONE, command="true")[0] == 200
    assert ask(service, "POST", "/exec/box", TWO, command="sleep 0.2")[0] == 200
    found = work(service, ONE)
    # Service and supervisor are one process here, and the last that spoke gave it its name.
    host = [event for name, events in found.items() for event in events if not name.startswith("guest of")]
    steps = [event["name"] for event in host]
    for step in ("POST /provision", "write the record", "let the vCPUs run", "handshake", "POST /exec/box", "exec"):
        assert step in steps
    assert steps.index("POST /provision") < steps.index("handshake") < steps.index("exec")
    assert "run the command" in [event["name"] for event in found["guest of box"]]
    other = work(service, TWO)
    assert "POST /provision" not in [event["name"] for events in other.values() for event in events]
    [command] = [event for event in other["guest of box"] if event["name"] == "run the command"]
    assert command["dur"] >= 200_000


def test_who_wants_no_trace_leaves_none(service: str) -> None:
    other = "4" * 32
    assert ask(service, "GET", "/list", other)[0] == 200
    assert ask(service, "GET", "/version")[0] == 200
    steps = [event["name"] for events in work(service, other).values() for event in events]
    assert steps == ["GET /list"]
    status, answer = ask(service, "GET", f"/trace/{'3' * 32}")
    assert (status, answer["code"]) == (404, "not_found")


@pytest.mark.parametrize("trace", ["1", "x" * 32, "../../../../etc/passwd"])
def test_a_bad_id_is_refused_before_anything_is_done(service: str, trace: str) -> None:
    status, answer = ask(service, "POST", "/provision", trace, name="bad")
    assert (status, answer["code"]) == (400, "invalid_input")
    assert ask(service, "GET", "/info/bad")[0] == 404


def test_older_ones_go(tmp_path: Path) -> None:
    kept = Traces(tmp_path / "traces")
    ids = [f"{number:032x}" for number in range(traces.KEPT + 3)]
    for age, each in enumerate(ids):
        kept.open(each).close()
        os.utime(tmp_path / "traces" / f"{each}.jsonl", (age, age))
    assert sorted(path.stem for path in (tmp_path / "traces").iterdir()) == ids[3:]
    with pytest.raises(NotFound):
        kept.read(ids[0])
    with pytest.raises(InvalidInput):
        kept.read("..")
    (tmp_path / "traces" / f"{ids[-1]}.jsonl").write_text('{"name": "a"}\n{"name": "b')
    assert kept.read(ids[-1]).events == [{"name": "a"}]
