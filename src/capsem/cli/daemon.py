"""`capsem status`, `start`, `install`, `uninstall`: the service itself. `capsem stop` without a VM ends it."""

from __future__ import annotations

import contextlib
import json
from typing import TYPE_CHECKING

import click

from capsem.cli.context import Context
from capsem.cli.terminal import waiting

if TYPE_CHECKING:
    from collections.abc import Mapping


@click.command("status", epilog="\b\nExample:\n  capsem status --json")
@click.option("--json", "as_json", is_flag=True, help="As JSON.")
@click.pass_context
def status_command(ctx: click.Context, as_json: bool) -> None:
    """Show whether the service runs; exits with 1 when it does not.

    Starts nothing.
    """
    from capsem.client.daemon import look

    obj = ctx.find_object(Context)
    assert obj is not None
    paths = obj.paths
    found = look(paths)
    rows = {
        "running": found.version is not None,
        "version": found.version,
        "pid": found.pid,
        "running_vms": found.running_vms,
        "socket": paths.socket,
        "run_dir": paths.run_text,
    }
    if as_json:
        click.echo(json.dumps(rows, indent=2))
    else:
        for key, value in rows.items():
            if value is not None:
                text = {True: "yes", False: "no"}[value] if isinstance(value, bool) else str(value)
                click.echo(f"{key.ljust(11)}  {text}")
    ctx.exit(0 if found.version is not None else 1)


@click.command("start", epilog="\b\nExample:\n  capsem start")
@click.pass_obj
def start_command(obj: Context) -> None:
    """Start the service, if it does not run.

    Other commands do so by themselves.
    """
    from capsem.client.service import start

    if obj.paths.explicit:
        version = obj.client(start=False).call("version")["version"]
    else:
        start(obj.paths, obj.environ, notify=lambda text: click.echo(f"{text} ...", err=True))
        version = obj.client(start=False).call("version")["version"]
    click.echo(f"capsem-service {version} is running.")


def stop_service(obj: Context) -> None:
    """End the service and its VMs; the persistent ones are suspended (unless `vm.on_service_stop` says otherwise)."""
    from capsem.client.daemon import stop

    with waiting("stopping the service"):
        stop(obj.paths)
    click.echo("Service stopped.")


@click.command("install", epilog="\b\nExample:\n  capsem install --dry-run")
@click.option("--dry-run", is_flag=True, help="Only show what would be written, and where.")
@click.pass_obj
def install_command(obj: Context, dry_run: bool) -> None:
    """Let systemd start the service when you log in.

    Writes a unit for your user; nothing is changed for others, and no root is wanted.
    """
    from pathlib import Path

    from capsem.client import daemon
    from capsem.client.service import find_command
    from capsem.store import durable

    path = daemon.unit_path(obj.environ)
    program, *rest = find_command(obj.environ)
    text = daemon.unit_text([str(Path(program).absolute()), *rest], obj.environ)
    if dry_run:
        click.echo(f"# {path}\n{text}", nl=False)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    durable.write(path, text.encode(), mode=0o644)
    click.echo(f"{path} written.")
    _systemctl(obj.environ, ("daemon-reload",), ("enable", "--now", daemon.UNIT_NAME))


@click.command("uninstall", epilog="\b\nExample:\n  capsem uninstall")
@click.pass_obj
def uninstall_command(obj: Context) -> None:
    """Take back what `capsem install` did.

    VMs, images and settings stay.
    """
    from capsem.client import daemon

    path = daemon.unit_path(obj.environ)
    if not path.is_file():
        click.echo("Not installed.")
        return
    _systemctl(obj.environ, ("disable", "--now", daemon.UNIT_NAME))
    with contextlib.suppress(FileNotFoundError):
        path.unlink()
    click.echo(f"{path} removed.")
    _systemctl(obj.environ, ("daemon-reload",))


def _systemctl(environ: Mapping[str, str], *calls: tuple[str, ...]) -> None:
    """Make these calls; from the first on that is not possible here, print them instead."""
    from capsem.client.daemon import systemctl

    for number, call in enumerate(calls):
        if (complaint := systemctl(environ, *call)) is not None:
            click.echo(f"systemctl --user does not work here: {complaint}", err=True)
            click.echo("Where it does, run:")
            for left in calls[number:]:
                click.echo(f"  systemctl --user {' '.join(left)}")
            return
