"""Commands: each its own bash in its own session, its output as it comes, its end exactly when it ends.

Nothing polls: output, exit (a pidfd) and time-outs are events of the loop. A command has ended when its bash has, and
its pipes are closed; a process that it left behind may keep a pipe open: what that holds a moment after the end still
belongs to the command, what comes later is read and dropped.
"""

from __future__ import annotations

import fcntl
import os
import signal
import time

from capsem.guest.group import Group
from capsem.guest.loop import READ, WRITE, Loop, Timer
from capsem.guest.servant import Servant
from capsem.wire.messages import STDERR, STDIN, STDOUT, Exec, Exited, Message, Signal

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from capsem.wire.streams import Mux

SHELL = "/bin/bash"
_PIECE = 64 * 1024
_PIECES_PER_TURN = 16  # then the rest of the agent gets its turn
_LINGER = 0.1  # seconds that a background process may hold a pipe open before its command counts as ended
_FIONREAD = 0x541B  # ioctl: how many bytes a pipe holds
_RESET_SIGNALS = (signal.SIGPIPE, signal.SIGXFSZ)  # Python ignores them, and would hand that on
_OOM_SCORE = "/proc/self/oom_score_adj"


def spawn(command: str, env: dict[str, str], cwd: str, fds: tuple[int, int, int], group: Group) -> int:
    """Start `bash -c command` in `group` and a session of its own, `fds` its standard streams; returns its pid.

    Raises OSError. Call it from the loop's thread alone: the working directory is the process's while it runs.
    """
    home = os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    oom_score = _swap_oom_score("0")
    try:
        os.chdir(cwd)
        group.enter()
        return os.posix_spawn(
            SHELL,
            ["bash", "-c", command],
            env,
            file_actions=[(os.POSIX_SPAWN_DUP2, fd, number) for number, fd in enumerate(fds)],
            setsid=True,
            setsigdef=_RESET_SIGNALS,
        )
    finally:
        group.leave()
        os.fchdir(home)
        os.close(home)
        if oom_score is not None:
            _swap_oom_score(oom_score)


def _swap_oom_score(new: str) -> str | None:
    """Commands may be killed when memory runs out, the agent may not; the score is inherited at the fork."""
    try:
        with open(_OOM_SCORE, "r+") as file:
            old = file.read().strip()
            if old == new:
                return None
            file.seek(0)
            file.write(new)
            return old
    except OSError:  # an unprivileged agent in tests: it has the score it has
        return None


