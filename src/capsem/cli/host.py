"""`capsem version` and `completions`: what needs no service."""

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
