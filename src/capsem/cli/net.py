"""`capsem net`: what VMs may reach. The commands that change it, and those that tell what holds."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from importlib import import_module
from types import MappingProxyType
from typing import Any, Final

import click

from capsem.cli.context import SESSION, Context
from capsem.cli.policy import Span
from capsem.cli.terminal import printable, table
from capsem.egress.schema import PRESETS
from capsem.model.errors import InvalidInput

# Those of other modules, imported when they are called.
_ELSEWHERE: Final = MappingProxyType(
    {
        **dict.fromkeys(("asks", "log", "learn"), "capsem.cli.net_watch"),
        **dict.fromkeys(("ca", "lint", "reload"), "capsem.cli.net_host"),
    }
)
_ORDER: Final = ("show", "set", "allow", "deny", "asks", "log", "check", "learn", "lint", "reload", "ca")

JSON = click.option("--json", "as_json", is_flag=True, help="The service's answer, as JSON.")


class _Group(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_ORDER)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name in _ELSEWHERE:
            command: click.Command = getattr(import_module(_ELSEWHERE[cmd_name]), f"{cmd_name}_command")
            return command
        return super().get_command(ctx, cmd_name)


@click.group(
    "net",
    cls=_Group,
    epilog="\b\nExamples:\n  capsem net show box\n  capsem net allow box api.example.com\n  capsem net log box -f",
)
def net_command() -> None:
    """See and change what VMs may reach.

    A VM has no network device: what its programs open is carried out by this host, if policy lets it pass.
    """


def wanted(value: str) -> dict[str, Any]:
    """What `--net PRESET|FILE` means, for the body of a request. Raises InvalidInput."""
    if value in PRESETS:
        return {"preset": value}
    try:
        if value == "-":
            return {"policy": sys.stdin.read()}
        with open(value, encoding="utf-8") as file:  # noqa: PTH123  pathlib takes its time to import
            return {"policy": file.read()}
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise InvalidInput(
            f"{value} is no preset, and no file that can be read: {reason}", hint=f"presets are: {', '.join(PRESETS)}"
        ) from error


def net_option(command: Callable[..., Any]) -> Callable[..., Any]:
    """`--net`, for commands that make VMs."""
    text = f"What it may reach: {', '.join(PRESETS)}, or a policy file; the settings' preset unless given."
    return click.option("--net", metavar="PRESET|FILE", help=text)(command)


@net_command.command(
    "show", epilog="\b\nExamples:\n  capsem net show box\n  capsem net show box --policy > policy.toml"
)
@click.argument("session", type=SESSION)
@click.option("--policy", "as_policy", is_flag=True, help="The VM's own policy alone, as a file.")
@JSON
@click.pass_obj
def show_command(obj: Context, session: str, as_policy: bool, as_json: bool) -> None:
    """Show what a VM may reach: its preset, and all rules that hold, the strongest first."""
    _shown(obj.client().call("network", vm_id=session), as_json=as_json, as_policy=as_policy)


def _shown(answer: Mapping[str, Any], *, as_json: bool, as_policy: bool = False) -> None:
    if as_json:
        click.echo(json.dumps(answer, indent=2))
    elif as_policy:
        click.echo(answer["policy"], nl=False)
    else:
        click.echo(f"preset: {answer['preset']}")
        click.echo(f"otherwise: {answer['otherwise']}")
        if answer.get("learning_since") is not None:
            click.echo("learning: what no rule denies is let through and recorded")
        if answer["rules"]:
            rows = [(each["layer"], each["action"], each["name"], rule_text(each)) for each in answer["rules"]]
            click.echo("\n".join(["", *table(("LAYER", "ACTION", "RULE", "ABOUT"), rows)]))


def rule_text(rule: Mapping[str, Any]) -> str:
    """What a rule is about, in one line."""
    where = ", ".join([*rule.get("host", ()), *rule.get("cidr", ())])
    parts = [
        where,
        *(["port " + ", ".join(map(str, rule["port"]))] if "port" in rule else []),
        *([", ".join(rule["method"])] if "method" in rule else []),
        *([", ".join(rule["path"])] if "path" in rule else []),
        *([rule["protocol"]] if rule.get("protocol") not in {None, "http"} else []),
    ]
    return printable("; ".join(parts))


@net_command.command("set", epilog="\b\nExamples:\n  capsem net set box off\n  capsem net set box policy.toml")
@click.argument("session", type=SESSION)
@click.argument("policy", metavar="PRESET|FILE")
@JSON
@click.pass_obj
def set_command(obj: Context, session: str, policy: str, as_json: bool) -> None:
    """Give a VM another preset, or another policy of its own.

    Connections go on, and are judged by it at their next request. FILE may be - for standard input.
    """
    answer = obj.client().call("set_network", vm_id=session, body=wanted(policy))
    _shown(answer, as_json=as_json)


@net_command.command(
    "allow",
    epilog="\b\nExamples:\n  capsem net allow box api.example.com\n  capsem net allow box '*.example.org' --for 1h\n"
    "  capsem net allow box db.example.com:5432 --tcp\n  capsem net allow box --ask 3",
)
@click.argument("session", type=SESSION)
@click.argument("host", required=False)
@click.option("--once", is_flag=True, help="Only what waits for an answer now.")
@click.option("--for", "for_secs", type=Span(), metavar="T", help="For so long (1h).")
@click.option("--always", is_flag=True, help="Also for all VMs with the preset medium, those to come too.")
@click.option("--tcp", is_flag=True, help="Something other than HTTP; needs a port.")
@click.option("--method", multiple=True, metavar="M", help="This method of HTTP alone; may be repeated.")
@click.option("--ask", metavar="N", help="The request of that number, as `capsem net asks` shows it, for once.")
@JSON
@click.pass_obj
def allow_command(
    obj: Context,
    session: str,
    host: str | None,
    once: bool,
    for_secs: float | None,
    always: bool,
    tcp: bool,
    method: tuple[str, ...],
    ask: str | None,
    as_json: bool,
) -> None:
    """Let a VM reach a host, on the ports of the web unless HOST names one (HOST:PORT).

    It holds for this VM, and for copies that are made of it; a `*.` before a domain is for all below it. An address
    may be given, too, with what it leads to past the floor.
    """
    if host is None and ask is None:
        raise click.UsageError("Missing argument 'HOST'.")
    body = {
        "host": host,
        "once": once,
        "for_secs": for_secs or None,
        "always": always,
        "tcp": tcp,
        "method": list(method) or None,
        "ask": ask,
    }
    _said(obj.client().call("network_allow", vm_id=session, body=body), as_json=as_json)


@net_command.command(
    "deny", epilog="\b\nExamples:\n  capsem net deny box tracker.example.com\n  capsem net deny box --ask 3"
)
@click.argument("session", type=SESSION)
@click.argument("host", required=False)
@click.option("--once", is_flag=True, help="Only what waits for an answer now.")
@click.option("--ask", metavar="N", help="The request of that number, as `capsem net asks` shows it, for once.")
@JSON
@click.pass_obj
def deny_command(obj: Context, session: str, host: str | None, once: bool, ask: str | None, as_json: bool) -> None:
    """Keep a VM from a host, whatever else allows it."""
    if host is None and ask is None:
        raise click.UsageError("Missing argument 'HOST'.")
    body = {"host": host, "once": once, "ask": ask}
    _said(obj.client().call("network_deny", vm_id=session, body=body), as_json=as_json)


def _said(answer: Mapping[str, Any], *, as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps(answer, indent=2))
        return
    click.echo(printable(answer["message"]))
    for name in answer.get("removed", []):
        click.echo(f"it takes the place of rule {printable(name)}")


@net_command.command(
    "check",
    epilog="\b\nExamples:\n  capsem net check https://example.com/\n"
    "  capsem net check https://api.example.com/v1/x --vm box --method POST",
)
@click.argument("url")
@click.option(
    "--vm", "session", type=SESSION, metavar="SESSION", help="For this VM; otherwise for one that is made now."
)
@click.option("--method", default="GET", metavar="M", help="The request's; GET.")
@JSON
@click.pass_obj
def check_command(obj: Context, url: str, session: str | None, method: str, as_json: bool) -> None:
    """Say what would be decided on a URL, by which rule of which layer.

    tcp://HOST:PORT is for something other than HTTP. Nothing is sent and nobody is asked.
    """
    query = {"url": url, "method": method, **({"id": session} if session else {})}
    answer = obj.client().call("network_check", query=query)
    if as_json:
        click.echo(json.dumps(answer, indent=2))
        return
    click.echo(answer["action"])
    click.echo(f"rule: {answer['rule']}")
    click.echo(f"layer: {answer['layer']}")
    for key in ("where", "reason", "note"):
        if answer.get(key):
            click.echo(printable(f"{key}: {answer[key]}"))
    if answer.get("remedy"):
        click.echo(printable(f"to allow it: {answer['remedy']}"))
