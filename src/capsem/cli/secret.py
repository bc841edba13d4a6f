"""`capsem secret`: keys that VMs may use and never hold."""

from __future__ import annotations

import json
import sys
from typing import Any

import click

from capsem.cli.context import Context
from capsem.cli.terminal import printable, table
from capsem.model.errors import InvalidInput

_NAME = click.argument("name")


@click.group(
    "secret",
    epilog="\b\nExamples:\n  capsem secret set openai --host api.openai.com --env OPENAI_API_KEY\n  capsem secret ls",
)
def secret_command() -> None:
    """Lend keys to VMs.

    A VM gets a placeholder; on its way to the key's hosts, and nowhere else, the proxy puts the key in its place.
    """


@secret_command.command(
    "set",
    epilog="\b\nExamples:\n  capsem secret set openai --host api.openai.com --env OPENAI_API_KEY\n"
    "  capsem secret set gh --host api.github.com --host github.com --env GH_TOKEN --source 'command:gh auth token'\n"
    "  capsem secret set pypi --host pypi.example.com --source env:PYPI_TOKEN",
)
@_NAME
@click.option(
    "--host", "hosts", multiple=True, required=True, metavar="HOST", help="Where it may go; *.example.com is all below."
)
@click.option("--env", metavar="VAR", help="The variable that holds its placeholder in VMs.")
@click.option(
    "--source",
    metavar="SOURCE",
    help="env:VAR of the service, keyring:SERVICE/USER, command:PROGRAM ARGS or file:PATH. Without, the value is asked for, or "
    "read from standard input, and kept in the keyring or in a file of Capsem's.",
)
@click.option(
    "--header", "headers", multiple=True, metavar="NAME", help="In this header alone; any, unless one is named."
)
@click.option("--no-header", is_flag=True, help="In no header.")
@click.option("--no-basic", is_flag=True, help="Not inside of Basic.")
@click.option("--query", is_flag=True, help="In the query of a URL, too.")
@click.option("--body", is_flag=True, help="In the body of a request, too.")
@click.option("--prefix", metavar="TEXT", help="How the placeholder begins; that of well-known variables is known.")
@click.option(
    "--ttl",
    type=click.FloatRange(1, 60),
    default=60,
    metavar="S",
    help="Seconds that the value is kept in memory (60).",
)
@click.pass_obj
def set_command(
    obj: Context,
    name: str,
    hosts: tuple[str, ...],
    env: str | None,
    source: str | None,
    headers: tuple[str, ...],
    no_header: bool,
    no_basic: bool,
    query: bool,
    body: bool,
    prefix: str | None,
    ttl: float,
) -> None:
    """Define a secret, or define it anew.

    It stands in your settings from then on, without its value. VMs that it is lent to have the new value at once.
    """
    if headers and no_header:
        raise InvalidInput("--header and --no-header contradict each other", hint="leave one of them out")
    request: dict[str, Any] = {
        "hosts": list(hosts),
        "env": env,
        "source": source,
        "value": None if source is not None else _value(name),
        "header": list(headers) or not no_header,
        "basic": not no_basic,
        "query": query,
        "body": body,
        "prefix": prefix,
        "ttl": ttl,
    }
    answer = obj.client().call("set_secret", vm_id=name, body=request)
    kept = f", kept in {answer['stored_in']}" if answer.get("stored_in") else ""
    click.echo(printable(f"{answer['name']}: {answer['source']}{kept}; for {', '.join(answer['hosts'])}"))


def _value(name: str) -> str:
    """The value, never from the command line, where others could see it."""
    if sys.stdin.isatty():
        value: str = click.prompt(f"Value of {name}", hide_input=True)
        return value
    return sys.stdin.read().removesuffix("\n").removesuffix("\r")


@secret_command.command("ls", epilog="\b\nExample:\n  capsem secret ls")
@click.option("--json", "as_json", is_flag=True, help="The service's answer, as JSON.")
@click.pass_obj
def ls_command(obj: Context, as_json: bool) -> None:
    """Show which secrets there are, and whom they are lent to."""
    answer = obj.client().call("secrets")
    if as_json:
        click.echo(json.dumps(answer, indent=2))
    elif not answer["secrets"]:
        click.echo("No secrets.")
    else:
        rows = [
            (
                each["name"],
                printable(each["source"]),
                ",".join(each["hosts"]),
                each.get("env") or "-",
                ",".join(each["vms"]) or "-",
            )
            for each in answer["secrets"]
        ]
        for line in table(("NAME", "SOURCE", "HOSTS", "VARIABLE", "LENT TO"), rows):
            click.echo(line)


@secret_command.command("rm", epilog="\b\nExample:\n  capsem secret rm openai")
@_NAME
@click.pass_obj
def rm_command(obj: Context, name: str) -> None:
    """Take a secret away, and forget its value if Capsem keeps it.

    VMs that it is lent to have it no more.
    """
    obj.client().call("remove_secret", vm_id=name)
    click.echo(f"{name} is removed.")


@secret_command.command("test", epilog="\b\nExample:\n  capsem secret test openai")
@_NAME
@click.pass_obj
def test_command(obj: Context, name: str) -> int:
    """Find out whether the value can be had just now."""
    answer = obj.client().call("test_secret", vm_id=name)
    if answer["ok"]:
        click.echo(f"{name}: {answer['length']} characters, in {answer['took_ms']:.0f} ms")
        return 0
    click.echo(printable(f"{name}: {answer['problem']}"), err=True)
    return 1
