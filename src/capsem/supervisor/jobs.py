"""Commands as jobs: they outlive whoever asked for them, and what they wrote can be fetched later.

Each output of a job is a log of the last `RETAINED` bytes, addressed by absolute offset. A follower that keeps up
loses nothing, however much comes: while somebody follows, the guest is held back rather than output dropped.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Awaitable, Callable

from capsem.api.internal import RETAINED, JobEnded
from capsem.control.channel import Stream
from capsem.model.errors import AlreadyExists, CapsemError, NotFound
from capsem.wire.messages import STDERR, STDOUT, Exec, Exited

LAG = 1024 * 1024  # bytes that a follower may be behind before the guest waits for it
FINISHED_KEPT = 64  # jobs
FINISHED_BYTES = 32 * 1024 * 1024  # of output that finished jobs may hold in all
_TRIM = 256 * 1024


class OutputLog:
    """The last `limit` bytes of what was written, by absolute offset."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._data = bytearray()
        self.start = 0  # offset of the first byte still kept

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

    def __init__(self, request: Exec, stream: Stream) -> None:
        self.id = request.job
        self.command = request.command
        self.stream = stream
        self.outputs = {STDOUT: OutputLog(RETAINED), STDERR: OutputLog(RETAINED)}
        self.ended: Exited | CapsemError | None = None
        self._followers: list[Follower] = []
        self._changed = asyncio.Event()
        self._task = asyncio.create_task(self._collect(), name=f"job {self.id}")

    @property
    def held(self) -> int:
        """Bytes of output in memory."""
        return sum(len(log) for log in self.outputs.values())

    def _notify(self) -> None:
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    async def _collect(self) -> None:
        try:
            async with asyncio.TaskGroup() as group:
                for channel in self.outputs:
                    group.create_task(self._pump(channel))
            result = await self.stream.result()
            assert isinstance(result, Exited)
            self.ended = result
        except CapsemError as error:
            self.ended = error
        finally:
            self._notify()

    async def _pump(self, channel: int) -> None:
        log = self.outputs[channel]
        while data := await self.stream.read(channel):
            log.append(data)
            self._notify()
            while any(log.end - follower.offsets[channel] > LAG for follower in self._followers):
                await self._changed.wait()

    async def follow(self, follower: Follower, write: Callable[[int, bytes], Awaitable[None]]) -> JobEnded:
        """Hand a follower all output as it comes; returns how the command ended. Raises what kept it from ending."""
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
                if self.ended is not None:
                    break
                await changed.wait()
        finally:
            self._followers.remove(follower)
            self._notify()
        if isinstance(self.ended, CapsemError):
            raise self.ended
        return JobEnded(job=self.id, dropped=follower.dropped, **self.ended.__dict__)

    def cancel(self) -> None:
        """Kill the command."""
        self.stream.reset()


class JobTable:
    """The jobs of one VM's run. Ids are not used twice."""

    def __init__(self) -> None:
        self._jobs: OrderedDict[str, Job] = OrderedDict()

    def check_new(self, job_id: str) -> None:
        """Raises AlreadyExists."""
        if job_id in self._jobs:
            raise AlreadyExists(f"job {job_id} was started before", hint="attach to it, or use another id")

    def add(self, job: Job) -> None:
        """Keep a job; forgets the oldest finished ones beyond the bounds."""
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

    def ids(self) -> tuple[list[str], list[str]]:
        """All jobs, and those that still run; oldest first."""
        return list(self._jobs), [each.id for each in self._jobs.values() if each.ended is None]
