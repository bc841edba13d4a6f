"""The proxies that the host itself has to go through, as its environment names them (HTTPS_PROXY and so on). Pure."""

from __future__ import annotations

import base64
import ipaddress
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final
from urllib.parse import unquote, urlsplit

from capsem.egress import hosts

# Whether a name is looked up here ("socks5" elsewhere) or there ("socks5h"), we do not leave to the scheme: see Dialer.
_PORTS: Final = {"http": 80, "https": 443, "socks5": 1080, "socks5h": 1080}


class BadProxy(ValueError):
    """A setting that names no proxy that can be used; the message says which."""


@dataclass(frozen=True, slots=True)
class HostProxy:
    """One proxy. `tls`: it is spoken to in TLS itself; `socks`: by SOCKS 5. `authorization` says who asks, b"" for nobody: it is
    the value of a header, or the message of RFC 1929 for SOCKS."""

    host: str
    port: int
    tls: bool = False
    authorization: bytes = b""
    socks: bool = False


@dataclass(frozen=True, slots=True)
class HostProxies:
    """For plain HTTP, for everything else, and where to go directly."""

    http: HostProxy | None = None
    https: HostProxy | None = None
    direct: tuple[str, ...] = ()

    def to(self, host: str, port: int, *, plain: bool) -> HostProxy | None:
        """The proxy on the way to a host or address, None if there is none. `plain`: it is plain HTTP."""
        proxy = self.http if plain else self.https
        return None if proxy is None or any(_covers(entry, host, port) for entry in self.direct) else proxy


def from_environment(environment: Mapping[str, str]) -> HostProxies:
    """As HTTP_PROXY, HTTPS_PROXY, ALL_PROXY and NO_PROXY say; the lower-case names come first, as with curl. Raises BadProxy."""

    def value(name: str) -> str:
        return environment.get(name.lower()) or environment.get(name) or ""

    everything = value("ALL_PROXY")
    no_proxy = (entry.strip().lower() for entry in value("NO_PROXY").replace(" ", ",").split(","))
    return HostProxies(
        _parse("HTTP_PROXY", value("HTTP_PROXY") or everything),
        _parse("HTTPS_PROXY", value("HTTPS_PROXY") or everything),
        tuple(entry for entry in no_proxy if entry),
    )


def _parse(variable: str, text: str) -> HostProxy | None:
    if not text:
        return None
    try:
        url = urlsplit(text if "://" in text else f"http://{text}")
        host, port = url.hostname or "", url.port
    except ValueError as error:
        raise BadProxy(f"{variable} is no URL ({error})") from error
    if url.scheme not in _PORTS or not (hosts.host_name(host) or hosts.address(host)):
        # Its password, if it has one, is not repeated.
        raise BadProxy(f"{variable} must name an http://, https:// or socks5:// proxy; {url.scheme}://{host} is none")
    socks, login = url.scheme.startswith("socks5"), b""
    if url.username is not None:
        user, password = unquote(url.username).encode(), unquote(url.password or "").encode()
        if not socks:
            login = b"Basic " + base64.b64encode(b"%b:%b" % (user, password))
        elif 0 < len(user) < 256 and 0 < len(password) < 256:
            login = b"\1%c%b%c%b" % (len(user), user, len(password), password)
        else:
            raise BadProxy(f"{variable} must have a user and a password of 1 to 255 bytes each, or none")
    return HostProxy(host, port or _PORTS[url.scheme], url.scheme == "https", login, socks)


def _covers(entry: str, host: str, port: int) -> bool:
    """Whether an entry of NO_PROXY means that host: a name and all below it, an address or network, each with a port or not."""
    if entry == "*":
        return True
    if "/" in entry:
        try:
            return ipaddress.ip_address(host) in ipaddress.ip_network(entry, strict=False)
        except ValueError:  # a name, or no network
            return False
    split = hosts.split_authority(entry.removeprefix("*").removeprefix(".").encode("latin-1", "replace"))
    if split is None or split[1] not in (None, port):
        return False
    return host == split[0] or (hosts.address(host) is None and host.endswith(f".{split[0]}"))
