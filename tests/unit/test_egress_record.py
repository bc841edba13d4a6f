"""Traffic as rows: what is in them, what is cut, and that a model's call keeps what belongs to it."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from pathlib import Path

import pytest

from capsem.egress import record
from capsem.egress.events import DnsEvent, ModelCall, NetEvent, Recorder, ToolCall, ToolResponse
from capsem.egress.facts import Layer, TlsMode
from capsem.egress.record import TrafficRecord
from capsem.ledger import writer as writing
from capsem.ledger.database import open_writer, reader
from capsem.ledger.schema import SESSION, iso
from capsem.ledger.writer import Statement, Writer

T0 = 1_700_000_000.0


def call(number: int, *tools: str) -> ModelCall:
    return ModelCall(
        time=T0 + number,
        domain="api.anthropic.com",
        provider="anthropic",
        model=f"m{number}",
        method="POST",
        path="/v1/messages",
        stream=True,
        status_code=200,
        tools=[ToolCall(index, f"c{number}-{index}", name, "{}") for index, name in enumerate(tools)],
    )


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[tuple[Recorder, Writer]]:
    writer = Writer(tmp_path / "session.db", SESSION)
    yield TrafficRecord(writer.put), writer
    writer.close().result(10)


def rows(writer: Writer, sql: str) -> list[tuple[object, ...]]:
    writer.flush().result(10)
    with reader(writer.path) as connection:
        return connection.execute(sql).fetchall()


def test_a_request_with_everything(ledger: tuple[Recorder, Writer]) -> None:
    recorder, writer = ledger
    recorder.net(
        NetEvent(
            time=T0,
            domain="api.example",
            port=443,
            decision="allowed",
            process_name="curl",
            method="GET",
            path="/v1",
            status_code=200,
            bytes_sent=1,
            bytes_received=2,
            duration=0.25,
            matched_rule="api",
            rule_layer=Layer.USER,
            policy_version=7,
            address="192.0.2.1",
            tls=TlsMode.INTERCEPTED,
            secrets=("one", "two"),
        )
    )
    names = "timestamp, domain, port, decision, process_name, method, path, status_code, bytes_sent, bytes_received, "
    names += "duration_ms, matched_rule, rule_layer, policy_version, address, tls, error, secrets, trace_id"
    assert rows(writer, f"SELECT {names} FROM net_events") == [
        (iso(T0), "api.example", 443, "allowed", "curl", "GET", "/v1", 200, 1, 2, 250.0, "api", "user", 7, "192.0.2.1",
         "intercepted", None, "one,two", None)
    ]  # fmt: skip


def test_a_connection_of_which_nothing_is_known_and_one_of_garbage(ledger: tuple[Recorder, Writer]) -> None:
    recorder, writer = ledger
    recorder.net(NetEvent(time=T0, domain=None, port=5432))
    recorder.net(NetEvent(time=T0, domain="x" * 9999, port=1, path="/\udcff" + "p" * 9999, error="e" * 9999))
    empty, full = rows(writer, "SELECT domain, decision, path, tls, error, secrets FROM net_events")
    assert empty == (None, "error", None, "none", None, None)
    assert [len(str(each)) for each in full[:3]] == [record.NAME, len("error"), record.PATH]
    assert (str(full[2])[:3], len(str(full[4]))) == ("/?p", record.DETAIL)


def test_a_question(ledger: tuple[Recorder, Writer]) -> None:
    recorder, writer = ledger
    recorder.dns(
        DnsEvent(time=T0, domain="a.test", record_type="A", decision="synthetic", answer="198.18.0.1", duration=0.001,
                 matched_rule="r", rule_layer="preset", policy_version=2)
    )  # fmt: skip
    names = "domain, record_type, decision, answer, duration_ms, matched_rule, rule_layer, policy_version"
    assert rows(writer, f"SELECT {names} FROM dns_events") == [
        ("a.test", "A", "synthetic", "198.18.0.1", 1.0, "r", "preset", 2)
    ]


def test_a_models_call_has_its_tools_and_what_they_answered(ledger: tuple[Recorder, Writer]) -> None:
    recorder, writer = ledger
    first, second = call(1, "bash", "edit"), call(2, "search")
    first.cost_usd, first.price_date, first.input_tokens, first.thinking_tokens = 0.5, "2026-01-01", 10, 3
    second.responses.append(ToolResponse("c1-0", "done", is_error=False))
    second.truncated, second.note = True, "too long"
    for each in (first, second):
        recorder.model(each)
    names = (
        "model, stream, input_tokens, output_tokens, thinking_tokens, estimated_cost_usd, price_date, truncated, note"
    )
    assert rows(writer, f"SELECT {names} FROM model_calls") == [
        ("m1", 1, 10, None, 3, 0.5, "2026-01-01", 0, None),
        ("m2", 1, None, None, None, None, None, 1, "too long"),
    ]
    of = "SELECT m.model, t.call_index, t.tool_name, t.origin FROM tool_calls t JOIN model_calls m ON m.id = model_call_id"
    assert rows(writer, of) == [("m1", 0, "bash", "native"), ("m1", 1, "edit", "native"), ("m2", 0, "search", "native")]
    of = "SELECT m.model, r.call_id, r.content_preview, r.is_error FROM tool_responses r JOIN model_calls m "
    assert rows(writer, of + "ON m.id = model_call_id") == [("m2", "c1-0", "done", 0)]


def test_what_belongs_together_is_lost_together(
    ledger: tuple[Recorder, Writer], monkeypatch: pytest.MonkeyPatch
) -> None:
    recorder, writer = ledger
    monkeypatch.setattr(writing, "LIMIT", 1)
    writer.flush().result(10)
    writer.put(Statement("SELECT 1"))  # whether or not it is taken at once, many calls are not
    for number in range(50):
        recorder.model(call(number, "tool", "tool", "tool"))
    counts = "SELECT (SELECT count(*) FROM model_calls), (SELECT count(*) FROM tool_calls)"
    ((calls, tools),) = rows(writer, counts)
    assert tools == 3 * int(str(calls))
    orphans = "SELECT count(*) FROM tool_calls JOIN model_calls m ON m.id = model_call_id "
    assert rows(writer, orphans + "WHERE call_id NOT LIKE 'c' || substr(m.model, 2) || '-%'") == [(0,)]


def test_a_ledger_of_before_there_was_traffic(tmp_path: Path) -> None:
    path = tmp_path / "old.db"
    connection = open_writer(path, SESSION[:1])
    connection.execute("INSERT INTO net_events (timestamp, domain, port) VALUES ('t', 'old.test', 443)")
    connection.close()
    connection = open_writer(path, SESSION)
    for statement in (record.net_row(NetEvent(T0, "new.test", 80)), record.model_rows(call(1, "bash"))):
        writing._execute(connection, statement)
    found = connection.execute("SELECT domain, tls, rule_layer FROM net_events ORDER BY id").fetchall()
    assert found == [("old.test", None, None), ("new.test", "none", None)]
    # And an older version goes on with a newer ledger.
    connection.execute("INSERT INTO model_calls (timestamp, provider) VALUES ('t', 'p')")
    assert connection.execute("SELECT count(*) FROM model_calls").fetchone() == (2,)
    connection.close()


def test_a_failing_part_takes_the_whole_along(tmp_path: Path) -> None:
    connection = open_writer(tmp_path / "l.db", SESSION)
    broken = record.model_rows(call(1, "bash"))._replace(then=(Statement("INSERT INTO nowhere VALUES (1)"),))
    writer = Writer(tmp_path / "l.db", SESSION)
    writer.put(broken)
    writer.close().result(10)
    assert writer.dropped == 1
    assert connection.execute("SELECT count(*) FROM model_calls").fetchone() == (0,)
    with pytest.raises(sqlite3.OperationalError):
        writing._execute(connection, broken)
    connection.close()
