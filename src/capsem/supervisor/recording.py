"""What a supervisor writes into its VM's ledger. Nothing here waits, but for what says so, and nothing raises.

The supervisor alone knows of everything that passes between its VM and the world, and outlives its service: so it is the
ledger's only writer, as it is the record's.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import posixpath
from collections.abc import AsyncIterator
from concurrent.futures import Future
from pathlib import Path

from capsem.egress.events import Recorder
from capsem.egress.record import TrafficRecord
from capsem.ledger import events
from capsem.ledger.schema import SESSION
from capsem.ledger.writer import Statement, Writer
from capsem.model.errors import CapsemError
from capsem.supervisor.jobs import Job
from capsem.system import Clock
from capsem.wire.messages import STDERR, STDOUT, Exited, FileRead, FileWritten, ReadFile, Started, WriteFile
from capsem.wire.schema import Message

WORKSPACE = "/root"
OPEN_LIMIT = 2.0  # seconds that a guest which is ready waits for its ledger
FLUSH_LIMIT = 1.0  # seconds that a reader of the ledger waits for what is on its way there
CLOSE_LIMIT = 0.7  # seconds; the service allows two from SIGTERM to the end, and the guest gets one of them

TRAFFIC_LIMIT = 1_000_000  # rows of traffic in one run, some 300 MB; what comes then is counted as lost

log = logging.getLogger("capsem_process.recording")


class Recording:
    """The ledger of one VM's run."""

    def __init__(self, clock: Clock, path: Path, *, on: bool, resumed: bool) -> None:
        """Open it. Not `on`: it is made, and only the VM's own life goes into it. `resumed`: its commands go on."""
        self._clock = clock
        self._on = on
        self._writer = Writer(
            path, SESSION, lambda lost: events.lifecycle_event(clock.time(), "lost", detail=str(lost))
        )
        self._traffic = 0  # rows of it
        self._resting = False  # the VM is suspended: its commands have not ended
        if not resumed:
            self._put(events.commands_lost("the VM ended before the command did"))

    def _put(self, *statements: Statement) -> None:
        for statement in statements:
            self._writer.put(statement)

    # -- events

    def lifecycle(self, event: str, state: str, detail: str | None = None) -> None:
        """The VM has begun something, or come to its end."""
        self._put(events.lifecycle_event(self._clock.time(), event, state, detail))

    def command_began(self, job: Job, source: str) -> None:
        """A command was asked for; `source` is what it came through."""
        if self._on:
            self._put(events.command_began(self._clock.time(), job.id, job.command, source))

    def command_started(self, job: Job, started: Started) -> None:
        """The guest agent told of the process that it started."""
        if self._on:
            self._put(
                *events.command_started(
                    self._clock.time(),
                    job.id,
                    pid=started.pid,
                    ppid=started.ppid,
                    uid=started.uid,
                    exe=started.exe,
                    argv=[*started.argv, job.command],
                    cwd=started.cwd,
                )
            )

    def command_ended(self, job: Job) -> None:
        """A command has ended, or cannot be followed any more; one whose VM is suspended has not."""
        how = job.ended
        if not self._on or self._resting or how is None:
            return
        stdout, stderr = job.outputs[STDOUT], job.outputs[STDERR]
        error = how.message if isinstance(how, CapsemError) else "timed out" if how.timed_out else None
        self._put(
            events.command_ended(
                self._clock.time(),
                job.id,
                job.command,
                exit_code=how.exit_code if isinstance(how, Exited) else None,
                duration=how.duration if isinstance(how, Exited) else None,
                stdout=stdout.read(0, events.PREVIEW),
                stderr=stderr.read(0, events.PREVIEW),
                stdout_bytes=stdout.end,
                stderr_bytes=stderr.end,
                error=error,
            )
        )

    def file_moved(self, request: Message, result: Message) -> None:
        """A file of the workspace was read or written by somebody outside."""
        if isinstance(request, WriteFile) and isinstance(result, FileWritten):
            self._file("created" if result.created else "modified", request.path, result.size)
        elif isinstance(request, ReadFile) and isinstance(result, FileRead):
            self._file("read", request.path, result.size)

    def files_written(self, sizes: dict[str, float]) -> None:
        """The guest agent has written these files by itself."""
        for path, size in sizes.items():
            self._file("modified", path, int(size))

    def _file(self, action: str, path: str, size: int) -> None:
        if self._on:
            full = posixpath.normpath(posixpath.join(WORKSPACE, path))
            self._put(events.file_event(self._clock.time(), action, full, size))

    def begin(self) -> None:
        """Commands and files are recorded from here on."""
        self._on = True

    def rest(self) -> None:
        """The VM is suspended: what becomes of its commands is told when it is resumed."""
        self._resting = True

    @property
    def traffic(self) -> Recorder:
        """Takes what the VM's traffic does; nothing of it is kept as long as commands are not."""
        return TrafficRecord(self._put_traffic)

    def _put_traffic(self, statement: Statement) -> None:
        """A guest may make requests as fast as it can, for as long as it likes: the host's disk is not for it to fill."""
        if not self._on:
            return
        self._traffic += 1
        if self._traffic > TRAFFIC_LIMIT:
            self._writer.drop()
            if self._traffic == TRAFFIC_LIMIT + 1:
                log.warning("no more of the traffic is recorded until the VM is started anew: %d rows", TRAFFIC_LIMIT)
        else:
            self._put(statement)

    # -- the file

    async def opened(self) -> None:
        """Return when the ledger is there, or will not be soon."""
        await _settled(self._writer.flush(), OPEN_LIMIT)

    async def flushed(self) -> None:
        """Return when what was recorded so far can be read, or will not be soon."""
        await _settled(self._writer.flush(), FLUSH_LIMIT)

    @contextlib.asynccontextmanager
    async def set_aside(self, path: Path) -> AsyncIterator[None]:
        """Inside, the file is closed and may be moved: SQLite finds its journal by name. It goes on wherever it is then,
        at `path` or below the directory that it was in; until then events wait in the queue."""
        before = self._writer.path
        await asyncio.wrap_future(self._writer.set_aside())
        try:
            yield
        finally:
            self._writer.go_on(path if path.parent.exists() else before)

    async def close(self, *, lasting: bool = True) -> None:
        """Write what is left and close the file, durably unless it is about to be removed; what takes too long is left to
        whoever opens it next.
        """
        if not self._resting:
            self._put(events.commands_lost("the VM ended before the command did"))
        if not await _settled(self._writer.close(lasting=lasting), CLOSE_LIMIT):
            log.error("the ledger is not closed: its disk is too slow")
        if self._writer.dropped:
            log.warning("%d events are not in the ledger", self._writer.dropped)


async def _settled(done: Future[None], limit: float) -> bool:
    """Whether it is done in time."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(limit):
            await asyncio.shield(asyncio.wrap_future(done))
            return True
    return False
