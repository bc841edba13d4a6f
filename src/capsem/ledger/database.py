"""SQLite files: opened to write, opened to read, tidied, copied.

They are in WAL mode: a writer does not wait for readers, nor they for it. SQLite removes the journal (`-wal`, `-shm`)
when the last connection closes, provided that one may write. A reader may not, and one that comes when nobody writes
leaves an empty journal; a writer that was killed leaves a full one, which the next to open it puts right. `tidy` is for
both: whoever owns the VM calls it when nobody writes any more.

The journal has an index that SQLite maps into memory, and a process that touches a mapped page for which the disk has no
room is killed (SIGBUS): with it the VM that it supervises, or the service. So nothing is opened or written that could
do so while there is hardly any room (`has_room`).
"""

from __future__ import annotations

import contextlib
import errno
import os
import sqlite3
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from urllib.parse import quote

from capsem.model.errors import Corrupt, NotFound

BUSY = 2.0  # seconds to wait for another process's lock
WAL_TURN = 0.01  # seconds between tries
ROOM = 256 * 1024  # bytes that have to be free; the index grows by 32 KiB
CHECKPOINT_PAGES = 256  # 1 MiB of journal, then it goes into the file


class Deadline(Exception):
    """A statement took longer than it may."""


def _use_wal(connection: sqlite3.Connection) -> None:
    """SQLite does not wait for another who does the same at that moment: it says at once that the file is locked."""
    deadline = time.monotonic() + BUSY
    while True:
        try:
            connection.execute("PRAGMA journal_mode = WAL")
        except sqlite3.OperationalError as error:
            if "locked" not in str(error) or time.monotonic() >= deadline:
                raise
            time.sleep(WAL_TURN)
        else:
            return


def has_room(path: Path) -> bool:
    """Whether the index of a ledger's journal could grow; see above."""
    try:
        found = os.statvfs(path.parent)
    except OSError:  # whoever opens the file is told what is wrong
        return True
    return found.f_bavail * found.f_frsize >= ROOM


def is_damaged(error: sqlite3.Error) -> bool:
    """Whether it says that the file is no sound database."""
    return getattr(error, "sqlite_errorcode", None) in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)


def open_writer(path: Path, migrations: Sequence[Sequence[str]]) -> sqlite3.Connection:
    """Open a ledger, make it or bring it up to date. Raises sqlite3.Error, OSError."""
    if not has_room(path):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    path.touch(mode=0o600)
    connection = sqlite3.connect(path, timeout=BUSY, isolation_level=None, check_same_thread=False)
    try:
        _use_wal(connection)
        # What is committed survives the death of any process; after a power cut the newest may be missing.
        connection.execute("PRAGMA synchronous = NORMAL")
        connection.execute(f"PRAGMA wal_autocheckpoint = {CHECKPOINT_PAGES}")
        _migrate(connection, migrations)
    except BaseException:
        connection.close()
        raise
    return connection


def _migrate(connection: sqlite3.Connection, migrations: Sequence[Sequence[str]]) -> None:
    if _version(connection) >= len(migrations):
        return
    with transaction(connection):
        done = _version(connection)  # somebody else may have been faster
        for migration in migrations[done:]:
            for statement in migration:
                connection.execute(statement)
        connection.execute(f"PRAGMA user_version = {max(done, len(migrations))}")


def _version(connection: sqlite3.Connection) -> int:
    return int(connection.execute("PRAGMA user_version").fetchone()[0])


@contextlib.contextmanager
def transaction(connection: sqlite3.Connection) -> Iterator[None]:
    """All of it, or nothing."""
    connection.execute("BEGIN IMMEDIATE")
    try:
        yield
    except BaseException:
        if connection.in_transaction:  # a full disk may have rolled it back already
            connection.execute("ROLLBACK")
        raise
    connection.execute("COMMIT")


def close_writer(connection: sqlite3.Connection, *, lasting: bool = True) -> None:
    """Put the journal into the file and close; with no reader there the journal is removed. Not `lasting`: without waiting
    for the disk. Raises sqlite3.Error.
    """
    try:
        if not lasting:
            connection.execute("PRAGMA synchronous = OFF")
        connection.execute("PRAGMA busy_timeout = 0")  # a reader may keep the journal; it is not waited for
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
    finally:
        connection.close()


@contextlib.contextmanager
def reader(path: Path, *, limit: float | None = None, still: bool = False) -> Iterator[sqlite3.Connection]:
    """A connection that cannot write; each statement is ended after `limit` seconds. `still`: nobody writes meanwhile; then
    nothing is left behind that would have to be put right, unless it is there already.

    Raises NotFound (there is no ledger), Deadline, Corrupt, sqlite3.Error of what is done inside.
    """
    alone = "&immutable=1" if not journal(path).exists() and (still or not has_room(path)) else ""  # without an index
    uri = f"file:{quote(str(path))}?mode=ro{alone}"
    try:
        connection = sqlite3.connect(uri, uri=True, timeout=BUSY, isolation_level=None)
    except sqlite3.OperationalError as error:
        raise NotFound(f"there is no ledger {path.name}: {error}", hint="it is made when the VM is started") from error
    end = None if limit is None else time.monotonic() + limit
    connection.text_factory = lambda data: data.decode("utf-8", "replace")
    if end is not None:
        connection.set_progress_handler(lambda: time.monotonic() > end, 5000)
    try:
        yield connection
    except sqlite3.OperationalError as error:
        if end is not None and time.monotonic() > end:
            raise Deadline from error
        raise
    except sqlite3.DatabaseError as error:
        if is_damaged(error):
            raise Corrupt(f"{path.name} is damaged: {error}", hint="the VM is not affected; its history is") from error
        raise
    finally:
        connection.close()


def journal(path: Path) -> Path:
    """Where a ledger's journal is while there is one."""
    return path.with_name(f"{path.name}-wal")


def tidy(path: Path) -> None:
    """Put right, and remove, what a writer or a reader left behind. Nobody else writes; a reader that is still there
    keeps the journal, and tidies when it is done. Without room for that it stays as it is. Raises sqlite3.Error: then, too.
    """
    if journal(path).exists() and path.exists() and has_room(path):
        connection = sqlite3.connect(path, timeout=0, isolation_level=None)
        try:
            connection.execute("PRAGMA user_version").fetchone()  # opens the journal, and recovers it
        finally:
            close_writer(connection)


def copy(source: Path, target: Path, finish: Callable[[sqlite3.Connection], None] = lambda _copy: None) -> bool:
    """Copy a ledger as of one instant, whoever is writing to it, to the new file `target`; False: there is none.

    `finish` may write into the copy.

    Raises sqlite3.Error, Corrupt, OSError; then there may be a part of the target.
    """
    try:
        with reader(source) as original:
            target.touch(mode=0o600)
            made = sqlite3.connect(target, isolation_level=None)
            try:
                made.execute("PRAGMA synchronous = OFF")  # whoever gives it its name makes it durable first
                original.backup(made)
                finish(made)
            finally:
                made.close()
    except NotFound:
        return False
    return True
