"""The questions that the service asks of a `session.db`, all on a reader's connection (see database.reader).

A ledger whose VM has not run since an upgrade has the columns of its time: what is asked here is in all of them, but for what
`net_log` makes up for.
"""

from __future__ import annotations

import json
import sqlite3
from typing import Any, Final, NamedTuple

from capsem.ledger.events import INHERITED

# Layer -> its rows as (timestamp, layer, ref, summary, status, duration_ms, trace_id).
_TIMELINE: Final = {
    "exec": "SELECT timestamp, 'exec', exec_id, command, "
    "CASE WHEN exit_code IS NOT NULL THEN 'exit ' || exit_code WHEN error IS NOT NULL THEN error ELSE 'running' END, "
    "duration_ms, trace_id FROM exec_events",
    "mcp": "SELECT timestamp, 'mcp', CAST(id AS TEXT), server_name || ' ' || coalesce(tool_name, method, ''), "
    "coalesce(error_message, decision), duration_ms, trace_id FROM mcp_calls",
    "net": "SELECT timestamp, 'net', CAST(id AS TEXT), coalesce(method || ' ', '') || coalesce(domain, '?') || "
    "CASE WHEN port IN (80, 443) THEN '' ELSE coalesce(':' || port, '') END || coalesce(path, ''), "
    "decision, duration_ms, trace_id FROM net_events",
    "fs": "SELECT timestamp, 'fs', CAST(id AS TEXT), path, action, NULL, trace_id FROM fs_events",
    "model": "SELECT timestamp, 'model', CAST(id AS TEXT), coalesce(provider || ' ', '') || coalesce(model, '') || "
    "coalesce(', ' || input_tokens || ' tokens in', '') || coalesce(', ' || output_tokens || ' out', ''), "
    "CAST(status_code AS TEXT), duration_ms, trace_id FROM model_calls",
    "lifecycle": "SELECT timestamp, 'lifecycle', CAST(id AS TEXT), event || coalesce(': ' || detail, ''), state, NULL, "
    "NULL FROM lifecycle_events",
}
LAYERS: Final = tuple(_TIMELINE)
DEFAULT_LAYERS: Final = ("exec", "mcp", "net", "fs", "model")
TIMELINE_COLUMNS: Final = ("timestamp", "layer", "ref", "summary", "status", "duration_ms", "trace_id")

NET_COLUMNS: Final = (
    *("id", "timestamp", "domain", "port", "decision", "process_name", "method", "path", "status_code", "bytes_sent"),
    *("bytes_received", "duration_ms", "matched_rule", "rule_layer", "policy_version", "address", "tls", "error"),
    *("secrets", "trace_id"),
)
SUMMARY_COLUMNS: Final = (
    *("domain", "port", "method", "path", "address", "tls", "rule_layer", "matched_rule", "process_name"),
)
MOST_KINDS: Final = 20_000  # of what was decided
COUNTED: Final = ("exec_events", "fs_events", "net_events", "model_calls", "tool_calls", "mcp_calls")
TOP: Final = 50  # providers and tools that are counted by name

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
    unpriced_calls: int = 0  # of models, whose price is not known: they are not in estimated_cost


class Provider(NamedTuple):
    """Calls of one provider's models. The cost is of those whose price is known."""

    provider: str
    call_count: int
    input_tokens: int
    output_tokens: int
    estimated_cost: float


class Tool(NamedTuple):
    """How often models asked for a tool."""

    tool_name: str
    call_count: int


class Work(NamedTuple):
    """What a VM has done so far, with names to it."""

    totals: Totals
    providers: tuple[Provider, ...] = ()
    tools: tuple[Tool, ...] = ()


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
    # Of each layer its newest, which its index finds: a VM may have made a million requests.
    newest = " UNION ALL ".join(
        f"SELECT * FROM ({_TIMELINE[layer]} WHERE (?1 IS NULL OR timestamp >= ?1) "  # noqa: S608  our own text
        f"AND (?2 IS NULL OR {'NULL' if layer == 'lifecycle' else 'trace_id'} = ?2) ORDER BY timestamp DESC LIMIT ?3)"
        for layer in dict.fromkeys(layers)
    )
    found = connection.execute(
        f"WITH events ({', '.join(TIMELINE_COLUMNS)}) AS ({newest}) SELECT * FROM events "  # noqa: S608
        "ORDER BY timestamp DESC, layer, ref DESC LIMIT ?3",
        (since, trace_id, limit),
    )
    return found.fetchall()[::-1]


def work(connection: sqlite3.Connection) -> Work:
    """Everything that is counted, and for whom: since the VM was forked, if it was, as what it inherited is its source's."""
    since = _inherited(connection)
    return Work(_totals(connection, since), _providers(connection, since), _tools(connection, since))


def last_ids(connection: sqlite3.Connection) -> dict[str, int]:
    """The newest row of each table that is counted."""
    return {
        table: connection.execute(f"SELECT coalesce(max(id), 0) FROM {table}").fetchone()[0]  # noqa: S608  our own text
        for table in COUNTED
    }


def _inherited(connection: sqlite3.Connection) -> dict[str, int]:
    """`last_ids` of the source, in the ledger of a fork; 0 where nothing is inherited."""
    row = connection.execute(
        "SELECT detail FROM lifecycle_events WHERE event = ? ORDER BY id DESC LIMIT 1", (INHERITED,)
    ).fetchone()
    told: dict[str, int] = json.loads(row[0]) if row else {}
    return {table: told.get(table, 0) for table in COUNTED}


