"""`capsem net asks`, `log` and `learn`: what VMs want, and what they did."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping
from typing import Any, Final

import click

from capsem.cli.context import SESSION, Context
from capsem.cli.net import JSON
from capsem.cli.terminal import printable, table
from capsem.client.events import follow
from capsem.client.sync import Client
from capsem.model.errors import CapsemError

TURN: Final = 0.5  # seconds between looks at the log
PATH: Final = 80  # characters of a path in a line
_REFUSED: Final = "tls_client_refused"  # what is recorded of a client that does not take our certificate


@click.command(
    "asks",
    epilog="\b\nExamples:\n  capsem net asks\n  capsem net asks --json | while read -r event; do ...; done",
)
@click.option("--vm", "session", type=SESSION, metavar="SESSION", help="Of this VM alone.")
@click.option("--now", is_flag=True, help="Show what waits now, and end.")
@click.option("--json", "as_json", is_flag=True, help="Each event as a line of JSON.")
@click.pass_obj
def asks_command(obj: Context, session: str | None, now: bool, as_json: bool) -> None:
    """Wait for requests that a rule wants somebody to be asked about, and answer them.

    Such requests wait, for up to a minute, as long as this runs; without anybody to ask they are denied at once. On a
    terminal each is answered with a key; otherwise `capsem net allow` and `deny` do, with --ask and its number.
    """
    client, query = obj.client(), {"id": session} if session else {}
    if now:
        answer = client.call("network_asks", query=query)
        if as_json:
            click.echo(json.dumps(answer))
        elif answer["asks"]:
            rows = [(ask["id"], ask["ask"], _ask_text(ask)) for ask in answer["asks"]]
            click.echo("\n".join(table(("ID", "ASK", "WANTS"), rows)))
        else:
            click.echo("Nothing waits." + ("" if answer["followers"] else " Nobody listens, so everything is denied."))
        return
    interactive = sys.stdin.isatty() and sys.stdout.isatty() and not as_json
    for name, event in follow(client, "network_events", query):
        if as_json:
            click.echo(json.dumps({"event": name, **event}))
            sys.stdout.flush()
        elif name == "ask":
            click.echo(f"{printable(event['id'])} ask {event['ask']}: {_ask_text(event)}")
            if interactive:
                _answer(client, event)
        elif not interactive:
            click.echo(f"{printable(event['id'])} ask {event['ask']}: {event['outcome']}")


def _ask_text(ask: Mapping[str, Any]) -> str:
    where = f"{ask.get('host') or ask.get('address') or '?'}:{ask['port']}"
    what = (
        f"{ask['method']} {where}{(ask.get('path') or '')[:PATH]}"
        if ask.get("method")
        else f"{ask['protocol']} {where}"
    )
    return printable(f"{what} (rule {ask['rule']})")


def _answer(client: Client, ask: Mapping[str, Any]) -> None:
    keys = {"o": {"ask": ask["ask"]}, "h": {"for_secs": 3600}, "a": {"always": True}, "n": {"ask": ask["ask"]}}
    click.echo("  [o]nce, for an [h]our, [a]lways, [n]o? ", nl=False)
    key = click.getchar().lower()
    click.echo(key if key in keys else "later")
    if key not in keys:
        return
    body: dict[str, Any] = dict(keys[key])
    if "ask" not in body:
        body |= {"host": ask.get("host") or ask.get("address"), "port": ask["port"], "tcp": ask["protocol"] == "tcp"}
    try:
        answer = client.call("network_deny" if key == "n" else "network_allow", vm_id=ask["id"], body=body)
        click.echo(f"  {printable(answer['message'])}")
    except CapsemError as error:
        click.echo(f"  {printable(str(error))}", err=True)


@click.command(
    "log", epilog="\b\nExamples:\n  capsem net log box\n  capsem net log box -f --denied\n  capsem net log box --json"
)
@click.argument("session", type=SESSION)
@click.option("-f", "--follow", "following", is_flag=True, help="Go on, with what happens from now on.")
@click.option("--denied", is_flag=True, help="What was denied alone.")
@click.option("--since", metavar="WHEN", help="How far back: 30m, 1h, 7d, or an instant such as 2026-05-01T12:00:00Z.")
@click.option(
    "--limit", type=click.IntRange(1, 5000), default=100, metavar="N", help="The newest N entries (default 100)."
)
@click.option("--json", "as_json", is_flag=True, help="Each entry as a line of JSON, with every column.")
@click.pass_obj
def log_command(
    obj: Context, session: str, following: bool, denied: bool, since: str | None, limit: int, as_json: bool
) -> None:
    """Show what a VM reached and what it was kept from, oldest first: one line for each request or connection.

    The VM need not run, unless it is followed.
    """
    client = obj.client()
    query = {"limit": str(limit), **({"since": since} if since else {}), **({"decision": "denied"} if denied else {})}
    answer = client.call("network_log", vm_id=session, query=query)
    _print(answer["events"], as_json=as_json, header=True)
    if not answer["events"] and not following and not as_json:
        click.echo("Nothing yet.")
    query = {key: value for key, value in query.items() if key == "decision"}
    while following:
        time.sleep(TURN)
        answer = client.call(
            "network_log", vm_id=session, query={**query, "after": str(answer["last"]), "limit": "1000"}
        )
        _print(answer["events"], as_json=as_json)


def _print(events: list[dict[str, Any]], *, as_json: bool, header: bool = False) -> None:
    if as_json:
        for event in events:
            click.echo(json.dumps(event))
    elif events:
        lines = table(("TIME", "DECISION", "STATUS", "RULE", "WHAT"), [_row(event) for event in events])
        click.echo("\n".join(lines if header else lines[1:]))
        if any(_REFUSED in event.get("error", "") for event in events):
            click.echo(
                "hint: a client did not take this host's certificate; if it has its own list of those it trusts, a rule with "
                'protocol = "passthrough" for that host lets it pass unseen',
                err=True,
            )
    sys.stdout.flush()


def _row(event: Mapping[str, Any]) -> tuple[str, ...]:
    where = f"{event.get('domain') or event.get('address') or '?'}:{event['port']}"
    what = f"{event['method']} {where}{event.get('path', '')[:PATH]}" if event.get("method") else where
    rule = f"{event.get('rule_layer', '-')}/{event.get('matched_rule', '-')}"
    trouble = f"  {event['error'][:PATH]}" if event.get("error") else ""
    who = f"  {event['process_name']}" if event.get("process_name") else ""
    time_ = event["timestamp"][11:19]
    cells = (time_, event["decision"], str(event.get("status_code", "-")), rule, what + who + trouble)
    return tuple(" ".join(printable(cell).split()) for cell in cells)


@click.command(
    "learn",
    epilog="\b\nExamples:\n  capsem net learn start box\n  capsem net learn stop box -o policy.toml\n"
    "  capsem net learn --from-log box --since 1h -o policy.toml",
)
@click.argument("words", nargs=-1, metavar="[start|stop|show] SESSION")
@click.option("--from-log", is_flag=True, help="Learn what was denied, by the VM's log, without a learning run.")
@click.option("--since", metavar="WHEN", help="With --from-log: how far back (1h).")
@click.option("--paths", is_flag=True, help="Learn paths, too, and not hosts, ports and methods alone.")
@click.option("-o", "--output", metavar="FILE", help="Write the policy there, and not to standard output.")
@JSON
@click.pass_obj
def learn_command(
    obj: Context,
    words: tuple[str, ...],
    from_log: bool,
    since: str | None,
    paths: bool,
    output: str | None,
    as_json: bool,
) -> None:
    """Learn a policy from what a VM does.

    From `start` to `stop` everything that no rule denies is let through, above the floor, and recorded; `stop` writes a
    policy that lets the same pass and nothing else, for `capsem create --net FILE`. `show` writes it, and goes on.
    """
    actions = ("start", "stop", "show")
    if len(words) != (1 if from_log else 2) or (not from_log and words[0] not in actions):
        raise click.UsageError("say start, stop or show, and which VM; or --from-log, and which VM")
    session = SESSION.convert(words[-1], None, None)
    body = {"action": "denials" if from_log else words[0], "paths": paths, "since": since}
    answer = obj.client().call("network_learn", vm_id=session, body=body)
    policy = answer.get("policy")
    if output is not None and policy is not None:
        with open(output, "w", encoding="utf-8") as file:  # noqa: PTH123
            file.write(policy)
    if as_json:
        click.echo(json.dumps(answer, indent=2))
    elif policy is None:
        click.echo(f"{session} is learning: do what it is to be allowed, then `capsem net learn stop {session}`.")
    elif output is None:
        click.echo(policy, nl=False)
    else:
        for each in answer.get("left_out", []):
            click.echo(f"left out: {printable(each)}", err=True)
        click.echo(f"{output}: a policy from {answer.get('events', 0)} requests and connections")
