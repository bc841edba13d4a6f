"""docs/cli.md, made from the help of the commands themselves: `python -m capsem.cli.reference`."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import click

from capsem.cli.main import ALIASES, PROGRAM, cli

WIDTH = 100  # columns; not those of the terminal that happens to be there


def to_markdown() -> str:
    """The page."""
    lines = [
        "# The command line",
        "",
        "Generated from the commands' own help by `make docs`; do not edit.",
        "",
        "Exit codes: 0 done; for `exec` and `run` the command's own; 1 an error; 2 a mistake in the call; 124 a time limit",
        "ran out; 130 interrupted; 141 nobody reads the output any more. Errors go to standard error, with a hint.",
        "",
        "Short forms: " + ", ".join(f"`{short}` is `{name}`" for short, name in ALIASES.items()) + ".",
        "",
    ]
    root = click.Context(cli, info_name=PROGRAM, max_content_width=WIDTH, terminal_width=WIDTH)
    for ctx in _walk(root):
        lines += [f"## {ctx.command_path}", "", "```text", ctx.get_help(), "```", ""]
    return "\n".join(lines).rstrip() + "\n"


def _walk(ctx: click.Context) -> Iterator[click.Context]:
    """A command, and all below it."""
    yield ctx
    command = ctx.command
    if isinstance(command, click.Group):
        for name in command.list_commands(ctx):
            child = command.get_command(ctx, name)
            assert child is not None
            yield from _walk(click.Context(child, info_name=name, parent=ctx))


if __name__ == "__main__":
    sys.stdout.write(to_markdown())
