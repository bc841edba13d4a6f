"""The writer of a ledger: its queue, its file, and what becomes of both when something is in the way."""

from __future__ import annotations

import os
import sqlite3
import stat
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest

from capsem.ledger import writer as writing
from capsem.ledger.database import ROOM, copy, journal, open_writer, reader, tidy
from capsem.ledger.events import lifecycle_event
from capsem.ledger.schema import MAIN, SESSION
from capsem.ledger.writer import Statement, Writer

PROMISED = {
    "net_events": "domain port decision process_name method path status_code bytes_sent bytes_received duration_ms "
    "matched_rule trace_id rule_layer policy_version address tls error secrets",
    "model_calls": "provider model method path stream input_tokens output_tokens duration_ms estimated_cost_usd "
    "status_code trace_id",
    "tool_calls": "model_call_id call_index call_id tool_name arguments origin mcp_call_id",
    "tool_responses": "model_call_id call_id content_preview is_error",
    "mcp_calls": "server_name method tool_name request_id decision duration_ms error_message",
    "fs_events": "action path size",
    "snapshot_events": "slot origin name files_count start_fs_event_id stop_fs_event_id",
    "exec_events": "exec_id command exit_code duration_ms stdout_preview stderr_preview stdout_bytes source pid",
    "dns_events": "domain record_type decision answer matched_rule rule_layer policy_version",
    "audit_events": "pid ppid uid exe comm argv cwd tty parent_exe",
    "policy_hook_events": "",
}


def event(number: int) -> Statement:
    return lifecycle_event(1_700_000_000 + number, f"e{number}")


def events(path: Path) -> list[str]:
    with reader(path) as connection:
        return [row[0] for row in connection.execute("SELECT event FROM lifecycle_events ORDER BY id")]


def begun(path: Path) -> Writer:
    writer = Writer(path, SESSION, lambda count: lifecycle_event(0.0, "dropped", detail=str(count)))
    writer.flush().result(10)
    return writer


def hold(writer: Writer) -> threading.Event:
    """Keep the thread from doing anything until the event is set."""
    held, go_on = threading.Event(), threading.Event()

    def wait(done: object) -> None:
        held.set()
        go_on.wait(10)

    writer._order(wait)
    assert held.wait(10)
    return go_on


def test_the_contracts_tables_and_columns(tmp_path: Path) -> None:
    connection = open_writer(tmp_path / "session.db", SESSION)
    for table, columns in PROMISED.items():
        found = {row[1]: row for row in connection.execute(f"PRAGMA table_info({table})")}
        assert found.keys() >= {"id", "timestamp", *columns.split()}, table
        assert (found["id"][2], found["id"][5], found["timestamp"][2]) == ("INTEGER", 1, "TEXT")
    sql = dict(connection.execute("SELECT name, sql FROM sqlite_master WHERE type = 'table'"))
    assert all("AUTOINCREMENT" in sql[table] for table in PROMISED)
    assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    connection.close()
    assert stat.S_IMODE((tmp_path / "session.db").stat().st_mode) == 0o600


def test_migrations_are_done_once_and_never_taken_back(tmp_path: Path) -> None:
    path, more = tmp_path / "l.db", (*SESSION, ("ALTER TABLE fs_events ADD COLUMN old_path TEXT",))
    now = len(SESSION)
    for migrations, version in ((SESSION, now), (SESSION, now), (more, now + 1), (SESSION, now + 1)):
        connection = open_writer(path, migrations)
        assert connection.execute("PRAGMA user_version").fetchone() == (version,)
        connection.execute("INSERT INTO fs_events (timestamp, action, path) VALUES ('t', 'read', '/x')")
        connection.close()
    broken = (*more, ("CREATE TABLE half (id)", "CREATE TABLE fs_events (id)"))
    with pytest.raises(sqlite3.OperationalError, match="already exists"):
        open_writer(path, broken)
    with reader(path) as connection:
        assert connection.execute("SELECT count(*) FROM sqlite_master WHERE name = 'half'").fetchone() == (0,)
        assert connection.execute("SELECT count(*), count(old_path) FROM fs_events").fetchone() == (4, 0)


