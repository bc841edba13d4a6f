"""The tables of the two ledgers, as migrations: `session.db`, one for each VM, and `main.db`, the index of all.

A ledger's `user_version` counts the migrations that it has seen. A migration only adds tables, columns and indexes: so
an older Capsem can go on writing to a newer ledger, as happens when an upgrade is taken back.

Every table has `id` and `timestamp` (UTC, ISO 8601 with microseconds, so that text order is time order). Tables of parts
that do not exist yet, such as the network's, are there and empty: what reads them need not know which version it met.
"""

from __future__ import annotations

from datetime import UTC, datetime
from functools import lru_cache
from typing import Final


def iso(seconds: float) -> str:
    """A time, in seconds since 1970, as the ledgers write it."""
    whole, micro = divmod(round(seconds * 1_000_000), 1_000_000)
    return f"{_second(whole)}.{micro:06}Z"


@lru_cache(maxsize=16)
def _second(seconds: int) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%S")


def _columns(table: str, *columns: str) -> tuple[str, ...]:
    return tuple(f"ALTER TABLE {table} ADD COLUMN {column}" for column in columns)


def _table(name: str, columns: str) -> str:
    return f"CREATE TABLE {name} (id INTEGER PRIMARY KEY AUTOINCREMENT, timestamp TEXT NOT NULL, {columns})"


SESSION: Final = (
    (
        # exit_code is NULL while a command runs, and for good when nobody learnt how it ended: then `error` says why.
        _table(
            "exec_events",
            "exec_id TEXT NOT NULL, command TEXT NOT NULL, exit_code INTEGER, duration_ms REAL, stdout_preview TEXT, "
            "stderr_preview TEXT, stdout_bytes INTEGER, stderr_bytes INTEGER, source TEXT NOT NULL, pid INTEGER, "
            "error TEXT, trace_id TEXT",
        ),
        "CREATE INDEX exec_events_exec_id ON exec_events (exec_id)",
        "CREATE INDEX exec_events_timestamp ON exec_events (timestamp)",
        _table(
            "audit_events",
            "pid INTEGER, ppid INTEGER, uid INTEGER, exe TEXT, comm TEXT, argv TEXT, cwd TEXT, tty TEXT, "
            "parent_exe TEXT, exec_id TEXT",
        ),
        "CREATE INDEX audit_events_timestamp ON audit_events (timestamp)",
        _table("fs_events", "action TEXT NOT NULL, path TEXT NOT NULL, size INTEGER, trace_id TEXT"),
        "CREATE INDEX fs_events_timestamp ON fs_events (timestamp)",
        _table("lifecycle_events", "event TEXT NOT NULL, state TEXT, detail TEXT"),
        _table(
            "net_events",
            "domain TEXT, port INTEGER, decision TEXT, process_name TEXT, method TEXT, path TEXT, status_code INTEGER, "
            "bytes_sent INTEGER, bytes_received INTEGER, duration_ms REAL, matched_rule TEXT, trace_id TEXT",
        ),
        _table(
            "dns_events",
            "domain TEXT, record_type TEXT, decision TEXT, answer TEXT, process_name TEXT, duration_ms REAL, "
            "matched_rule TEXT, trace_id TEXT",
        ),
        _table(
            "model_calls",
            "provider TEXT, model TEXT, method TEXT, path TEXT, stream INTEGER, input_tokens INTEGER, "
            "output_tokens INTEGER, duration_ms REAL, estimated_cost_usd REAL, status_code INTEGER, trace_id TEXT",
        ),
        _table(
            "tool_calls",
            "model_call_id INTEGER, call_index INTEGER, call_id TEXT, tool_name TEXT, arguments TEXT, origin TEXT, "
            "mcp_call_id INTEGER, trace_id TEXT",
        ),
        _table("tool_responses", "model_call_id INTEGER, call_id TEXT, content_preview TEXT, is_error INTEGER"),
        _table(
            "mcp_calls",
            "server_name TEXT, method TEXT, tool_name TEXT, request_id TEXT, decision TEXT, duration_ms REAL, "
            "error_message TEXT, trace_id TEXT",
        ),
        _table(
            "snapshot_events",
            "slot INTEGER, origin TEXT, name TEXT, files_count INTEGER, start_fs_event_id INTEGER, "
            "stop_fs_event_id INTEGER",
        ),
        _table(
            "policy_hook_events",
            "hook TEXT, subject TEXT, decision TEXT, reason TEXT, duration_ms REAL, trace_id TEXT",
        ),
    ),
    (
        # `rule_layer` is where `matched_rule` stands, `address` the one that was dialled, `tls` what became of TLS (none,
        # intercepted, passthrough), `secrets` names, comma-separated.
        *_columns(
            "net_events",
            "rule_layer TEXT",
            "policy_version INTEGER",
            "address TEXT",
            "tls TEXT",
            "error TEXT",
            "secrets TEXT",
        ),
        "CREATE INDEX net_events_timestamp ON net_events (timestamp)",
        "CREATE INDEX net_events_decision ON net_events (decision)",  # a count must not read every row
        *_columns("dns_events", "rule_layer TEXT", "policy_version INTEGER"),
        "CREATE INDEX dns_events_timestamp ON dns_events (timestamp)",
        # input_tokens are with those of caches, output_tokens with thinking; NULL is what is not known, and `note` says why.
        *_columns(
            "model_calls",
            "domain TEXT",
            "cache_read_tokens INTEGER",
            "cache_write_tokens INTEGER",
            "thinking_tokens INTEGER",
            "price_date TEXT",
            "truncated INTEGER NOT NULL DEFAULT 0",
            "note TEXT",
        ),
        "CREATE INDEX model_calls_timestamp ON model_calls (timestamp)",
        "CREATE INDEX tool_calls_model_call ON tool_calls (model_call_id)",
        "CREATE INDEX tool_responses_model_call ON tool_responses (model_call_id)",
    ),
)

