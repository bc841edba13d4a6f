"""`capsem jobs` and `output`: commands that were started by somebody, and what became of them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import click

from capsem.api import stream
from capsem.cli.context import SESSION, Context
from capsem.cli.execute import ending, show
from capsem.cli.terminal import printable, table


@click.command("jobs", epilog="\b\nExamples:\n  capsem jobs box\n  capsem jobs box --json")
@click.option("--json", "as_json", is_flag=True, help="The service's answer, as JSON.")
@click.argument("session", type=SESSION)
@click.pass_obj
def jobs_command(obj: Context, as_json: bool, session: str) -> None:
    """List the commands of a running VM.

    Oldest first: those that run, and those that ended not too long ago. They outlive their clients, and a suspend.
    """
    answer = obj.client().call("jobs", vm_id=session)
    if as_json:
        click.echo(json.dumps(answer, indent=2))
        return
    rows = [(job["id"], _state(job), printable(" ".join(job["command"].split()))) for job in answer["details"]]
    for line in table(("JOB", "STATE", "COMMAND"), rows) if rows else ["No jobs."]:
        click.echo(line)


def _state(job: Mapping[str, Any]) -> str:
    if job["running"]:
        return "running"
    return "cut off" if job.get("exit_code") is None else f"exit {job['exit_code']}"


@click.command(
    "output", epilog="\b\nExamples:\n  capsem output box 5f3a9c0d1e2b4a68\n  capsem output -f box 5f3a9c0d1e2b4a68"
)
@click.option("-f", "--follow", is_flag=True, help="Go on until the command has ended; Ctrl-C leaves it running.")
@click.argument("session", type=SESSION)
@click.argument("job")
@click.pass_obj
def output_command(obj: Context, follow: bool, session: str, job: str) -> int:
    """Show what a command of a running VM has written.

    The last 10 MiB of its output and of its error output. The exit code is the command's once that has ended.
    """
    body = {"job": job, "offsets": {"stdout": 0, "stderr": 0}, "wait": follow, "keep": True}
    with obj.client().stream(session, body) as output:
        show(output, session, {stream.STDOUT: 0, stream.STDERR: 0})
    if output.result.get("running"):
        click.echo(f"note: job {job} still runs; --follow waits for its end", err=True)
        return 0
    return ending(output.result)
