"""Arguments to requests, answers to results."""

from __future__ import annotations

from typing import Any

import pytest

from capsem.mcp.tools import TOOLS
from capsem.mcp.translate import LOG_CHARACTERS, Call, clip, error_text, request, result, text_of
from capsem.model.errors import InvalidInput, NotFound


def asked(tool: str, **arguments: Any) -> Call:
    return request(TOOLS[f"capsem_{tool}"], arguments)


def given(tool: str, answer: Any, **arguments: Any) -> Any:
    row = TOOLS[f"capsem_{tool}"]
    return result(row, answer, request(row, arguments).here)


def test_a_name_makes_a_vm_persistent() -> None:
    assert asked("create", name="dev", ramMb=512, cpuCount=1).body == {
        "name": "dev",
        "ram_mb": 512,
        "cpus": 1,
        "persistent": True,
    }
    assert asked("create").body == {"persistent": False}
    assert asked("create", name=None, ramMb=1024.0).body == {"ram_mb": 1024, "persistent": False}


def test_time_limits() -> None:
    assert asked("exec", id="a", command="x").body == {"command": "x", "timeout_secs": 30}
    assert asked("exec", id="a", command="x", timeout=2.5).body == {"command": "x", "timeout_secs": 2.5}
    assert asked("exec", id="a", command="x", timeout_secs=9, more=1).body == {"command": "x", "timeout_secs": 30}
    assert asked("exec", id="a", command="x", background=True).body == {"command": "x", "wait": False}
    assert asked("run", command="x").body == {"command": "x", "timeout_secs": 60}


def test_where_arguments_go() -> None:
    assert asked("resume", name="dev")[:3] == ("resume", "dev", {})
    assert asked("suspend", id="dev")[:3] == ("suspend", "dev", None)
    assert asked("list_files", id="dev", path="a b", depth=2).query == {
        "path": "a b",
        "depth": "2",
        "exact": "true",
    }
    assert asked("fork", id="dev", name="try", live=True, count=2, at="3f").body == {
        "name": "try",
        "live": True,
        "count": 2,
        "checkpoint": "3f",
    }
    assert asked("mcp_call", name="a__b", arguments={"x": None})[:3] == ("call_tool", "a__b", {"x": None})
    assert asked("mcp_call", name="a__b").body == {}


def test_a_background_job_is_looked_at_and_left_alone() -> None:
    at_start = {"stdout": 0, "stderr": 0}
    assert asked("job_output", id="a", job="j").body == {"job": "j", "offsets": at_start, "keep": True, "wait": False}
    assert (asked("job_output", id="a", job="j", wait=3).body or {})["wait"]


@pytest.mark.parametrize(
    ("tool", "arguments", "words"),
    [
        ("exec", {"id": "a"}, "missing required argument `command`.*capsem_exec needs: id, command"),
        ("exec", {"id": "a", "command": None}, "missing required argument `command`"),
        ("exec", {"id": 1, "command": "x"}, "id has to be a string, not 1"),
        ("exec", {"id": "a", "command": "x", "timeout": True}, "timeout has to be a number, not true"),
        ("exec", {"id": "a", "command": "x", "timeout": "9"}, 'timeout has to be a number, not "9"'),
        ("create", {"ramMb": 512.5}, "ramMb has to be a whole number"),
        ("create", {"env": ["A=1"]}, "env has to be an object"),
        ("service_logs", {"tail": -1}, "tail is -1"),
    ],
)
def test_bad_arguments_are_named(tool: str, arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(InvalidInput, match=words):
        request(TOOLS[f"capsem_{tool}"], arguments)


def test_what_is_short_comes_as_it_is() -> None:
    answer = {"stdout": "hi\n", "stderr": "", "exit_code": 3, "job": "j"}
    assert given("exec", answer, id="a", command="x") == answer


def test_what_is_left_out_is_said() -> None:
    answer = {"stdout": "a" * 100 + "b" * 100, "stderr": "", "exit_code": 0}
    cut = given("exec", answer, id="a", command="x", maxOutput=40)
    assert cut["stdout"] == "a" * 20 + "\n[... 160 characters left out ...]\n" + "b" * 20
    assert cut["truncated"]
    assert "stdout had 200 characters" in cut["note"]
    assert "10 MiB" in given("exec", {**answer, "truncated": True}, id="a", command="x")["note"]


@pytest.mark.parametrize("limit", [0, 1, 2, 3, 10, 11])
def test_clipping_keeps_both_ends(limit: int) -> None:
    head, middle, tail = clip("0123456789ab", limit).partition("\n[")
    kept = head + tail.partition("]\n")[2]
    assert middle
    assert len(kept) == limit
    assert "0123456789ab".startswith(head)
    assert clip("0123456789ab", 12) == "0123456789ab"


def test_logs_are_searched_then_cut() -> None:
    log = "One x\ntwo\none y\nONE z\n"
    assert given("service_logs", log, grep="one", tail=2) == "one y\nONE z\n"
    assert given("service_logs", log, tail=0) == ""
    both = given("vm_logs", {"logs": log, "process_logs": "two\n", "warning": "One w"}, id="a", grep="two")
    assert both == {"logs": "two\n", "process_logs": "two\n", "warning": "One w"}
    long = given("service_logs", "x" * (LOG_CHARACTERS + 7))
    assert long.startswith("[... 7 characters before this left out")
    assert long.endswith("x" * LOG_CHARACTERS)


def test_parts_of_a_file() -> None:
    content = {"content": "a\nb\nc\nd"}
    assert given("read_file", content, id="a", path="f") == content
    assert given("read_file", content, id="a", path="f", startLine=2, lines=2) == {
        "content": "b\nc\n",
        "note": "lines 2 to 3 of 4",
    }
    assert given("read_file", content, id="a", path="f", startLine=4)["content"] == "d"


def test_tools_of_one_server() -> None:
    tools = [{"server_name": "a"}, {"server_name": "b"}]
    assert given("mcp_tools", tools) == tools
    assert given("mcp_tools", tools, server="b") == [{"server_name": "b"}]


def test_texts() -> None:
    assert text_of("plain é") == "plain é"
    assert text_of({"a": "é"}) == '{\n  "a": "é"\n}'
    assert (
        error_text(NotFound("no VM is called x", hint="see capsem_list")) == "404: no VM is called x (see capsem_list)"
    )
