"""Manual pages of all commands, made from their own help: `python -m capsem.cli.man DIRECTORY`; `make man`."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path

import click

from capsem import __version__
from capsem.cli.main import PROGRAM, cli


def pages() -> Iterator[tuple[str, str]]:
    """File name and content of each."""
    yield from _pages(click.Context(cli, info_name=PROGRAM))


def _pages(ctx: click.Context) -> Iterator[tuple[str, str]]:
    command = ctx.command
    yield f"{_name(ctx)}.1", "\n".join(_page(ctx)) + "\n"
    if isinstance(command, click.Group):
        for name in command.list_commands(ctx):
            child = command.get_command(ctx, name)
            assert child is not None
            yield from _pages(click.Context(child, info_name=name, parent=ctx))


def _name(ctx: click.Context) -> str:
    return ctx.command_path.replace(" ", "-")


def _page(ctx: click.Context) -> Iterator[str]:
    command, summary = ctx.command, ctx.command.get_short_help_str(limit=200).rstrip(".")
    yield f'.TH "{_name(ctx).upper()}" 1 "" "Capsem {__version__}"'
    yield ".SH NAME"
    yield f"{escaped(_name(ctx))} \\- {escaped(summary)}"
    yield ".SH SYNOPSIS"
    usage = " ".join(command.collect_usage_pieces(ctx))
    yield f"\\fB{escaped(ctx.command_path)}\\fR {escaped(usage)}"
    yield ".SH DESCRIPTION"
    yield from _paragraphs(command.help or "")
    params = (each for each in command.get_params(ctx) if isinstance(each, click.Option))
    options = [record for each in params if (record := each.get_help_record(ctx))]
    if options:
        yield ".SH OPTIONS"
        for name, text in options:
            yield from (".TP", f"\\fB{escaped(name)}\\fR", escaped(text or ""))
    if isinstance(command, click.Group):
        yield ".SH COMMANDS"
        for name in command.list_commands(ctx):
            child = command.get_command(ctx, name)
            assert child is not None
            yield from (
                ".TP",
                f"\\fB{escaped(_name(ctx))}\\-{escaped(name)}\\fR(1)",
                escaped(child.get_short_help_str(200)),
            )
    if command.epilog:
        title, _, examples = command.epilog.replace("\b", "").strip().partition("\n")
        yield f".SH {title.rstrip(':').upper()}"
        yield from (".nf", *(escaped(line.strip()) for line in examples.splitlines()), ".fi")
    if ctx.parent is not None:
        yield ".SH SEE ALSO"
        yield f"\\fB{escaped(_name(ctx.parent))}\\fR(1)"


def _paragraphs(text: str) -> Iterator[str]:
    for paragraph in re.split(r"\n\s*\n", text.strip()):
        yield ".PP"
        yield escaped(" ".join(paragraph.replace("\b", "").split()))


def escaped(text: str) -> str:
    """`text` as troff shows it letter by letter."""
    text = text.replace("\\", "\\e").replace("-", "\\-")
    return re.sub(r"^([.'])", r"\\&\1", text, flags=re.MULTILINE)


def main() -> None:
    """Write them into the directory that is named."""
    directory = Path(sys.argv[1])
    directory.mkdir(parents=True, exist_ok=True)
    for name, content in pages():
        (directory / name).write_text(content, encoding="utf-8")


if __name__ == "__main__":
    main()
