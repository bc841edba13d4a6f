"""Commands that errors, hints and pages tell people to type are there, take so many words, and have those options."""

from __future__ import annotations

import ast
import itertools
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from capsem.cli.main import cli

ROOT = Path(__file__).parents[2]
PLACE = "PLACE"  # for what an f-string puts in
NAMED = re.compile(r"`capsem ([^`\n]+)`")
HINT = re.compile(r"(?:^|, then |; )capsem ([^`,;()\n]+)")


def texts(path: Path) -> Iterator[str]:
    """All that a page says, or a module's strings."""
    if path.suffix == ".md":
        yield re.sub(r"```.*?```", "", path.read_text(), flags=re.DOTALL)  # those are run, by test_docs
        return
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.JoinedStr):
            yield "".join(str(each.value) if isinstance(each, ast.Constant) else PLACE for each in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


def mistake(words: list[str], *, prose: bool = False) -> str | None:
    """Why nobody can type `capsem WORDS`; what is missing does not count, for a page may name a command in short. `prose`: a
    sentence may go on behind it.
    """
    command: click.Command = cli
    ctx = click.Context(cli, info_name="capsem")
    while isinstance(command, click.Group) and words and not words[0].startswith("-"):
        found = command.get_command(ctx, words[0])
        if found is None:  # `capsem checkpoint NAME` is short for its `create`
            return None if words[0].isupper() and (prose or command is not cli) else f"there is no {words[0]!r}"
        command, ctx, words = found, click.Context(found, info_name=words[0], parent=ctx), words[1:]
    if isinstance(command, click.Group):
        return None
    if prose:
        words = list(itertools.takewhile(lambda word: word.isupper() or word.startswith("-"), words))
    try:
        command.make_parser(ctx).parse_args(list(words))
        command.make_context(ctx.info_name, list(words), parent=ctx.parent)
    except click.NoSuchOption as error:
        return error.message
    except click.UsageError as error:
        return error.message if "extra argument" in error.message else None
    return None


@pytest.mark.parametrize(
    "words", ["frok box", "fork --live box new", "suspend box now", "net alow box", "checkpoint rm a b c"]
)
def test_mistakes_are_found(words: str) -> None:
    assert mistake(words.split()) is not None


def test_commands_that_are_named_exist() -> None:
    mistakes, count = [], 0
    for path in (*ROOT.glob("src/**/*.py"), *ROOT.glob("docs/**/*.md"), ROOT / "README.md"):
        for text in texts(path):
            for named in (*NAMED.findall(text), *HINT.findall(text)):
                count += 1
                why = mistake(shlex.split(named, posix=False), prose=f"`capsem {named}`" not in text)
                if why is not None and named != "simulated layer 1":  # a file's magic
                    mistakes.append(f"{path.relative_to(ROOT)}: `capsem {named}`: {why}")
    assert "\n".join(mistakes) == ""
    assert count > 100
