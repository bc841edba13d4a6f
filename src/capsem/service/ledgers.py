"""The ledgers as the service has them: every VM's, which it reads, and the index of all, which it writes.

A VM's supervisor is the only writer of its ledger. Here ledgers are read, on threads of their own, so that whoever asks
slow questions keeps nobody but other readers waiting; they are tidied after their supervisors, and copied for forks.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import sqlite3
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final, TypeVar

from capsem.api.internal import FlushLedger
from capsem.ledger import database, events, queries
from capsem.ledger.inspection import Found, inspect
from capsem.ledger.queries import Provider, Tool, Totals, Work
from capsem.ledger.schema import MAIN, iso
from capsem.ledger.writer import Statement, Writer
from capsem.model.errors import CapsemError, NotFound, TimedOut, Unavailable
from capsem.service.fleet import Fleet
from capsem.service.vm import Vm
from capsem.store import durable
from capsem.store.layout import SessionDir

T = TypeVar("T")

THREADS: Final = 4
QUESTION_LIMIT: Final = 5.0  # seconds for one of our own questions
FLUSH_LIMIT: Final = 2.0  # seconds for a supervisor to say that all is written
CLOSE_LIMIT: Final = 1.0  # seconds for the index when the service stops

_KEY: Final = "run_dir = ? AND name = ? AND created_at = ?"
_UPSERT: Final = (
    "INSERT INTO sessions (timestamp, run_dir, name, created_at, persistent, status, image, ram_mb, cpus, forked_from, "
    "started_at, ended_at, exit_reason) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?) "
    "ON CONFLICT (run_dir, name, created_at) DO UPDATE SET timestamp = excluded.timestamp, "
    "persistent = excluded.persistent, status = excluded.status, started_at = excluded.started_at, "
    "ended_at = excluded.ended_at, exit_reason = excluded.exit_reason"
)
_DELETED: Final = "Deleted"

log = logging.getLogger("capsem_service.ledgers")


class Ledgers:
    """Begins with the service; `close` it."""

    def __init__(self, fleet: Fleet, main: Path) -> None:
        """`main` is the index; it may be shared with services of other run directories."""
        self._fleet = fleet
        self._run_dir = str(fleet.layout.run_dir)
        self._main_path = main
        self._pool = ThreadPoolExecutor(THREADS, thread_name_prefix="ledgers")
        self._indexed: dict[Vm, tuple[Any, ...]] = {}  # what the index was told last
        main.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._main = Writer(main, MAIN)
        # What an earlier service could not tell any more; those that are still there are told of next.
        now = iso(fleet.system.clock.time())
        self._main.put(
            Statement(
                f"UPDATE sessions SET status = '{_DELETED}', ended_at = ? WHERE run_dir = ? AND status <> '{_DELETED}'",  # noqa: S608
                (now, self._run_dir),
            )
        )
        fleet.on_gone = self._gone
        fleet.on_forked = self._forked
        fleet.watchers.append(self._changed)

    async def close(self) -> None:
        """Write the index's last lines."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(CLOSE_LIMIT):
                await asyncio.shield(asyncio.wrap_future(self._main.close()))
        self._pool.shutdown(wait=False, cancel_futures=True)

    # -- reading

    async def ask(self, vm: Vm, question: Callable[[sqlite3.Connection], T]) -> T:
        """One of `ledger.queries` on a VM's ledger. Raises NotFound (it has none yet), TimedOut, Corrupt."""
        await self._flush(vm)
        return await self._read(vm, lambda path: _ask(path, question))

    async def inspect(self, vm: Vm | None, sql: str) -> Found:
        """A stranger's SELECT on a VM's ledger, or on the index. Raises QueryFailed, TimedOut, NotFound, Corrupt."""
        if vm is not None:
            await self._flush(vm)
            return await self._read(vm, lambda path: inspect(path, sql))
        await asyncio.wrap_future(self._main.flush())
        return await self._in_thread(lambda: inspect(self._main_path, sql))

    async def work(self, vm: Vm) -> Work | None:
        """What a VM has done so far; None when its ledger cannot tell."""
        try:
            return await self._read(vm, lambda path: _ask(path, queries.work), wait=False)
        except CapsemError:
            return None

    async def index(self) -> list[dict[str, Any]]:
        """Every VM that the index knows, newest first, with what it has done so far; see `_columns`."""
        await asyncio.wrap_future(self._main.flush())
        found = await self._in_thread(lambda: _ask(self._main_path, _index))
        running = {self._key(vm): vm for vm in self._fleet.all() if vm.running}
        live = {key: await self.work(vm) for key, vm in running.items()}
        for row in found:
            work = live.get((row["run_dir"], row["name"], row["created_at"]))
            if work is not None:
                row.update(_columns(work))
        return found

    async def _read(self, vm: Vm, read: Callable[[Path], T], *, wait: bool = True) -> T:
        """Raises NotFound, if so wanted only after a look at where the VM has moved meanwhile."""
        where = vm.session.ledger
        try:
            return await self._in_thread(lambda: read(where))
        except NotFound:
            if not wait:
                raise
            async with vm.turn:  # it may just be moving to another name
                moved = vm.session.ledger
            if moved == where:
                raise
            return await self._in_thread(lambda: read(moved))
        finally:
            if not vm.running and not vm.deleted:  # a reader alone cannot remove what it made
                await self._in_thread(lambda: _tidy(vm.session))

    async def _flush(self, vm: Vm) -> None:
        """What has happened so far is in the file; a supervisor that cannot say so, or not soon, is not waited for."""
        if vm.link is not None:
            with contextlib.suppress(CapsemError, TimeoutError):
                async with asyncio.timeout(FLUSH_LIMIT):
                    await vm.link.open(FlushLedger()).result()

    async def _in_thread(self, work: Callable[[], T]) -> T:
        try:
            return await asyncio.get_running_loop().run_in_executor(self._pool, work)
        except RuntimeError as error:  # the pool is shut down
            raise Unavailable("the service is stopping", hint="try again when it is back") from error

    # -- for forks

    async def _forked(self, source: Vm, children: Sequence[Vm]) -> None:
        """Give new VMs the history of the one that they are forks of. One that cannot be copied is begun anew."""
        await self._flush(source)
        await asyncio.gather(*(self._copy(source, child) for child in children))

    async def _copy(self, source: Vm, child: Vm) -> None:
        async with child.turn:
            if child.deleted or child.running:
                return
            target = child.session.ledger
            temporary = target.with_name(f"{durable.TEMPORARY}{target.name}")
            try:
                now = self._fleet.system.clock.time()
                await self._read(source, lambda path: _copy(path, temporary, target, now))
            except (CapsemError, sqlite3.Error, OSError) as error:
                log.warning("%s begins without the history of %s: %s", child.id, source.id, error)
                temporary.unlink(missing_ok=True)

    # -- what becomes of VMs

    async def _gone(self, vm: Vm) -> None:
        """A VM's supervisor is gone: nobody writes any more."""
        try:
            vm.work = await self._in_thread(lambda: _wind_up(vm.session))
        except (CapsemError, sqlite3.Error, OSError) as error:  # whatever it is, the VM has ended
            log.warning("the ledger of %s: %s", vm.id, error)

    def _key(self, vm: Vm) -> tuple[str, str, str]:
        return self._run_dir, vm.id, iso(vm.record.created_at)

    def _changed(self, vm: Vm) -> None:
        if vm.record.nobodys:  # a session is somebody's
            return
        record, key, before = vm.record, self._key(vm), self._indexed.get(vm)
        status = None if vm.deleted else vm.status
        row = (
            *key,
            int(record.persistent),
            status or _DELETED,
            record.image,
            record.spec.ram_mb,
            record.spec.cpus,
            record.forked_from,
            None if record.started_at is None else iso(record.started_at),
        )
        reason = None if vm.running or record.last_exit is None else record.last_exit.reason
        state = (*row, reason, vm.work)
        if state == before:
            return
        now = iso(self._fleet.system.clock.time())
        if before is not None and before[:3] != key:
            self._main.put(Statement(f"UPDATE sessions SET name = ? WHERE {_KEY}", (vm.id, *before[:3])))  # noqa: S608
        self._main.put(Statement(_UPSERT, (now, *row, None if status else now, reason)))
        if vm.work is not None:
            columns = _columns(vm.work)
            names = ", ".join(f"{name} = ?" for name in columns)
            self._main.put(Statement(f"UPDATE sessions SET {names} WHERE {_KEY}", (*columns.values(), *key)))  # noqa: S608
        if vm.deleted:
            self._indexed.pop(vm, None)
        else:
            self._indexed[vm] = state


