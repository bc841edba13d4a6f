"""What a service may ask of a supervisor, over its socket (api/internal.py)."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine
from typing import Any, Protocol, TypeVar

from capsem import __version__, tracing
from capsem.api.internal import (
    MESSAGES,
    PROTOCOL,
    REQUESTS,
    AddLayer,
    Assign,
    Assigned,
    Attach,
    CheckpointMade,
    Fed,
    Feed,
    FlushLedger,
    Hello,
    JobList,
    Jobs,
    JobStarted,
    Kill,
    Killed,
    LayerAdded,
    LayersReplaced,
    LedgerFlushed,
    Persist,
    Persisted,
    PolicySet,
    ReplaceLayers,
    Save,
    SetPolicy,
    Start,
    State,
    Stop,
    Stopping,
    TraceGoes,
    TraceTo,
    speaks,
)
from capsem.api.network_messages import AnswerAsk, FollowAsks, SetNetwork
from capsem.api.secret_messages import LendSecrets, SetSecrets
from capsem.control.channel import Channel, Stream
from capsem.control.guest import Guest
from capsem.model.errors import CapsemError, Interrupted, InvalidInput, Unsupported, host_failed
from capsem.supervisor.activity import Activity
from capsem.supervisor.jobs import Follower, Job, JobTable
from capsem.supervisor.lending import Lending
from capsem.supervisor.policing import Policing
from capsem.supervisor.recording import Recording
from capsem.tracing import span
from capsem.wire.decoder import FrameDecoder
from capsem.wire.frames import ProtocolError
from capsem.wire.messages import (
    STDERR,
    STDIN,
    STDOUT,
    Exec,
    Exited,
    Failed,
    Forward,
    ListDir,
    ReadFile,
    Terminal,
    WriteFile,
    largest_data,
)
from capsem.wire.schema import Message
from capsem.wire.streams import Mux

HELLO_LIMIT = 5.0  # seconds
LAST_KEYS = 1.0  # seconds for what was typed to reach a guest that does not take it now
COMMAND_SHOWN = 100  # characters of a command in a list: a thousand jobs have to fit a message

log = logging.getLogger("capsem_process.server")

T = TypeVar("T")


class Supervised(Protocol):
    """What the server needs of the supervisor."""

    guest: Guest
    jobs: JobTable
    activity: Activity
    recording: Recording
    lending: Lending
    policing: Policing
    pid: int

    def state(self) -> State:
        """Where the VM is now."""

    async def admit(self) -> None:
        """Wait until the guest may be spoken to. Raises when it will not be."""

    def stop(self, request: Stop) -> None:
        """Begin to end the machine."""

    async def persist(self, request: Persist) -> Persisted:
        """Take another name."""

    async def assign(self, request: Assign) -> Assigned:
        """Leave the pool, and be somebody's."""

    async def add_layer(self, request: AddLayer) -> LayerAdded:
        """Freeze the volume's top layer."""

    async def replace_layers(self, request: ReplaceLayers) -> LayersReplaced:
        """Name a merged layer instead of those it was merged from."""

    async def save(self, request: Save) -> CheckpointMade:
        """Make a checkpoint."""

    def set_policy(self, request: SetPolicy) -> PolicySet:
        """Write down another policy."""


class Server:
    """All connections; usually there is one."""

    def __init__(self, supervised: Supervised) -> None:
        self._supervised = supervised
        self._connections: set[_Connection] = set()
        self._peers: set[_Connection] = set()  # those who said hello
        self._closed = False

    def connection(self) -> Channel:
        """A protocol for the listener to hand a new connection to."""
        connection = _Connection(self, self._supervised)
        self._connections.add(connection)
        if self._closed:  # it had been accepted before the listener was closed
            connection.channel.hang_up()
        return connection.channel

    def add(self, connection: _Connection) -> None:
        """A peer said hello."""
        self._peers.add(connection)

    def remove(self, connection: _Connection) -> None:
        """A peer went away."""
        self._connections.discard(connection)
        self._peers.discard(connection)

    def broadcast(self, message: Message) -> None:
        """Tell every peer."""
        for connection in list(self._peers):
            connection.channel.control(message)

    def cut(self, reason: Interrupted) -> None:
        """What moves between peers and a guest that runs no more, files above all, ends with the reason."""
        for connection in self._connections:
            connection.cut(reason)

    def close(self) -> None:
        """Hang up on everybody, once what is queued is out."""
        self._closed = True
        for connection in list(self._connections):
            connection.channel.hang_up()


