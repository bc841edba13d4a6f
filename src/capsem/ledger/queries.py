"""The questions that the service asks of a `session.db`, all on a reader's connection (see database.reader)."""

from __future__ import annotations

import json
import sqlite3
from typing import Any, Final, NamedTuple

# Layer -> its rows as (timestamp, layer, ref, summary, status, duration_ms, trace_id).
_TIMELINE: Final = {
    "exec": "SELECT timestamp, 'exec', exec_id, command, "
    "CASE WHEN exit_code IS NOT NULL THEN 'exit ' || exit_code WHEN error IS NOT NULL THEN error ELSE 'running' END, "
    "duration_ms, trace_id FROM exec_events",
    "mcp": "SELECT timestamp, 'mcp', CAST(id AS TEXT), server_name || ' ' || coalesce(tool_name, method, ''), "
    "coalesce(error_message, decision), duration_ms, trace_id FROM mcp_calls",
    "net": "SELECT timestamp, 'net', CAST(id AS TEXT), coalesce(method || ' ', '') || domain || coalesce(path, ''), "
    "decision, duration_ms, trace_id FROM net_events",
    "fs": "SELECT timestamp, 'fs', CAST(id AS TEXT), path, action, NULL, trace_id FROM fs_events",
    "model": "SELECT timestamp, 'model', CAST(id AS TEXT), coalesce(provider || ' ', '') || coalesce(model, ''), "
    "CAST(status_code AS TEXT), duration_ms, trace_id FROM model_calls",
    "lifecycle": "SELECT timestamp, 'lifecycle', CAST(id AS TEXT), event || coalesce(': ' || detail, ''), state, NULL, "
    "NULL FROM lifecycle_events",
}
LAYERS: Final = tuple(_TIMELINE)
DEFAULT_LAYERS: Final = ("exec", "mcp", "net", "fs", "model")
TIMELINE_COLUMNS: Final = ("timestamp", "layer", "ref", "summary", "status", "duration_ms", "trace_id")

HISTORY_LAYERS: Final = ("all", "exec", "audit")
_EXEC: Final = (
    "SELECT timestamp, id, 'exec' AS layer, command, exit_code, duration_ms, stdout_preview, stderr_preview, "
    "json_object('exec_id', exec_id, 'source', source, 'pid', pid, 'stdout_bytes', stdout_bytes, 'stderr_bytes', "
    "stderr_bytes, 'error', error) AS details FROM exec_events"
)
_AUDIT: Final = (
    "SELECT timestamp, id, 'audit' AS layer, "
    "(SELECT group_concat(value, ' ') FROM json_each(argv)) AS command, NULL AS exit_code, NULL AS duration_ms, "
    "NULL AS stdout_preview, NULL AS stderr_preview, json_object('exec_id', exec_id, 'pid', pid, 'ppid', ppid, 'uid', "
    "uid, 'exe', exe, 'cwd', cwd) AS details FROM audit_events"
)


class Command(NamedTuple):
    """A row of a VM's history."""

    timestamp: str
    layer: str
    command: str
    exit_code: int | None
    duration_ms: float | None
    stdout_preview: str | None
    stderr_preview: str | None
    details: dict[str, Any]


class History(NamedTuple):
    """Some of a VM's commands, newest first, and how many there are in all."""

    commands: list[Command]
    total: int


class Program(NamedTuple):
    """How often a program was started for a command."""

    exe: str
    command_count: int
    first_seen: str
    last_seen: str


class Totals(NamedTuple):
    """What a VM has done so far."""

    exec_count: int = 0
    file_events: int = 0
    tool_calls: int = 0
    mcp_calls: int = 0
    requests: int = 0
    allowed_requests: int = 0
    denied_requests: int = 0
    model_calls: int = 0
    input_tokens: int = 0
    output_tokens: int = 0
    estimated_cost: float = 0.0


