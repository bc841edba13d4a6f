"""What is recorded in a `session.db`, as statements. Times are in seconds since 1970, durations in seconds."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Final

from capsem.ledger.schema import iso
from capsem.ledger.writer import Statement

PREVIEW: Final = 1024  # bytes of each output
COMMAND: Final = 16 * 1024  # characters of a command
PATH: Final = 4096  # characters of a path
DETAIL: Final = 1024  # characters of a reason
INHERITED: Final = "inherited"  # a lifecycle event of a fork: what is above it was its source's


def command_began(at: float, exec_id: str, command: str, source: str) -> Statement:
    """A command was asked for; `source` is what it came through."""
    return Statement(
        "INSERT INTO exec_events (timestamp, exec_id, command, source) VALUES (?, ?, ?, ?)",
        (iso(at), exec_id, text(command, COMMAND), source),
    )


def command_started(
    at: float, exec_id: str, *, pid: int, ppid: int, uid: int, exe: str, argv: Sequence[str], cwd: str
) -> tuple[Statement, Statement]:
    """The guest agent has started a process for a command."""
    words = json.dumps([text(word, COMMAND) for word in argv], ensure_ascii=False)
    return (
        Statement("UPDATE exec_events SET pid = ? WHERE exec_id = ? AND pid IS NULL", (pid, exec_id)),
        Statement(
            "INSERT INTO audit_events (timestamp, pid, ppid, uid, exe, comm, argv, cwd, exec_id) "
            "VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
            (iso(at), pid, ppid, uid, text(exe, PATH), exe.rpartition("/")[2][:15], words, text(cwd, PATH), exec_id),
        ),
    )


def command_ended(
    at: float,
    exec_id: str,
    command: str,
    *,
    exit_code: int | None,
    duration: float | None,
    stdout: bytes,
    stderr: bytes,
    stdout_bytes: int,
    stderr_bytes: int,
    error: str | None,
) -> Statement:
    """How it ended. In the row of its beginning, if that has no end yet: a command that ends once more, because the VM was
    rolled back into the middle of it, gets a row of its own."""
    values = (
        exit_code,
        None if duration is None else round(duration * 1000, 3),
        _preview(stdout),
        _preview(stderr),
        stdout_bytes,
        stderr_bytes,
        None if error is None else text(error, DETAIL),
    )
    return Statement(
        "UPDATE exec_events SET exit_code = ?, duration_ms = ?, stdout_preview = ?, stderr_preview = ?, "
        "stdout_bytes = ?, stderr_bytes = ?, error = ? WHERE exec_id = ? AND exit_code IS NULL AND error IS NULL",
        (*values, exec_id),
        Statement(
            "INSERT INTO exec_events (exit_code, duration_ms, stdout_preview, stderr_preview, stdout_bytes, "
            "stderr_bytes, error, exec_id, timestamp, command, source) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, 'resumed')",
            (*values, exec_id, iso(at), text(command, COMMAND)),
        ),
    )


def commands_lost(reason: str) -> Statement:
    """Whatever still runs by the ledger does not any more, and nobody will learn how it ended."""
    return Statement("UPDATE exec_events SET error = ? WHERE exit_code IS NULL AND error IS NULL", (reason,))


def file_event(at: float, action: str, path: str, size: int | None = None) -> Statement:
    """A file of the guest was created, modified, read or deleted."""
    return Statement(
        "INSERT INTO fs_events (timestamp, action, path, size) VALUES (?, ?, ?, ?)",
        (iso(at), action, text(path, PATH), size),
    )


def lifecycle_event(at: float, event: str, state: str | None = None, detail: str | None = None) -> Statement:
    """The VM began, ended, was saved."""
    return Statement(
        "INSERT INTO lifecycle_events (timestamp, event, state, detail) VALUES (?, ?, ?, ?)",
        (iso(at), event, state, None if detail is None else text(detail, DETAIL)),
    )


def inherited(at: float, last_ids: Mapping[str, int]) -> Statement:
    """This is the ledger of a fork from here on; rows up to `last_ids`, by table, happened in its source."""
    return Statement(
        "INSERT INTO lifecycle_events (timestamp, event, detail) VALUES (?, ?, ?)",
        (iso(at), INHERITED, json.dumps(last_ids)),
    )


def text(value: str, limit: int) -> str:
    """The beginning of it, as SQLite takes it: no lone surrogates, as in names that are no UTF-8."""
    return value[:limit] if value.isascii() else value[:limit].encode("utf-8", "replace").decode()


def _preview(output: bytes) -> str:
    return output[:PREVIEW].decode("utf-8", "replace")
