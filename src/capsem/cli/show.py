"""`capsem list`, `info`, `logs`: what there is."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from typing import Any

import click

from capsem.cli.context import SESSION, Context
from capsem.cli.terminal import duration, memory, pool_line, printable, size_text, table
from capsem.model.errors import Interrupted, NotFound, Unavailable

LOGS = {"logs": "console", "process_logs": "process.log"}
FOLLOW_TURN = 0.5  # seconds
MARK = 2000  # characters by which a place in a log is found again

HEADER = ("ID", "NAME", "STATUS", "RAM", "CPUs", "UPTIME")


@click.command("list", epilog="\b\nExamples:\n  capsem list\n  capsem list -q | xargs -n1 capsem stop")
@click.option("-q", "--quiet", is_flag=True, help="Only the ids, one on a line.")
@click.option("--json", "as_json", is_flag=True, help="The service's answer, as JSON.")
@click.pass_obj
def list_command(obj: Context, quiet: bool, as_json: bool) -> None:
    """List the VMs (alias: ls)."""
    answer = obj.client().call("list")
    boxes = answer["sandboxes"]
    if as_json:
        click.echo(json.dumps(answer, indent=2))
    elif quiet:
        for box in boxes:
            click.echo(box["id"])
    elif not boxes:
        click.echo("No sessions.")
    else:
        head, *lines = table(HEADER, [_row(box) for box in boxes])
        click.echo(head)
        for line, box in zip(lines, boxes, strict=True):
            click.echo(line)
            if error := _first_line(box.get("last_error")):  # why; below it stands the end of the log
                click.echo(f"  last error: {error}")
            elif box["status"] == "Running" and (reason := _first_line(box.get("reason"))):
                click.echo(f"  note: {reason}")
            if waiting := box.get("waiting"):
                click.echo(f"  {printable(waiting)}")
            if warning := box.get("warning"):
                click.echo(f"  warning: {printable(warning)}")
            if box["status"] == "Suspended" and (blocked := box.get("resume_blocked_reason")):
                click.echo(f"  cannot be resumed: {printable(blocked)}")


@click.command("info", epilog="\b\nExamples:\n  capsem info box\n  capsem info box --json")
@click.argument("session", type=SESSION)
@click.option("--json", "as_json", is_flag=True, help="The service's answer, as JSON.")
@click.pass_obj
def info_command(obj: Context, session: str, as_json: bool) -> None:
    """Show what is known about a VM."""
    box = obj.client().call("info", vm_id=session)
    if as_json:
        click.echo(json.dumps(box, indent=2))
        return
    width = max(len(key) for key in box)
    for key, value in box.items():
        text = json.dumps(value) if isinstance(value, (bool, dict, list)) else printable(str(value))
        first, *more = text.splitlines() or [""]
        click.echo(f"{key.ljust(width)}  {first}".rstrip())
        for line in more:
            click.echo(f"{' ' * width}  {line}")


@click.command("logs", epilog="\b\nExamples:\n  capsem logs box --tail 20\n  capsem logs -f box")
@click.argument("session", type=SESSION)
@click.option("--tail", type=click.IntRange(min=1), metavar="N", help="Only the last N lines of each.")
@click.option("-f", "--follow", is_flag=True, help="Go on with what is added, through restarts, until Ctrl-C.")
@click.pass_obj
def logs_command(obj: Context, session: str, tail: int | None, follow: bool) -> None:
    """Show the console and the log of a VM.

    The VM need not run; one that crashed still has them.
    """
    answer = obj.client().call("logs", vm_id=session)
    if follow:
        _follow(obj, session, answer, tail)
        return
    _section("console", answer["logs"], tail)
    if process := answer.get("process_logs"):
        _section("process.log", process, tail)
    if warning := answer.get("warning"):
        _section("warning", warning, tail)


@click.command("df", epilog="\b\nExamples:\n  capsem df\n  capsem df --json")
@click.option("--json", "as_json", is_flag=True, help="The service's answer, as JSON.")
@click.pass_obj
def df_command(obj: Context, as_json: bool) -> None:
    """Show what VMs, checkpoints and images take on disk.

    OWN goes when the VM is deleted; what it SHARES with others stays as long as one of them does. MEMORY is that of its
    checkpoints, hidden ones too; MAKING is prepared for the next one.
    """
    answer = obj.client().call("df")
    if as_json:
        click.echo(json.dumps(answer, indent=2))
        return
    vms = [
        (vm["id"], *(size_text(vm.get(f"{key}_bytes", 0)) for key in ("own", "shared", "memory", "draft", "session")))
        for vm in answer["vms"]
    ]
    checkpoints = [
        (
            each["id"][:12],
            each["vm"],
            f"{each['kind']}{' (hidden)' if each.get('hidden') else ''}",
            *(size_text(each[f"{key}_bytes"]) for key in ("memory", "own", "shared")),
        )
        for each in answer.get("checkpoints", ())
    ]
    images = [
        (f"{image['name']}-{image['digest'][:12]}", size_text(image["size_bytes"]), str(len(image["vms"])))
        for image in answer["images"]
    ]
    tables = [
        table(("VM", "OWN", "SHARED", "MEMORY", "MAKING", "SESSION"), vms),
        table(("CHECKPOINT", "VM", "KIND", "MEMORY", "OWN", "SHARED"), checkpoints) if checkpoints else (),
        table(("IMAGE", "SIZE", "VMS"), images),
    ]
    for lines in filter(None, tables):
        for line in (*lines, ""):
            click.echo(line)
    totals = [
        (text, size_text(answer.get(key, 0)))
        for text, key in (
            ("layers", "layers_bytes"),
            ("memory", "memory_bytes"),
            ("in the making", "draft_bytes"),
            ("unreferenced", "unreferenced_bytes"),
            ("failed VMs", "failed_bytes"),
            ("total", "total_bytes"),
            ("free", "free_bytes"),
        )
    ]
    for line in table(totals[0], totals[1:]):
        click.echo(line)
    if waiting := pool_line(answer.get("pool")):
        click.echo(f"\n{waiting}")


def _follow(obj: Context, session: str, answer: Mapping[str, Any], tail: int | None) -> None:
    """Both logs as they grow, under a heading whenever it is the other one's turn; ends when the VM is no more."""
    client, shown, last = obj.client(start=False), dict.fromkeys(LOGS.values(), ""), ""
    while True:
        for key, title in LOGS.items():
            text = str(answer.get(key) or "")
            if new := added(shown[title], text):
                lines = printable(new).splitlines()
                if not shown[title] and tail is not None:
                    lines = lines[-tail:]
                if title != last:
                    click.echo(f"== {title} ==")
                for line in lines:
                    click.echo(line)
                shown[title], last = text[: text.rfind("\n") + 1], title
        time.sleep(FOLLOW_TURN)
        try:
            answer = client.call("logs", vm_id=session)
        except NotFound:
            click.echo(f"note: {session} is no more", err=True)
            return
        except (Unavailable, Interrupted):  # the service is restarted: the logs go on with it
            continue


def added(before: str, now: str) -> str:
    """What `now` has after `before`, whole lines; both are the end of a log whose beginning may be cut off."""
    now = now[: now.rfind("\n") + 1]
    if now.startswith(before):
        return now[len(before) :]
    mark = before[-MARK:]
    at = now.rfind(mark)
    return now if at < 0 else now[at + len(mark) :]


def _section(title: str, text: str, tail: int | None) -> None:
    lines = text.splitlines()
    click.echo(f"== {title} ==")
    for line in lines if tail is None else lines[-tail:]:
        click.echo(printable(line))


def _row(box: Mapping[str, Any]) -> tuple[str, ...]:
    ram, uptime = box.get("ram_mb"), box.get("uptime_secs")
    return (
        box["id"],
        box.get("name") or "-",
        box["status"],
        "-" if ram is None else memory(ram),
        str(box.get("cpus", "-")),
        "-" if uptime is None else duration(uptime),
    )


def _first_line(text: str | None) -> str:
    lines = printable(text or "").split("\n")
    return next((line.strip() for line in lines if line.strip()), "")
