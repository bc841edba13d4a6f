"""`capsem shell`: a terminal in a VM, which stays when one leaves it, and comes back with the VM after a suspend."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final, NoReturn

import click

from capsem.api import stream
from capsem.cli.context import SESSION, Context, parse_env
from capsem.cli.execute import StandardInput, ending, show
from capsem.cli.terminal import waiting
from capsem.client.terminal import Escape, Joined
from capsem.model.errors import CapsemError, Interrupted, NotFound, NotRunning, Unavailable

_PREFIX: Final = "shell-"  # of the job ids of shells
_TURN: Final = 0.5  # seconds between looks at a VM that is away
_TYPED_AHEAD: Final = 4096  # bytes kept of what is typed meanwhile
_CTRL_C: Final = b"\x03"


@click.command(
    "shell",
    epilog="\b\nExamples:\n  capsem shell            # in a VM made for it, destroyed at the end\n  capsem shell box\n"
    "  capsem shell -a box     # back to the shell that was left with ~.\n  capsem shell -n new     # in a VM of that name, "
    "made if there is none",
)
@click.option("-n", "--name", type=SESSION, help="The VM; a persistent one is made where there is none of that name.")
@click.option("-a", "--attach", is_flag=True, help="Go back to the newest shell that was left there.")
@click.option("-e", "--env", multiple=True, metavar="K=V", help="An environment variable for the shell.")
@click.argument("session", type=SESSION, required=False)
@click.pass_obj
def shell_command(obj: Context, name: str | None, attach: bool, env: tuple[str, ...], session: str | None) -> int:
    """Open a shell in a VM.

    Typed at the beginning of a line, `~.` leaves it running (`--attach` goes back to it), `~~` is one `~`. When the VM
    is suspended the shell waits for it to run again. The exit code is the shell's. Without a terminal, what comes on
    standard input is run as a script.
    """
    if session and name and session != name:
        raise click.UsageError("SESSION and --name are two different VMs")
    if attach and not (session or name):
        raise click.UsageError("--attach needs a SESSION")
    client = obj.client()
    vm, temporary = session or name, False
    if vm is None:
        with waiting("starting a VM"):
            vm, temporary = str(client.call("provision", body={})["id"]), True
    elif name is not None and not _exists(obj, vm):
        with waiting(f"starting {vm}"):
            client.call("provision", body={"name": vm, "persistent": True})
    left, job = False, _left_before(obj, vm) if attach else None
    try:
        if not sys.stdin.isatty():
            if attach:
                raise click.UsageError("--attach needs a terminal")
            with client.stream(vm, {"command": "bash", "env": parse_env(env)}, stdin=StandardInput()) as output:
                show(output, vm, {stream.STDOUT: 0, stream.STDERR: 0})
            return ending(output.result)
        result = _converse(obj, vm, job, parse_env(env) or {})
        left = result is None
    finally:
        if temporary and not left:
            with contextlib.suppress(NotFound):
                client.call("delete", vm_id=vm)
    if result is None:
        rest = f"; `capsem delete {vm}` ends the VM" if temporary else ""
        click.echo(f"Left {vm}; `capsem shell --attach {vm}` goes back{rest}.", err=True)
        return 0
    return ending(result)


def _exists(obj: Context, vm: str) -> bool:
    try:
        obj.client().call("info", vm_id=vm)
    except NotFound:
        return False
    return True


def _left_before(obj: Context, vm: str) -> str:
    shell = newest_left(obj.client().call("jobs", vm_id=vm)["details"])
    if shell is None:
        raise NotFound(f"no shell was left running in {vm}", hint=f"capsem shell {vm} opens one")
    return shell


def newest_left(jobs: Sequence[Mapping[str, Any]]) -> str | None:
    """The newest shell of those on which no terminal hangs; if there is none, of all: a dead one may not be noticed yet."""
    shells = [job for job in jobs if job["running"] and job["id"].startswith(_PREFIX)]
    left = [job for job in shells if not job.get("followed")] or shells
    return str(left[-1]["id"]) if left else None


def _converse(obj: Context, vm: str, job: str | None, env: dict[str, str]) -> dict[str, Any] | None:
    """A shell to its end, through as many suspends as there are; None: its user has left it."""
    with _console() as console:
        joined = Joined(obj.client(), console, Escape())
        body: dict[str, Any] = {"job": job, "offsets": {}}
        if job is None:
            job = _PREFIX + os.urandom(4).hex()
            term = {"TERM": os.environ.get("TERM") or "xterm-256color"}
            body = {"job": job, "command": "exec bash -l", "env": {**term, **env}}
        away, typed = False, b""
        while True:
            rows, columns = console.size()
            try:
                return joined.run(vm, {**body, "terminal": {"rows": rows, "columns": columns}}, typed)
            except Interrupted:
                if not away:
                    console.say(f"{vm} is away; waiting until it runs again, ~. leaves")
                away = True
            except (NotRunning, Unavailable):
                if not away:
                    raise
            meanwhile = _comes_back(obj, vm, console)
            if meanwhile is None:
                return None
            typed = meanwhile
            body = {"job": job, "offsets": {"stdout": joined.seen}}


def _comes_back(obj: Context, vm: str, console: _Console) -> bytes | None:
    """Wait until a VM runs again, and return what was typed meanwhile; None when its user does not want to wait.

    Raises NotFound, NotRunning: it will not.
    """
    escape, kept = Escape(), b""
    while True:
        if select.select([console.keys], [], [], _TURN)[0]:
            typed = os.read(console.keys, 4096)
            wanted, leave = escape.feed(typed)
            if not typed or _CTRL_C in typed or leave:
                return None
            kept = (kept + wanted)[:_TYPED_AHEAD]
        try:
            status = obj.client(start=False).call("info", vm_id=vm)["status"]
        except NotFound:
            raise
        except CapsemError:  # the service is away too, or busy
            continue
        if status == "Running":
            return kept
        if status != "Suspended":
            raise NotRunning(f"{vm} is {status}, and its shell gone", hint=f"capsem resume {vm}")


class _Console:
    """Our terminal, raw. See client.terminal.Console."""

    keys = 0

    def __init__(self, resized: int) -> None:
        self.resized = resized

    def size(self) -> tuple[int, int]:
        """See client.terminal.Console."""
        with contextlib.suppress(BlockingIOError):
            os.read(self.resized, 4096)
        columns, rows = os.get_terminal_size(self.keys)
        return rows or 24, columns or 80

    def show(self, data: bytes) -> None:
        """See client.terminal.Console."""
        view = memoryview(data)
        while view:
            view = view[os.write(1, view) :]

    def say(self, text: str) -> None:
        """A line of ours."""
        self.show(f"\r\n[{text}]\r\n".encode())


@contextlib.contextmanager
def _console() -> Iterator[_Console]:
    """Our terminal is raw inside, and afterwards as it was, also after a signal that ends us."""
    import termios
    import tty

    reading, writing = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)

    def resized(_number: int, _frame: object) -> None:
        with contextlib.suppress(BlockingIOError):
            os.write(writing, b"x")

    def end(number: int, _frame: object) -> NoReturn:
        raise SystemExit(128 + number)

    handlers = dict.fromkeys((signal.SIGINT, signal.SIGTERM, signal.SIGHUP), end)
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    before[signal.SIGWINCH] = signal.signal(signal.SIGWINCH, resized)
    modes = termios.tcgetattr(0)
    try:
        tty.setraw(0, termios.TCSADRAIN)
        yield _Console(reading)
    finally:
        termios.tcsetattr(0, termios.TCSADRAIN, modes)
        for number, handler in before.items():
            signal.signal(number, handler)
        os.close(reading)
        os.close(writing)
