"""`capsem doctor`: what was found, what is missing, and the command that mends it; `support-bundle` is its report alone."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Final

import click

from capsem.cli.context import Context
from capsem.cli.terminal import printable, waiting

if TYPE_CHECKING:
    from capsem.client.health import Check

_NAME_WIDTH: Final = 14
_REPORT: Final = "capsem-report.tar.gz"


@click.command(
    "doctor",
    epilog="\b\nExamples:\n  capsem doctor\n  capsem doctor --fast --json\n  capsem doctor --bundle report.tar.gz",
)
@click.option("--fast", is_flag=True, help="Boot no VM, and do not read all of the image.")
@click.option("--json", "as_json", is_flag=True, help="As JSON: a list of the checks.")
@click.option(
    "--bundle",
    type=click.Path(path_type=Path, dir_okay=False),
    is_flag=False,
    flag_value=Path(_REPORT),
    metavar="[FILE]",
    help=f"Also write a bug report, without secrets ({_REPORT}).",
)
@click.pass_context
def doctor_command(ctx: click.Context, fast: bool, as_json: bool, bundle: Path | None) -> None:
    """Look whether this host can run VMs.

    Checks the host, then boots a small VM, looks at it from inside and destroys it. Exits with 0 when nothing failed.
    """
    obj = ctx.find_object(Context)
    assert obj is not None
    checks = []
    for check in _progress(_checks(obj, fast=fast)):
        checks.append(check)
        if not as_json:
            _show(check)
    if as_json:
        click.echo(json.dumps([asdict(check) for check in checks], indent=2))
    else:
        _sum_up(checks)
    if bundle is not None:
        from capsem.client.bundle import write

        write(bundle, obj.paths, obj.environ, checks)
        click.echo(f"report: {bundle}", err=as_json)
    ctx.exit(int(any(check.status == "failed" for check in checks)))


@click.command("support-bundle", epilog="\b\nExample:\n  capsem support-bundle report.tar.gz")
@click.argument("file", type=click.Path(path_type=Path, dir_okay=False), default=_REPORT)
@click.pass_obj
def support_bundle_command(obj: Context, file: Path) -> None:
    """Write a bug report, without secrets, to FILE.

    It holds the logs and records of all VMs, and what `doctor --fast` finds. Nothing is started.
    """
    from capsem.client.bundle import write
    from capsem.client.health import host_checks

    write(file, obj.paths, obj.environ, list(_progress(host_checks(obj.paths, obj.environ, fast=True))))
    click.echo(f"report: {file}")


def _checks(obj: Context, *, fast: bool) -> Iterator[Check]:
    from capsem.client.health import guest_checks, host_checks

    yield from host_checks(obj.paths, obj.environ, fast=fast)
    if not fast:
        client = obj.client()
        # Not at once, as that client has it: the VM has to go first.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        yield from guest_checks(client)


def _progress(checks: Iterator[Check]) -> Iterator[Check]:
    while True:
        with waiting("checking"):
            check = next(checks, None)
        if check is None:
            return
        yield check


def _show(check: Check) -> None:
    click.echo(f"{check.status:<7}  {check.name.ljust(_NAME_WIDTH)}  {_line(check.found)}")
    if check.fix and check.status != "ok":
        click.echo(f"{'':7}  {'':{_NAME_WIDTH}}  fix: {_line(check.fix)}")


def _sum_up(checks: list[Check]) -> None:
    failed, warned = (sum(check.status == status for check in checks) for status in ("failed", "warning"))
    more = f", {warned} with a warning" if warned else ""
    click.echo(f"{failed} of {len(checks)} checks failed{more}." if failed else f"{len(checks)} checks passed{more}.")


def _line(text: str) -> str:
    return " ".join(printable(text).split())
