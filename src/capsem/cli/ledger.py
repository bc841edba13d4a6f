"""`capsem history`, `timeline`, `inspect`, `stats`, `triage`, `panics`, `host-logs`: what happened."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import click

from capsem.cli.context import SESSION, Context
from capsem.cli.terminal import printable, table

PAGE = 500  # commands fetched at once
WIDTH = 100  # characters of a command or a summary in a table

_JSON = click.option("--json", "as_json", is_flag=True, help="The service's answer, as JSON.")
_SINCE = "How far back: 30m, 1h, 7d, 300s, or an instant such as 2026-05-01T12:00:00Z."


@click.command(
    "history", epilog="\b\nExamples:\n  capsem history box\n  capsem history box --search pip --layer exec --tail 20"
)
@click.argument("session", type=SESSION)
@click.option(
    "--tail", type=click.IntRange(min=1), default=500, metavar="N", help="The newest N commands (default 500)."
)
@click.option("--all", "everything", is_flag=True, help="All of them.")
@click.option("--search", metavar="TEXT", default="", help="Those that hold this text, whatever its case.")
@click.option(
    "--layer",
    type=click.Choice(["all", "exec", "audit"]),
    default="all",
    help="exec: commands that were asked for; audit: processes that were started for them.",
)
@_JSON
@click.pass_obj
def history_command(
    obj: Context, session: str, tail: int, everything: bool, search: str, layer: str, as_json: bool
) -> None:
    """Show the commands that were run in a VM, oldest first.

    The VM need not run.
    """
    client = obj.client()
    commands: list[dict[str, Any]] = []
    while True:
        room = PAGE if everything else min(PAGE, tail - len(commands))
        query = {"limit": str(room), "offset": str(len(commands)), "search": search, "layer": layer}
        answer = client.call("history", vm_id=session, query=query)
        commands += answer["commands"]
        if not answer["has_more"] or (not everything and len(commands) >= tail):
            break
    if as_json:
        _dump({**answer, "commands": commands})
    elif not commands:
        click.echo("No commands.")
    else:
        rows = [
            (
                _time(each["timestamp"]),
                each["layer"],
                _ending(each),
                _milliseconds(each["duration_ms"]),
                _line(each["command"]),
            )
            for each in reversed(commands)
        ]
        _table(("TIME", "LAYER", "EXIT", "MS", "COMMAND"), rows)


@click.command(
    "timeline", epilog="\b\nExamples:\n  capsem timeline box --since 10m\n  capsem timeline box --layers exec,fs"
)
@click.argument("session", type=SESSION)
@click.option("--since", metavar="WHEN", help=_SINCE)
@click.option(
    "--limit", type=click.IntRange(min=1), default=200, metavar="N", help="The newest N events (default 200)."
)
@click.option(
    "--layers", metavar="LIST", help="Some of exec,mcp,net,fs,model,lifecycle; all but the last unless given."
)
@click.option("--trace-id", metavar="ID", help="What belongs to one trace.")
@_JSON
@click.pass_obj
def timeline_command(
    obj: Context, session: str, since: str | None, limit: int, layers: str | None, trace_id: str | None, as_json: bool
) -> None:
    """Show what happened in a VM, of all kinds, oldest first."""
    query = _query(since=since, limit=str(limit), layers=layers, trace_id=trace_id)
    answer = obj.client().call("timeline", vm_id=session, query=query)
    if as_json:
        _dump(answer)
    elif not answer["rows"]:
        click.echo("No events.")
    else:
        rows = [
            (_time(time), layer, _line(status or "-"), _milliseconds(took), _line(summary or ""))
            for time, layer, _ref, summary, status, took, _trace in answer["rows"]
        ]
        _table(("TIME", "LAYER", "STATUS", "MS", "WHAT"), rows)


@click.command(
    "inspect",
    epilog="\b\nExamples:\n  capsem inspect box 'SELECT path, size FROM fs_events'\n"
    "  capsem inspect _main 'SELECT name, status FROM sessions'",
)
@click.argument("session", type=SESSION)
@click.argument("sql")
@_JSON
@click.pass_obj
def inspect_command(obj: Context, session: str, sql: str, as_json: bool) -> None:
    """Ask a running VM's ledger by SQL.

    One SELECT, at most 10000 rows and 5 seconds. The session `_main` is the index of all VMs.
    """
    answer = obj.client().call("inspect", vm_id=session, body={"sql": sql})
    if as_json:
        _dump(answer)
        return
    _table(
        answer["columns"], [["NULL" if cell is None else _line(str(cell)) for cell in row] for row in answer["rows"]]
    )
    if answer.get("truncated"):
        click.echo(f"only the first {len(answer['rows'])} rows are shown", err=True)


@click.command("stats", epilog="\b\nExample:\n  capsem stats")
@_JSON
@click.pass_obj
def stats_command(obj: Context, as_json: bool) -> None:
    """Show sums over all VMs that there ever were."""
    answer = obj.client().call("stats")
    if as_json:
        _dump(answer)
        return
    totals = answer["global"]
    _table(("TOTAL", ""), [(key.removeprefix("total_").replace("_", " "), str(value)) for key, value in totals.items()])
    if answer["sessions"]:
        click.echo("")
        rows = [
            (
                each["id"],
                each["status"],
                _time(each["created_at"]),
                str(each["exec_count"]),
                str(each["total_file_events"]),
            )
            for each in answer["sessions"]
        ]
        _table(("ID", "STATUS", "CREATED", "COMMANDS", "FILES"), rows)


@click.command("triage", epilog="\b\nExamples:\n  capsem triage\n  capsem triage box --since 1h")
@click.argument("session", type=SESSION, required=False)
@click.option("--since", metavar="WHEN", default="30m", help=f"{_SINCE} Default 30m.")
@click.option(
    "--limit", type=click.IntRange(min=1), default=20, metavar="N", help="At most N of each kind (default 20)."
)
@_JSON
@click.pass_obj
def triage_command(obj: Context, session: str | None, since: str, limit: int, as_json: bool) -> None:
    """Show what went wrong lately, what matters most first."""
    answer = obj.client().call("triage", query=_query(id=session, since=since, limit=str(limit)))
    if as_json:
        _dump(answer)
        return
    if told := answer["session"]:
        click.echo(f"{told['id']}: {told['status']}" + (f", {_line(told['reason'])}" if told.get("reason") else ""))
        if warning := told.get("warning"):
            click.echo(f"warning: {printable(warning)}")
    if not answer["rank"]:
        click.echo(f"Nothing since {_time(answer['since'])}.")
    for each in answer["rank"]:
        times = f" ({each['count']} times)" if each["count"] > 1 else ""
        click.echo(f"{each['score']:3}  {each['kind']}: {_line(each['summary'])}{times}")
        if hint := each.get("hint"):
            click.echo(f"     {printable(hint)}")


@click.command("panics", epilog="\b\nExample:\n  capsem panics --since 1d")
@click.option("--since", metavar="WHEN", default="7d", help=f"{_SINCE} Default 7d.")
@click.option("--limit", type=click.IntRange(min=1), default=20, metavar="N", help="At most N (default 20).")
@_JSON
@click.pass_obj
def panics_command(obj: Context, since: str, limit: int, as_json: bool) -> None:
    """Show what nobody expected: exceptions of Capsem itself, guests whose kernels gave up."""
    answer = obj.client().call("panics", query={"since": since, "limit": str(limit)})
    if as_json:
        _dump(answer)
    elif not answer["panics"]:
        click.echo("No panics.")
    for each in () if as_json else answer["panics"]:
        where = f"{each['vm']}, {each['source']}" if each.get("vm") else each["source"]
        click.echo(f"{_time(each['timestamp'])}  {where}: {_line(each['message'])}")
        last = (each.get("exception") or "").strip().splitlines()
        for text in (*last[-1:], each.get("hint")):
            if text:
                click.echo(f"  {printable(text)}")


@click.command(
    "host-logs", epilog="\b\nExamples:\n  capsem host-logs service --tail 20\n  capsem host-logs mcp --grep error"
)
@click.argument("name", type=click.Choice(["service", "mcp", "gateway", "tray", "app"]))
@click.option("--grep", metavar="TEXT", help="Only lines that hold this text, whatever its case.")
@click.option("--tail", type=click.IntRange(min=1), metavar="N", help="Only the last N lines.")
@click.option("--max-bytes", type=click.IntRange(min=1), metavar="N", help="Look at the last N bytes (default 100 KB).")
@click.pass_obj
def host_logs_command(obj: Context, name: str, grep: str | None, tail: int | None, max_bytes: int | None) -> None:
    """Show the end of a log of this host's Capsem."""
    query = _query(
        grep=grep, tail=None if tail is None else str(tail), max_bytes=None if max_bytes is None else str(max_bytes)
    )
    for line in obj.client().fetch("host_logs", vm_id=name, query=query).decode("utf-8", "replace").splitlines():
        click.echo(printable(line))


def _query(**values: str | None) -> dict[str, str]:
    return {name: value for name, value in values.items() if value is not None}


def _dump(answer: Mapping[str, Any]) -> None:
    click.echo(json.dumps(answer, indent=2))


def _table(header: Any, rows: list[Any]) -> None:
    for line in table(header, rows):
        click.echo(line)


def _time(timestamp: str) -> str:
    return timestamp[:19].replace("T", " ")


def _milliseconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.0f}"


def _ending(command: Mapping[str, Any]) -> str:
    if command["exit_code"] is not None:
        return str(command["exit_code"])
    if command["layer"] != "exec":
        return "-"
    return "?" if command["details"].get("error") else "runs"


def _line(text: str) -> str:
    shown = printable(text).replace("\n", " ")
    return shown if len(shown) <= WIDTH else f"{shown[: WIDTH - 3]}..."
