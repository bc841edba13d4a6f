"""Commands under the agent's loop, in this process: what it must not do while they run, and what is left of them."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from capsem.guest import processes, spawner
from capsem.guest.group import Group
from capsem.guest.loop import Loop
from capsem.guest.processes import Command
from capsem.guest.spawner import Spawner
from capsem.wire.events import Closed, DataReceived
from capsem.wire.messages import STDOUT, Exec, Exited
from capsem.wire.schema import Message
from capsem.wire.streams import WINDOW
from wire_pair import pair, settle


def descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


class Shell:
    """Commands on a loop that the test drives until something has happened."""

    def __init__(self, directory: Path) -> None:
        self.loop = Loop()
        self.directory = directory
        self.host, self.guest = pair()
        self.commands: list[Command] = []
        self.spawner = Spawner(Group(""))

    def start(self, command: str, **options: object) -> Command:
        request = Exec(job="j", command=command, **options)  # type: ignore[arg-type]
        stream = self.host.mux.open(request)
        settle(self.host, self.guest)
        self.commands.append(
            Command(
                self.loop,
                self.guest.mux,
                stream,
                request,
                {"PATH": os.environ["PATH"]},
                str(self.directory),
                self.spawner,
                lambda _command: None,
                lambda _stream: self.loop.exit(0),
            )
        )
        return self.commands[-1]

    def finish(self) -> Exited:
        """Run until the command has ended; nothing of its output is taken."""
        self.loop.exit_status = None
        self.loop.run(lambda: None)
        (message,) = self.results()
        assert isinstance(message, Exited)
        return message

    def results(self) -> list[Message]:
        settle(self.host, self.guest)
        return [event.message for event in self.host.events if isinstance(event, Closed)]

    def close(self) -> None:
        for command in self.commands:
            if command._status is None:
                os.killpg(command.pid, signal.SIGKILL)
                os.waitpid(command.pid, 0)
                os.close(command._pidfd)
            for fd in command._pipes.values():
                os.close(fd)
        os.close(self.loop._wake)
        self.loop._epoll.close()


@pytest.fixture
def shell(tmp_path: Path) -> Iterator[Shell]:
    made = Shell(tmp_path)
    yield made
    made.close()


def test_nothing_is_left_of_a_command_that_has_ended(shell: Shell) -> None:
    """Neither descriptors nor timers, such as that of a time-out of an hour."""
    before = descriptors()
    for _ in range(3):
        shell.start("exit 3", timeout=3600, stdin=True)
        shell.loop.exit_status = None
        shell.loop.run(lambda: None)
    assert descriptors() == before
    assert shell.loop._next_due() is None
    assert [result.exit_code for result in shell.results() if isinstance(result, Exited)] == [3, 3, 3]


def test_a_command_that_cannot_be_started_leaves_nothing(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    before = descriptors()
    home = Path.cwd()
    with pytest.raises(ValueError, match="surrogates"):
        shell.start("echo \ud800")
    monkeypatch.setattr(spawner, "SHELL", "/no/such/shell")
    with pytest.raises(FileNotFoundError):
        shell.start("true")
    monkeypatch.undo()
    shell.directory = Path("/no/such/directory")
    with pytest.raises(FileNotFoundError):
        shell.start("true")
    assert descriptors() == before
    assert Path.cwd() == home


def test_the_agents_own_directory_is_what_it_was(shell: Shell) -> None:
    home = Path.cwd()
    shell.start("true")
    assert Path.cwd() == home
    shell.finish()


@pytest.mark.parametrize("attached", [True, False])
def test_an_endless_flood_does_not_hold_the_loop(shell: Shell, monkeypatch: pytest.MonkeyPatch, attached: bool) -> None:
    """A writer that is faster than we read: reading goes on next time."""
    command = shell.start("sleep 100")
    if not attached:
        command.orphaned()
    reads = 0

    def endless(_fd: int, size: int) -> bytes:
        nonlocal reads
        reads += 1
        assert reads < 1000, "it never stops reading"
        return bytes(size)

    with monkeypatch.context() as patch:
        patch.setattr(processes.os, "read", endless)
        command._pump(STDOUT)
    assert (STDOUT in command._paused) == attached
    settle(shell.host, shell.guest)
    received = sum(len(event.data) for event in shell.host.events if isinstance(event, DataReceived))
    assert received == (WINDOW if attached else 0)
    assert command.held == reads * processes._PIECE


def test_what_a_command_left_in_its_pipe_is_sent_and_no_more(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    """A background process goes on writing into the pipe; the command has ended, and so does its stream."""
    command = shell.start(f"head -c {WINDOW + 50000} /dev/zero; sleep 100 &")
    stream = command.stream
    assert stream is not None
    over = command._stop_lingering
    monkeypatch.setattr(command, "_stop_lingering", lambda: (over(), shell.loop.exit(0)))
    shell.loop.run(lambda: None)
    assert command.exited is not None
    assert command.held == WINDOW + 50000
    assert shell.loop._next_due() is None
    with Path(f"/proc/self/fd/{command._pipes[STDOUT]}").open("wb", buffering=0) as late:
        late.write(b"late" * 100)
    settle(shell.host, shell.guest)
    shell.host.mux.consumed(stream, STDOUT, WINDOW)
    settle(shell.host, shell.guest)
    command.credit(STDOUT)
    (result,) = shell.results()
    assert isinstance(result, Exited)
    received = b"".join(event.data for event in shell.host.events if isinstance(event, DataReceived))
    assert len(received) == WINDOW + 50000
    assert b"late" not in received
    os.killpg(command.pid, signal.SIGKILL)


def test_a_time_out_after_the_end_signals_nobody(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    """By then the number may be another process's."""
    command = shell.start("exit 0")
    shell.finish()
    monkeypatch.setattr(processes.os, "killpg", lambda *_: pytest.fail("signalled"))
    command._expire()
    command.signal(signal.SIGTERM)
    command.cancelled()
    assert not command._timed_out