class _Connection:
    """One service, perhaps."""

    def __init__(self, server: Server, supervised: Supervised) -> None:
        self._server = server
        self._supervised = supervised
        self._tasks: set[asyncio.Task[None]] = set()
        self._relayed: set[Stream] = set()  # to the guest
        self._greeted = False
        self.channel = Channel(Mux(FrameDecoder(hunting=False), initiator=False, messages=MESSAGES, requests=REQUESTS))
        self.channel.on_control = self._control
        self.channel.on_open = self._open
        self.channel.on_garbage = self._garbage
        self.channel.on_lost = self._lost
        self._deadline = asyncio.get_running_loop().call_later(HELLO_LIMIT, self._silent)

    def _silent(self) -> None:
        log.error("a peer did not say hello within %.0f s; hanging up", HELLO_LIMIT)
        self.channel.hang_up()

    def _garbage(self, error: ProtocolError) -> None:
        log.error("a peer does not speak the protocol, hanging up: %s", error)
        self.channel.hang_up()

    def _lost(self) -> None:
        self._deadline.cancel()
        self._server.remove(self)

    def cut(self, reason: Interrupted) -> None:
        """See Server."""
        for target in self._relayed:
            target.deliver(reason)

    def _control(self, message: Message) -> None:
        if not isinstance(message, Hello) or self._greeted:
            raise ProtocolError(f"unexpected {message.tag}")
        self._deadline.cancel()
        self.channel.mux.largest = largest_data(message.protocol)
        self.channel.control(Hello(protocol=PROTOCOL, version=__version__, pid=self._supervised.pid))
        if not speaks(message.protocol):
            log.error(
                "service %s speaks protocol %d, this supervisor (%s) %d: hanging up",
                message.version,
                message.protocol,
                __version__,
                PROTOCOL,
            )
            self.channel.hang_up()
            return
        self._greeted = True
        self._server.add(self)
        self.channel.control(self._supervised.state())

    def _open(self, stream: Stream) -> None:
        if not self._greeted:
            raise ProtocolError("request before hello")
        task = asyncio.create_task(self._serve(stream), name=f"serve {stream.request.tag}")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _serve(self, stream: Stream) -> None:
        """One request; whatever goes wrong closes its stream with the reason."""
        try:
            with span(stream.request.tag):
                answer = await self._answer(stream)
            stream.close(answer)
        except CapsemError as error:
            job = error.job if isinstance(error, Interrupted) else None
            stream.close(Failed(code=error.code, message=error.message, hint=error.hint, job=job))
        except OSError as error:
            failed = host_failed(f"{stream.request.tag} failed", error)
            stream.close(Failed(code=failed.code, message=failed.message, hint=failed.hint))
        except Exception as error:
            log.exception("%s failed", stream.request.tag)
            stream.close(Failed(code="internal", message=f"{stream.request.tag}: {type(error).__name__}: {error}"))

    async def _answer(self, stream: Stream) -> Message:
        request, jobs, activity = stream.request, self._supervised.jobs, self._supervised.activity
        if isinstance(request, (Exec, Terminal)):
            job = await self._start(request)
            stream.on_message = job.send
            # Who leaves a terminal may come back to it; it ends when what runs there does, or with the VM.
            place = Attach(job=job.id, keep=job.terminal, stdin=job.terminal)
            return await self._follow(stream, job, place, feed=isinstance(request, Exec) and request.stdin)
        if isinstance(request, Attach):
            job = jobs.get(request.job)
            stream.on_message = job.send
            with activity.going_on():
                return await self._follow(stream, job, request, feed=False)
        if isinstance(request, Start):
            return JobStarted(job=(await self._start(Exec(**request.__dict__))).id)
        if isinstance(request, Feed):
            with activity.going_on():
                feeding = jobs.get(request.job).feed(stream, end=request.end)
                return Fed(size=await while_wanted(stream, feeding))
        if isinstance(request, Kill):
            return Killed(running=jobs.get(request.job).signal(request.signal))
        if isinstance(request, Jobs):
            return job_list(jobs, activity.idle)
        if isinstance(request, (ReadFile, WriteFile, ListDir, Forward)):
            await self._supervised.admit()
            with activity.going_on():
                result = await self._relay(stream, self._supervised.guest.channel.open(request))
                self._supervised.recording.file_moved(request, result)
                return result
        if isinstance(request, TraceTo):
            name = f"capsem-process {self._supervised.guest.identity.vm_id}"
            tracing.follow(tracing.to_file(request.file, name) if request.file else None)
            return TraceGoes()
        if isinstance(request, FlushLedger):
            await self._supervised.recording.flushed()
            return LedgerFlushed()
        if isinstance(request, Stop):
            self._supervised.stop(request)
            return Stopping()
        if isinstance(request, Persist):
            return await self._supervised.persist(request)
        if isinstance(request, Assign):
            return await self._supervised.assign(request)
        if isinstance(request, AddLayer):
            await self._supervised.admit()
            return await self._supervised.add_layer(request)
        if isinstance(request, ReplaceLayers):
            return await self._supervised.replace_layers(request)
        if isinstance(request, Save):
            await self._supervised.admit()
            return await self._supervised.save(request)
        if isinstance(request, SetPolicy):
            with activity.going_on():  # its owner is there: one that has been idle for long is not suspended at once
                return self._supervised.set_policy(request)
        if isinstance(request, SetNetwork):
            with activity.going_on():
                return self._supervised.policing.set(request)
        if isinstance(request, AnswerAsk):
            return self._supervised.policing.answer(request)
        if isinstance(request, FollowAsks):
            return await self._supervised.policing.follow(stream, request)
        if isinstance(request, LendSecrets):
            return await self._supervised.lending.serve(stream, request)
        if isinstance(request, SetSecrets):
            return self._supervised.lending.set(request)
        raise Unsupported(f"{request.tag} is not served here")

    async def _relay(self, stream: Stream, target: Stream) -> Message:
        self._relayed.add(target)
        try:
            return await relay(stream, target)
        finally:
            self._relayed.discard(target)

    async def _start(self, request: Exec | Terminal) -> Job:
        """A command of its own, once the guest may be spoken to. Raises AlreadyExists."""
        await self._supervised.admit()
        self._supervised.jobs.check_new(request.job)
        job = self._begin(request)
        self._supervised.jobs.add(job)
        return job

    def _begin(self, request: Exec | Terminal) -> Job:
        """Start a command. Raises Interrupted, InvalidInput."""
        activity, recording = self._supervised.activity, self._supervised.recording
        job = Job(request.job, request.command)

        def ended() -> None:
            activity.end()
            recording.command_ended(job)

        job.on_started = lambda started: recording.command_started(job, started)
        job.on_ended = ended
        job.start(self._supervised.guest, request)
        activity.begin()
        recording.command_began(job, request.tag)
        return job

    async def _follow(self, stream: Stream, job: Job, place: Attach, *, feed: bool) -> Message:
        """Copy a job's output to a peer, and the peer's input to the job, until the job has ended or is cut off.

        A peer that gives the stream up kills the command, unless it has said otherwise; one that is gone leaves it to run.
        """
        follower = Follower({STDOUT: place.stdout, STDERR: place.stderr})
        following = asyncio.create_task(job.follow(follower, stream.write, wait=place.wait))
        feeding = None
        if place.stdin:
            feeding = asyncio.create_task(job.type_on(stream))
        elif feed and job.stream is not None:
            feeding = asyncio.create_task(_feed(stream, job.stream))
        watching = asyncio.create_task(stream.result())
        try:
            await asyncio.wait((following, watching, job.cut), return_when=asyncio.FIRST_COMPLETED)
            if following.done():
                return following.result()
            if job.cut.done():
                raise job.cut.result()
            if self.channel.connected and not place.keep:
                job.cancel()
            if place.stdin and feeding is not None:  # what was typed before leaving is typed
                typing: set[asyncio.Future[Any]] = {feeding, job.cut}
                await asyncio.wait(typing, timeout=LAST_KEYS, return_when=asyncio.FIRST_COMPLETED)
            return Failed(code="interrupted", message="nobody follows any more")
        finally:
            for task in (following, watching, feeding):
                if task is not None:
                    task.cancel()
            await asyncio.gather(*(task for task in (following, watching, feeding) if task), return_exceptions=True)