def _ask(path: Path, question: Callable[[sqlite3.Connection], T], *, still: bool = False) -> T:
    try:
        with database.reader(path, limit=QUESTION_LIMIT, still=still) as connection:
            return question(connection)
    except database.Deadline:
        raise TimedOut(f"{path.name} was not read within {QUESTION_LIMIT:.0f} s", hint="ask for less") from None
    except sqlite3.OperationalError as error:  # made, and without tables as yet; or locked
        raise NotFound(f"{path.name} cannot be read: {error}", hint="try again in a moment") from error


def _index(connection: sqlite3.Connection) -> list[dict[str, Any]]:
    cursor = connection.execute("SELECT * FROM sessions ORDER BY created_at DESC, id DESC")
    names = [column[0] for column in cursor.description]
    return [dict(zip(names, row, strict=True)) for row in cursor]


def _tidy(session: SessionDir) -> None:
    try:
        database.tidy(session.ledger)
    except sqlite3.Error as error:
        log.warning("%s stays as it was left: %s", session.ledger, error)


def _wind_up(session: SessionDir) -> Work | None:
    """Remove the journal that a killed supervisor left, and count what there is."""
    _tidy(session)
    if not session.ledger.exists():
        return None
    work = _ask(session.ledger, queries.work, still=True)
    _tidy(session)
    return work


