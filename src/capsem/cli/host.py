"""`capsem version`, `update` and `completions`: what needs no service."""

from __future__ import annotations

import json
import os
import sys

import click

from capsem import __version__


@click.command("version", epilog="\b\nExample:\n  capsem version")
@click.option("--json", "as_json", is_flag=True, help="As JSON.")
def version_command(as_json: bool) -> None:
    """Print the version of Capsem and what it runs on."""
    python = ".".join(str(part) for part in sys.version_info[:3])
    platform = f"{sys.platform} {os.uname().machine}"
    if as_json:
        click.echo(json.dumps({"version": __version__, "python": python, "platform": platform}))
    else:
        click.echo(f"capsem {__version__} (Python {python}, {platform})")


@click.command("update", epilog="\b\nExample:\n  capsem update")
def update_command() -> None:
    """Say how to upgrade Capsem.

    Nothing is changed: whatever installed it upgrades it.
    """
    click.echo(f"capsem {__version__} is installed in {sys.prefix}. To upgrade it:")
    click.echo(f"  {sys.executable} -m pip install --upgrade capsem  # or whatever installed it")
    click.echo("  capsem image build  # makes a new image where its recipe has changed")
    click.echo("  capsem stop && capsem start  # VMs stop with the service; persistent ones stay")


@click.command(
    "completions",
    epilog="\b\nExample:\n  echo 'eval \"$(capsem completions bash)\"' >> ~/.bashrc",
)
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@click.pass_context
def completions_command(ctx: click.Context, shell: str) -> None:
    """Print a script for shell completion.

    It completes commands, options and the ids of VMs.
    """
    from click.shell_completion import get_completion_class

    kind = get_completion_class(shell)
    assert kind is not None
    click.echo(kind(ctx.find_root().command, {}, "capsem", "_CAPSEM_COMPLETE").source())
