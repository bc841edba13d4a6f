"""The scripted commands of a simulated guest: enough to leave traces in memory and on disk, and to look for them.

    echo WORD...           cat FILE...        rm FILE...       sync          sleep SECONDS
    count FILE             adds one to the number in a file, and says the sum
    tally NAME             as count, of a number that only the guest's memory holds
    true  false  exit N    dmesg  hostname  poweroff  suspend

joined by `;`, `&&` and `||`, each with `> FILE` or `>> FILE` behind it if wanted; `$NAME` is a variable of the
environment, quotes are as in a shell. What is written is in the guest's page cache until somebody says `sync`. Anything
else is "command not found".

A script is plain data (`Step`), so that a command that sleeps can be saved, with all the rest of the guest's memory.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from typing import Any, Final

Step = dict[str, Any]  # "when": after which kind of status; "argv"; "to" and "append": its redirection
_JOINTS: Final = {";": "always", "\n": "always", "&&": "success", "||": "failure"}
_VARIABLE: Final = re.compile(r"\$(\w+|\{\w+\})")
USAGE, NOT_FOUND = 2, 127


class BadScript(ValueError):
    """It cannot be parsed; the message is for standard error."""


def parse(command: str, env: Mapping[str, str]) -> list[Step]:
    """The steps of a command. Raises BadScript."""
    text = _VARIABLE.sub(lambda found: env.get(found[1].strip("{}"), ""), command)
    lexer = shlex.shlex(text.replace("\n", " ; "), posix=True, punctuation_chars=";&|<>")
    lexer.whitespace_split = True
    lexer.commenters = "#"
    try:
        words = list(lexer)
    except ValueError as error:
        raise BadScript(f"bash: syntax error: {error}") from error
    steps: list[Step] = []
    argv: list[str] = []
    when, to, append = "always", None, False
    words.append(";")
    at = 0
    while at < len(words):
        word = words[at]
        if word in _JOINTS:
            if argv:
                steps.append({"when": when, "argv": argv, "to": to, "append": append})
            elif at + 1 < len(words) and word != ";":
                raise BadScript(f"bash: syntax error near unexpected token `{word}'")
            when, argv, to, append = _JOINTS[word], [], None, False
        elif word in (">", ">>"):
            at += 1
            if words[at] in _JOINTS:
                raise BadScript(f"bash: syntax error near unexpected token `{words[at]}'")
            to, append = words[at], word == ">>"
        elif set(word) <= set("&|<>"):
            raise BadScript(f"bash: {word}: not in the simulated shell")
        else:
            argv.append(word)
        at += 1
    return steps


def wanted(step: Step, status: int) -> bool:
    """Whether a step is taken after one that ended with `status`."""
    return bool(step["when"] == "always" or (step["when"] == "success") == (status == 0))
