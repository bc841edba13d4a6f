"""Checkpoints of a VM: making, listing, checking and removing them, and going back to one."""

from __future__ import annotations

import contextlib
import json
import os
import time
from pathlib import Path
from typing import Any

import click

from capsem.cli.context import NEW_NAME, SESSION, Context
from capsem.cli.terminal import printable, size_text, waiting

ID = 12  # digits shown; so many, or fewer, are enough to name one


class _Group(click.Group):
    """`checkpoint NAME` makes one; `checkpoint rm NAME ID` and the like take a word first."""

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and args[0] not in self.commands:
            args = ["create", *args]
        return super().resolve_command(ctx, args)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if args and args[0].startswith("-") and args[0] != "--help":
            args = ["create", *args]
        return super().parse_args(ctx, args)


@click.group(
    "checkpoint",
    cls=_Group,
    epilog="\b\nExamples:\n  capsem checkpoint box -m 'before the upgrade'\n  capsem checkpoint rm box 3f2a",
)
def checkpoint_command() -> None:
    """Make a checkpoint of a running VM, which goes on: `capsem checkpoint NAME [-m MESSAGE]`.

    With the words rm, verify, export or import first, do that with one.
    """


@checkpoint_command.command("create", epilog="\b\nExample:\n  capsem checkpoint create box -m 'works'")
@click.argument("session", type=SESSION)
@click.option("-m", "--message", metavar="TEXT", help="What it is of.")
@click.option("--json", "as_json", is_flag=True, help="Everything there is to tell, as JSON.")
@click.pass_obj
def create_command(obj: Context, session: str, message: str | None, as_json: bool) -> None:
    """Make a checkpoint of a running VM, which goes on running."""
    with waiting(f"saving {session}"):
        answer = obj.client().call("checkpoint", vm_id=session, body={"message": message})
    if as_json:
        click.echo(json.dumps(answer, indent=2))
    else:
        click.echo(answer["id"][:ID])
        click.echo(f"paused {answer['pause_ms']:.0f} ms, {size_text(answer['bytes'])} of memory written", err=True)
        if warning := answer.get("warning"):
            click.echo(f"warning: {printable(warning)}", err=True)


@checkpoint_command.command("rm", epilog="\b\nExample:\n  capsem checkpoint rm box 3f2a")
@click.argument("session", type=SESSION)
@click.argument("checkpoint")
@click.pass_obj
def rm_command(obj: Context, session: str, checkpoint: str) -> None:
    """Remove a checkpoint; what others share with it stays."""
    obj.client().call("remove_checkpoint", vm_id=session, body={"checkpoint": checkpoint})
    click.echo("Checkpoint removed.")


@checkpoint_command.command("verify", epilog="\b\nExample:\n  capsem checkpoint verify box 3f2a")
@click.argument("session", type=SESSION)
@click.argument("checkpoint")
@click.pass_obj
def verify_command(obj: Context, session: str, checkpoint: str) -> None:
    """Read all of a checkpoint and hold it against its checksums."""
    with waiting(f"reading {checkpoint}"):
        obj.client().call("verify_checkpoint", vm_id=session, body={"checkpoint": checkpoint})
    click.echo("Checkpoint is whole.")


@click.command("checkpoints", epilog="\b\nExample:\n  capsem checkpoints box")
@click.argument("session", type=SESSION)
@click.option("-q", "--quiet", is_flag=True, help="Ids alone, one a line.")
@click.option("--json", "as_json", is_flag=True, help="Everything there is to tell, as JSON.")
@click.pass_obj
def checkpoints_command(obj: Context, session: str, quiet: bool, as_json: bool) -> None:
    """List the checkpoints of a VM as a tree; * is where the VM is, or came from last."""
    found = obj.client().call("checkpoints", vm_id=session)["checkpoints"]
    if as_json:
        click.echo(json.dumps(found, indent=2))
    elif quiet:
        for each in found:
            click.echo(each["id"])
    elif not found:
        click.echo("No checkpoints.")
    else:
        click.echo(f"{'ID':<22} {'MADE':<16} {'KIND':<9} {'MEMORY':>9} {'DISK':>9} {'SHARED':>9}  MESSAGE")
        for depth, each in tree(found):
            click.echo(_line(depth, each))


