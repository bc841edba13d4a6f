"""`capsem stop`, `resume`, `delete`: from one state to another."""

from __future__ import annotations

import click

from capsem.cli.context import SESSION, Context
from capsem.cli.terminal import waiting


@click.command("stop", epilog="\b\nExample:\n  capsem stop box")
@click.argument("session", type=SESSION)
@click.pass_obj
def stop_command(obj: Context, session: str) -> None:
    """Power a VM off. A persistent one keeps its disk; any other is destroyed."""
    with waiting(f"stopping {session}"):
        answer = obj.client().call("stop", vm_id=session)
    click.echo("Session stopped." if answer.get("persistent", True) else "Session stopped and removed.")


@click.command("resume", epilog="\b\nExample:\n  capsem resume box")
@click.argument("name", type=SESSION)
@click.pass_obj
def resume_command(obj: Context, name: str) -> None:
    """Start a VM that does not run (alias: attach).

    Waits until it is ready, and prints its id; one that runs is left alone.
    """
    with waiting(f"resuming {name}"):
        answer = obj.client().call("resume", vm_id=name)
    click.echo(answer["id"])


@click.command("delete", epilog="\b\nExample:\n  capsem delete box")
@click.argument("session", type=SESSION)
@click.pass_obj
def delete_command(obj: Context, session: str) -> None:
    """Destroy a VM and all its data (alias: rm)."""
    with waiting(f"deleting {session}"):
        obj.client().call("delete", vm_id=session)
    click.echo("Session deleted.")
