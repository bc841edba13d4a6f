"""`capsem set`, and the options that it shares with `create`: what becomes of a VM as time goes by."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

import click

from capsem.cli.context import SESSION, Context

UNITS: Final = {"s": 1, "m": 60, "h": 3600, "d": 86400}


class Span(click.ParamType[float]):
    """A time such as 90s, 15m, 2h or 7d, in seconds; `off` is 0."""

    name = "time"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """Check it and turn it into seconds."""
        text = str(value)
        if text == "off":
            return 0.0
        number, unit = (text[:-1], UNITS[text[-1]]) if text[-1:] in UNITS else (text, 1)
        try:
            seconds = float(number) * unit
        except ValueError:
            seconds = 0.0
        if not 1 <= seconds <= 3650 * 86400:
            self.fail(f"{text!r} is no time of a second or more: write it like 90s, 15m, 2h or 7d, or off", param, ctx)
        return seconds


class Count(click.ParamType[int]):
    """A positive number; `off` is 0."""

    name = "count"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Check it."""
        if value == "off":
            return 0
        return click.IntRange(1, 1000).convert(value, param, ctx)


_SPAN: Final = Span()
_OPTIONS: Final = (
    ("--idle", "idle_secs", _SPAN, "T", "Suspend it when nobody has used it for so long (15m)."),
    ("--ttl", "ttl_secs", _SPAN, "T", "Stop it when it has run for so long; one without a name is then gone."),
    ("--every", "checkpoint_every_secs", _SPAN, "T", "Make a checkpoint so often while it runs."),
    ("--keep", "checkpoint_keep", Count(), "N", "How many of those checkpoints to keep; 10."),
    ("--keep-for", "checkpoint_age_secs", _SPAN, "T", "Keep none of them for longer."),
)


def policy_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options of a policy, for a command."""
    for option, name, kind, metavar, text in reversed(_OPTIONS):
        command = click.option(option, name, type=kind, metavar=metavar, help=text)(command)
    return command


def given(values: Mapping[str, float | None]) -> dict[str, float] | None:
    """What was said, as the service takes it; None: nothing."""
    return {name: value for name, value in values.items() if value is not None} or None


@click.command(
    "set", epilog="\b\nExamples:\n  capsem set box --idle 15m --every 5m --keep 10\n  capsem set box --idle off"
)
@click.argument("session", type=SESSION)
@policy_options
@click.pass_obj
def set_command(obj: Context, /, session: str, **policy: float | None) -> None:
    """Change what becomes of a VM as time goes by, and show it.

    A time is written like 90s, 15m, 2h or 7d; `off` turns something off, and what is not given stays as it is. All of
    it is off unless asked for. Only a VM with a name can be suspended or have checkpoints.
    """
    answer = obj.client().call("policy", vm_id=session, body=given(policy) or {})
    for option, name, kind, _metavar, _text in _OPTIONS:
        value = answer.get(name)
        shown = "off" if value is None else (_text_of(value) if kind is _SPAN else str(value))
        click.echo(f"{option[2:].ljust(8)}  {shown}")


def _text_of(seconds: float) -> str:
    """In the largest unit that makes it a whole number."""
    unit = next((name for name in reversed(UNITS) if seconds % UNITS[name] == 0), "s")
    return f"{seconds / UNITS[unit]:g}{unit}"
