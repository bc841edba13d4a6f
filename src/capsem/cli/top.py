"""`capsem top`: what runs, and what it takes of this computer."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections.abc import Iterator
from typing import Any, Final

import click

from capsem.cli.context import SECONDS, Context
from capsem.cli.terminal import duration, memory, pool_line, printable, size_text, table
from capsem.model.errors import CapsemError

_SAMPLE: Final = 0.5  # seconds over which a single table counts CPU time
_HEADER: Final = ("ID", "STATUS", "CPU%", "MEMORY", "OF", "DISK", "UPTIME", "RUNS")
_TICK: Final = os.sysconf("SC_CLK_TCK")
_PAGE: Final = os.sysconf("SC_PAGE_SIZE")


def usage(pid: int) -> tuple[float, int]:
    """CPU seconds and resident bytes of a process and its children; of what has ended meanwhile, nothing."""
    seconds, resident = 0.0, 0
    for each in _family(pid):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            with open(f"/proc/{each}/stat", encoding="ascii", errors="replace") as file:  # noqa: PTH123
                fields = file.read().rpartition(")")[2].split()
            seconds += (int(fields[11]) + int(fields[12])) / _TICK
            resident += int(fields[21]) * _PAGE
    return seconds, resident


def _family(pid: int) -> Iterator[int]:
    if pid <= 0:
        return
    yield pid
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        for task in os.listdir(f"/proc/{pid}/task"):  # noqa: PTH208
            with open(f"/proc/{pid}/task/{task}/children", encoding="ascii") as file:  # noqa: PTH123
                for child in file.read().split():
                    yield from _family(int(child))


@click.command("top", epilog="\b\nExamples:\n  capsem top\n  capsem top --json | jq '.[].id'")
@click.option("--json", "as_json", is_flag=True, help="Once, as JSON.")
@click.option("--interval", type=SECONDS, default=2, metavar="S", help="Seconds between two looks, 2.")
@click.pass_obj
def top_command(obj: Context, as_json: bool, interval: float) -> None:
    """Show what VMs take of this computer, and what they run.

    On a terminal again and again, until Ctrl-C; else once. CPU% counts one CPU of this computer as 100, MEMORY is
    resident, OF what the VM was given, DISK its own layers and logs.
    """
    live = sys.stdout.isatty() and not as_json
    before = _times(obj)
    time.sleep(_SAMPLE)
    while True:
        rows, pool, before = _look(obj, before)
        if as_json:
            click.echo(json.dumps(rows, indent=2))
            return
        lines = table(_HEADER, [_row(row) for row in rows]) if rows else ["No sessions."]
        lines += [pool] if pool else []
        if not live:
            click.echo("\n".join(lines))
            return
        width, height = os.get_terminal_size()  # 0 on one that was not told, as in `script` and `docker -t`
        click.echo("\x1b[H\x1b[J" + "\n".join(line[: width or 80] for line in lines[: (height or 24) - 2]))
        time.sleep(interval)


Times = tuple[float, dict[str, float]]  # when, and CPU seconds by VM


def _times(obj: Context) -> Times:
    boxes = obj.client().call("list")["sandboxes"]
    return time.monotonic(), {box["id"]: usage(box["pid"])[0] for box in boxes}


def _look(obj: Context, before: Times) -> tuple[list[dict[str, Any]], str | None, Times]:
    """A row for each VM, what there is to say of the pool, and the times to hold the next look against."""
    client = obj.client()
    boxes, disk = client.call("list")["sandboxes"], client.call("df")
    sizes = {vm["id"]: vm["own_bytes"] + vm["session_bytes"] for vm in disk["vms"]}
    now, seconds, rows = time.monotonic(), {}, []
    for box in boxes:
        vm = box["id"]
        cpu, resident = usage(box["pid"])
        seconds[vm] = cpu
        row: dict[str, Any] = {"id": vm, "status": box["status"], "disk_bytes": sizes.get(vm, 0), "commands": []}
        if box["pid"]:
            spent = max(0.0, cpu - before[1].get(vm, cpu))
            row |= {
                "cpu_percent": round(100 * spent / max(now - before[0], 0.01), 1),
                "resident_bytes": resident,
                "ram_mb": box.get("ram_mb"),
                "uptime_secs": box.get("uptime_secs"),
            }
            with contextlib.suppress(CapsemError):  # it may stop just now
                jobs = client.call("jobs", vm_id=vm)["details"]
                row["commands"] = [job["command"] for job in jobs if job["running"]]
        rows.append(row)
    rows.sort(key=lambda row: -row.get("cpu_percent", -1))
    return rows, pool_line(disk.get("pool")), (now, seconds)


def _row(row: dict[str, Any]) -> tuple[str, ...]:
    commands = [" ".join(printable(command).split())[:40] for command in row["commands"]]
    more = f" (+{len(commands) - 1})" if len(commands) > 1 else ""
    running = "cpu_percent" in row
    return (
        row["id"],
        row["status"],
        f"{row['cpu_percent']:.0f}" if running else "-",
        size_text(row["resident_bytes"]) if running else "-",
        memory(row["ram_mb"]) if row.get("ram_mb") else "-",
        size_text(row["disk_bytes"]),
        duration(row["uptime_secs"]) if row.get("uptime_secs") is not None else "-",
        commands[-1] + more if commands else "-",
    )
