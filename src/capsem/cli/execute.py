"""`capsem exec` and `run`: a command's output on ours, its exit code as ours."""

from __future__ import annotations

import contextlib
import itertools
import os
import shlex
import sys
import time
from collections.abc import Mapping
from typing import Any

import click

from capsem.api import stream
from capsem.cli.context import IMAGE, MEMORY, SECONDS, SESSION, VOLUME, Context, parse_env
from capsem.cli.net import net_option, wanted
from capsem.cli.terminal import waiting
from capsem.client.exec_answer import BrokenOff
from capsem.client.sync import ExecStream
from capsem.model.errors import CapsemError

RECONNECT_WITHIN = 60.0  # seconds that a running command waits for a service that went away
_RECONNECT_TURN = 0.2


@click.command(
    "exec",
    epilog="\b\nExamples:\n  capsem exec box 'ls -l /etc | head'\n  capsem exec box -- ls -l /etc\n"
    "  tar c . | capsem exec -i box 'tar x'",
)
@click.option("--timeout", type=SECONDS, metavar="S", help="End the command after so many seconds; exit code 124.")
@click.option("-i", "--stdin", "with_input", is_flag=True, help="Feed it our standard input.")
@click.option("-e", "--env", multiple=True, metavar="K=V", help="An environment variable for the command.")
@click.option("-w", "--cwd", metavar="DIR", help="Where in the guest to run it; /root.")
@click.argument("session", type=SESSION)
@click.argument("command", nargs=-1, required=True)
@click.pass_obj
def exec_command(
    obj: Context,
    timeout: float | None,
    with_input: bool,
    env: tuple[str, ...],
    cwd: str | None,
    session: str,
    command: tuple[str, ...],
) -> int:
    """Run a command in a VM.

    One word is a line for bash; several are a program and its arguments. Output comes as it is made; Ctrl-C ends the
    command. The exit code is the command's; 75 when the VM was suspended meanwhile: then `capsem output` has the rest.
    """
    job = os.urandom(8).hex()
    body: dict[str, Any] = {
        "command": _line(command),
        "timeout_secs": timeout,
        "env": parse_env(env),
        "cwd": cwd,
        "job": job,
    }
    seen = {stream.STDOUT: 0, stream.STDERR: 0}
    client = obj.client()
    while True:
        try:
            with client.stream(session, body, stdin=StandardInput() if with_input else None) as output:
                show(output, session, seen)
            return ending(output.result)
        except BrokenOff:
            # The service is gone, the command is not: its supervisor keeps it, and its output, for the next service.
            if with_input or not _answers_again(obj):
                raise
            body = {"job": job, "offsets": {"stdout": seen[stream.STDOUT], "stderr": seen[stream.STDERR]}}


@click.command(
    "run",
    epilog="\b\nExamples:\n  capsem run 'echo $((6*7))'\n  capsem run --timeout 30 -e N=3 'seq $N'",
)
@click.option("--timeout", type=SECONDS, metavar="S", help="End the command after so many seconds; exit code 124.")
@click.option("-e", "--env", multiple=True, metavar="K=V", help="An environment variable for the command.")
@click.option(
    "--secret", "secrets", multiple=True, metavar="NAME", help="A key that it may use and never sees: `capsem secret`."
)
@click.option("--ram", type=MEMORY, metavar="GB", help="Memory of the VM, 0.25 to 16.")
@click.option("--cpu", type=int, metavar="N", help="CPUs of the VM, 1 to 8.")
@click.option("--disk", type=VOLUME, metavar="GB", help="Room on its volume.")
@click.option("--profile", type=IMAGE, metavar="NAME", help="The image it is made from; `default`, or say `code`.")
@click.option("--cold", is_flag=True, help="Boot it, though there is a template of its size to fork.")
@net_option
@click.argument("command", nargs=-1, required=True)
@click.pass_obj
def run_command(
    obj: Context,
    timeout: float | None,
    env: tuple[str, ...],
    secrets: tuple[str, ...],
    ram: int | None,
    cpu: int | None,
    disk: int | None,
    profile: str | None,
    cold: bool,
    net: str | None,
    command: tuple[str, ...],
) -> int:
    """Run a command in a VM of its own.

    The VM is made for it and destroyed after it. The exit code is the command's.
    """
    body = {
        "command": _line(command),
        "timeout_secs": timeout,
        "env": parse_env(env),
        "secrets": list(secrets) or None,
        "ram_mb": ram,
        "cpus": cpu,
        "disk_mb": disk,
        "profile": profile,
        "cold": cold,
        "network": None if net is None else wanted(net),
    }
    with waiting("running in a new VM"):
        answer = obj.client().call("run", body=body)
    _write(stream.STDOUT, answer["stdout"].encode())
    _write(stream.STDERR, answer["stderr"].encode())
    return ending(answer)


def show(output: ExecStream, session: str, seen: dict[int, int]) -> None:
    """Copy the output as it comes, counting it."""
    pieces = iter(output)
    with waiting(f"waiting for {session}"):  # which may still be booting; the first piece says that it begins
        first = next(pieces, None)
    for channel, data in itertools.chain([first] if first else [], pieces):
        _write(channel, data)
        seen[channel] += len(data)


def _answers_again(obj: Context) -> bool:
    """Wait for a service to come back; starting one is up to whoever stopped it."""
    client, deadline = obj.client(start=False), time.monotonic() + RECONNECT_WITHIN
    with waiting("the service went away; waiting for it"):
        while time.monotonic() < deadline:
            with contextlib.suppress(CapsemError):
                client.call("version")
                return True
            time.sleep(_RECONNECT_TURN)
    return False


class StandardInput:
    """Our standard input, read without a buffer: a thread that reads it never holds a lock that our exit waits for."""

    def read(self, size: int, /) -> bytes:
        """See client.sync.Input."""
        while True:
            try:
                return os.read(0, size)
            except BlockingIOError:  # whoever gave it to us does not want to block on it
                import select

                select.select([0], [], [])


def _line(words: tuple[str, ...]) -> str:
    return words[0] if len(words) == 1 else shlex.join(words)


def _write(channel: int, data: bytes) -> None:
    out = (sys.stdout if channel == stream.STDOUT else sys.stderr).buffer
    out.write(data)
    out.flush()


def ending(result: Mapping[str, Any]) -> int:
    """The exit code for a command's; says what the code does not."""
    if result.get("truncated"):
        click.echo("note: output beyond the limit of 10 MiB was dropped", err=True)
    code = int(result["exit_code"])
    return code & 0xFF or int(code != 0)