def test_what_is_flushed_is_seen_and_what_is_closed_has_no_journal(tmp_path: Path) -> None:
    path = tmp_path / "session.db"
    writer = begun(path)
    for number in range(writing.BATCH * 2 + 3):
        writer.put(event(number))
    writer.flush().result(10)
    assert events(path) == [f"e{number}" for number in range(writing.BATCH * 2 + 3)]
    writer.put(event(-1))
    writer.close().result(10)
    assert events(path)[-1] == "e-1"
    tidy(path)  # after the reader
    assert os.listdir(tmp_path) == ["session.db"]
    writer.put(event(0))  # too late, and no harm
    assert writer.dropped == 1
    writer.flush().result(10)
    writer.close().result(10)


def test_a_full_queue_drops_counts_and_tells(tmp_path: Path) -> None:
    writer = begun(tmp_path / "session.db")
    go_on = hold(writer)
    for number in range(writing.LIMIT + 7):
        writer.put(event(number))
    assert writer.dropped == 7
    go_on.set()
    writer.close().result(10)
    with reader(tmp_path / "session.db") as connection:
        assert connection.execute("SELECT count(*) FROM lifecycle_events WHERE event LIKE 'e%'").fetchone() == (
            writing.LIMIT,
        )
        assert connection.execute("SELECT detail FROM lifecycle_events WHERE event = 'dropped'").fetchall() == [("7",)]


@pytest.mark.parametrize("opened", [True, False])
def test_a_disk_without_room_loses_events_and_no_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, opened: bool
) -> None:
    """A page of the journal's index that the disk has no room for would be the end of the process."""
    path, room = tmp_path / "session.db", opened
    monkeypatch.setattr(os, "statvfs", lambda _path: SimpleNamespace(f_bavail=1 if room else 0, f_frsize=ROOM))
    writer = begun(path)
    room = False
    for number in range(3):
        writer.put(event(number))
    writer.flush().result(10)
    assert writer.dropped == 3
    if opened:
        assert events(path) == []
    else:
        assert list(tmp_path.iterdir()) == []
    room = True
    writer.put(event(4))
    writer.close().result(10)
    assert events(path) == ["e4", "dropped"]
    tidy(path)
    room = False
    assert events(path) == ["e4", "dropped"]
    assert os.listdir(tmp_path) == ["session.db"]


def test_a_statement_that_changes_nothing_has_another(tmp_path: Path) -> None:
    writer = begun(tmp_path / "session.db")
    for _ in range(2):
        writer.put(Statement("UPDATE lifecycle_events SET state = 'twice' WHERE event = 'e1'", (), event(1)))
    writer.close().result(10)
    with reader(tmp_path / "session.db") as connection:
        assert connection.execute("SELECT event, state FROM lifecycle_events").fetchall() == [("e1", "twice")]


def test_the_file_is_moved_and_nothing_is_lost(tmp_path: Path) -> None:
    old, new = tmp_path / "old", tmp_path / "new"
    old.mkdir()
    writer = begun(old / "session.db")
    writer.put(event(0))
    with reader(old / "session.db") as connection:  # which keeps the journal from being removed
        connection.execute("SELECT * FROM lifecycle_events").fetchall()
        writer.set_aside().result(10)
        old.rename(new)
        writer.put(event(1))
        writer.go_on(new / "session.db")
    writer.put(event(2))
    writer.close().result(10)
    assert events(new / "session.db") == ["e0", "e1", "e2"]
    tidy(new / "session.db")
    assert os.listdir(new) == ["session.db"]


def test_a_directory_that_is_not_there_loses_events_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    writer = Writer(tmp_path / "missing" / "session.db", SESSION)
    writer.put(event(0))
    writer.flush().result(10)
    assert writer.dropped == 1
    writer.close().result(10)
    assert [record.getMessage()[:19] for record in caplog.records] == ["nothing is recorded"]


