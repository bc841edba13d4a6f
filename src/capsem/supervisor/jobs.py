"""Commands as jobs: they outlive whoever asked for them, and what they wrote can be fetched later.

Each output of a job is a log of the last `RETAINED` bytes, addressed by absolute offset. A follower that keeps up
loses nothing, however much comes: while somebody follows, the guest is held back rather than output dropped.

A job outlives its stream to the guest, too. When an epoch takes that away, be it that the agent met garbage or that
the machine was restored from a checkpoint, the job attaches again at the offsets that it has; the guest keeps what it
sent until that was confirmed. A job that the guest does not know ends as interrupted: nothing is run twice.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Iterator

from capsem.api.internal import RETAINED, JobEnded
from capsem.control.channel import Stream
from capsem.control.guest import Guest
from capsem.model.errors import AlreadyExists, CapsemError, Interrupted, NotFound, TimedOut, WrongState, from_dict
from capsem.store.jobs import OUTPUT_LIMIT, TOTAL_LIMIT, SavedJob, SavedOutput
from capsem.wire.messages import (
    STDERR,
    STDIN,
    STDOUT,
    Exec,
    Exited,
    Failed,
    Forget,
    Reattach,
    Reattached,
    Signal,
    Started,
    Terminal,
)
from capsem.wire.schema import Message

LAG = 1024 * 1024  # bytes that a follower may be behind before the guest waits for it
FINISHED_KEPT = 64  # jobs
FINISHED_BYTES = 32 * 1024 * 1024  # of output that finished jobs may hold in all
EPOCH_LIMIT = 90.0  # seconds for the guest to be ready in another epoch
_TRIM = 256 * 1024


class OutputLog:
    """The last `limit` bytes of what was written, by absolute offset."""

    def __init__(self, limit: int = RETAINED, *, start: int = 0, data: bytes = b"") -> None:
        self._limit = limit
        self._data = bytearray(data)
        self.start = start  # offset of the first byte still kept

    @property
    def end(self) -> int:
        """Offset after the last byte."""
        return self.start + len(self._data)

    def append(self, data: bytes) -> None:
        """Add bytes, dropping the oldest beyond the limit (in strides, so that it costs little)."""
        self._data += data
        excess = len(self._data) - self._limit
        if excess >= min(_TRIM, self._limit):
            del self._data[:excess]
            self.start += excess

    def go_on_at(self, offset: int) -> None:
        """What comes next is at `offset`; if that leaves a gap, what is before it is dropped."""
        if offset != self.end:
            self._data.clear()
            self.start = offset

    def read(self, offset: int, size: int) -> bytes:
        """Bytes from `offset` on, or from the first that is kept."""
        at = max(0, offset - self.start)
        return bytes(memoryview(self._data)[at : at + size])

    def __len__(self) -> int:
        return len(self._data)


class Follower:
    """Somebody's place in a job's outputs."""

    def __init__(self, offsets: dict[int, int]) -> None:
        self.offsets = offsets
        self.dropped = 0


class Job:
    """One command, from the moment that it was asked for."""

    def __init__(
        self,
        job_id: str,
        command: str,
        outputs: dict[int, OutputLog] | None = None,
        ended: Exited | CapsemError | None = None,
    ) -> None:
        self.id = job_id
        self.command = command
        self.outputs = outputs or {STDOUT: OutputLog(), STDERR: OutputLog()}
        self.ended = ended
        self.stream: Stream | None = None
        self.on_started: Callable[[Started], None] = lambda _started: None
        self.terminal = False  # whether it runs on one, as far as that is known yet
        self.on_ended: Callable[[], None] = lambda: None
        self.on_shown: Callable[[bytes], None] = lambda _data: None  # by its terminal
        self._followers: list[Follower] = []
        self._changed = asyncio.Event()
        # Done once nobody can follow it here any more; then why.
        self.cut: asyncio.Future[Interrupted] = asyncio.get_running_loop().create_future()
        self._cancelled = self._given_up = False  # wanted, and done
        self._signals: list[int] = []  # that wait for a stream
        self._input: Stream | None = None  # what takes standard input, while that is open
        self._feeding = asyncio.Lock()
        self._task: asyncio.Task[None] | None = None

    @property
    def held(self) -> int:
        """Bytes of output in memory."""
        return sum(len(log) for log in self.outputs.values())

    @property
    def followed(self) -> bool:
        """Whether somebody waits for its output."""
        return bool(self._followers)

    def _notify(self) -> None:
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    # -- with the guest

    def start(self, guest: Guest, request: Exec | Terminal) -> None:
        """Ask the guest for it. Raises Interrupted, InvalidInput."""
        self.terminal = isinstance(request, Terminal)
        self.stream = guest.execute(type(request)(**{**request.__dict__, "told": True}))
        self.stream.on_message = self._told
        self._input = self.stream if isinstance(request, Exec) and request.stdin else None
        self._task = asyncio.create_task(self._run(guest), name=f"job {self.id}")

    def _told(self, message: Message) -> None:
        if isinstance(message, Started):
            self.on_started(message)

    def go_on(self, guest: Guest) -> None:
        """Attach to it in a guest that was restored."""
        self._task = asyncio.create_task(self._run(guest), name=f"job {self.id}")

    async def _run(self, guest: Guest) -> None:
        try:
            self.ended = await self._follow_through(guest)
        except NotFound:
            self.ended = Interrupted(
                f"what became of job {self.id} is not known: it never began, or the guest agent began anew since",
                hint="look what it did before you repeat it",
            )
        except CapsemError as error:
            self.ended = error
        finally:
            self.stream = None
            self._notify()
            self.on_ended()
        with contextlib.suppress(CapsemError):  # then it keeps it for a while longer
            await guest.channel.open(Forget(job=self.id)).result()

    async def _follow_through(self, guest: Guest) -> Exited:
        """Collect what the command writes, through as many epochs as there are; returns how it ended."""
        while True:
            stream = self.stream or await self._attach(guest)
            try:
                ended = await self._collect(stream)
            except Interrupted:
                self.stream = None
                if self._given_up or guest.is_lost:
                    raise
            else:
                guest.did("run the command", ended.duration)
                return ended

    async def _attach(self, guest: Guest) -> Stream:
        try:
            await guest.wait_ready(EPOCH_LIMIT)
        except TimedOut as error:
            raise Interrupted(f"the guest could not be asked about job {self.id} again: {error.message}") from None
        at = {channel: log.end for channel, log in self.outputs.items()}
        stream = guest.channel.open(Reattach(job=self.id, stdout=at[STDOUT], stderr=at[STDERR]))
        stream.on_message = self._attached
        self.stream = stream
        for number in self._signals:
            stream.send(Signal(number=number))
        self._signals.clear()
        self._notify()
        if self._cancelled:
            self._give_up(stream)
        return stream

    def _attached(self, message: Message) -> None:
        if isinstance(message, Reattached):
            self.outputs[STDOUT].go_on_at(message.stdout)
            self.outputs[STDERR].go_on_at(message.stderr)
            self.terminal = message.terminal

    async def _collect(self, stream: Stream) -> Exited:
        pumps = [asyncio.create_task(self._pump(stream, channel)) for channel in self.outputs]
        try:
            await asyncio.gather(*pumps)
        finally:
            for pump in pumps:
                pump.cancel()
        result = await stream.result()
        assert isinstance(result, Exited)
        return result

    async def _pump(self, stream: Stream, channel: int) -> None:
        log = self.outputs[channel]
        while data := await stream.read(channel):
            log.append(data)
            if self.terminal:
                self.on_shown(data)
            self._notify()
            while any(log.end - follower.offsets[channel] > LAG for follower in self._followers):
                await self._changed.wait()

    def send(self, message: Message) -> None:
        """Hand a message, such as a signal, to the command; one that has ended does not get it."""
        if self.stream is not None:
            self.stream.send(message)

    def signal(self, number: int) -> bool:
        """Send the command a signal, now or when it has a stream again; False when it has ended."""
        if self.ended is not None:
            return False
        if self.stream is not None and not self.stream.over:
            self.stream.send(Signal(number=number))
        else:
            self._signals.append(number)
        return True

    async def feed(self, source: Stream, *, end: bool) -> int:
        """Hand the command what comes on `source` as its input, at its pace; with `end` that is all it gets.

        Returns how many bytes there were. One call's bytes stay together. Raises WrongState when nothing takes them,
        Interrupted when they do not come to their end.
        """
        async with self._feeding:
            size = 0
            target = self._takes_input()
            while data := await source.read(STDIN):
                await target.write(STDIN, data)
                target = self._takes_input()
                size += len(data)
            if not source.ended(STDIN):
                raise Interrupted("the input was given up half-way")
            if end:
                target.end(STDIN)
                self._input = None
            return size

    def _takes_input(self) -> Stream:
        if self._input is None or self._input.over or self.ended is not None:
            how = "has ended" if self.ended is not None else "takes no input"
            raise WrongState(
                f"job {self.id} {how}",
                hint="a command has input while it runs, if it was started with `stdin`, until that is ended or its VM suspended",
            )
        return self._input

    async def type_on(self, source: Stream) -> None:
        """Type, on its terminal, what comes from `source`, through as many epochs as there are. Its end is not the input's."""
        while data := await source.read(STDIN):
            while self.ended is None:
                changed, stream = self._changed, self.stream
                if stream is not None and not stream.over:
                    await stream.write(STDIN, data)
                    break
                await changed.wait()

    def cancel(self) -> None:
        """Kill the command; one that has no stream now, when it has one."""
        self._cancelled = True
        if self.stream is not None and not self.stream.over:
            self._give_up(self.stream)

    def _give_up(self, stream: Stream) -> None:
        self._given_up = True
        stream.reset()

    # -- with those who follow it

    async def follow(
        self, follower: Follower, write: Callable[[int, bytes], Awaitable[None]], *, wait: bool
    ) -> JobEnded:
        """Hand a follower all output as it comes, or with `wait` false what there is; returns how the command ended.

        Raises what kept it from ending.
        """
        self._followers.append(follower)
        try:
            while True:
                changed = self._changed
                moved = False
                for channel, log in self.outputs.items():
                    offset = follower.offsets[channel]
                    if offset < log.start:
                        follower.dropped += log.start - offset
                        offset = follower.offsets[channel] = log.start
                    data = log.read(offset, _TRIM)
                    if data:
                        moved = True
                        await write(channel, data)
                        follower.offsets[channel] = offset + len(data)
                        self._notify()
                if moved:
                    continue
                if self.ended is not None or not wait:
                    break
                await changed.wait()
        finally:
            self._followers.remove(follower)
            self._notify()
        if isinstance(self.ended, CapsemError):
            raise self.ended
        if self.ended is None:
            return JobEnded(job=self.id, exit_code=0, running=True, dropped=follower.dropped)
        return JobEnded(job=self.id, dropped=follower.dropped, **self.ended.__dict__)

    # -- with checkpoints

    def mark(self) -> Mark:
        """Where it is now; cheap."""
        return Mark(self, {channel: log.end for channel, log in self.outputs.items()}, self.ended)