def _totals(connection: sqlite3.Connection, since: dict[str, int]) -> Totals:
    row = connection.execute(
        "SELECT (SELECT count(*) FROM exec_events WHERE id > :exec_events), "
        "(SELECT count(*) FROM fs_events WHERE id > :fs_events), "
        "(SELECT count(*) FROM tool_calls WHERE id > :tool_calls), "
        "(SELECT count(*) FROM mcp_calls WHERE id > :mcp_calls), "
        "n.requests, n.allowed, n.denied, m.calls, m.input, m.output, m.cost, m.unpriced FROM "
        "(SELECT count(*) AS requests, count(*) FILTER (WHERE decision = 'allowed') AS allowed, "
        "count(*) FILTER (WHERE decision = 'denied') AS denied FROM net_events WHERE id > :net_events) AS n, "
        "(SELECT count(*) AS calls, coalesce(sum(input_tokens), 0) AS input, "
        "coalesce(sum(output_tokens), 0) AS output, total(estimated_cost_usd) AS cost, "
        "count(*) FILTER (WHERE estimated_cost_usd IS NULL AND status_code BETWEEN 200 AND 299) AS unpriced "
        "FROM model_calls WHERE id > :model_calls) AS m",
        since,
    ).fetchone()
    return Totals(*row)


def _providers(connection: sqlite3.Connection, since: dict[str, int]) -> tuple[Provider, ...]:
    """Whose models were called, those of most calls first."""
    rows = connection.execute(
        "SELECT coalesce(provider, 'unknown'), count(*), coalesce(sum(input_tokens), 0), coalesce(sum(output_tokens), 0), "
        "total(estimated_cost_usd) FROM model_calls WHERE id > ? GROUP BY 1 ORDER BY 2 DESC, 1 LIMIT ?",
        (since["model_calls"], TOP),
    )
    return tuple(Provider(*row) for row in rows)


def _tools(connection: sqlite3.Connection, since: dict[str, int]) -> tuple[Tool, ...]:
    """What models asked for, the most frequent first."""
    rows = connection.execute(
        "SELECT tool_name, count(*) FROM tool_calls WHERE tool_name IS NOT NULL AND id > ? "
        "GROUP BY 1 ORDER BY 2 DESC, 1 LIMIT ?",
        (since["tool_calls"], TOP),
    )
    return tuple(Tool(*row) for row in rows)


def net_log(
    connection: sqlite3.Connection,
    *,
    limit: int,
    since: str | None = None,
    decisions: tuple[str, ...] = (),
    after: int | None = None,
) -> list[dict[str, Any]]:
    """The newest `limit` rows of net_events, oldest first, by column; of these decisions alone, if any are given. `since` is
    a ledger's timestamp. With `after`: of the rows that came after that one the first `limit`, so that who asks again misses
    none. What an older ledger has no column for is None."""
    columns = _columns_of(connection, NET_COLUMNS)
    wanted = f" AND decision IN ({', '.join('?' * len(decisions))})" if decisions else ""
    order = "timestamp DESC, id DESC" if after is None else "id"
    rows = connection.execute(
        f"SELECT {columns} FROM net_events WHERE (? IS NULL OR timestamp >= ?) AND id > ?{wanted} "  # noqa: S608  our own text
        f"ORDER BY {order} LIMIT ?",
        (since, since, after or 0, *decisions, limit),
    )
    found = [dict(zip(NET_COLUMNS, row, strict=True)) for row in rows]
    return found[::-1] if after is None else found


def net_summary(
    connection: sqlite3.Connection, *, since: str, decision: str, paths: bool = False
) -> list[dict[str, Any]]:
    """What was decided so since then, each kind once, the first first: SUMMARY_COLUMNS, of which `process_name` is that of the
    first of them, and how many there were (`count`). Without `paths` those are None."""
    columns = _columns_of(connection, SUMMARY_COLUMNS)
    kinds = ", ".join(
        str(number) for number in range(1, len(SUMMARY_COLUMNS))
    )  # all but process_name, which is the last
    rows = connection.execute(
        f"SELECT {columns if paths else columns.replace('path,', 'NULL AS path,')}, count(*), min(id) "  # noqa: S608
        f"FROM net_events WHERE timestamp >= ? AND decision = ? GROUP BY {kinds} ORDER BY min(id) LIMIT ?",
        (since, decision, MOST_KINDS),
    )
    return [dict(zip((*SUMMARY_COLUMNS, "count"), row[:-1], strict=True)) for row in rows]


def _columns_of(connection: sqlite3.Connection, wanted: tuple[str, ...]) -> str:
    present = {row[1] for row in connection.execute("PRAGMA table_info(net_events)")}
    return ", ".join(name if name in present else f"NULL AS {name}" for name in wanted)


def failures(connection: sqlite3.Connection, *, since: str, limit: int) -> list[tuple[Any, ...]]:
    """Commands that did not end with 0, newest first: (timestamp, command, exit code, error, beginning of stderr)."""
    return connection.execute(
        "SELECT timestamp, command, exit_code, error, stderr_preview FROM exec_events WHERE timestamp >= ? "
        "AND (exit_code <> 0 OR error IS NOT NULL) ORDER BY timestamp DESC LIMIT ?",
        (since, limit),
    ).fetchall()
