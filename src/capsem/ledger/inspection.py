"""A stranger's SQL on a ledger: one SELECT, on a connection that cannot write, within bounds of rows, bytes and time.

What is not allowed is refused while the statement is compiled (SQLite's authorizer), so that nothing depends on
understanding its text.
"""

from __future__ import annotations

import base64
import sqlite3
from pathlib import Path
from typing import Any, Final, NamedTuple

from capsem.ledger.database import Deadline, reader
from capsem.model.errors import QueryFailed, TimedOut

ROWS: Final = 10_000
SECONDS: Final = 5.0
ANSWER: Final = 32 * 1024 * 1024  # bytes of all values, about
VALUE: Final = 8 * 1024 * 1024  # bytes of one value, also on the way

_ALLOWED: Final = frozenset(
    {sqlite3.SQLITE_SELECT, sqlite3.SQLITE_READ, sqlite3.SQLITE_FUNCTION, sqlite3.SQLITE_RECURSIVE}
)
_FORBIDDEN_FUNCTIONS: Final = frozenset({"load_extension"})


class Found(NamedTuple):
    """Rows in the order in which SQLite gave them; `truncated`: there were more."""

    columns: list[str]
    rows: list[list[Any]]
    truncated: bool


def inspect(path: Path, sql: str, *, seconds: float = SECONDS) -> Found:
    """What a SELECT finds. Blocks. Raises NotFound, QueryFailed, TimedOut, Corrupt."""
    try:
        with reader(path, limit=seconds) as connection:
            connection.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, VALUE)
            connection.set_authorizer(_authorize)
            return _select(connection, sql)
    except Deadline:
        raise TimedOut(f"the query timed out after {seconds:g}s", hint="ask for less") from None
    except (sqlite3.Error, sqlite3.Warning, UnicodeEncodeError, MemoryError) as error:
        raise QueryFailed(f"the query failed: {error}", hint="one SELECT on the tables of docs/ledger.md") from error


def _authorize(action: int, first: str | None, second: str | None, _database: str | None, _trigger: str | None) -> int:
    if action not in _ALLOWED or (action == sqlite3.SQLITE_FUNCTION and second in _FORBIDDEN_FUNCTIONS):
        return sqlite3.SQLITE_DENY
    return sqlite3.SQLITE_OK


def _select(connection: sqlite3.Connection, sql: str) -> Found:
    cursor = connection.execute(sql)
    if cursor.description is None:
        raise QueryFailed("the query failed: nothing is selected", hint="begin with SELECT")
    rows: list[list[Any]] = []
    room = ANSWER
    for row in cursor:
        if len(rows) == ROWS:
            return Found(_columns(cursor), rows, truncated=True)
        room -= sum(len(value) if isinstance(value, (str, bytes)) else 8 for value in row)
        if room < 0:
            raise QueryFailed(f"the answer is larger than {ANSWER >> 20} MiB", hint="ask for fewer rows or columns")
        rows.append([base64.b64encode(value).decode() if isinstance(value, bytes) else value for value in row])
    return Found(_columns(cursor), rows, truncated=False)


def _columns(cursor: sqlite3.Cursor) -> list[str]:
    return [column[0] for column in cursor.description]