MAIN: Final = (
    (
        # `run_dir`, `name` and `created_at` are one VM; the name changes when it is kept under another. The counts are
        # as of its last stop.
        _table(
            "sessions",
            "run_dir TEXT NOT NULL, name TEXT NOT NULL, created_at TEXT NOT NULL, persistent INTEGER NOT NULL, "
            "status TEXT NOT NULL, image TEXT, ram_mb INTEGER, cpus INTEGER, forked_from TEXT, started_at TEXT, "
            "ended_at TEXT, exit_reason TEXT, exec_count INTEGER NOT NULL DEFAULT 0, "
            "file_events INTEGER NOT NULL DEFAULT 0, tool_calls INTEGER NOT NULL DEFAULT 0, "
            "mcp_calls INTEGER NOT NULL DEFAULT 0, requests INTEGER NOT NULL DEFAULT 0, "
            "allowed_requests INTEGER NOT NULL DEFAULT 0, denied_requests INTEGER NOT NULL DEFAULT 0, "
            "model_calls INTEGER NOT NULL DEFAULT 0, input_tokens INTEGER NOT NULL DEFAULT 0, "
            "output_tokens INTEGER NOT NULL DEFAULT 0, estimated_cost REAL NOT NULL DEFAULT 0",
        ),
        "CREATE UNIQUE INDEX sessions_key ON sessions (run_dir, name, created_at)",
    ),
    (
        # Calls of models whose price is not known are not in estimated_cost: `unpriced_calls` counts them. `providers` and
        # `tools` are JSON arrays of queries.Provider and queries.Tool, as objects.
        *_columns("sessions", "unpriced_calls INTEGER NOT NULL DEFAULT 0", "providers TEXT", "tools TEXT"),
    ),
)


def schema_text() -> str:
    """Every statement that makes up a `session.db`, as SQL to read."""
    return "\n".join(f"{statement};" for migration in SESSION for statement in migration)