def history(
    connection: sqlite3.Connection, *, limit: int, offset: int = 0, search: str = "", layer: str = "all"
) -> History:
    """Commands that hold `search`, newest first; `layer` is one of HISTORY_LAYERS."""
    parts = [part for name, part in (("exec", _EXEC), ("audit", _AUDIT)) if layer in ("all", name)]
    rows = f"SELECT * FROM ({' UNION ALL '.join(parts)})"  # noqa: S608  our own text
    parameters: list[Any] = []
    if search:
        rows += " WHERE command LIKE ? ESCAPE '\\'"
        parameters.append(_like(search))
    total = connection.execute(f"SELECT count(*) FROM ({rows})", parameters).fetchone()[0]  # noqa: S608
    found = connection.execute(
        f"{rows} ORDER BY timestamp DESC, layer DESC, id DESC LIMIT ? OFFSET ?", (*parameters, limit, offset)
    )
    return History([_command(*row) for row in found], total)


def _command(timestamp: str, _id: int, *values: Any) -> Command:
    told = {key: value for key, value in json.loads(values[-1]).items() if value is not None}
    return Command._make((timestamp, *values[:-1], told))


def _like(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace("%", "\\%").replace("_", "\\_")
    return f"%{escaped}%"


def counts(connection: sqlite3.Connection) -> tuple[int, int]:
    """How many rows there are of commands, and of processes."""
    row = connection.execute(
        "SELECT (SELECT count(*) FROM exec_events), (SELECT count(*) FROM audit_events)"
    ).fetchone()
    return row[0], row[1]


def processes(connection: sqlite3.Connection) -> list[Program]:
    """The programs that were started, the most frequent first."""
    rows = connection.execute(
        "SELECT exe, count(*), min(timestamp), max(timestamp) FROM audit_events GROUP BY exe ORDER BY 2 DESC, 1"
    )
    return [Program(*row) for row in rows]


def timeline(
    connection: sqlite3.Connection,
    *,
    limit: int,
    since: str | None = None,
    trace_id: str | None = None,
    layers: tuple[str, ...] = DEFAULT_LAYERS,
) -> list[tuple[Any, ...]]:
    """The newest `limit` events of these layers, oldest first, as TIMELINE_COLUMNS; `since` is a ledger's timestamp."""
    rows = " UNION ALL ".join(_TIMELINE[layer] for layer in dict.fromkeys(layers))
    found = connection.execute(
        f"WITH events ({', '.join(TIMELINE_COLUMNS)}) AS ({rows}) SELECT * FROM events "  # noqa: S608  our own text
        "WHERE (?1 IS NULL OR timestamp >= ?1) AND (?2 IS NULL OR trace_id = ?2) "
        "ORDER BY timestamp DESC, layer, ref DESC LIMIT ?3",
        (since, trace_id, limit),
    )
    return found.fetchall()[::-1]


def totals(connection: sqlite3.Connection) -> Totals:
    """Everything that is counted."""
    row = connection.execute(
        "SELECT (SELECT count(*) FROM exec_events), (SELECT count(*) FROM fs_events), "
        "(SELECT count(*) FROM tool_calls), (SELECT count(*) FROM mcp_calls), "
        "n.requests, n.allowed, n.denied, m.calls, m.input, m.output, m.cost FROM "
        "(SELECT count(*) AS requests, count(*) FILTER (WHERE decision = 'allowed') AS allowed, "
        "count(*) FILTER (WHERE decision = 'denied') AS denied FROM net_events) AS n, "
        "(SELECT count(*) AS calls, coalesce(sum(input_tokens), 0) AS input, "
        "coalesce(sum(output_tokens), 0) AS output, total(estimated_cost_usd) AS cost FROM model_calls) AS m"
    ).fetchone()
    return Totals(*row)


def failures(connection: sqlite3.Connection, *, since: str, limit: int) -> list[tuple[Any, ...]]:
    """Commands that did not end with 0, newest first: (timestamp, command, exit code, error, beginning of stderr)."""
    return connection.execute(
        "SELECT timestamp, command, exit_code, error, stderr_preview FROM exec_events WHERE timestamp >= ? "
        "AND (exit_code <> 0 OR error IS NOT NULL) ORDER BY timestamp DESC LIMIT ?",
        (since, limit),
    ).fetchall()
