"""Commands: each its own bash in its own session, its output as it comes, its end exactly when it ends.

Nothing polls: output, exit (a pidfd) and time-outs are events of the loop. A command has ended when its bash has, and
its pipes are closed; a process that it left behind may keep a pipe open: what that holds a moment after the end still
belongs to the command, what comes later is read and dropped.

What is sent is kept until the host confirms it. When a new epoch takes the stream away, the command goes on and its
output is kept here, the newest `LIMIT` bytes of each; the host attaches again at the offsets that it has, and nothing
comes twice.
"""

from __future__ import annotations

import fcntl
import os
import signal
import time

from capsem.guest.files import Refused
from capsem.guest.kept import LIMIT, Kept
from capsem.guest.loop import READ, WRITE, Loop, Timer
from capsem.guest.servant import Servant
from capsem.guest.spawner import SHELL, SHELL_ARGV, Spawner
from capsem.wire.messages import STDERR, STDIN, STDOUT, Exec, Exited, Reattach, Reattached, Signal, Started
from capsem.wire.schema import Message

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from capsem.wire.messages import Terminal
    from capsem.wire.streams import Mux

OUTPUTS = (STDOUT, STDERR)
_PIECE = 64 * 1024
_PIECES_PER_TURN = 16  # then the rest of the agent gets its turn
_LINGER = 0.1  # seconds that a background process may hold a pipe open before its command counts as ended
_FIONREAD = 0x541B  # ioctl: how many bytes a pipe holds