class Command(Servant):
    """A running command on a stream of the control channel."""

    def __init__(
        self,
        loop: Loop,
        mux: Mux,
        stream: int,
        request: Exec,
        env: dict[str, str],
        cwd: str,
        group: Group,
        ended: Callable[[Command], None],
    ) -> None:
        """Start it. Raises OSError."""
        self.job = request.job
        self.stream = stream
        self._loop = loop
        self._mux = mux
        self._ended = ended
        self._attached = True
        self._status: int | None = None
        self._timed_out = False
        self._lingering: Timer | None = None
        self._rest: dict[int, int] | None = None  # when lingering is over: bytes in the pipes that are to be sent
        self._expiry: Timer | None = None
        self._began = time.monotonic()
        self._stdin_queue: list[memoryview] = []
        self._stdin_end = False
        self._pipes: dict[int, int] = {}  # channel -> our end, while it is open
        self._paused: set[int] = set()  # channels that wait for credit
        theirs = self._open_pipes(stdin=request.stdin)
        try:
            self.pid = spawn(request.command, env, cwd, theirs, group)
            self._pidfd = os.pidfd_open(self.pid)
        except BaseException:
            for fd in self._pipes.values():
                os.close(fd)
            raise
        finally:
            for fd in theirs:
                os.close(fd)
        for channel in (STDOUT, STDERR):
            self._watch_output(channel)
        loop.watch(self._pidfd, READ, self._exited)
        if request.timeout is not None:
            self._expiry = loop.after(request.timeout, self._expire)

    def _open_pipes(self, *, stdin: bool) -> tuple[int, int, int]:
        out_ours, out_theirs = os.pipe2(os.O_CLOEXEC)
        err_ours, err_theirs = os.pipe2(os.O_CLOEXEC)
        self._pipes = {STDOUT: out_ours, STDERR: err_ours}
        if stdin:
            in_theirs, self._pipes[STDIN] = os.pipe2(os.O_CLOEXEC)
        else:
            in_theirs = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
        for fd in self._pipes.values():
            os.set_blocking(fd, False)
        return in_theirs, out_theirs, err_theirs

    # -- output

    def _watch_output(self, channel: int) -> None:
        self._loop.watch(self._pipes[channel], READ, lambda _events: self._pump(channel))

    def credit(self, channel: int) -> None:
        """The host takes more: go on reading what was paused."""
        if channel in self._paused and channel in self._pipes:
            self._paused.discard(channel)
            self._watch_output(channel)
            self._pump(channel)

    def _pump(self, channel: int) -> None:
        """Move what a pipe holds to the host, as far as there is credit."""
        fd = self._pipes.get(channel)
        if fd is None:
            return
        for _ in range(_PIECES_PER_TURN):
            room = self._room(channel)
            if not room:
                self._paused.add(channel)
                self._loop.unwatch(fd)
                self._settle()
                return
            try:
                data = os.read(fd, min(room, _PIECE))
            except BlockingIOError:
                self._settle()
                return
            if not data:
                self._close(channel)
                if self._attached:
                    self._mux.end(self.stream, channel)
                self._settle()
                return
            if self._attached:
                self._mux.send(self.stream, channel, data)
                if self._rest is not None:
                    self._rest[channel] -= len(data)

    def _room(self, channel: int) -> int:
        """How much of a pipe may be read now."""
        if not self._attached:
            return _PIECE
        room = self._mux.room(self.stream, channel)
        return room if self._rest is None else min(room, self._rest[channel])

    def orphaned(self) -> None:
        """The stream is gone, the command goes on: its output is dropped from here."""
        self._detach()
        self._close(STDIN)

    def _detach(self) -> None:
        self._attached = False
        for channel in (STDOUT, STDERR):
            self.credit(channel)

    def _close(self, channel: int) -> None:
        fd = self._pipes.pop(channel, None)
        if fd is not None:
            self._loop.unwatch(fd)
            os.close(fd)

    # -- input

    def feed(self, data: bytes) -> None:
        """Bytes for the command's standard input."""
        self._stdin_queue.append(memoryview(data))
        self._push()

    def feed_end(self) -> None:
        """No more input will come."""
        self._stdin_end = True
        self._push()

    def _push(self, _events: int = 0) -> None:
        fd = self._pipes.get(STDIN)
        while self._stdin_queue:
            head = self._stdin_queue[0]
            try:
                # A command that does not read its input must not stop the host from sending it.
                size = os.write(fd, head) if fd is not None else len(head)
            except BlockingIOError:
                assert fd is not None
                self._loop.watch(fd, WRITE, self._push)
                return
            except BrokenPipeError:
                self._close(STDIN)
                fd, size = None, len(head)
            self._mux.consumed(self.stream, STDIN, size)
            if size < len(head):
                self._stdin_queue[0] = head[size:]
            else:
                self._stdin_queue.pop(0)
        if fd is not None:
            self._loop.unwatch(fd)
        if self._stdin_end:
            self._close(STDIN)

    # -- the end

    def message(self, message: Message) -> None:
        """A signal for the command."""
        if isinstance(message, Signal):
            self.signal(message.number)

    def cancelled(self) -> None:
        """The host does not want it any more."""
        self.signal(signal.SIGKILL)
        self.orphaned()

    def signal(self, number: int) -> None:
        """Send a signal to the command's process group; one that has ended is no error."""
        if self._status is None:
            try:
                os.killpg(self.pid, number)
            except ProcessLookupError:
                pass

    def _expire(self) -> None:
        if self._status is None:
            self._timed_out = True
            self.signal(signal.SIGKILL)

    def _exited(self, _events: int) -> None:
        self._loop.unwatch(self._pidfd)
        os.close(self._pidfd)
        _, self._status = os.waitpid(self.pid, 0)
        if self._expiry is not None:
            self._expiry.cancel()
        self._close(STDIN)
        for channel in (STDOUT, STDERR):
            self._pump(channel)
        self._settle()

    def _settle(self) -> None:
        """Report the end once bash has exited and its pipes are closed, or what they held after a while is sent."""
        if self._status is None or not self._attached:
            return
        held = [channel for channel in (STDOUT, STDERR) if channel in self._pipes]
        if held and self._rest is None:
            self._lingering = self._lingering or self._loop.after(_LINGER, self._stop_lingering)
            return
        if self._rest is not None and any(self._rest[channel] for channel in held):
            return
        if self._lingering is not None:
            self._lingering.cancel()
        code, number = os.waitstatus_to_exitcode(self._status), None
        if code < 0:
            code, number = 1, -code
        self._mux.close(
            self.stream,
            Exited(exit_code=code, signal=number, timed_out=self._timed_out, duration=time.monotonic() - self._began),
        )
        self._detach()
        self._ended(self)

    def _stop_lingering(self) -> None:
        self._rest = {}
        for channel in (STDOUT, STDERR):
            if channel in self._pipes:
                size = fcntl.ioctl(self._pipes[channel], _FIONREAD, bytes(4))
                self._rest[channel] = int.from_bytes(size, "little")
        for channel in tuple(self._rest):
            self._pump(channel)
        self._settle()
