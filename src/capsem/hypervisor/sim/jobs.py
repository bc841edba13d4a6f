"""The commands of a simulated guest: each a script that runs to its next sleep, with its output kept until confirmed."""

from __future__ import annotations

import posixpath
from collections.abc import Callable

from capsem.guest.files import Refused
from capsem.hypervisor.sim import shell
from capsem.hypervisor.sim.filesystem import WORKSPACE, FileSystem
from capsem.hypervisor.sim.memory import Job, Memory
from capsem.hypervisor.sim.shell import Step
from capsem.hypervisor.sim.timers import Alarm, Timers
from capsem.hypervisor.sim.volume import File
from capsem.wire.messages import STDERR, STDOUT, Exec, Exited, Reattach, Reattached, ShutdownRequest, SuspendRequest
from capsem.wire.schema import Message
from capsem.wire.streams import Mux

OUTPUTS = (STDOUT, STDERR)
REMEMBERED = 4096  # ids
ENDED_KEPT = 64  # commands


class Follower:
    """The stream on which a command's output goes to the host; offsets by channel."""

    def __init__(self, stream: int, job: Job, offsets: dict[int, int]) -> None:
        self.stream = stream
        self.job = job
        self.base = dict(offsets)  # of the stream's first byte
        self.sent = dict(offsets)  # of what goes out next


