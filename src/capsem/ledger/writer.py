"""The one writer of a ledger: a queue and a thread. Whoever records hands over a statement and goes on.

The queue is bounded. What comes when it is full is dropped and counted, and the ledger is told how much as soon as there
is room: recording may lose events, and says so; it never makes anything wait. A disk that is full loses events in the
same way, and a file that is damaged is put aside and begun anew.
"""

from __future__ import annotations

import errno
import functools
import logging
import os
import queue
import sqlite3
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any, Final, NamedTuple

from capsem.ledger.database import close_writer, has_room, is_damaged, open_writer, transaction

LIMIT: Final = 4096  # statements that wait
BATCH: Final = 256  # of them in one transaction
AT_ONCE: Final = 50  # transactions a second, and as many in a row; what comes faster than that is gathered
GATHER: Final = 0.02  # seconds that the first of a batch then waits for others, unless somebody waits for it
DAMAGED: Final = ".damaged"

log = logging.getLogger("capsem.ledger")


class Statement(NamedTuple):
    """SQL with its parameters. `otherwise` is done when it has changed nothing; `then` after it, all of them or none."""

    sql: str
    parameters: tuple[Any, ...] = ()
    otherwise: Statement | None = None
    then: tuple[Statement, ...] = ()


class _Order(NamedTuple):
    """Something to be done between statements; it sets `done` itself."""

    do: Callable[[Future[None]], None]
    done: Future[None]


class Writer:
    """Opens the ledger in its thread, at once; `flush` says when it is there."""

    def __init__(
        self, path: Path, migrations: Sequence[Sequence[str]], lost: Callable[[int], Statement] | None = None
    ) -> None:
        """`lost` makes the statement that tells how many were dropped."""
        self._path = path
        self._migrations = migrations
        self._lost = lost
        self._queue: queue.SimpleQueue[Statement | _Order] = queue.SimpleQueue()
        self._wanted = threading.Event()  # somebody waits for what is in the queue
        self._back = threading.Event()  # the file is where it is to be
        self._closing = self._ended = False  # asked for, and done
        self._dropped = 0  # by `put`; counted by its caller's thread alone
        self._failed = 0  # by the disk; counted by ours
        self._told = 0
        self._left, self._counted = float(AT_ONCE), 0.0  # see _busy
        self._connection: sqlite3.Connection | None = None
        self._full = False  # it could not be opened because the disk was
        self._thread = threading.Thread(target=self._run, name=f"ledger {path.name}", daemon=True)
        self._thread.start()

    @property
    def path(self) -> Path:
        """Where the file is."""
        return self._path

    @property
    def dropped(self) -> int:
        """How many statements were lost so far."""
        return self._dropped + self._failed

    def put(self, statement: Statement) -> None:
        """Have it written soon. Never waits, never raises."""
        if self._closing or self._queue.qsize() >= LIMIT:
            self.drop()
        else:
            self._queue.put(statement)

    def drop(self) -> None:
        """Count one that is not to be written."""
        self._dropped += 1

    def flush(self) -> Future[None]:
        """Done when everything that was put before is in the file, or lost."""
        return self._order(lambda done: done.set_result(None))

    def set_aside(self) -> Future[None]:
        """Done when the file is closed, so that it can be moved; what is put from then on waits for `go_on`."""
        return self._order(self._wait_aside)

    def go_on(self, path: Path) -> None:
        """The file is at `path` now."""
        self._path = path
        self._back.set()

    def close(self, *, lasting: bool = True) -> Future[None]:
        """Done when all is written and the file is closed, with its journal in it; nothing is taken any more. Not `lasting`:
        without waiting for the disk.
        """
        done = self._order(functools.partial(self._end, lasting=lasting))
        self._closing = True
        return done

    def _order(self, do: Callable[[Future[None]], None]) -> Future[None]:
        done: Future[None] = Future()
        if self._closing:
            done.set_result(None)
        else:
            self._queue.put(_Order(do, done))
            self._wanted.set()
        return done

    # -- in the thread

    def _run(self) -> None:
        self._open()
        while not self._ended:
            item = self._queue.get()
            batch: list[Statement] = []
            if isinstance(item, Statement) and self._busy() and self._queue.qsize() < BATCH:
                self._wanted.wait(GATHER)
            while isinstance(item, Statement):
                batch.append(item)
                if len(batch) >= BATCH or self._queue.empty():
                    break
                item = self._queue.get()
            if batch:
                self._write(batch)
            if isinstance(item, _Order):
                self._wanted.clear()
                item.do(item.done)

    def _busy(self) -> bool:
        """Whether so much is recorded that a transaction for each would cost more than all else: each is a write to the file,
        and this thread would be awake, and in the way of others, all the time."""
        now = time.monotonic()
        self._left = min(float(AT_ONCE), self._left + (now - self._counted) * AT_ONCE)
        self._counted = now
        if self._left < 1:
            return True
        self._left -= 1
        return False

    def _open(self) -> None:
        self._full = False
        try:
            try:
                self._connection = open_writer(self._path, self._migrations)
            except sqlite3.DatabaseError as error:
                if not is_damaged(error):
                    raise
                log.error("%s is damaged, and begun anew: %s", self._path, error)
                for suffix in ("", "-wal", "-shm"):
                    old = self._path.with_name(self._path.name + suffix)
                    if old.exists():
                        os.replace(old, old.with_name(self._path.name + DAMAGED + suffix))
                self._connection = open_writer(self._path, self._migrations)
        except (sqlite3.Error, OSError) as error:
            log.error("nothing is recorded in %s: %s", self._path, error)
            self._full = isinstance(error, OSError) and error.errno == errno.ENOSPC

    def _write(self, batch: list[Statement]) -> None:
        """In one transaction: what fails fails together, and is lost."""
        room = has_room(self._path)
        if self._full and room:
            self._open()
        if self._connection is None or not room:
            self._failed += len(batch)
            return
        lost = self.dropped
        try:
            with transaction(self._connection):
                for statement in batch:
                    _execute(self._connection, statement)
                if lost > self._told and self._lost is not None:
                    _execute(self._connection, self._lost(lost - self._told))
        except (sqlite3.Error, OverflowError) as error:
            if self._failed == 0:  # most likely a full disk, which would say so again and again
                log.error("%d events are not recorded in %s: %s", len(batch), self._path, error)
            self._failed += len(batch)
        else:
            self._told = lost

    def _wait_aside(self, done: Future[None]) -> None:
        self._close()
        done.set_result(None)
        self._back.wait()
        self._back.clear()
        self._open()

    def _end(self, done: Future[None], *, lasting: bool) -> None:
        self._close(lasting=lasting)
        self._ended = True
        done.set_result(None)

    def _close(self, *, lasting: bool = True) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            try:
                close_writer(connection, lasting=lasting)
            except sqlite3.Error as error:
                log.error("%s is not closed as it should be: %s", self._path, error)


def _execute(connection: sqlite3.Connection, statement: Statement) -> None:
    done = connection.execute(statement.sql, statement.parameters)
    if done.rowcount == 0 and statement.otherwise is not None:
        _execute(connection, statement.otherwise)
    for each in statement.then:
        _execute(connection, each)
