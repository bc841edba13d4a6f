"""The secrets that may be lent, as the settings define them: where a value comes from and where it may go, never the value.

    [[secret]]
    name = "openai"
    source = "env:OPENAI_API_KEY"         # or keyring:SERVICE/USER, command:gh auth token, file:~/.token
    hosts = ["api.openai.com"]            # as in rules: *.example.com is all below
    env = "OPENAI_API_KEY"                # what the variable in the VM is called
    header = true                         # in any header, or in those of a list; true unless said otherwise
    basic = true                          # inside of Basic; true unless said otherwise
    query = false                         # in the query of a URL
    body = false                          # in the body
    prefix = "sk-"                        # how the placeholder begins; that of the variable, if it is known
    ttl = 60                              # seconds that a value is kept in memory, at most 60

The company's file wins over the user's, name by name.
"""

from __future__ import annotations

import re
import shlex
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NamedTuple

from capsem import config
from capsem.egress.grants import PREFIX, PREFIXES, USUAL, Grant, Places, check_name
from capsem.egress.rules import ANY_HOST, host_pattern
from capsem.model.errors import InvalidInput
from capsem.wire.environment import env_problem

KINDS: Final = ("env", "keyring", "command", "file")
TTL: Final = 60  # seconds, and no longer
MOST: Final = 200  # secrets of one file
KEPT_SERVICE: Final = "capsem"  # of keyring sources whose values Capsem keeps itself

_KEYS: Final = frozenset({"name", "source", "hosts", "env", "header", "basic", "query", "body", "prefix", "ttl"})
_HEADER: Final = re.compile(r"[!#$%&'*+.^_`|~0-9a-z-]{1,100}\Z")
_NOT_IN: Final = frozenset({"host", "content-length", "transfer-encoding", "connection"})


class Source(NamedTuple):
    """Where a value comes from: one of KINDS, and what of it."""

    kind: str
    reference: str

    def __str__(self) -> str:
        return f"{self.kind}:{self.reference}"

    @property
    def shown(self) -> str:
        """For anybody: of a command its program alone, whose arguments might be secrets themselves."""
        reference = shlex.split(self.reference)[0] if self.kind == "command" else self.reference
        return f"{self.kind}:{reference}"

    @property
    def kept(self) -> bool:
        """Whether Capsem keeps the value itself."""
        return self.kind == "keyring" and self.reference.startswith(f"{KEPT_SERVICE}/")


@dataclass(frozen=True, slots=True)
class Secret:
    """One of them. `where` is the file that defines it."""

    name: str
    source: Source
    hosts: tuple[str, ...]
    places: Places = USUAL
    env: str | None = None
    prefix: str = ""
    ttl: float = TTL
    where: str = ""

    def grant(self, placeholders: tuple[str, ...]) -> Grant:
        """It, lent to a VM."""
        return Grant(self.name, placeholders, self.hosts, self.places, self.env)

    def to_table(self) -> dict[str, Any]:
        """What stands in the settings; what is as usual is left out."""
        header = self.places.header
        said: dict[str, Any] = {"name": self.name, "source": str(self.source), "hosts": list(self.hosts)}
        if self.env is not None:
            said["env"] = self.env
        if header is not True:
            said["header"] = header if isinstance(header, bool) else list(header)
        if not self.places.basic:
            said["basic"] = False
        said |= {key: True for key in ("query", "body") if getattr(self.places, key)}
        if self.prefix != PREFIXES.get(self.env or "", ""):
            said["prefix"] = self.prefix
        if self.ttl != TTL:
            said["ttl"] = self.ttl
        return said


def load(environ: Mapping[str, str]) -> dict[str, Secret]:
    """Every secret by its name. Raises InvalidInput that names the file."""
    found: dict[str, Secret] = {}
    for path in (config.user_file(environ), config.corporate_file(environ)):
        found |= read(text_of(path), path)
    return found


def text_of(path: str) -> str:
    """What a settings file holds; "" where there is none. Raises InvalidInput."""
    try:
        return Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        return ""
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidInput(f"{path} cannot be read: {error}", hint="correct the file, or move it away") from error


