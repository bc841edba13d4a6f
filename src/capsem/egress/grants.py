"""What a VM may have put in for it: secrets by name, the placeholders that stand for them, and where they may go. Values and
text; no I/O, and never the secret itself.

A placeholder is `PREFIX` + `capsem-NAME-RANDOM`: the prefix is that of the true thing, as some programs look at it; the rest is
not to be mistaken for anything else, in whatever it turns up.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Final

from capsem.egress.rules import host_matches
from capsem.model.errors import InvalidInput

NAME_PATTERN: Final = r"[a-z0-9](?:[a-z0-9_-]{0,38}[a-z0-9])?"
NAME: Final = re.compile(NAME_PATTERN + r"\Z")
PLACEHOLDER: Final = re.compile(rb"capsem-(" + NAME_PATTERN.encode() + rb")-([a-z0-9]{20})")
PREFIX: Final = re.compile(r"[A-Za-z0-9._-]{0,32}\Z")
MARK: Final = b"capsem-"  # is in every one

_ALPHABET: Final = "abcdefghijklmnopqrstuvwxyz0123456789"
_RANDOM: Final = 20

# How keys begin that programs look at, by the variable that they are in.
PREFIXES: Final = MappingProxyType(
    {
        "ANTHROPIC_API_KEY": "sk-ant-api03-",
        "OPENAI_API_KEY": "sk-",
        "OPENROUTER_API_KEY": "sk-or-v1-",
        "GEMINI_API_KEY": "AIza",
        "GOOGLE_API_KEY": "AIza",
        "GROQ_API_KEY": "gsk_",
        "XAI_API_KEY": "xai-",
        "HF_TOKEN": "hf_",
        "GITHUB_TOKEN": "ghp_",
        "GH_TOKEN": "ghp_",
        "GITLAB_TOKEN": "glpat-",
        "NPM_TOKEN": "npm_",
        "PYPI_TOKEN": "pypi-",
        "SLACK_BOT_TOKEN": "xoxb-",
        "STRIPE_API_KEY": "sk_test_",
    }
)


@dataclass(frozen=True, slots=True)
class Places:
    """Where in a request a secret may stand. `header`: in any, or in these, by lower-case name."""

    header: bool | tuple[str, ...] = True
    basic: bool = True
    query: bool = False
    body: bool = False


USUAL: Final = Places()


@dataclass(frozen=True, slots=True)
class Grant:
    """A secret that a VM may use. The first of `placeholders` is in the variable `env` of its commands; others are what a fork
    has in its memory from its source. `hosts` are patterns as in rules."""

    name: str
    placeholders: tuple[str, ...]
    hosts: tuple[str, ...]
    places: Places = USUAL
    env: str | None = None

    def fits(self, host: str) -> bool:
        """Whether it may go to this host."""
        return any(host_matches(pattern, host) for pattern in self.hosts)


def new_placeholder(name: str, prefix: str, token_bytes: Callable[[int], bytes]) -> str:
    """One of its own."""
    number = int.from_bytes(token_bytes(16), "big")  # 128 bits, of which 103 are used
    drawn = []
    for _ in range(_RANDOM):
        number, place = divmod(number, len(_ALPHABET))
        drawn.append(_ALPHABET[place])
    return f"{prefix}capsem-{name}-{''.join(drawn)}"


def check_name(name: object) -> str:
    """A secret's name. Raises InvalidInput."""
    if not isinstance(name, str) or not NAME.match(name):
        raise InvalidInput(
            f"{str(name)[:60]!r} cannot be a secret's name",
            hint="use 1 to 40 lower-case letters, digits, - or _, beginning and ending with a letter or digit",
        )
    return name


def to_json(grants: Sequence[Grant]) -> str:
    """As text; `from_json` is the opposite."""
    return json.dumps([_to_dict(grant) for grant in grants], separators=(",", ":"))


def _to_dict(grant: Grant) -> dict[str, Any]:
    header = grant.places.header
    return {
        "name": grant.name,
        "placeholders": list(grant.placeholders),
        "hosts": list(grant.hosts),
        "header": header if isinstance(header, bool) else list(header),
        "basic": grant.places.basic,
        "query": grant.places.query,
        "body": grant.places.body,
        "env": grant.env,
    }


def from_json(text: str) -> tuple[Grant, ...]:
    """What a service has sent; "" is nothing. Raises InvalidInput."""
    try:
        return tuple(_from_dict(each) for each in json.loads(text)) if text else ()
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise InvalidInput(f"the grants of secrets cannot be read: {error!r}", hint="restart the service") from error


def _from_dict(values: Mapping[str, Any]) -> Grant:
    header = values["header"]
    places = Places(
        header if isinstance(header, bool) else tuple(header), values["basic"], values["query"], values["body"]
    )
    return Grant(values["name"], tuple(values["placeholders"]), tuple(values["hosts"]), places, values["env"])


def environment(grants: Sequence[Grant]) -> dict[str, str]:
    """The variables that commands of the VM get."""
    return {grant.env: grant.placeholders[0] for grant in grants if grant.env is not None}
