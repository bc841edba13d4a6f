"""Names of hosts, in the one form in which all of the proxy has them: lower-case ASCII, no final dot; addresses as `ipaddress`
writes them, without brackets. No I/O."""

from __future__ import annotations

import ipaddress
import re
from functools import lru_cache
from typing import Final

_LABEL: Final = r"[a-z0-9_](?:[a-z0-9_-]{0,61}[a-z0-9_])?"
_NAME: Final = re.compile(rf"(?=.{{1,253}}\Z){_LABEL}(?:\.{_LABEL})*\Z")
_AUTHORITY: Final = re.compile(rb"(\[[0-9a-fA-F:.]+\]|[^\[\]:@/?#\s]+)(?::([0-9]{1,5}))?\Z")


def host_name(text: str) -> str | None:
    """A name in that form; None for what is none: an address, or characters that no host name has."""
    name = text.lower().removesuffix(".")
    if _NAME.match(name) is None or name.rsplit(".", 1)[-1].isdigit():
        return None
    return name


@lru_cache(maxsize=1024)
def address(text: str) -> str | None:
    """An IP address in that form, None for anything else. An IPv6 address that only wraps an IPv4 one stays as it is."""
    try:
        found = ipaddress.ip_address(text.removeprefix("[").removesuffix("]") if text.startswith("[") else text)
    except ValueError:
        return None
    return None if isinstance(found, ipaddress.IPv6Address) and found.scope_id else str(found)


@lru_cache(maxsize=1024)
def split_authority(value: bytes) -> tuple[str, int | None] | None:
    """The host or address and the port of a Host header or the like; None for what is malformed. No user info."""
    match = _AUTHORITY.match(value)
    if match is None:
        return None
    text = match[1].decode("latin-1")
    host = address(text) or host_name(text)
    port = int(match[2]) if match[2] is not None else None
    if host is None or (port is not None and not 0 < port < 65536):
        return None
    return host, port


def join_authority(host: str, port: int, default: int) -> str:
    """As it is written into a Host header: the port left out where it is the one that is meant anyway."""
    text = f"[{host}]" if ":" in host else host
    return text if port == default else f"{text}:{port}"
