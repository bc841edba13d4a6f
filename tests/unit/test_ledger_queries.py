"""What is asked of a session's ledger, and a stranger's SQL on it."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from capsem.egress.events import ModelCall, NetEvent, ToolCall
from capsem.egress.record import model_rows, net_row
from capsem.ledger import inspection, queries
from capsem.ledger.database import copy, open_writer, reader
from capsem.ledger.events import (
    COMMAND,
    PREVIEW,
    command_began,
    command_ended,
    command_started,
    commands_lost,
    file_event,
    inherited,
    lifecycle_event,
)
from capsem.ledger.inspection import inspect
from capsem.ledger.schema import SESSION, iso
from capsem.ledger.writer import Statement, _execute
from capsem.model.errors import Corrupt, NotFound, QueryFailed, TimedOut

T0 = 1_700_000_000.0


def end(
    exec_id: str, command: str = "x", exit_code: int | None = 0, error: str | None = None, **more: Any
) -> Statement:
    given = {"duration": 0.25, "stdout": b"out", "stderr": b"", "stdout_bytes": 3, "stderr_bytes": 0, **more}
    return command_ended(T0 + 60, exec_id, command, exit_code=exit_code, error=error, **given)


def written(path: Path, *statements: Statement) -> Path:
    connection = open_writer(path, SESSION)
    for statement in statements:
        _execute(connection, statement)
    connection.close()
    return path


@pytest.fixture
def ledger(tmp_path: Path) -> Path:
    started = command_started(
        T0 + 1, "j1", pid=7, ppid=1, uid=0, exe="/bin/bash", argv=["bash", "-c", "ls"], cwd="/root"
    )
    return written(
        tmp_path / "session.db",
        lifecycle_event(T0, "boot", "starting"),
        file_event(T0, "modified", "/etc/hostname", 4),
        command_began(T0 + 1, "j1", "ls", "exec"),
        *started,
        end("j1"),
        command_began(T0 + 2, "j2", "false 100%_\\", "exec"),
        end("j2", exit_code=1, stderr=b"\xff no\n"),
        command_began(T0 + 3, "j3", "sleep 9", "shell"),
    )


def ask(path: Path, question: Callable[..., Any], **arguments: Any) -> Any:
    with reader(path) as connection:
        return question(connection, **arguments)


def test_history_is_newest_first_and_in_pages(ledger: Path) -> None:
    found = ask(ledger, queries.history, limit=2)
    assert [(each.layer, each.command, each.exit_code) for each in found.commands] == [
        ("exec", "sleep 9", None),
        ("exec", "false 100%_\\", 1),
    ]
    assert found.total == 4
    rest = ask(ledger, queries.history, limit=500, offset=2)
    assert [(each.layer, each.command) for each in rest.commands] == [("exec", "ls"), ("audit", "bash -c ls")]
    first = rest.commands[0]
    assert (first.timestamp, first.duration_ms, first.stdout_preview) == (iso(T0 + 1), 250.0, "out")
    assert first.details == {"exec_id": "j1", "source": "exec", "pid": 7, "stdout_bytes": 3, "stderr_bytes": 0}
    assert rest.commands[1].details == {
        "exec_id": "j1", "pid": 7, "ppid": 1, "uid": 0, "exe": "/bin/bash", "cwd": "/root",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("search", "layer", "expected"),
    [
        ("LS", "exec", ["false 100%_\\", "ls"]),
        ("100%", "all", ["false 100%_\\"]),
        ("%", "all", ["false 100%_\\"]),
        ("_\\", "all", ["false 100%_\\"]),
        ("ls", "audit", ["bash -c ls"]),
        ("'; DROP TABLE exec_events; --", "all", []),
    ],
)
def test_history_is_searched_for_what_is_written(ledger: Path, search: str, layer: str, expected: list[str]) -> None:
    found = ask(ledger, queries.history, limit=9, search=search, layer=layer)
    assert [each.command for each in found.commands] == expected
    assert found.total == len(expected)


def test_counts_and_processes(ledger: Path) -> None:
    assert ask(ledger, queries.counts) == (3, 1)
    assert ask(ledger, queries.processes) == [("/bin/bash", 1, iso(T0 + 1), iso(T0 + 1))]
    totals = ask(ledger, queries.work).totals
    assert (totals.exec_count, totals.file_events, totals.requests, totals.estimated_cost) == (3, 1, 0, 0.0)


def test_timeline(ledger: Path) -> None:
    rows = ask(ledger, queries.timeline, limit=200)
    assert [row[1:5] for row in rows] == [
        ("fs", "1", "/etc/hostname", "modified"),
        ("exec", "j1", "ls", "exit 0"),
        ("exec", "j2", "false 100%_\\", "exit 1"),
        ("exec", "j3", "sleep 9", "running"),
    ]
    assert [row[2] for row in ask(ledger, queries.timeline, limit=2)] == ["j2", "j3"]
    assert [row[2] for row in ask(ledger, queries.timeline, limit=9, since=iso(T0 + 3))] == ["j3"]
    assert ask(ledger, queries.timeline, limit=9, trace_id="none") == []
    assert [row[3] for row in ask(ledger, queries.timeline, limit=9, layers=("lifecycle",))] == ["boot"]
    assert len(ask(ledger, queries.timeline, limit=9, layers=queries.LAYERS)) == 5


def traffic(*, decision: str, domain: str | None = "a.test", port: int = 443, **more: Any) -> Statement:
    return net_row(NetEvent(time=T0, domain=domain, port=port, decision=decision, **more))


def model(provider: str, cost: float | None = None, *tools: str) -> Statement:
    call = ModelCall(T0, "h.test", provider, "m", "POST", "/v1", stream=True, status_code=200, cost_usd=cost)
    call.input_tokens, call.output_tokens = 10, 2
    call.tools = [ToolCall(index, None, name, "") for index, name in enumerate(tools)]
    return model_rows(call)


def test_traffic_is_counted_and_shown(tmp_path: Path) -> None:
    path = written(
        tmp_path / "a.db",
        traffic(decision="allowed", method="GET", path="/x", rule_layer="user", address="192.0.2.7"),
        traffic(decision="denied", domain=None, port=22),
        traffic(decision="interrupted", port=8443),
        model("anthropic", 0.5, "bash", "bash", "edit"),
        model("openai"),
        model("anthropic", 0.25),
        model("openai")._replace(parameters=tuple(429 if each == 200 else each for each in model("openai").parameters)),
    )
    done = ask(path, queries.work)
    totals = done.totals
    assert (totals.requests, totals.allowed_requests, totals.denied_requests) == (3, 1, 1)
    assert (totals.model_calls, totals.input_tokens, totals.output_tokens, totals.tool_calls) == (4, 40, 8, 3)
    assert (totals.estimated_cost, totals.unpriced_calls) == (0.75, 1)
    assert done.providers == (("anthropic", 2, 20, 4, 0.75), ("openai", 2, 20, 4, 0.0))
    assert done.tools == (("bash", 2), ("edit", 1))
    shown = [row[1:5] for row in ask(path, queries.timeline, limit=9, layers=("net", "model"))]
    assert sorted(shown) == [
        ("model", "1", "anthropic m, 10 tokens in, 2 out", "200"),
        ("model", "2", "openai m, 10 tokens in, 2 out", "200"),
        ("model", "3", "anthropic m, 10 tokens in, 2 out", "200"),
        ("model", "4", "openai m, 10 tokens in, 2 out", "429"),
        ("net", "1", "GET a.test/x", "allowed"),
        ("net", "2", "?:22", "denied"),
        ("net", "3", "a.test:8443", "interrupted"),
    ]
    log = ask(path, queries.net_log, limit=2, decisions=("allowed", "denied"))
    assert [(each["domain"], each["rule_layer"], each["address"]) for each in log] == [
        ("a.test", "user", "192.0.2.7"),
        (None, None, None),
    ]
    assert ask(path, queries.net_log, limit=9, since=iso(T0 + 1)) == []


def test_the_newest_of_much_traffic_is_found_by_its_index(tmp_path: Path) -> None:
    path = written(tmp_path / "a.db", *(traffic(decision="allowed") for _ in range(10)))
    with reader(path) as connection:
        steps: list[str] = []
        connection.set_trace_callback(steps.append)
        queries.timeline(connection, limit=5, layers=("net", "fs"))
        (asked,) = steps
        plan = [row[3] for row in connection.execute(f"EXPLAIN QUERY PLAN {asked}")]
    assert any("net_events USING INDEX net_events_timestamp" in step for step in plan), plan


def test_a_fork_counts_what_it_has_done_itself(tmp_path: Path) -> None:
    source = written(tmp_path / "a.db", traffic(decision="allowed"), model("anthropic", 0.5, "bash"), end("j"))

    def mark(connection: sqlite3.Connection) -> None:
        _execute(connection, inherited(T0, queries.last_ids(connection)))

    assert copy(source, tmp_path / "b.db", mark)
    fork = written(tmp_path / "b.db", traffic(decision="denied"), model("openai", 0.25))
    done = ask(fork, queries.work)
    assert (done.totals.requests, done.totals.denied_requests, done.totals.exec_count) == (1, 1, 0)
    assert (done.totals.estimated_cost, done.providers, done.tools) == (0.25, (("openai", 1, 10, 2, 0.25),), ())
    assert len(ask(fork, queries.net_log, limit=9)) == 2  # its history is with that of its source


def test_a_ledger_of_before_there_was_traffic(tmp_path: Path) -> None:
    path = tmp_path / "old.db"
    connection = open_writer(path, SESSION[:1])
    connection.execute(
        "INSERT INTO net_events (timestamp, domain, port, decision) VALUES (?, 'old.test', 443, 'denied')", (iso(T0),)
    )
    connection.close()
    (row,) = ask(path, queries.net_log, limit=9)
    assert (row["domain"], row["decision"], row["secrets"]) == ("old.test", "denied", None)
    assert ask(path, queries.work).totals.denied_requests == 1
    assert [row[3] for row in ask(path, queries.timeline, limit=9, layers=queries.LAYERS)] == ["old.test"]


def test_an_end_goes_where_its_beginning_is_but_not_over_another_end(tmp_path: Path) -> None:
    path = written(tmp_path / "a.db", command_began(T0, "j", "x", "exec"), end("j"), end("j", exit_code=2))
    rows = inspect(path, "SELECT exit_code, source, timestamp FROM exec_events ORDER BY id").rows
    assert rows == [[0, "exec", iso(T0)], [2, "resumed", iso(T0 + 60)]]


def test_commands_that_nobody_saw_end(ledger: Path) -> None:
    written(ledger, commands_lost("the VM was stopped"), end("j3"))
    rows = inspect(ledger, "SELECT exec_id, exit_code, error FROM exec_events ORDER BY id").rows
    assert rows == [["j1", 0, None], ["j2", 1, None], ["j3", None, "the VM was stopped"], ["j3", 0, None]]
    failed = ask(ledger, queries.failures, since=iso(T0), limit=9)
    assert [(row[1], row[2], row[3]) for row in failed] == [
        ("sleep 9", None, "the VM was stopped"),
        ("false 100%_\\", 1, None),
    ]


def test_what_is_long_or_no_text_is_cut_and_replaced(tmp_path: Path) -> None:
    path = written(
        tmp_path / "a.db",
        command_began(T0, "j", "x" * COMMAND * 2 + "\udcff", "exec"),
        command_began(T0, "k", "a\udcff", "exec"),
        end("j", stdout=b"\xc3" * PREVIEW * 2),
    )
    (length, preview), (command, _) = inspect(
        path, "SELECT CASE exec_id WHEN 'j' THEN length(command) ELSE command END, stdout_preview FROM exec_events"
    ).rows
    assert (length, preview, command) == (COMMAND, "\ufffd" * PREVIEW, "a?")


def test_inspect_selects(ledger: Path) -> None:
    found = inspect(
        ledger, "WITH n(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM n LIMIT 3) SELECT x, x'00ff' AS b FROM n"
    )
    assert found == (["x", "b"], [[1, "AP8="], [2, "AP8="], [3, "AP8="]], False)
    assert inspect(ledger, "SELECT name FROM sqlite_master WHERE name = 'exec_events'").rows == [["exec_events"]]


@pytest.mark.parametrize(
    "sql",
    [
        "DELETE FROM exec_events",
        "INSERT INTO exec_events (timestamp) VALUES ('')",
        "UPDATE exec_events SET command = ''",
        "DROP TABLE exec_events",
        "CREATE TEMP TABLE t (x)",
        "ATTACH '/tmp/x.db' AS x",
        "PRAGMA user_version",
        "PRAGMA journal_mode = DELETE",
        "SELECT * FROM pragma_database_list",
        "BEGIN",
        "VACUUM INTO '/tmp/x.db'",
        "SELECT 1; DELETE FROM exec_events",
        "SELECT load_extension('x')",
        "SELECT nothing FROM nowhere",
        "SELECT '\udcff'",
        "SELECT \0 1",
        "",
        "  -- nothing",
        "nonsense",
        "SELECT zeroblob(100000000)",
        "SELECT ?",
    ],
)
def test_inspect_refuses(ledger: Path, sql: str) -> None:
    before = ledger.read_bytes()
    with pytest.raises(QueryFailed) as caught:
        inspect(ledger, sql)
    assert caught.value.status == 500
    assert caught.value.hint
    assert ledger.read_bytes() == before


def test_inspect_is_bounded(ledger: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    endless = "WITH RECURSIVE n(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM n) SELECT {} FROM n"
    found = inspect(ledger, endless.format("x"))
    assert (len(found.rows), found.truncated) == (inspection.ROWS, True)
    with pytest.raises(TimedOut, match=r"timed out after 0\.2s"):
        inspect(ledger, endless.format("count(*)"), seconds=0.2)
    monkeypatch.setattr(inspection, "ANSWER", 1 << 20)
    with pytest.raises(QueryFailed, match="larger than 1 MiB"):
        inspect(ledger, endless.format("hex(zeroblob(1000))"))


def test_no_ledger_and_no_database(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="no ledger"):
        inspect(tmp_path / "session.db", "SELECT 1")
    assert not list(tmp_path.iterdir())
    (tmp_path / "bad.db").write_bytes(b"nonsense" * 1000)
    with pytest.raises(Corrupt):
        inspect(tmp_path / "bad.db", "SELECT * FROM exec_events")