class Jobs:
    """All commands of one guest."""

    def __init__(
        self,
        memory: Memory,
        files: FileSystem,
        timers: Timers,
        *,
        ask: Callable[[Message], None],
        flush: Callable[[], None],
    ) -> None:
        """`ask` sends a message to the host, `flush` what the mux has queued."""
        self._memory = memory
        self._files = files
        self._timers = timers
        self._ask = ask
        self._flush = flush
        self._mux: Mux | None = None
        self._followers: dict[int, Follower] = {}
        self._alarms: dict[str, Alarm] = {}
        self._expiries: dict[str, Alarm] = {}

    def connect(self, mux: Mux) -> None:
        """A new agent's connection: nobody follows anything any more."""
        self._mux = mux
        self._followers.clear()

    def forget_all(self) -> None:
        """The agent has died, and its commands with it."""
        for alarm in (*self._alarms.values(), *self._expiries.values()):
            alarm.cancel()
        self._memory.jobs.clear()
        self._followers.clear()

    def wake(self) -> None:
        """The machine was restored, or its commands may go on: all that have not ended do."""
        for job in list(self._memory.jobs.values()):
            if job.exited is None:
                self._schedule(job)
                if job.expires is not None and job.id not in self._expiries:
                    self._expiries[job.id] = self._timers.at(job.expires, lambda job=job: self._expire(job))  # type: ignore[misc]

    # -- requests

    def start(self, stream: int, request: Exec, env: dict[str, str]) -> None:
        """Run a command. Raises Refused."""
        memory = self._memory
        if request.job in memory.started:
            raise Refused("already_exists", f"job {request.job} was started before")
        if memory.held:
            raise Refused("unavailable", "a checkpoint is being made: nothing is started now")
        job = Job(request.job, [], {**env, **request.env}, began=self._timers.now)
        if request.timeout is not None:
            job.expires = self._timers.now + request.timeout
        memory.jobs[job.id] = job
        memory.started = [*memory.started[-REMEMBERED + 1 :], job.id]
        self._followers[stream] = Follower(stream, job, dict.fromkeys(OUTPUTS, 0))
        try:
            job.steps = shell.parse(request.command, job.env)
        except shell.BadScript as error:
            self._say(job, STDERR, f"{error}\n")
            job.status = shell.USAGE
        self.wake()

    def reattach(self, stream: int, request: Reattach) -> None:
        """Follow a command again. Raises Refused."""
        job = self._memory.jobs.get(request.job)
        if job is None:
            raise Refused("not_found", f"job {request.job} is not known here")
        if any(each.job is job for each in self._followers.values()):
            raise Refused("already_exists", f"job {request.job} is followed already")
        offsets = {STDOUT: request.stdout, STDERR: request.stderr}
        for channel, offset in offsets.items():
            if not 0 <= offset <= job.end(channel):
                raise Refused("invalid_input", f"job {job.id} has not written {offset} bytes")
            offsets[channel] = max(offset, job.start[str(channel)])
            self._drop(job, channel, offsets[channel])
        assert self._mux is not None
        self._mux.message(stream, Reattached(stdout=offsets[STDOUT], stderr=offsets[STDERR]))
        self._followers[stream] = Follower(stream, job, offsets)
        self._pump(self._followers[stream])

    def forget(self, name: str) -> None:
        """The host has all of it; one that still runs stays."""
        job = self._memory.jobs.get(name)
        if job is not None and job.exited is not None:
            del self._memory.jobs[name]

    def credit(self, stream: int, channel: int) -> None:
        """The host has dealt with some output."""
        follower = self._followers.get(stream)
        if follower is not None and channel in OUTPUTS:
            assert self._mux is not None
            self._drop(follower.job, channel, follower.base[channel] + self._mux.confirmed(stream, channel))

    def signal(self, stream: int, number: int) -> None:
        """A signal ends a command, whichever it is."""
        follower = self._followers.get(stream)
        if follower is not None and follower.job.exited is None:
            self._end(follower.job, 1, number)

    def give_up(self, stream: int) -> None:
        """Nobody wants the command any more."""
        self.signal(stream, 9)
        self._followers.pop(stream, None)

    # -- running

    def _schedule(self, job: Job) -> None:
        if (alarm := self._alarms.get(job.id)) is not None:
            alarm.cancel()
        self._alarms[job.id] = self._timers.at(job.wakes or 0.0, lambda: self._turn(job))

    def _turn(self, job: Job) -> None:
        self._go_on(job)
        self._flush()

    def _go_on(self, job: Job) -> None:
        """Run a command up to where it has to wait; what waits stays its first step, so that a restored guest repeats it."""
        if self._memory.held or job.exited is not None:
            return
        if job.wakes is not None:
            job.wakes = None
            job.steps.pop(0)
        while job.steps:
            step = job.steps[0]
            if not shell.wanted(step, job.status):
                job.steps.pop(0)
                continue
            name, *words = step["argv"]
            if name == "sleep":
                job.status, job.wakes = 0, self._timers.now + _number(words)
                self._schedule(job)
                return
            if name == "sync":
                self._files.sync(lambda error: self._synced(job, error))
                return
            job.steps.pop(0)
            if name == "exit":
                job.status, job.steps = int(_number(words)) & 255, []
            else:
                self._run(job, step, name, words)
        self._end(job, job.status)

    def _synced(self, job: Job, error: OSError | None) -> None:
        if job.exited is None and job.steps:
            job.status = 0 if error is None else 1
            if error is not None:
                self._say(job, STDERR, f"sync: {error.strerror}\n")
            job.steps.pop(0)
            self._schedule(job)

    def _run(self, job: Job, step: Step, name: str, words: list[str]) -> None:
        """A step that takes no time."""
        job.status, output = 0, ""
        try:
            if name == "echo":
                output = " ".join(words) + "\n"
            elif name == "cat":
                output = "".join(self._files.get(_absolute(word)).data.decode("latin-1") for word in words)
            elif name == "rm":
                for word in words:
                    self._files.get(_absolute(word))
                    self._files.put(_absolute(word), None)
            elif name == "count":
                output = self._count(_absolute(words[0]))
            elif name == "tally":
                tallies = self._memory.tallies
                tallies[words[0]] = tallies.get(words[0], 0) + 1
                output = f"{tallies[words[0]]}\n"
            elif name == "dmesg":
                output = "".join(f"{line}\n" for line in self._memory.log)
            elif name == "hostname":
                output = f"{self._memory.hostname}\n"
            elif name in ("poweroff", "shutdown"):
                self._ask(ShutdownRequest())
            elif name == "suspend":
                self._ask(SuspendRequest())
            elif name in ("true", "false"):
                job.status = int(name == "false")
            else:
                job.status = shell.NOT_FOUND
                self._say(job, STDERR, f"bash: {name}: command not found\n")
        except (OSError, IndexError, ValueError) as error:
            job.status = 1
            what = error.strerror if isinstance(error, OSError) else "bad arguments"
            self._say(job, STDERR, f"{name}: {' '.join(words)}: {what}\n")
        if step["to"] is None:
            self._say(job, STDOUT, output)
        elif step["to"] != "/dev/null":
            self._redirect(_absolute(step["to"]), output.encode("latin-1", "replace"), append=step["append"])

    def _redirect(self, path: str, data: bytes, *, append: bool) -> None:
        try:
            before = self._files.get(path).data if append else b""
        except FileNotFoundError:
            before = b""
        self._files.put(path, File(before + data, mtime=int(self._memory.wall + self._timers.now)))

    def _count(self, path: str) -> str:
        try:
            number = int(self._files.get(path).data)
        except FileNotFoundError:
            number = 0
        text = f"{number + 1}\n"
        self._redirect(path, text.encode(), append=False)
        return text

    def _expire(self, job: Job) -> None:
        if job.exited is None:
            self._end(job, 1, 9, timed_out=True)
            self._flush()

    def _end(self, job: Job, code: int, signal: int | None = None, *, timed_out: bool = False) -> None:
        if (alarm := self._alarms.pop(job.id, None)) is not None:
            alarm.cancel()
        if (expiry := self._expiries.pop(job.id, None)) is not None:
            expiry.cancel()
        duration = self._timers.now - job.began
        job.steps, job.wakes = [], None
        job.exited = {"exit_code": code, "signal": signal, "timed_out": timed_out, "duration": duration}
        ended = [each.id for each in self._memory.jobs.values() if each.exited is not None]
        for name in ended[:-ENDED_KEPT]:
            del self._memory.jobs[name]
        for follower in list(self._followers.values()):
            if follower.job is job:
                self._pump(follower)

    # -- output

    def _say(self, job: Job, channel: int, text: str) -> None:
        if text:
            job.output[str(channel)] += text.encode("utf-8").decode("latin-1") if channel == STDERR else _bytes(text)
            for follower in list(self._followers.values()):
                if follower.job is job:
                    self._pump(follower)

    def _drop(self, job: Job, channel: int, offset: int) -> None:
        name = str(channel)
        if offset > job.start[name]:
            job.output[name] = job.output[name][offset - job.start[name] :]
            job.start[name] = offset

    def _pump(self, follower: Follower) -> None:
        """Hand over what there is; the mux keeps to the host's credit."""
        mux, job, stream = self._mux, follower.job, follower.stream
        assert mux is not None
        for channel in OUTPUTS:
            at = follower.sent[channel] - job.start[str(channel)]
            mux.send(stream, channel, job.output[str(channel)][at:].encode("latin-1"))
            follower.sent[channel] = job.end(channel)
        if job.exited is not None:
            for channel in OUTPUTS:
                mux.end(stream, channel)
            mux.close(stream, Exited(**job.exited))
            del self._followers[stream]


def _bytes(text: str) -> str:
    """Text of a script or a file, as latin-1 of its bytes."""
    return text if all(ord(each) < 256 for each in text) else text.encode("utf-8").decode("latin-1")


def _absolute(path: str) -> str:
    return posixpath.normpath(posixpath.join(WORKSPACE, path))


def _number(words: list[str]) -> float:
    try:
        return max(0.0, float(words[0]))
    except (IndexError, ValueError):
        return 0.0
