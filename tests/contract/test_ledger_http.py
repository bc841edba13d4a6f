"""What happened in a VM, over HTTP and through the command line."""

from __future__ import annotations

import asyncio
import base64
import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import uvicorn

from capsem.api.vm_types import ProvisionRequest
from capsem.client.sync import Client
from capsem.model.errors import CapsemError, InvalidInput, NotFound, NotRunning, QueryFailed
from capsem.service.app import build_app
from service_world import world

CAPSEM = Path(sys.executable).parent / "capsem"


class Live:
    """A service on a socket, with a VM that has done something, and one that is off."""

    def __init__(self, socket: Path, run_dir: Path) -> None:
        self.client = Client(socket)
        self.run_dir = run_dir

    def cli(self, *words: str) -> tuple[int, str, str]:
        done = subprocess.run(
            [CAPSEM, "--uds-path", self.client.uds_path, *words], capture_output=True, timeout=60, text=True
        )
        return done.returncode, done.stdout, done.stderr


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    directory = tmp_path_factory.mktemp("live")
    ready, over = threading.Event(), threading.Event()
    path = directory / "service.sock"

    async def run() -> None:
        async with world(directory) as it:
            app = build_app(it.handlers, "1")
            config = uvicorn.Config(app, uds=str(path), loop="asyncio", log_config=None, lifespan="off")
            server = uvicorn.Server(config)
            serving = asyncio.create_task(server.serve())
            while not server.started:
                await asyncio.sleep(0.005)
            await it.handlers.provision(ProvisionRequest(name="off", persistent=True))
            await it.handlers.stop("off")
            await it.handlers.provision(ProvisionRequest(name="box", persistent=True))
            ready.set()
            await asyncio.to_thread(over.wait)
            server.should_exit = True
            await serving

    thread = threading.Thread(target=asyncio.run, args=(run(),))
    thread.start()
    assert ready.wait(30)
    live = Live(path, directory / "run")
    for command in ("echo one", "echo 'two & 50% of three' >&2; exit 3"):
        live.client.call("exec", vm_id="box", body={"command": command})
    live.client.call("write_file", vm_id="box", body={"path": "a.txt", "content": "hello"})
    yield live
    over.set()
    thread.join(30)
    assert not thread.is_alive()


def test_history(live: Live) -> None:
    answer = live.client.call("history", vm_id="box", query={"limit": "1", "layer": "exec", "search": "& 50% of"})
    assert (answer["total"], answer["has_more"]) == (1, False)
    (command,) = answer["commands"]
    assert command.keys() == {
        "timestamp", "layer", "command", "exit_code", "duration_ms", "stdout_preview", "stderr_preview", "details",
    }  # fmt: skip
    assert (command["exit_code"], command["stderr_preview"]) == (3, "two & 50% of three\n")
    assert live.client.call("history_counts", vm_id="box") == {"exec_count": 2, "audit_count": 2}
    (program,) = live.client.call("history_processes", vm_id="box")["processes"]
    assert program.keys() == {"exe", "command_count", "first_seen", "last_seen"}
    audit = live.client.call("history", vm_id="box", query={"layer": "audit"})["commands"]
    assert [(each["command"], each["exit_code"]) for each in audit][-1] == ("bash -c echo one", None)


def test_timeline(live: Live) -> None:
    answer = live.client.call("timeline", vm_id="box", query={"since": "1h", "limit": "2"})
    assert answer["columns"] == ["timestamp", "layer", "ref", "summary", "status", "duration_ms", "trace_id"]
    assert [(row[1], row[3], row[4]) for row in answer["rows"]] == [
        ("exec", "echo 'two & 50% of three' >&2; exit 3", "exit 3"),
        ("fs", "/root/a.txt", "created"),
    ]
    begin = answer["rows"][1][0].replace("Z", "+00:00")
    answer = live.client.call("timeline", vm_id="box", query={"since": begin})
    assert [row[1] for row in answer["rows"]] == ["fs"]


def test_transcript(live: Live) -> None:
    assert live.client.call("transcript", vm_id="box") == {"content": "", "bytes": 0}
    (live.run_dir / "persistent" / "off" / "pty.log").write_bytes(b"$ ls\r\n\xff\r\n")
    answer = live.client.call("transcript", vm_id="off", query={"tail_lines": "1"})
    assert (base64.b64decode(answer["content"]), answer["bytes"]) == (b"\xff\r\n", 3)


def test_inspect(live: Live) -> None:
    answer = live.client.call("inspect", vm_id="box", body={"sql": "SELECT path, size FROM fs_events"})
    assert answer == {"columns": ["path", "size"], "rows": [["/root/a.txt", 5]]}
    answer = live.client.call("inspect", vm_id="_main", body={"sql": "SELECT name FROM sessions ORDER BY name"})
    assert answer["rows"] == [["box"], ["off"]]
    for vm_id, sql, error in (
        ("box", "DROP TABLE exec_events", QueryFailed),
        ("box", "SELECT x", QueryFailed),
        ("off", "SELECT 1", NotRunning),
        ("ghost", "SELECT 1", NotFound),
        ("_other", "SELECT 1", InvalidInput),
    ):
        with pytest.raises(error) as caught:
            live.client.call("inspect", vm_id=vm_id, body={"sql": sql})
        assert caught.value.hint