def job_list(jobs: JobTable, idle: float) -> JobList:
    """What there is to say of them; a command that runs, if only since before a resume, is not idleness."""
    everything = list(jobs)
    running = [job.id for job in everything if job.ended is None]
    return JobList(
        idle=0.0 if running else idle,
        jobs=[job.id for job in everything],
        running=running,
        followed=[job.id for job in everything if job.followed],
        commands={job.id: job.command[:COMMAND_SHOWN] for job in everything},
        exit_codes={job.id: job.ended.exit_code for job in everything if isinstance(job.ended, Exited)},
        errors={job.id: job.ended.message[:COMMAND_SHOWN] for job in everything if isinstance(job.ended, CapsemError)},
    )


async def while_wanted(stream: Stream, work: Coroutine[Any, Any, T]) -> T:
    """The outcome of `work`, which ends when the peer gives its stream up. Raises Interrupted then."""
    working, watching = asyncio.ensure_future(work), asyncio.ensure_future(stream.result())
    try:
        await asyncio.wait((working, watching), return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise Interrupted("the request was given up")
    finally:
        working.cancel()
        watching.cancel()
        await asyncio.gather(working, watching, return_exceptions=True)


async def copy(source: Stream, target: Stream, channel: int) -> None:
    """Copy a channel until it ends, at the pace of the slower side. What breaks off is not ended: half a file is none."""
    while data := await source.take(channel):
        await target.write(channel, data)
    if source.ended(channel):
        target.end(channel)


async def _feed(source: Stream, command: Stream) -> None:
    """A command's input. It may live on without its client, and would wait for ever for what nobody will send."""
    await copy(source, command, STDIN)
    command.end(STDIN)


async def relay(stream: Stream, target: Stream) -> Message:
    """Join a peer's stream with one to the guest, in both directions; returns the guest's result."""
    target.on_message = stream.send
    if isinstance(target.request, WriteFile):
        stream.widen(STDIN)
    elif isinstance(target.request, ReadFile):
        target.widen(STDOUT)
    tasks = [
        asyncio.create_task(copy(stream, target, STDIN)),
        asyncio.create_task(copy(target, stream, STDOUT)),
    ]
    ending = asyncio.create_task(target.result())
    watching = asyncio.create_task(stream.result())
    try:
        await asyncio.wait((ending, watching), return_when=asyncio.FIRST_COMPLETED)
        if ending.done():
            await tasks[1]
            return ending.result()
        raise InvalidInput("the request was given up")
    finally:
        target.reset()
        for task in (*tasks, ending, watching):
            task.cancel()
        await asyncio.gather(*tasks, ending, watching, return_exceptions=True)
