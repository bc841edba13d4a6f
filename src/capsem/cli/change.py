"""Commands that take a VM from one state to another."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Mapping
from typing import Any

import click

from capsem.cli.context import NEW_NAME, SESSION, Context
from capsem.cli.terminal import printable, waiting
from capsem.model.errors import InvalidInput, NotRunning


@click.command("stop", epilog="\b\nExamples:\n  capsem stop box\n  capsem stop")
@click.argument("session", type=SESSION, required=False)
@click.pass_obj
def stop_command(obj: Context, session: str | None) -> None:
    """Power a VM off; without SESSION, stop the service and with it all VMs.

    A persistent VM keeps its disk; any other is destroyed. With the service, persistent VMs are suspended (see
    `vm.on_service_stop`).
    """
    if session is None:
        from capsem.cli.daemon import stop_service

        stop_service(obj)
        return
    with waiting(f"stopping {session}"):
        answer = obj.client().call("stop", vm_id=session)
    click.echo("Session stopped." if answer.get("persistent", True) else "Session stopped and removed.")


@click.command("resume", epilog="\b\nExamples:\n  capsem resume box\n  capsem resume --cold box")
@click.argument("name", type=SESSION)
@click.option("--cold", is_flag=True, help="From its disk alone: what was in memory is given up.")
@click.pass_obj
def resume_command(obj: Context, name: str, cold: bool) -> None:
    """Start a VM that does not run, a suspended one just as it was (alias: attach).

    Waits until it is ready, and prints its id; one that runs is left alone.
    """
    with waiting(f"resuming {name}"):
        answer = obj.client().call("resume", vm_id=name, body={"cold": cold})
    click.echo(answer["id"])
    _tell_wait(answer)
    if note := answer.get("boot_note"):
        click.echo(f"{answer['boot_kind']}: {printable(note)}", err=True)


@click.command("suspend", epilog="\b\nExample:\n  capsem suspend box && capsem resume box")
@click.argument("session", type=SESSION)
@click.pass_obj
def suspend_command(obj: Context, session: str) -> None:
    """Save a running VM, memory and all, and end its processes; `resume` brings it back just as it was."""
    with waiting(f"suspending {session}"):
        answer = obj.client().call("suspend", vm_id=session)
    click.echo("Session suspended.")
    _tell_wait(answer)
    if warning := answer.get("warning"):
        click.echo(f"warning: {printable(warning)}", err=True)


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
@click.argument("name", type=NEW_NAME)
@click.pass_obj
def persist_command(obj: Context, session: str, name: str) -> None:
    """Keep a running VM, which would be gone when it stops, under a name."""
    answer = obj.client().call("persist", vm_id=session, body={"name": name})
    click.echo(f"{answer['name']} (persistent)")


@click.command("fork", epilog="\b\nExamples:\n  capsem fork box experiment\n  capsem fork box try --count 5")
@click.argument("session", type=SESSION)
@click.argument("name", type=NEW_NAME)
@click.option("-d", "--description", metavar="TEXT", help="What it is for.")
@click.option("--at", metavar="CHECKPOINT", help="From this checkpoint instead of the present.")
@click.option("--count", metavar="N", type=click.IntRange(1, 64), default=1, help="How many: NAME-1, NAME-2 ...")
@click.option("--cold", is_flag=True, help="The disk alone; the new VM is stopped.")
@click.option("--inherit-secrets", is_flag=True, help="Lend it what its source was lent; nothing, unless asked for.")
@click.pass_obj
def fork_command(
    obj: Context,
    session: str,
    name: str,
    description: str | None,
    at: str | None,
    count: int,
    cold: bool,
    inherit_secrets: bool,
) -> None:
    """Make a copy of a VM, its memory included, that goes on from the same instant.

    Nothing is copied: both go on from the same memory and the same disk. A running source is held still for an
    instant. The copy of a VM that is stopped, or with --cold, has the disk alone, and is stopped too.
    """
    client = obj.client()
    if not cold and at is None and client.call("info", vm_id=session)["status"] in ("Stopped", "Defunct"):
        cold = True
    body = {
        "name": name,
        "description": description,
        "live": not cold,
        "count": count,
        "checkpoint": at,
        "inherit_secrets": inherit_secrets,
    }
    with waiting(f"forking {session}"):
        answer = client.call("fork", vm_id=session, body=body)
    click.echo("\n".join(answer.get("names") or [answer["name"]]))


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


def _tell_wait(answer: Mapping[str, Any]) -> None:
    """That a VM had to wait for its turn, if that could be noticed."""
    if (waited := answer.get("waited_ms") or 0) >= 1000:
        click.echo(f"waited {waited / 1000:.1f} s for others to be started, stopped, saved or resumed", err=True)