def test_stats(live: Live) -> None:
    answer = live.client.call("stats")
    assert answer["global"].keys() == {
        "total_sessions", "total_input_tokens", "total_output_tokens", "total_estimated_cost", "total_tool_calls",
        "total_mcp_calls", "total_file_events", "total_requests", "total_allowed", "total_denied",
    }  # fmt: skip
    assert (answer["global"]["total_sessions"], answer["global"]["total_file_events"]) == (2, 1)
    assert [each["id"] for each in answer["sessions"]] == ["box", "off"]
    info = live.client.call("info", vm_id="box")
    assert (info["total_file_events"], info["total_requests"]) == (1, 0)
    assert None not in info.values()


def test_logs_and_triage(live: Live) -> None:
    (live.run_dir / "mcp.log").write_text("one & two\n+three\nfour\n")
    assert live.client.fetch("host_logs", vm_id="mcp", query={"grep": "& T"}) == b"one & two\n"
    assert live.client.fetch("host_logs", vm_id="mcp", query={"grep": "+", "tail": "5"}) == b"+three\n"
    answer = live.client.call("triage", query={"id": "box", "since": "1h"})
    assert answer.keys() == {"since", "session_id", "host", "session", "rank"}
    assert answer["host"].keys() == {"panics", "errors", "slow_ops"}
    assert [each["exit_code"] for each in answer["session"]["failed_commands"]] == [3]
    assert [each["kind"] for each in answer["rank"]] == ["command"]
    answer = live.client.call("triage")
    assert (answer["session_id"], answer["session"]) == (None, None)
    assert live.client.call("panics", query={"limit": "5"}) == {"panics": []}


@pytest.mark.parametrize(
    ("operation", "vm_id", "query"),
    [
        ("history", "box", {"limit": "0"}),
        ("history", "box", {"limit": "many"}),
        ("history", "box", {"offset": "-1"}),
        ("history", "box", {"offset": str(1 << 80)}),
        ("history", "box", {"layer": "secrets"}),
        ("timeline", "box", {"layers": "exec,secrets"}),
        ("timeline", "box", {"since": "yesterday"}),
        ("transcript", "box", {"tail_lines": "-1"}),
        ("host_logs", "passwd", {}),
        ("host_logs", "../service", {}),
        ("host_logs", "mcp", {"max_bytes": "0"}),
        ("triage", None, {"since": "0"}),
        ("triage", None, {"id": "../x"}),
        ("panics", None, {"limit": "-5"}),
    ],
)
def test_bad_queries(live: Live, operation: str, vm_id: str | None, query: dict[str, str]) -> None:
    with pytest.raises(CapsemError) as caught:
        live.client.fetch(operation, vm_id=vm_id, query=query)
    assert (caught.value.status, bool(caught.value.hint)) in ((400, True), (404, True))


def test_the_command_line(live: Live) -> None:
    code, out, err = live.cli("history", "box", "--layer", "exec")
    assert (code, err) == (0, "")
    head, first, second = out.splitlines()
    assert head.split() == ["TIME", "LAYER", "EXIT", "MS", "COMMAND"]
    assert first.endswith("echo one")
    assert second.split()[2:4] == ["exec", "3"]
    code, out, _ = live.cli("history", "box", "--json", "--tail", "1", "--layer", "exec")
    assert [each["exit_code"] for each in json.loads(out)["commands"]] == [3]
    code, out, _ = live.cli("history", "box", "--all", "--json")
    assert len(json.loads(out)["commands"]) == 4
    assert live.cli("history", "off") == (0, "No commands.\n", "")
    code, out, _ = live.cli("timeline", "box", "--layers", "fs")
    assert out.splitlines()[1].split()[2:] == ["fs", "created", "-", "/root/a.txt"]
    assert live.cli("inspect", "box", "SELECT path, NULL AS n FROM fs_events") == (
        0, "path         n\n/root/a.txt  NULL\n", "",
    )  # fmt: skip
    code, out, _ = live.cli("inspect", "_main", "SELECT count(*) AS n FROM sessions")
    assert (code, out) == (0, "n\n2\n")
    code, out, err = live.cli("inspect", "box", "DELETE FROM fs_events")
    assert (code, out) == (2, "")
    assert "error: the query failed" in err
    code, out, _ = live.cli("stats")
    assert ["sessions", "2"] in [line.split() for line in out.splitlines()]
    code, out, _ = live.cli("triage", "box")
    assert code == 0
    assert out.startswith("box: Running\n")
    assert live.cli("panics") == (0, "No panics.\n", "")
    (live.run_dir / "mcp.log").write_text("one & two\nthree\n")
    assert live.cli("host-logs", "mcp", "--grep", "& T") == (0, "one & two\n", "")
    for words in (("history", "ghost"), ("timeline", "box", "--since", "x"), ("host-logs", "passwd")):
        code, out, err = live.cli(*words)
        assert (code > 0, out) == (True, "")
        assert "error" in err
