"""`capsem create`."""

from __future__ import annotations

import click

from capsem.cli.context import IMAGE, MEMORY, SESSION, VOLUME, Context, parse_env
from capsem.cli.net import net_option, wanted
from capsem.cli.policy import given, policy_options
from capsem.cli.terminal import waiting


@click.command(
    "create",
    epilog="\b\nExamples:\n  capsem create\n  capsem create -n box --ram 0.5 --cpu 1 -e TOKEN=abc\n"
    "  capsem create --profile code\n  capsem create -n box --idle 15m\n  capsem create -n box --net policy.toml",
)
@click.option("-n", "--name", metavar="N", help="Its name; a VM with a name is persistent.")
@click.option("--ram", type=MEMORY, metavar="GB", help="Memory, 0.25 to 16; 4 unless the settings say otherwise.")
@click.option("--cpu", type=int, metavar="N", help="CPUs, 1 to 8; 4 unless the settings say otherwise.")
@click.option("--disk", type=VOLUME, metavar="GB", help="Room on its volume; 16. What is not used takes no space.")
@click.option("-e", "--env", multiple=True, metavar="K=V", help="An environment variable for every command in it.")
@click.option(
    "--secret", "secrets", multiple=True, metavar="NAME", help="A key that it may use and never sees: `capsem secret`."
)
@click.option("--profile", type=IMAGE, metavar="NAME", help="The image it is made from; `default`, or say `code`.")
@click.option("--cold", is_flag=True, help="Boot it, though there is a template of its size to fork.")
@click.option("--from", "--image", "source", type=SESSION, metavar="NAME", help="Begin with a copy of this VM's disk.")
@net_option
@policy_options
@click.pass_obj
def create_command(
    obj: Context,
    /,
    name: str | None,
    ram: int | None,
    cpu: int | None,
    disk: int | None,
    env: tuple[str, ...],
    secrets: tuple[str, ...],
    profile: str | None,
    cold: bool,
    source: str | None,
    net: str | None,
    **policy: float | None,
) -> None:
    """Create a VM, boot it, and print its id.

    With a name, or made from another VM, it is persistent: it outlives a stop. Without, it is gone when it stops.
    """
    persistent = name is not None or source is not None
    body = {
        "name": name,
        "ram_mb": ram,
        "cpus": cpu,
        "disk_mb": disk,
        "env": parse_env(env),
        "secrets": list(secrets) or None,
        "profile": profile,
        "cold": cold,
        "from": source,
        "persistent": persistent,
        "policy": given(policy),
        "network": None if net is None else wanted(net),
    }
    with waiting(f"creating {name or 'a VM'}"):
        answer = obj.client().call("provision", body=body)
    click.echo(f"{answer['id']} (persistent)" if persistent else answer["id"])