def _copy(source: Path, temporary: Path, target: Path, now: float) -> None:
    def mark(made: sqlite3.Connection) -> None:
        statement = events.inherited(now, queries.last_ids(made))
        made.execute(statement.sql, statement.parameters)

    if database.copy(source, temporary, mark):
        durable.sync_file(temporary)
        durable.rename(temporary, target)


def _columns(work: Work) -> dict[str, Any]:
    """It as columns of the index."""
    return {
        **work.totals._asdict(),
        "providers": json.dumps([each._asdict() for each in work.providers]),
        "tools": json.dumps([each._asdict() for each in work.tools]),
    }


def tops(rows: Sequence[dict[str, Any]]) -> tuple[list[Provider], list[Tool]]:
    """Whose models all of these have called, and which tools models asked for, the most frequent first."""
    providers: dict[str, Provider] = {}
    tools: Counter[str] = Counter()
    for row in rows:
        for each in json.loads(row["providers"] or "[]"):
            before = providers.get(each["provider"], Provider(each["provider"], 0, 0, 0, 0.0))
            counts = (getattr(before, name) + each[name] for name in Provider._fields[1:])
            providers[before.provider] = Provider(before.provider, *counts)
        for each in json.loads(row["tools"] or "[]"):
            tools[each["tool_name"]] += each["call_count"]
    ordered = sorted(providers.values(), key=lambda each: (-each.call_count, each.provider))
    return ordered, [Tool(*each) for each in tools.most_common()]


def sums(rows: Sequence[dict[str, Any]]) -> Totals:
    """What all of these have done together."""
    return Totals._make(sum(row[name] for row in rows) for name in Totals._fields)