def tree(found: list[dict[str, Any]]) -> list[tuple[int, dict[str, Any]]]:
    """Depth first; one whose parent is not in the list stands at the root."""
    ids = {each["id"] for each in found}
    children: dict[str | None, list[dict[str, Any]]] = {}
    for each in found:
        parent = each.get("parent")
        children.setdefault(parent if parent in ids else None, []).append(each)
    lines: list[tuple[int, dict[str, Any]]] = []
    waiting_ = [(0, each) for each in reversed(children.get(None, []))]
    while waiting_:
        depth, each = waiting_.pop()
        lines.append((depth, each))
        below = children.get(each["id"], [])
        # An only child stands below its parent; branches are set in.
        step = 1 if len(below) > 1 else 0
        waiting_ += [(depth + step, child) for child in reversed(below)]
    return lines


def _line(depth: int, each: dict[str, Any]) -> str:
    name = f"{'  ' * min(depth, 4)}{'*' if each.get('current') else ' '} {each['id'][:ID]}"
    made = time.strftime("%Y-%m-%d %H:%M", time.localtime(each["created_at"]))
    memory = size_text(each["memory_bytes"]) if each.get("warm") else "-"
    disk, shared = size_text(each["disk_bytes"]), size_text(each["shared_bytes"])
    message = printable(each.get("message") or "")
    return f"{name:<22} {made:<16} {each['kind']:<9} {memory:>9} {disk:>9} {shared:>9}  {message}".rstrip()


@checkpoint_command.command("export", epilog="\b\nExample:\n  capsem checkpoint export box 3f2a box.capsem")
@click.argument("session", type=SESSION)
@click.argument("checkpoint")
@click.argument("file", type=click.Path(dir_okay=False, writable=True, path_type=Path))
@click.pass_obj
def export_command(obj: Context, session: str, checkpoint: str, file: Path) -> None:
    """Write a checkpoint into one file: memory, devices and disk above the image.

    Whatever the VM had in memory, keys and passwords too, is in it: it is made for its owner alone to read.
    """
    from capsem.client.transfer import Incoming

    incoming = Incoming(obj.client(), "export_checkpoint", session, {"checkpoint": checkpoint})
    partial = file.with_name(f"{file.name}.part")
    with contextlib.closing(incoming), waiting(f"exporting {checkpoint}"):
        try:
            with os.fdopen(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as target:
                target.writelines(incoming)
                target.flush()
                os.fsync(target.fileno())
            partial.replace(file)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise
    click.echo(f"Checkpoint exported: {size_text(file.stat().st_size)}.")


@checkpoint_command.command(
    "import", epilog="\b\nExample:\n  capsem checkpoint import box.capsem twin && capsem resume twin"
)
@click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.argument("name", type=NEW_NAME)
@click.option("--trust", is_flag=True, help="Take memory and devices too: only from a source that you trust.")
@click.pass_obj
def import_command(obj: Context, file: Path, name: str, trust: bool) -> None:
    """Make a VM of an exported checkpoint; its image must be on this host.

    It is stopped, with the checkpoint's disk. With --trust it is suspended, and goes on where the other one was:
    the state of its devices is then handed to QEMU as it came.
    """
    from capsem.client.transfer import send_file

    with file.open("rb") as source, waiting(f"importing {file.name}"):
        size = os.fstat(source.fileno()).st_size
        query = {"name": name} | ({"trust": "1"} if trust else {})
        answer = send_file(obj.client(), "import_checkpoint", None, query, source.fileno(), size)
    click.echo(f"Session {answer['id']} is {answer['status'].lower()}.")


@click.command("rollback", epilog="\b\nExample:\n  capsem rollback box 3f2a")
@click.argument("session", type=SESSION)
@click.argument("checkpoint")
@click.option("--no-save", is_flag=True, help="Give the present up instead of keeping it as a checkpoint.")
@click.pass_obj
def rollback_command(obj: Context, session: str, checkpoint: str, no_save: bool) -> None:
    """Take a VM back to a checkpoint, disk and memory; one that runs goes on from there.

    Its present is kept as a checkpoint first, whose id is printed.
    """
    with waiting(f"taking {session} back"):
        answer = obj.client().call("rollback", vm_id=session, body={"checkpoint": checkpoint, "save": not no_save})
    click.echo(f"Session is back at {answer['checkpoint'][:ID]}.")
    if saved := answer.get("saved"):
        click.echo(f"Its present was kept as {saved[:ID]}.")
    if note := answer.get("boot_note"):
        click.echo(f"{answer['boot_kind']}: {printable(note)}", err=True)
