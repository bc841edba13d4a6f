"""capsem-mcp as the contract's clients see it: lines of JSON-RPC, revision 2024-11-05."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from capsem.client.daemon import stop
from capsem.client.sync import Client
from capsem.config import Paths
from capsem.mcp.tools import TOOLS
from mcp_client import Lines, environment, lines, parsed


@pytest.fixture(scope="module")
def home() -> Iterator[Path]:
    """A home whose service is started by whoever comes first."""
    with tempfile.TemporaryDirectory(prefix="capsem-mcp-") as text:
        yield Path(text)
        stop(Paths.from_environment(environment(Path(text))))


@pytest.fixture(scope="module")
def session(home: Path) -> Iterator[Lines]:
    with lines(home) as open_session:
        yield open_session


def test_a_handshake_of_every_revision(home: Path) -> None:
    for wanted, given in {"2024-11-05": "2024-11-05", "2025-06-18": "2025-06-18", "1999-01-01": "2025-11-25"}.items():
        it = Lines(home)
        hello = it.shake_hands(wanted)
        assert hello["protocolVersion"] == given
        assert hello["serverInfo"]["name"] == "capsem-mcp"
        assert "tools" in hello["capabilities"]
        assert it.ask("ping")["result"] == {}
        assert it.close() == 0
        assert it.seen.empty()


def test_what_the_reference_inspector_checks(session: Lines) -> None:
    """Its command line holds tools and results against the protocol's shapes, and makes arguments, which are text there, what
    the `type` of each property says; `_meta` comes with everything."""
    tools = session.ask("tools/list")["result"]["tools"]
    assert [tool["name"] for tool in tools] == list(TOOLS)
    for tool in tools:
        assert isinstance(tool["description"], str)
        assert tool["inputSchema"]["type"] == "object"
        assert isinstance(tool["inputSchema"]["properties"], dict)
        assert tool["inputSchema"].keys() <= {"type", "properties", "required"}
        kinds = {each["type"] for each in tool["inputSchema"]["properties"].values()}
        assert kinds <= {"string", "number", "integer", "boolean", "object"}
        assert tool.get("outputSchema", {"type": "object"})["type"] == "object"
    meta = {"name": "capsem_version", "arguments": {}, "_meta": {"client": "inspector"}}
    assert parsed(session.ask("tools/call", meta)["result"])["service"] == "connected"
    assert session.ask("resources/list")["error"]["code"] == -32601
    assert session.ask("prompts/list")["error"]["code"] == -32601
    assert session.ask("no/such")["error"]["code"] == -32601
    assert session.ask("tools/call", {"name": "no_such"})["error"]["code"] == -32602
    assert session.ask("tools/call", {"arguments": {}})["error"]["code"] == -32602


def test_a_life(session: Lines, home: Path) -> None:
    assert parsed(session.call("capsem_version"))["service"] == "connected"
    assert parsed(session.call("capsem_create", name="box", ramMb=512, cpuCount=1))["id"] == "box"
    ran = parsed(session.call("capsem_exec", id="box", command="echo hi > f; exit 3", timeout_secs=9, other=1))
    assert (ran["stdout"], ran["exit_code"]) == ("", 3)
    assert parsed(session.call("capsem_read_file", id="box", path="/root/f")) == {"content": "hi\n"}
    assert parsed(session.call("capsem_write_file", id="box", path="/root/d/g", content="ü"))["success"]
    assert [each["name"] for each in parsed(session.call("capsem_list_files", id="box", path=""))["entries"]] == [
        "d",
        "f",
    ]
    saved = parsed(session.call("capsem_checkpoint", id="box", message="one"))["id"]
    session.call("capsem_exec", id="box", command="rm f; sync")
    back = parsed(session.call("capsem_rollback", id="box", checkpoint=saved[:8]))
    assert back["checkpoint"] == saved
    assert parsed(session.call("capsem_read_file", id="box", path="/root/f")) == {"content": "hi\n"}
    shown = parsed(session.call("capsem_checkpoints", id="box"))["checkpoints"]
    assert [each["kind"] for each in shown if not each.get("hidden")] == ["manual", "rollback"]
    assert parsed(session.call("capsem_checkpoint_remove", id="box", checkpoint=back["saved"]))["success"]
    assert parsed(session.call("capsem_suspend", id="box"))["success"]
    assert parsed(session.call("capsem_info", id="box"))["status"] == "Suspended"
    assert parsed(session.call("capsem_resume", name="box"))["boot_kind"] == "warm"
    forked = parsed(session.call("capsem_fork", id="box", name="try", live=True, count=2))
    assert forked["names"] == ["try-1", "try-2"]
    assert parsed(session.call("capsem_fork", id="box", name="cold", description="d"))["size_bytes"] > 0
    statuses = {box["id"]: box["status"] for box in parsed(session.call("capsem_list"))["sandboxes"]}
    assert statuses == {"box": "Running", "try-1": "Running", "try-2": "Running", "cold": "Stopped"}
    for name in ("try-1", "try-2", "cold"):
        assert parsed(session.call("capsem_delete", id=name)) == {"success": True}
    assert parsed(session.call("capsem_stop", id="box")) == {"success": True, "persistent": True}
    assert "box" in parsed(session.call("capsem_vm_logs", id="box", grep="BOX", tail=5))["process_logs"]
    assert Client(home / "run/service.sock").call("info", vm_id="box")["status"] == "Stopped"
    assert parsed(session.call("capsem_delete", id="box")) == {"success": True}


def test_what_happened(session: Lines) -> None:
    parsed(session.call("capsem_create", name="told", ramMb=512, cpuCount=1))
    parsed(session.call("capsem_exec", id="told", command="echo this & that"))
    schema = session.call("capsem_inspect_schema")["content"][0]["text"]
    assert "CREATE TABLE exec_events" in schema
    found = parsed(session.call("capsem_inspect", id="told", sql="SELECT command FROM exec_events"))
    assert (found["columns"], found["rows"]) == (["command"], [["echo this & that"]])
    wrong = session.call("capsem_inspect", id="told", sql="DELETE FROM exec_events")
    assert wrong["isError"] is True
    assert wrong["content"][0]["text"].startswith("500: ")
    events = parsed(session.call("capsem_timeline", id="told", since="1h", limit=5, layers="exec"))
    assert "echo this & that" in json.dumps(events["rows"])
    assert parsed(session.call("capsem_panics", since="7d", limit=3)) == {"panics": []}
    assert parsed(session.call("capsem_triage", id="told", since="30m"))["session_id"] == "told"
    text = session.call("capsem_host_logs", name="mcp", grep="call.capsem_inspect.", tail=1, maxBytes=100_000)
    assert json.loads(text["content"][0]["text"])["message"] == "call.capsem_inspect.failed"
    assert session.call("capsem_host_logs", name="../x")["isError"] is True
    parsed(session.call("capsem_delete", id="told"))


def test_commands_in_the_background(session: Lines) -> None:
    parsed(session.call("capsem_create", name="box", ramMb=512, cpuCount=1))
    begun = parsed(session.call("capsem_exec", id="box", command="echo on; sleep 600; echo off", background=True))
    assert begun["running"] is True
    assert "capsem_job_output" in begun["note"]
    job = begun["job"]
    while parsed(session.call("capsem_job_output", id="box", job=job))["stdout"] != "on\n":
        pass
    waited = parsed(session.call("capsem_job_output", id="box", job=job, wait=0.1))
    assert waited["running"] is True
    assert job in parsed(session.call("capsem_jobs", id="box"))["running"]
    assert parsed(session.call("capsem_job_kill", id="box", job=job))["running"] is True
    ended = parsed(session.call("capsem_job_output", id="box", job=job, wait=60))
    assert "running" not in ended
    assert ended["exit_code"] != 0
    assert session.call("capsem_job_output", id="box", job="nope")["content"][0]["text"].startswith("404: ")
    parsed(session.call("capsem_delete", id="box"))


def test_temporary_vms(session: Lines) -> None:
    made = parsed(session.call("capsem_create", ramMb=512, cpuCount=1))["id"]
    assert parsed(session.call("capsem_persist", id=made, name="kept")) == {"success": True, "name": "kept"}
    parsed(session.call("capsem_create", ramMb=512, cpuCount=1))
    assert parsed(session.call("capsem_purge"))["ephemeral_purged"] == 1
    assert parsed(session.call("capsem_purge", all=True))["persistent_purged"] == 1


def test_errors_are_results_that_say_what_to_do(session: Lines) -> None:
    for tool, arguments, begin in (
        ("capsem_info", {"id": "nobody"}, "404: no VM is called nobody"),
        ("capsem_exec", {"id": "../x", "command": "true"}, "400: "),
        ("capsem_exec", {"id": "", "command": "true"}, "400: "),
        ("capsem_exec", {"command": "true"}, "400: missing required argument `id`"),
        ("capsem_create", {"name": "-x"}, "400: "),
        ("capsem_create", {"ramMb": 1}, "400: "),
        ("capsem_mcp_call", {"name": "a__b"}, "503: "),
    ):
        result = session.call(tool, **arguments)
        assert result["isError"] is True
        assert result["content"][0]["text"].startswith(begin), result


def test_lists_and_texts(session: Lines) -> None:
    assert parsed(session.call("capsem_mcp_servers")) == []
    assert parsed(session.call("capsem_mcp_tools", server="x")) == []
    text = session.call("capsem_service_logs", grep="& CAPSEM_SERVICE", tail=1)["content"][0]["text"]
    assert text == ""
    text = session.call("capsem_service_logs", grep="Capsem_Service", tail=1)["content"][0]["text"]
    assert json.loads(text)["target"].startswith("capsem_service")


def test_garbage_is_survived_and_answered_at_most_once(session: Lines) -> None:
    for garbage in (
        "\n",
        "{\n",
        "[]\n",
        '"x"\n',
        '{"jsonrpc": "2.0"}\n',
        '{"jsonrpc": "1.0", "id": 1, "method": "ping"}\n',
    ):
        session.send(garbage)
    assert session.ask("ping")["result"] == {}


def test_only_the_protocol_is_on_standard_output_and_the_rest_in_the_log(home: Path) -> None:
    with lines(home) as it:
        parsed(it.call("capsem_list"))
        it.call("capsem_info", id="nobody")
    assert it.seen.empty()
    log = [json.loads(line) for line in (home / "run/mcp.log").read_text().splitlines()]
    assert {"serving", "call.capsem_list.complete", "call.capsem_info.failed"} <= {line["message"] for line in log}


def test_the_core_toolset_offers_and_takes_no_more(home: Path) -> None:
    with lines(home, "--toolset", "core") as it:
        assert len(it.ask("tools/list")["result"]["tools"]) <= 12
        assert it.ask("tools/call", {"name": "capsem_purge", "arguments": {}})["error"]["code"] == -32602


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_it_ends_when_told(home: Path, number: int) -> None:
    it = Lines(home)
    it.shake_hands()
    it.process.send_signal(number)
    assert it.process.wait(5) == 0
    it.close()


def test_it_ends_with_its_input_though_a_call_is_under_way(home: Path, session: Lines) -> None:
    parsed(session.call("capsem_create", name="busy", ramMb=512, cpuCount=1))
    it = Lines(home)
    it.shake_hands()
    it.request(
        "tools/call", {"name": "capsem_exec", "arguments": {"id": "busy", "command": "sleep 600", "timeout": 900}}
    )
    while not parsed(session.call("capsem_jobs", id="busy"))["running"]:
        pass
    assert it.close() == 0
    while parsed(session.call("capsem_jobs", id="busy"))["running"]:
        pass
    parsed(session.call("capsem_delete", id="busy"))


def test_it_says_why_it_cannot_start() -> None:
    env = {"PATH": os.environ["PATH"]}
    done = subprocess.run([sys.executable, "-m", "capsem.mcp"], env=env, capture_output=True, text=True, timeout=30)
    assert done.returncode == 1
    assert done.stdout == ""
    assert "HOME" in done.stderr


def test_a_service_that_cannot_be_started_is_an_error_of_the_call(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "config.toml").write_text("vm = ")
    it = Lines(tmp_path)
    it.shake_hands()
    assert parsed(it.call("capsem_version"))["service"].startswith("unreachable: ")
    result = it.call("capsem_list")
    assert result["isError"] is True
    assert result["content"][0]["text"].startswith("500: ")
    assert it.close() == 0