class Mark:
    """Where a job was at an instant."""

    def __init__(self, job: Job, ends: dict[int, int], ended: Exited | CapsemError | None) -> None:
        self._job = job
        self._ends = ends
        self._ended = ended

    def saved(self, room: int) -> SavedJob:
        """The job as it was, with at most `room` bytes of output: what is still kept of what it had written."""
        outputs = {}
        for channel, end in self._ends.items():
            log = self._job.outputs[channel]
            start = max(log.start, end - min(OUTPUT_LIMIT, room))
            data = log.read(start, end - start) if start < end else b""
            room -= len(data)
            outputs[channel] = SavedOutput(end, data)
        how = self._ended
        ended = Failed(code=how.code, message=how.message, hint=how.hint) if isinstance(how, CapsemError) else how
        return SavedJob(self._job.id, self._job.command, outputs[STDOUT], outputs[STDERR], ended)


def restored(saved: SavedJob) -> Job:
    """A job of a checkpoint."""
    outputs = {
        channel: OutputLog(start=output.start, data=output.data)
        for channel, output in ((STDOUT, saved.stdout), (STDERR, saved.stderr))
    }
    ended = from_dict(saved.ended.__dict__) if isinstance(saved.ended, Failed) else saved.ended
    return Job(saved.id, saved.command, outputs, ended)