class Command(Servant):
    """A command, on a stream of the control channel or, for a while, on none."""

    terminal = False  # whether its streams are a terminal

    def __init__(
        self,
        loop: Loop,
        mux: Mux,
        stream: int,
        request: Exec | Terminal,
        env: dict[str, str],
        cwd: str,
        spawner: Spawner,
        ended: Callable[[Command], None],
        left: Callable[[int], None],
    ) -> None:
        """Start it; `ended` is called when it has ended, `left` when its stream is closed. Raises OSError."""
        self.job = request.job
        self.stream: int | None = stream
        self.exited: Exited | None = None  # how it ended
        self.kept = {channel: Kept() for channel in OUTPUTS}
        self._sent = dict.fromkeys(OUTPUTS, 0)  # offset of what goes to the stream next
        self._base = dict.fromkeys(OUTPUTS, 0)  # offset of the stream's first byte
        self._loop = loop
        self._mux = mux
        self._ended = ended
        self._left = left
        self._limit = LIMIT
        self._status: int | None = None
        self._timed_out = False
        self._lingering: Timer | None = None
        self._expiry: Timer | None = None
        self._began = time.monotonic()
        self._stdin_queue: list[memoryview] = []
        self._stdin_end = False
        self._pipes: dict[int, int] = {}  # channel -> our end, while it is open
        self._paused: set[int] = set()  # channels that wait for credit
        theirs, actions = self._open(request, spawner.nothing)
        try:
            self.pid = spawner.start(request.command, env, cwd, actions)
            self._pidfd = os.pidfd_open(self.pid)
        except BaseException:
            for fd in self._pipes.values():
                os.close(fd)
            raise
        finally:
            for fd in theirs:
                os.close(fd)
        for channel in OUTPUTS:
            self._watch_output(channel)
        loop.watch(self._pidfd, READ, self._exited)
        if request.told:
            started = Started(
                pid=self.pid, ppid=os.getpid(), uid=os.getuid(), exe=SHELL, argv=list(SHELL_ARGV), cwd=cwd
            )
            mux.message(stream, started)
        timeout = getattr(request, "timeout", None)
        if timeout is not None:
            self._expiry = loop.after(timeout, self._expire)

    def _open(self, request: Exec | Terminal, nothing: int) -> tuple[list[int], list[tuple[Any, ...]]]:
        """Make its streams: our ends are in `_pipes`; returns its own, and how it comes by them."""
        out_ours, out_theirs = os.pipe2(os.O_CLOEXEC)
        err_ours, err_theirs = os.pipe2(os.O_CLOEXEC)
        self._pipes = {STDOUT: out_ours, STDERR: err_ours}
        theirs, stdin = [out_theirs, err_theirs], nothing
        if getattr(request, "stdin", False):
            stdin, self._pipes[STDIN] = os.pipe2(os.O_CLOEXEC)
            theirs.append(stdin)
        for fd in self._pipes.values():
            os.set_blocking(fd, False)
        ends = (stdin, out_theirs, err_theirs)
        return theirs, [(os.POSIX_SPAWN_DUP2, fd, number) for number, fd in enumerate(ends)]

    def _take(self, fd: int, size: int) -> bytes:
        """Read output; b"" at its end. Raises BlockingIOError."""
        return os.read(fd, size)

    # -- output

    @property
    def held(self) -> int:
        """Bytes of output in memory."""
        return sum(len(kept) for kept in self.kept.values())

    def _watch_output(self, channel: int) -> None:
        fd = self._pipes.get(channel)
        if fd is None:
            return
        if self.exited is None:
            self._loop.watch(fd, READ, lambda _events: self._pump(channel))
        elif self.stream is None:
            self._loop.watch(fd, READ, lambda _events: self._drain(channel))
        else:  # what a background process writes can wait until the host has what came before
            self._loop.unwatch(fd)

    def credit(self, channel: int) -> None:
        """The host has dealt with some output, and takes more: go on with what was paused."""
        if self.stream is not None and channel in self.kept:
            self.kept[channel].drop(self._base[channel] + self._mux.confirmed(self.stream, channel))
            if channel in self._paused:
                self._paused.discard(channel)
                self._watch_output(channel)
                self._pump(channel)

    def _pump(self, channel: int) -> None:
        """Move output to the host, first what is kept, then what the pipe holds, as far as there is credit."""
        for _ in range(_PIECES_PER_TURN):
            room = _PIECE if self.stream is None else self._mux.room(self.stream, channel)
            if not room:
                self._pause(channel)
                break
            if not self._resend(channel, room) and not self._read(channel, room):
                break
        self._finish_stream(channel)
        self._settle()

    def _pause(self, channel: int) -> None:
        self._paused.add(channel)
        if channel in self._pipes and self.exited is None:
            self._loop.unwatch(self._pipes[channel])

    def _resend(self, channel: int, room: int) -> bool:
        """Send a piece of what the stream has not carried yet, if there is any."""
        at, kept = self._sent[channel], self.kept[channel]
        if self.stream is None or at >= kept.end:
            return False
        self._send(channel, kept.read(at, min(room, _PIECE)))
        return True

    def _send(self, channel: int, data: bytes) -> None:
        assert self.stream is not None
        self._mux.send(self.stream, channel, data)
        self._sent[channel] += len(data)

    def _read(self, channel: int, room: int) -> bool:
        """Take a piece from the pipe; False when there is none."""
        fd = self._pipes.get(channel)
        if fd is None or self.exited is not None:
            return False
        try:
            data = self._take(fd, min(room, _PIECE))
        except BlockingIOError:
            return False
        if not data:
            self._close(channel)
            return False
        self._keep(channel, data)
        if self.stream is not None:
            self._send(channel, data)
        return True

    def _keep(self, channel: int, data: bytes) -> None:
        kept = self.kept[channel]
        kept.append(data)
        if self.stream is None:
            kept.drop(kept.end - self._limit)

    def _drain(self, channel: int) -> None:
        """What a background process goes on writing after the end belongs to nobody."""
        fd = self._pipes[channel]
        for _ in range(_PIECES_PER_TURN):
            try:
                if not self._take(fd, _PIECE):
                    self._close(channel)
                    return
            except BlockingIOError:
                return

    def _finish_stream(self, channel: int) -> None:
        """Say that a channel has ended, and with the last one how the command has."""
        if self.stream is None:
            return
        if channel not in self._pipes and self._sent[channel] == self.kept[channel].end:
            self._mux.end(self.stream, channel)
        if self.exited is not None and all(self._sent[each] == self.kept[each].end for each in OUTPUTS):
            stream, self.stream = self.stream, None
            self._mux.close(stream, self.exited)
            self._left(stream)
            for each in OUTPUTS:
                self._watch_output(each)

    # -- streams come and go

    def orphaned(self) -> None:
        """The stream is gone, the command goes on: its output is kept from here, its input is at its end."""
        self.stream = None
        self._stdin_queue.clear()
        if not self.terminal:
            self._close(STDIN)
        self._paused.clear()
        for channel in OUTPUTS:
            self._watch_output(channel)
            self._pump(channel)

    def place(self, request: Reattach) -> dict[int, int]:
        """The offsets from which another stream can go on, where it asks to. Raises Refused when it cannot."""
        if self.stream is not None:
            raise Refused("already_exists", f"job {self.job} is followed already")
        wanted = {STDOUT: request.stdout, STDERR: request.stderr}
        for channel, offset in wanted.items():
            if not 0 <= offset <= self.kept[channel].end:
                raise Refused("invalid_input", f"job {self.job} has not written {offset} bytes")
        return {channel: max(offset, self.kept[channel].start) for channel, offset in wanted.items()}

    def attach(self, stream: int, offsets: dict[int, int]) -> None:
        """Go on with another stream, from what `place` has said."""
        self.stream = stream
        for channel, offset in offsets.items():
            self.kept[channel].drop(offset)
            self._sent[channel] = self._base[channel] = offset
        self._mux.message(stream, Reattached(stdout=offsets[STDOUT], stderr=offsets[STDERR], terminal=self.terminal))
        for channel in OUTPUTS:
            self._pump(channel)

    def _close(self, channel: int) -> None:
        fd = self._pipes.pop(channel, None)
        if fd is not None:
            self._loop.unwatch(fd)
            os.close(fd)

    # -- input

    def feed(self, data: bytes | memoryview) -> None:
        """Bytes for the command's standard input."""
        self._stdin_queue.append(memoryview(bytes(data)))
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
            except OSError:  # nobody reads it any more
                self._close(STDIN)
                fd, size = None, len(head)
            if self.stream is not None:
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
        self._limit = 0
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
        for channel in OUTPUTS:
            self._pump(channel)

    def _settle(self) -> None:
        """The command has ended once bash has exited, and its pipes are closed or have been open a while longer."""
        if self._status is None or self.exited is not None:
            return
        if any(channel in self._pipes for channel in OUTPUTS):
            self._lingering = self._lingering or self._loop.after(_LINGER, self._stop_lingering)
        else:
            self._end()

    def _stop_lingering(self) -> None:
        for channel in OUTPUTS:
            if channel in self._pipes:
                size = fcntl.ioctl(self._pipes[channel], _FIONREAD, bytes(4))
                left = int.from_bytes(size, "little")
                if left:  # a pipe hands out all that it holds at once
                    self._keep(channel, self._take(self._pipes[channel], left))
        self._end()

    def _end(self) -> None:
        if self._lingering is not None:
            self._lingering.cancel()
        assert self._status is not None
        code, number = os.waitstatus_to_exitcode(self._status), None
        if code < 0:
            code, number = 1, -code
        self.exited = Exited(
            exit_code=code, signal=number, timed_out=self._timed_out, duration=time.monotonic() - self._began
        )
        self._ended(self)
        for channel in OUTPUTS:
            self._watch_output(channel)
            self._pump(channel)
