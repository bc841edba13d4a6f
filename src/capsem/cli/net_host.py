"""`capsem net ca`, `lint` and `reload`: what is about this host, and no VM."""

from __future__ import annotations

import json
from datetime import UTC, datetime

import click

from capsem.cli.context import Context
from capsem.cli.net import JSON, wanted
from capsem.cli.terminal import printable


@click.group("ca", epilog="\b\nExample:\n  capsem net ca show > capsem-ca.pem")
def ca_command() -> None:
    """See or replace the authority that VMs trust.

    It is made for this installation alone, and signs what VMs are shown of the hosts that they reach. Its key never
    leaves this host, and is in no image, checkpoint or export.
    """


@ca_command.command("show", epilog="\b\nExample:\n  capsem net ca show > capsem-ca.pem")
@JSON
@click.pass_obj
def show_command(obj: Context, as_json: bool) -> None:
    """Print the authority's certificate."""
    _shown(obj, "network_ca", as_json=as_json)


@ca_command.command("rotate", epilog="\b\nExample:\n  capsem net ca rotate")
@JSON
@click.pass_obj
def rotate_command(obj: Context, as_json: bool) -> None:
    """Make another authority, and print its certificate.

    VMs that run keep the one that they have until they are started or resumed again.
    """
    _shown(obj, "rotate_network_ca", as_json=as_json)


def _shown(obj: Context, operation: str, *, as_json: bool) -> None:
    answer = obj.client().call(operation)
    if as_json:
        click.echo(json.dumps(answer, indent=2))
        return
    click.echo(answer["certificate"], nl=False)
    until = datetime.fromtimestamp(answer["not_after"], UTC)
    click.echo(f"SHA-256 {answer['fingerprint']}, until {until:%Y-%m-%d}; its key is in {answer['file']}", err=True)
    if message := answer.get("message"):
        click.echo(printable(message), err=True)


@click.command(
    "lint", epilog="\b\nExamples:\n  capsem net lint policy.toml\n  capsem net lint ~/.capsem/config.toml --layer user"
)
@click.argument("file")
@click.option(
    "--layer",
    type=click.Choice(["vm", "user", "corporate"]),
    default="vm",
    help="Where it is to be used: for a VM (unless given), as the user's file, as the company's.",
)
@JSON
@click.pass_context
def lint_command(ctx: click.Context, file: str, layer: str, as_json: bool) -> None:
    """Say everything that is wrong with a policy file: unknown keys, rules that can never decide anything.

    Exits with 1 when there is something. FILE may be - for standard input.
    """
    text = wanted(f"./{file}" if file != "-" and "/" not in file else file)["policy"]
    answer = ctx.obj.client().call("lint_settings", body={"policy": text, "layer": layer})
    if as_json:
        click.echo(json.dumps(answer, indent=2))
    else:
        for problem in answer["problems"]:
            click.echo(printable(problem.replace("policy", file, 1)))
        if answer["valid"]:
            click.echo("Nothing is wrong with it.")
    ctx.exit(0 if answer["valid"] else 1)


@click.command("reload", epilog="\b\nExample:\n  capsem net reload")
@click.pass_obj
def reload_command(obj: Context) -> None:
    """Read the settings and policy files again, for VMs that run, too.

    Connections go on. A file with a mistake changes nothing, and is told.
    """
    answer = obj.client().call("reload_config")
    click.echo(f"Read again; {answer['reloaded']} running VMs have the new policy.")