class JobTable:
    """The jobs of one VM's run. Ids are not used twice. `shown` is handed what their terminals show."""

    def __init__(self, shown: Callable[[bytes], None] = lambda _data: None) -> None:
        self._shown = shown
        self._jobs: OrderedDict[str, Job] = OrderedDict()

    def __iter__(self) -> Iterator[Job]:
        """Oldest first."""
        return iter(list(self._jobs.values()))

    def marks(self) -> list[Mark]:
        """Where all of them are now. Call it while the machine stands still and nothing is sent to it."""
        return [job.mark() for job in self._jobs.values()]

    def restore(self, saved: list[SavedJob], guest: Guest) -> None:
        """Take over the jobs of a checkpoint, and go on with those that had not ended in its guest."""
        for each in saved:
            job = restored(each)
            job.on_shown = self._shown
            self._jobs[job.id] = job
            if job.ended is None:
                job.go_on(guest)

    def forget_ended(self) -> None:
        """Those that have ended were of no interest to anybody."""
        for job in self:
            if job.ended is not None:
                del self._jobs[job.id]

    def cut(self, reason: Callable[[str], Interrupted]) -> None:
        """Those who follow a job are told the reason, and no more."""
        for job in self._jobs.values():
            if not job.cut.done():
                job.cut.set_result(reason(job.id))

    def check_new(self, job_id: str) -> None:
        """Raises AlreadyExists."""
        if job_id in self._jobs:
            raise AlreadyExists(f"job {job_id} was started before", hint="attach to it, or use another id")

    def add(self, job: Job) -> None:
        """Keep a job; forgets the oldest finished ones beyond the bounds."""
        job.on_shown = self._shown
        self._jobs[job.id] = job
        finished = [each for each in self._jobs.values() if each.ended is not None]
        held = sum(each.held for each in finished)
        for count, each in zip(range(len(finished), 0, -1), finished, strict=True):
            if count <= FINISHED_KEPT and held <= FINISHED_BYTES:
                break
            held -= each.held
            del self._jobs[each.id]

    def get(self, job_id: str) -> Job:
        """Raises NotFound."""
        job = self._jobs.get(job_id)
        if job is None:
            raise NotFound(f"no job {job_id}", hint="finished jobs are kept for a while only")
        return job


def saved_jobs(marks: list[Mark]) -> list[SavedJob]:
    """The jobs as they were, oldest first, with the output of the newest as far as there is room."""
    room, jobs = TOTAL_LIMIT, []
    for mark in reversed(marks):
        jobs.append(mark.saved(room))
        room -= len(jobs[-1].stdout.data) + len(jobs[-1].stderr.data)
    return jobs[::-1]