def test_a_damaged_file_is_put_aside(tmp_path: Path) -> None:
    path = tmp_path / "session.db"
    path.write_bytes(b"this is no database at all, whatever its name says" * 100)
    writer = begun(path)
    writer.put(event(0))
    writer.close().result(10)
    assert events(path) == ["e0"]
    assert (tmp_path / "session.db.damaged").exists()


def test_a_failing_statement_takes_its_batch_along_and_no_more(tmp_path: Path) -> None:
    writer = begun(tmp_path / "session.db")
    writer.put(event(0))
    writer.flush().result(10)
    writer.put(Statement("INSERT INTO lifecycle_events (timestamp) VALUES (NULL)"))
    writer.flush().result(10)
    writer.put(event(1))
    writer.close().result(10)
    assert writer.dropped == 1
    assert events(tmp_path / "session.db") == ["e0", "e1", "dropped"]


def test_two_processes_may_write_the_index(tmp_path: Path) -> None:
    path = tmp_path / "main.db"
    insert = (
        "INSERT INTO sessions (timestamp, run_dir, name, created_at, persistent, status) VALUES ('', ?, ?, '', 0, '')"
    )
    writers = [Writer(path, MAIN) for _ in range(3)]
    for number in range(50):
        for which, writer in enumerate(writers):
            writer.put(Statement(insert, (str(which), str(number))))
    for writer in writers:
        writer.close().result(20)
    assert [writer.dropped for writer in writers] == [0, 0, 0]
    with reader(path) as connection:
        assert connection.execute("SELECT count(*) FROM sessions").fetchone() == (150,)


def test_a_copy_of_a_ledger_that_is_being_written(tmp_path: Path) -> None:
    source, target = tmp_path / "session.db", tmp_path / "copy.db"
    writer = begun(source)
    for number in range(1000):
        writer.put(event(number))
    assert copy(source, target)  # wherever the writer is just now
    writer.flush().result(10)
    assert journal(source).stat().st_size
    found = events(target)
    assert found == [f"e{number}" for number in range(len(found))]
    assert len(events(source)) == 1000
    connection = open_writer(target, SESSION)
    assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    connection.execute("INSERT INTO lifecycle_events (timestamp, event) VALUES ('t', 'own')")
    connection.close()
    assert "own" not in events(source)
    writer.close().result(10)
    assert not copy(tmp_path / "missing.db", tmp_path / "other.db")
    assert not (tmp_path / "other.db").exists()


def test_a_reader_cannot_write_and_leaves_what_tidy_removes(tmp_path: Path) -> None:
    path = tmp_path / "session.db"
    open_writer(path, SESSION).close()
    with reader(path) as connection, pytest.raises(sqlite3.OperationalError, match="readonly"):
        connection.execute("DELETE FROM exec_events")
    tidy(path)
    assert os.listdir(tmp_path) == ["session.db"]
    tidy(tmp_path / "missing.db")
    assert os.listdir(tmp_path) == ["session.db"]


def test_a_reader_that_knows_that_nobody_writes_leaves_nothing(tmp_path: Path) -> None:
    path = tmp_path / "session.db"
    Writer(path, SESSION).close().result()
    with reader(path, still=True) as connection:
        assert connection.execute("SELECT count(*) FROM exec_events").fetchone() == (0,)
        assert os.listdir(tmp_path) == ["session.db"]


def test_what_comes_fast_is_gathered_unless_somebody_waits_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writing, "AT_ONCE", 0)
    monkeypatch.setattr(writing, "GATHER", 3600.0)
    path, batches = tmp_path / "session.db", []
    write = Writer._write
    monkeypatch.setattr(Writer, "_write", lambda self, batch: (batches.append(len(batch)), write(self, batch)))
    writer = begun(path)
    writer._left = 0.0
    for number in range(3):
        writer.put(event(number))
    writer.flush().result(10)
    assert batches == [3]
    assert events(path) == ["e0", "e1", "e2"]
    writer.put(event(3))
    writer.close().result(10)
    assert events(path)[-1] == "e3"
