"""What every command has at hand: where things are, and the client; and the kinds of arguments they share."""

from __future__ import annotations

import math
import os
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import click

from capsem.client.sync import Client
from capsem.config import Paths
from capsem.model.errors import CapsemError, InvalidInput
from capsem.model.ids import check_name

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem


INTERRUPTED = 130  # the exit code after a Ctrl-C
_MB_PER_GB = 1024


class Context:
    """One invocation of the command line."""

    def __init__(self, environ: Mapping[str, str], uds_path: str | None) -> None:
        self.environ = environ
        self._uds_path = uds_path

    @property
    def paths(self) -> Paths:
        """Where this user's Capsem lives."""
        return Paths.from_environment(self.environ, self._uds_path)

    def client(self, *, start: bool = True) -> Client:
        """A client that starts the service when none runs, unless the user said which socket, or `start` is false.

        From here on Ctrl-C ends this process on the spot: the service notices, and ends what was only waited for.
        """
        paths = self.paths
        _end_on_interrupt()

        def bring_up() -> None:
            from capsem.client.service import start as start_service

            start_service(paths, self.environ, notify=lambda text: click.echo(f"{text} ...", err=True))

        return Client(paths.socket, start=bring_up if start and not paths.explicit else None)


class NameType(click.ParamType[str]):
    """A name that may become part of a path: refused at once when it could lead out of there."""

    def __init__(self, name: str, hint: str) -> None:
        self.name = name
        self._hint = hint

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """Check it. Raises InvalidInput."""
        text = str(value)
        if not text or ".." in text or any(sign in text for sign in "/\\\0"):
            raise InvalidInput(f"bad {self.name} {text[:80]!r}", hint=self._hint)
        return text


class SessionType(NameType):
    """The id of a VM, completed from what there is."""

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        """The ids that begin so; none when no service runs."""
        from click.shell_completion import CompletionItem

        root = ctx.find_root().params
        try:
            boxes = Context(os.environ, root.get("uds_path")).client(start=False).call("list")["sandboxes"]
        except CapsemError:
            return []
        return [CompletionItem(box["id"]) for box in boxes if box["id"].startswith(incomplete)]


class NewName(click.ParamType[str]):
    """What a VM is to be called: the rule that the service holds it to, before one is started for it."""

    name = "name"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """Check it. Raises InvalidInput."""
        return check_name(str(value))


class Amount(click.ParamType[float]):
    """A positive number."""

    def __init__(self, name: str) -> None:
        self.name = name

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float | int:
        """Check it."""
        try:
            number = float(value)
        except ValueError:
            number = math.nan
        if not 0 < number < 1e9:
            self.fail(f"{value!r} is not a positive number", param, ctx)
        return int(number) if number.is_integer() else number


class Gigabytes(Amount):
    """An amount of GB, as the number of MB that the service is sent; refused in the unit in which it was asked for."""

    def __init__(self, allowed: Callable[[], range]) -> None:
        """`allowed`, in MB, is asked for when there is an amount: its module takes longer to import than `list` does."""
        super().__init__("GB")
        self._allowed = allowed

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Check it and turn it into MB. Raises InvalidInput."""
        number = super().convert(value, param, ctx)
        allowed = self._allowed()
        if (size := round(number * _MB_PER_GB)) not in allowed:
            least, most = allowed.start / _MB_PER_GB, (allowed.stop - 1) / _MB_PER_GB
            option = param.opts[0] if param else self.name
            raise InvalidInput(f"{option} is {number:g} GB", hint=f"choose {least:g} to {most:g}")
        return size


def _memory() -> range:
    from capsem.model.spec import RAM_MB

    return RAM_MB


def _volume() -> range:
    from capsem.model.spec import DISK_MB

    return DISK_MB


NEW_NAME = NewName()
SESSION = SessionType("session", "capsem list shows those there are")
IMAGE = NameType("image", "capsem image list shows those there are")
MEMORY = Gigabytes(_memory)
VOLUME = Gigabytes(_volume)
SECONDS = Amount("S")


def parse_env(pairs: Sequence[str]) -> dict[str, str] | None:
    """KEY=VALUE words as a dict, None if there are none. Raises InvalidInput; the rest is for the service to judge."""
    env = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not key or not equals:
            raise InvalidInput(f"bad environment variable {pair[:80]!r}", hint="write it as KEY=VALUE")
        env[key] = value
    return env or None


def _end_on_interrupt() -> None:
    """A KeyboardInterrupt could come up anywhere, in the middle of taking a lock too; there is nothing to clean up."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # one that is ignored stays so
        signal.signal(signal.SIGINT, _end)


def _end(_number: int, _frame: object) -> None:
    if sys.stderr.isatty():
        os.write(sys.stderr.fileno(), b"\n")
    os._exit(INTERRUPTED)
