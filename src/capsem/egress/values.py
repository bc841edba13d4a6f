"""How the values of a policy's keys are read, by the kind that `schema` gives them. What is wrong raises Wrong, which says so."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from datetime import datetime
from types import MappingProxyType
from typing import Any, Final, NamedTuple, TypeVar
from urllib.parse import urlsplit

from capsem.egress.facts import Action, Protocol
from capsem.egress.paths import PathPattern
from capsem.egress.rules import Network, host_pattern, network
from capsem.egress.schema import MODELS, PRESETS

T = TypeVar("T")

MOST_VALUES: Final = 500  # of one list

NAME: Final = re.compile(r"[A-Za-z0-9._-]{1,64}\Z")
_TOKEN: Final = re.compile(r"[A-Z][A-Z0-9_-]{0,31}\Z")


class Wrong(ValueError):
    """What is wrong with a value."""


class ClientCertificate(NamedTuple):
    """PEM files of this host."""

    cert: str
    key: str


def _preset(value: Any) -> str:
    return _choice(value, PRESETS)


def _otherwise(value: Any) -> Action:
    return Action(_choice(value, ("deny", "ask")))


def _action(value: Any) -> Action:
    return Action(_choice(value, tuple(Action)))


def _protocol(value: Any) -> Protocol:
    return Protocol(_choice(value, tuple(Protocol)))


def _model(value: Any) -> str:
    return _choice(value, MODELS)


def _name(value: Any) -> str:
    if not isinstance(value, str) or not NAME.match(value):
        raise Wrong(f"{value!r} is no name: letters, digits, - _ . and 64 at most")
    return value


def _flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise Wrong(f"{value!r} is neither true nor false")
    return value


def _time(value: Any) -> float:
    if isinstance(value, datetime) and value.tzinfo is not None:
        return value.timestamp()
    if isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value < 1e11:
        return float(value)
    raise Wrong(f"{value!r} is no time with its offset from UTC, such as 2027-01-31T12:00:00Z")


def _hosts(value: Any) -> tuple[str, ...]:
    return _each(value, host_pattern)


def _cidrs(value: Any) -> tuple[Network, ...]:
    return _each(value, network)


def _paths(value: Any) -> tuple[PathPattern, ...]:
    return _each(value, PathPattern)


def _methods(value: Any) -> tuple[str, ...]:
    def method(text: str) -> str:
        if not _TOKEN.match(text):
            raise Wrong(f"{text!r} is no method of HTTP; those are in capitals")
        return text

    return _each(value, method)


def _ports(value: Any) -> tuple[int, ...]:
    values = _list(value)
    for port in values:
        if not isinstance(port, int) or isinstance(port, bool) or not 1 <= port <= 65535:
            raise Wrong(f"{port!r} is no port: 1 to 65535")
    return tuple(values)


def _files(value: Any) -> tuple[str, ...]:
    return _each(value, _file)


def _proxy(value: Any) -> str:
    if value == "none":
        return "none"
    try:
        parts = urlsplit(value) if isinstance(value, str) and value.isprintable() else None
        if parts and parts.scheme in {"http", "https", "socks5", "socks5h"} and parts.hostname and parts.port != 0:
            return str(value)
    except ValueError:
        pass
    raise Wrong(f"{value!r} is no proxy: http://HOST:PORT, https://, socks5://, or none")


def _certificates(value: Any) -> Mapping[str, ClientCertificate]:
    found: dict[str, ClientCertificate] = {}
    if not isinstance(value, dict):
        raise Wrong("a table for each certificate: [network.client_certificate.NAME]")
    for each, files in value.items():
        _name(each)
        if not isinstance(files, dict) or set(files) != {"cert", "key"}:
            raise Wrong(f"{each} needs cert and key, and nothing else")
        found[each] = ClientCertificate(_file(files["cert"]), _file(files["key"]))
    return MappingProxyType(found)


def _choice(value: Any, choices: Any) -> str:
    if not isinstance(value, str) or value not in choices:
        raise Wrong(f"{value!r} is none of {', '.join(choices)}")
    return str(value)


def _list(value: Any) -> list[Any]:
    values = value if isinstance(value, list) else [value]
    if not values:
        raise Wrong("an empty list; leave the key out")
    if len(values) > MOST_VALUES:
        raise Wrong(f"{len(values)} are too many; {MOST_VALUES} are the limit")
    return values


def _each(value: Any, read: Callable[[str], T]) -> tuple[T, ...]:
    found: list[T] = []
    for text in _list(value):
        if not isinstance(text, str):
            raise Wrong(f"{text!r} is no text")
        found.append(read(text))
    return tuple(dict.fromkeys(found))


def tables(value: Any, header: str) -> list[Mapping[str, Any]]:
    """The tables of an array of tables. Raises Wrong."""
    if not isinstance(value, list) or not all(isinstance(each, dict) for each in value):
        raise Wrong(f"write {header}, once for each")
    return value


def _file(value: Any) -> str:
    if not isinstance(value, str) or not value.startswith(("/", "~/")) or not value.isprintable():
        raise Wrong(f"{value!r} is no absolute path")
    return value


READERS: Final[Mapping[str, Callable[[Any], Any]]] = MappingProxyType(
    {
        "preset": _preset,
        "otherwise": _otherwise,
        "action": _action,
        "protocol": _protocol,
        "name": _name,
        "flag": _flag,
        "time": _time,
        "hosts": _hosts,
        "cidrs": _cidrs,
        "paths": _paths,
        "methods": _methods,
        "ports": _ports,
        "files": _files,
        "certificate": _name,
        "model": _model,
        "proxy": _proxy,
        "certificates": _certificates,
    }
)
