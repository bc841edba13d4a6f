"""A soak on the user's own host."""

from __future__ import annotations

import json
import re
import signal
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click

from capsem.cli.context import INTERRUPTED, Context
from capsem.cli.terminal import Line, printable

if TYPE_CHECKING:
    from capsem.stress.report import Report

_UNITS = {"": 1, "s": 1, "m": 60, "h": 3600}
_PLAIN_EVERY = 10.0  # seconds between lines in a pipe


class _Span(click.ParamType[float]):
    name = "TIME"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        found = re.fullmatch(r"(\d+(?:\.\d+)?)([smh]?)", str(value))
        if found is None or not float(found[1]):
            self.fail(f"{value!r} is no length of time: 90s, 10m, 2h", param, ctx)
        return float(found[1]) * _UNITS[found[2]]


@click.command(
    "stress",
    epilog="\b\nExamples:\n  capsem stress --vms 3 --cycles 30 --clients 6\n  capsem stress --duration 8h --faults\n"
    "  capsem stress --hypervisor sim --services 3 --json",
)
@click.option("--hypervisor", type=click.Choice(["qemu", "sim"]), default="qemu", show_default=True, help="Which VMs.")
@click.option("--no-gate", is_flag=True, help="Let transitions overlap; only with sim, which then LOSES DATA.")
@click.option("--services", type=click.IntRange(1, 16), default=1, show_default=True, help="Services, side by side.")
@click.option("--vms", type=click.IntRange(1, 64), default=3, show_default=True, help="VMs of each service.")
@click.option(
    "--cycles", type=click.IntRange(1), help="End after so many suspends with resume and check, by all together (100)."
)
@click.option("--clients", type=click.IntRange(1, 64), default=6, show_default=True, help="Clients at once.")
@click.option("--duration", type=_Span(), help="End after so long, such as 90s, 10m, 8h.")
@click.option("--faults", is_flag=True, help="Kill services, supervisors and VMMs, and fill the disk, at named steps.")
@click.option("--light", is_flag=True, help="Only write, suspend, resume and check: the most cycles in an hour.")
@click.option("--seed", type=click.IntRange(0), help="Choose what is done as in the run that reported this seed.")
@click.option("--json", "as_json", is_flag=True, help="The report as JSON.")
@click.pass_context
def stress_command(ctx: click.Context, /, no_gate: bool, as_json: bool, cycles: int | None, **chosen: Any) -> None:
    """Try on this host whether anything is ever lost.

    Starts services of its own in a temporary directory; VMs write files and hold things in memory while many clients
    suspend, resume, fork, roll back and delete them, and everything is checked. Other VMs are not touched. Exits with 0
    only if nothing was lost; the evidence of what was is kept. Ctrl-C ends it with the report so far.
    """
    from capsem.stress.options import Options
    from capsem.stress.run import stress

    obj = ctx.find_object(Context)
    assert obj is not None
    if chosen["seed"] is None:
        del chosen["seed"]
    if cycles is None and chosen["duration"] is None:
        cycles = 100
    options = Options(gate=not no_gate, cycles=cycles, **chosen)
    if no_gate:
        click.secho(
            "WITHOUT THE GATE: simulated VMs will lose data. This shows what the gate is for.", fg="red", err=True
        )
    signal.signal(signal.SIGINT, signal.default_int_handler)
    line = Line()
    report, services = stress(options, obj.environ, _on_terminal(line) if sys.stderr.isatty() else _in_pipe())
    line.clear()
    if as_json:
        click.echo(json.dumps(report.to_dict(services), indent=2))
    else:
        click.echo("\n".join(map(printable, report.lines(services))))
    ctx.exit(INTERRUPTED if report.interrupted and report.clean else int(not report.clean))


def _on_terminal(line: Line) -> Callable[[Report], None]:
    return lambda report: line.show(report.progress())


def _in_pipe() -> Callable[[Report], None]:
    told, anomalies = time.monotonic(), 0

    def tell(report: Report) -> None:
        nonlocal told, anomalies
        for each in report.anomalies[anomalies:]:
            click.echo(f"ANOMALY {each.kind}: {each.vm}: {printable(each.what)[:200]}", err=True)
        anomalies = len(report.anomalies)
        if time.monotonic() - told >= _PLAIN_EVERY:
            told = time.monotonic()
            click.echo(report.progress(), err=True)

    return tell