def read(text: str, where: str) -> dict[str, Secret]:
    """The secrets of a settings file. Raises InvalidInput."""
    try:
        tables = tomllib.loads(text).get("secret", [])
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise InvalidInput(f"{where} cannot be read: {error}", hint="correct the file, or move it away") from error
    if not isinstance(tables, list) or len(tables) > MOST or not all(isinstance(table, dict) for table in tables):
        raise InvalidInput(f"{where}: write [[secret]], once for each, {MOST} at most")
    found: dict[str, Secret] = {}
    for table in tables:
        secret = from_table(table, where)
        if secret.name in found:
            raise InvalidInput(f"{where}: two secrets are called {secret.name}", hint="give one another name")
        found[secret.name] = secret
    return found


def from_table(table: Mapping[str, Any], where: str) -> Secret:
    """One of them. Raises InvalidInput."""
    try:
        name = check_name(table.get("name"))
    except InvalidInput as error:
        raise InvalidInput(f"{where}: {error.message}", hint=error.hint) from None
    try:
        return _from_table(name, table, where)
    except ValueError as error:
        raise InvalidInput(
            f"{where}: secret {name}: {error}", hint="docs/secrets.md tells what a secret may say"
        ) from None


def _from_table(name: str, table: Mapping[str, Any], where: str) -> Secret:
    if unknown := sorted(table.keys() - _KEYS):
        raise ValueError(f"there is no key {unknown[0]}; there are: {', '.join(sorted(_KEYS))}")
    env = table.get("env")
    if env is not None and (not isinstance(env, str) or env_problem(env, "")):
        raise ValueError(f"env: {env!r} cannot be a variable of a VM")
    prefix = table.get("prefix", PREFIXES.get(env or "", ""))
    if not isinstance(prefix, str) or not PREFIX.match(prefix):
        raise ValueError("prefix: up to 32 of letters, digits, . _ -")
    ttl = table.get("ttl", TTL)
    if type(ttl) not in (int, float) or not 1 <= ttl <= TTL:
        raise ValueError(f"ttl: 1 to {TTL} seconds")
    flags = {key: table.get(key, key == "basic") for key in ("basic", "query", "body")}
    for key, value in flags.items():
        if not isinstance(value, bool):
            raise ValueError(f"{key}: true or false")  # noqa: TRY004  it is a value of the settings
    places = Places(_header(table.get("header", True)), **flags)
    if not (places.header or places.basic or places.query or places.body):
        raise ValueError("it may stand nowhere: allow header, basic, query or body")
    return Secret(name, source(table.get("source")), _hosts(table.get("hosts")), places, env, prefix, ttl, where)


def source(text: object) -> Source:
    """What a setting says of where a value comes from. Raises ValueError."""
    kind, _, reference = text.partition(":") if isinstance(text, str) else ("", "", "")
    if kind not in KINDS or not reference.strip() or "\0" in reference:
        raise ValueError("source: env:NAME, keyring:SERVICE/USER, command:PROGRAM ARGUMENTS, or file:PATH")
    if kind == "keyring" and not all(reference.partition("/")):
        raise ValueError("source: keyring:SERVICE/USER")
    if kind == "file" and not reference.startswith(("/", "~/")):
        raise ValueError("source: a file by its absolute path, or ~/...")
    if kind == "command":
        shlex.split(reference)  # a quote that is not closed
    return Source(kind, reference)


def _hosts(value: object) -> tuple[str, ...]:
    if not isinstance(value, list) or not value or not all(isinstance(host, str) for host in value):
        raise ValueError('hosts: where it may go, such as ["api.example.com"]')
    patterns = tuple(dict.fromkeys(host_pattern(host) for host in value))
    if ANY_HOST in patterns:
        raise ValueError("hosts: name them; a secret that may go anywhere is none")
    return patterns


def _header(value: object) -> bool | tuple[str, ...]:
    if isinstance(value, bool):
        return value
    if not isinstance(value, list) or not value:
        raise ValueError('header: true, false, or names such as ["x-api-key"]')
    names = tuple(name.lower() if isinstance(name, str) else "" for name in value)
    for name in names:
        if not _HEADER.match(name) or name in _NOT_IN:
            raise ValueError(f"header: {name!r} can hold no secret")
    return names
