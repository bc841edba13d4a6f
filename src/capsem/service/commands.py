"""Commands and files of running VMs."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator

import msgspec

from capsem.api.exec_types import (
    ExecRequest,
    ExecResponse,
    ExecResult,
    FeedJobResponse,
    ForwardRequest,
    ForwardResult,
    JobInfo,
    JobsResponse,
    KillJobRequest,
    KillJobResponse,
)
from capsem.api.file_types import ReadFileRequest, ReadFileResponse, WriteFileRequest
from capsem.api.internal import Attach, Fed, Feed, JobEnded, JobList, Jobs, JobStarted, Kill, Killed, Start
from capsem.api.operations import OPERATIONS
from capsem.api.stream import ERROR, RESULT
from capsem.control.channel import Stream, limited
from capsem.model.errors import CapsemError, GuestFailed, Interrupted, InvalidInput, TimedOut
from capsem.service.fleet import Fleet
from capsem.service.manager import Resize
from capsem.service.vm import Vm
from capsem.wire import messages as wire
from capsem.wire.messages import STDERR, STDIN, STDOUT, Exec, Forward, ReadFile, Terminal, WriteFile

FILE_LIMIT = 30.0  # seconds
START_LIMIT = 60.0  # seconds, of which a checkpoint may take the most
TEXT_FILE_LIMIT = 256 * 1024  # bytes through read_file and write_file
OUTPUT_CAP = 10 * 1024 * 1024  # bytes of a command's output in one answer
DEADLINE_MARGIN = 10.0  # seconds that a guest may be late with a time-out it was given
COMMAND_LIMIT = 128 * 1024 - 1  # Linux's MAX_ARG_STRLEN, less the terminating NUL


class Commands:
    """See service.manager.Manager."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet

    def _vm(self, operation: str, vm_id: str) -> Vm:
        """A VM that may be asked for an operation in the state it is in. Raises what the table of operations says."""
        vm = self._fleet.get(vm_id)
        OPERATIONS[operation].require(vm.state, vm_id)
        return vm

    async def execute(self, vm_id: str, request: ExecRequest) -> ExecResponse:
        """Run a command to its end; its output comes back whole, up to 10 MiB."""
        if request.terminal is not None:
            raise InvalidInput("a terminal needs a stream", hint="POST /exec/{id}/stream")
        output = {STDOUT: bytearray(), STDERR: bytearray()}
        truncated = False
        async with contextlib.aclosing(self._follow(vm_id, request, None)) as items:
            async for channel, data in items:
                if isinstance(data, JobEnded):
                    return ExecResponse(
                        stdout=output[STDOUT].decode("utf-8", "replace"),
                        stderr=output[STDERR].decode("utf-8", "replace"),
                        exit_code=data.exit_code,
                        job=data.job,
                        truncated=truncated or data.dropped > 0,
                        running=data.running,
                        signal=data.signal,
                    )
                room = OUTPUT_CAP - sum(map(len, output.values()))
                truncated = truncated or len(data) > room
                output[channel] += data[:room]
        raise GuestFailed("the command's end was not reported")

    async def execute_stream(
        self, vm_id: str, request: ExecRequest, stdin: AsyncIterator[bytes | Resize] | None
    ) -> AsyncIterator[tuple[int, bytes]]:
        """Run a command; output as it is made, then the result (channel 3) or the error (channel 4) as JSON."""
        begun = False
        try:
            async with contextlib.aclosing(self._follow(vm_id, request, stdin)) as items:
                async for channel, data in items:
                    begun = True
                    if isinstance(data, JobEnded):
                        result = ExecResult(
                            exit_code=data.exit_code,
                            job=data.job,
                            truncated=data.dropped > 0,
                            running=data.running,
                            signal=data.signal,
                        )
                        yield RESULT, msgspec.json.encode(result)
                    else:
                        yield channel, data
        except CapsemError as error:
            if not begun:
                raise
            yield ERROR, msgspec.json.encode(error.to_dict())

    async def _follow(
        self, vm_id: str, request: ExecRequest, stdin: AsyncIterator[bytes | Resize] | None
    ) -> AsyncGenerator[tuple[int, bytes | JobEnded], None]:
        """A command's output as it comes, then how it ended. Leaving early kills the command."""
        if len((request.command or "").encode(errors="surrogatepass")) > COMMAND_LIMIT:
            raise InvalidInput("the command is too long", hint="write it to a file with write_file and run that")
        if request.timeout_secs is not None and request.timeout_secs <= 0:
            raise InvalidInput(f"timeout_secs is {request.timeout_secs}", hint="leave it out for no limit")
        link = await self._vm("exec", vm_id).ready_link()
        order = self._order(request, stdin=stdin is not None)
        stream = link.open(order)
        if isinstance(order, Start):
            async with limited(stream, "starting the command", START_LIMIT):
                started = await stream.result()
            assert isinstance(started, JobStarted)
            yield RESULT, JobEnded(job=started.job, exit_code=0, running=True)
            return
        if isinstance(order, Attach) and request.terminal is not None:
            stream.send(wire.Resize(rows=request.terminal.rows, columns=request.terminal.columns))
        queue: asyncio.Queue[tuple[int, bytes] | None] = asyncio.Queue(maxsize=1)
        tasks = [asyncio.create_task(_pump(stream, channel, queue)) for channel in (STDOUT, STDERR)]
        if stdin is not None:
            tasks.append(asyncio.create_task(_feed(stream, stdin)))
        limit = None if request.timeout_secs is None else request.timeout_secs + DEADLINE_MARGIN
        try:
            yield STDOUT, b""  # admitted
            async with asyncio.timeout(limit):
                open_channels = 2
                while open_channels:
                    item = await queue.get()
                    if item is None:
                        open_channels -= 1
                    else:
                        yield item
                result = await stream.result()
        except TimeoutError:
            raise TimedOut(f"command timed out after {request.timeout_secs:g}s and the guest did not end it") from None
        except Interrupted as error:
            error.job = error.job or order.job
            raise
        finally:
            stream.reset()
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        assert isinstance(result, JobEnded)
        if result.timed_out:
            limit_told = "" if request.timeout_secs is None else f" after {request.timeout_secs:g}s"
            raise TimedOut(f"command timed out{limit_told}", hint="give it a longer timeout")
        yield RESULT, result

    def _order(self, request: ExecRequest, *, stdin: bool) -> Exec | Terminal | Start | Attach:
        """What a supervisor is asked for."""
        job = request.job or self._fleet.system.entropy.token_bytes(8).hex()
        if request.offsets is not None:
            at = request.offsets
            terminal = request.terminal is not None
            return Attach(
                job=job,
                stdout=at.stdout,
                stderr=at.stderr,
                wait=request.wait,
                keep=request.keep or terminal,
                stdin=terminal,
            )
        if request.terminal is not None:
            return Terminal(
                job=job,
                command=request.command or "",
                env=dict(request.env or {}),
                cwd=request.cwd,
                rows=request.terminal.rows,
                columns=request.terminal.columns,
            )
        kind = Exec if request.wait else Start
        return kind(
            job=job,
            command=request.command or "",
            env=dict(request.env or {}),
            cwd=request.cwd,
            timeout=request.timeout_secs,
            stdin=stdin if request.wait else request.stdin,
        )

    async def forward(
        self, vm_id: str, request: ForwardRequest, stdin: AsyncIterator[bytes | Resize] | None
    ) -> AsyncIterator[tuple[int, bytes]]:
        """A connection to a port of the guest's; what comes, then the result or the error as JSON."""
        link = await self._vm("forward", vm_id).ready_link()
        stream, begun, feeding = link.open(Forward(port=request.port)), False, None
        if stdin is None:
            stream.end(STDIN)
        else:
            feeding = asyncio.create_task(_feed(stream, stdin))
        try:
            while data := await stream.read(STDOUT):
                begun = True
                yield STDOUT, data
            await stream.result()
            yield RESULT, msgspec.json.encode(ForwardResult(success=True))
        except CapsemError as error:
            if not begun:
                raise
            yield ERROR, msgspec.json.encode(error.to_dict())
        finally:
            stream.reset()
            if feeding is not None:
                feeding.cancel()
                await asyncio.gather(feeding, return_exceptions=True)

    async def jobs(self, vm_id: str) -> JobsResponse:
        """The commands of a running VM."""
        link = await self._vm("jobs", vm_id).ready_link()
        answer = await link.open(Jobs()).result()
        assert isinstance(answer, JobList)
        details = [
            JobInfo(
                id=job,
                command=answer.commands.get(job, ""),
                running=job in answer.running,
                followed=job in answer.followed,
                exit_code=None if job not in answer.exit_codes else int(answer.exit_codes[job]),
                error=answer.errors.get(job),
            )
            for job in answer.jobs
        ]
        return JobsResponse(jobs=answer.jobs, running=answer.running, details=details)

    async def kill_job(self, vm_id: str, request: KillJobRequest) -> KillJobResponse:
        """Send a signal to a command; one that has ended is no error."""
        link = await self._vm("kill_job", vm_id).ready_link()
        killed = await link.open(Kill(job=request.job, signal=request.signal)).result()
        assert isinstance(killed, Killed)
        return KillJobResponse(success=True, running=killed.running)

    async def feed_job(self, vm_id: str, job: str, body: AsyncIterator[bytes], *, end: bool) -> FeedJobResponse:
        """Hand a command its standard input, at its pace; with `end` that is all it gets."""
        link = await self._vm("feed_job", vm_id).ready_link()
        stream = link.open(Feed(job=job, end=end))
        feeding = asyncio.create_task(_feed(stream, body))
        ending = asyncio.create_task(stream.result())
        try:
            await asyncio.wait((feeding, ending), return_when=asyncio.FIRST_COMPLETED)
            if not ending.done():
                await feeding  # whose error is the client's end
            fed = await ending
            assert isinstance(fed, Fed)
            return FeedJobResponse(success=True, size=fed.size)
        finally:
            stream.reset()
            feeding.cancel()
            ending.cancel()
            await asyncio.gather(feeding, ending, return_exceptions=True)

    async def write_file(self, vm_id: str, request: WriteFileRequest) -> None:
        """Write a text file in the guest; durable on return."""
        data = request.content.encode(errors="surrogateescape")
        if len(data) > TEXT_FILE_LIMIT:
            raise InvalidInput(
                f"{len(data)} bytes, more than {TEXT_FILE_LIMIT}", hint="copy large files with `capsem cp`"
            )
        link = await self._vm("write_file", vm_id).ready_link()
        stream = link.open(WriteFile(path=request.path))
        async with limited(stream, f"writing {request.path}", FILE_LIMIT):
            await stream.write(STDIN, data)
            stream.end(STDIN)
            await stream.result()

    async def read_file(self, vm_id: str, request: ReadFileRequest) -> ReadFileResponse:
        """Read a text file from the guest."""
        link = await self._vm("read_file", vm_id).ready_link()
        stream = link.open(ReadFile(path=request.path, limit=TEXT_FILE_LIMIT))
        content = bytearray()
        async with limited(stream, f"reading {request.path}", FILE_LIMIT):
            while data := await stream.read(STDOUT):
                content += data
            await stream.result()
        return ReadFileResponse(content=content.decode("utf-8", "replace"))


async def _pump(stream: Stream, channel: int, queue: asyncio.Queue[tuple[int, bytes] | None]) -> None:
    while data := await stream.read(channel):
        await queue.put((channel, data))
    await queue.put(None)


async def _feed(stream: Stream, stdin: AsyncIterator[bytes | Resize]) -> None:
    async for data in stdin:
        if isinstance(data, bytes):
            await stream.write(STDIN, data)
        else:
            stream.send(wire.Resize(rows=data.rows, columns=data.columns))
    stream.end(STDIN)
