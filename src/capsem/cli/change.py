"""Commands that take a VM from one state to another."""

from __future__ import annotations

import contextlib
import sys

import click

from capsem.cli.context import SESSION, Context
from capsem.cli.terminal import waiting
from capsem.model.errors import InvalidInput, NotRunning


@click.command("stop", epilog="\b\nExamples:\n  capsem stop box\n  capsem stop")
@click.argument("session", type=SESSION, required=False)
@click.pass_obj
def stop_command(obj: Context, session: str | None) -> None:
    """Power a VM off; without SESSION, stop the service and with it all VMs.

    A persistent VM keeps its disk; any other is destroyed.
    """
    if session is None:
        from capsem.cli.daemon import stop_service

        stop_service(obj)
        return
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


@click.command("restart", epilog="\b\nExample:\n  capsem restart box")
@click.argument("name", type=SESSION)
@click.pass_obj
def restart_command(obj: Context, name: str) -> None:
    """Stop a persistent VM and start it again."""
    client = obj.client()
    if not client.call("info", vm_id=name).get("persistent"):
        raise InvalidInput(f"{name} is not persistent: stopped, it would be gone", hint=f"capsem persist {name} NAME")
    with waiting(f"restarting {name}"):
        with contextlib.suppress(NotRunning):
            client.call("stop", vm_id=name)
        answer = client.call("resume", vm_id=name)
    click.echo(answer["id"])


@click.command("persist", epilog="\b\nExample:\n  capsem persist brave-otter-tmp box")
@click.argument("session", type=SESSION)
@click.argument("name", type=SESSION)
@click.pass_obj
def persist_command(obj: Context, session: str, name: str) -> None:
    """Keep a running VM, which would be gone when it stops, under a name."""
    answer = obj.client().call("persist", vm_id=session, body={"name": name})
    click.echo(f"{answer['name']} (persistent)")


@click.command("fork", epilog="\b\nExample:\n  capsem fork box experiment -d 'before the upgrade'")
@click.argument("session", type=SESSION)
@click.argument("name", type=SESSION)
@click.option("-d", "--description", metavar="TEXT", help="What it is for.")
@click.pass_obj
def fork_command(obj: Context, session: str, name: str, description: str | None) -> None:
    """Make a stopped VM on a copy of a VM's disk.

    Nothing is copied: both go on from the same layers. A running source is held still for an instant.
    """
    with waiting(f"forking {session}"):
        answer = obj.client().call("fork", vm_id=session, body={"name": name, "description": description})
    click.echo(answer["name"])


@click.command("purge", epilog="\b\nExamples:\n  capsem purge\n  capsem purge --all")
@click.option("--all", "everything", is_flag=True, help="The persistent ones too; asks first.")
@click.pass_obj
def purge_command(obj: Context, everything: bool) -> None:
    """Destroy all VMs that are not persistent."""
    if everything:
        click.echo("Destroy all VMs, the persistent ones and their disks too? [y/N] ", nl=False)
        if sys.stdin.readline().strip() not in ("y", "Y"):
            click.echo("Aborted.")
            return
    with waiting("purging"):
        answer = obj.client().call("purge", body={"all": everything})
    persistent, ephemeral = answer["persistent_purged"], answer["ephemeral_purged"]
    click.echo(f"Purged {answer['purged']} ({persistent} persistent, {ephemeral} not).")
