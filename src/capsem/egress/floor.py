"""Addresses that no VM reaches unless its owner or the company says so by number: everything that is not the open internet.

Pure. `ipaddress` alone is not enough: it calls global what only wraps another address (NAT64, 6to4), multicast, and the two
addresses of clouds' metadata that lie outside of the reserved ranges.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network
from types import MappingProxyType
from typing import Final

from capsem.egress.policy import Address, Floor, FloorHit

_METADATA: Final = MappingProxyType(
    {
        ip_address(text): "a metadata service of the cloud"
        for text in (
            "169.254.169.254",
            "169.254.170.2",
            "100.100.100.200",
            "168.63.129.16",
            "192.0.0.192",
            "fd00:ec2::254",
        )
    }
)
# In this order: the first that holds the address gives its name.
_NAMED: Final = tuple(
    (ip_network(text), name)
    for text, name in (
        ("0.0.0.0/8", "unspecified"),
        ("127.0.0.0/8", "loopback"),
        ("10.0.0.0/8", "private"),
        ("172.16.0.0/12", "private"),
        ("192.168.0.0/16", "private"),
        ("169.254.0.0/16", "link-local"),
        ("100.64.0.0/10", "shared by a carrier (CGNAT)"),
        ("224.0.0.0/4", "multicast"),
        ("198.18.0.0/15", "reserved for benchmarks, and used for names that are not allowed"),
        ("192.88.99.0/24", "reserved (6to4 relays)"),
        ("240.0.0.0/4", "reserved"),
        ("::/128", "unspecified"),
        ("::1/128", "loopback"),
        ("fc00::/7", "private"),
        ("fe80::/10", "link-local"),
        ("fec0::/10", "site-local"),
        ("ff00::/8", "multicast"),
        ("64:ff9b:1::/48", "reserved (local NAT64)"),
        ("2001::/32", "reserved (Teredo)"),
        ("3fff::/20", "reserved for documentation"),
        ("::/96", "reserved (IPv4 in disguise)"),
    )
)
_FINAL: Final = frozenset(
    {"unspecified", "loopback", "multicast", "reserved (IPv4 in disguise)"}
)  # not even `resolve_allow` leads there
# Prefixes after which an IPv4 address follows, and the number of bits after that.
_WRAPPERS: Final = tuple(
    (IPv6Network(text), shift)
    for text, shift in (("::ffff:0:0/96", 0), ("::ffff:0:0:0/96", 0), ("64:ff9b::/96", 0), ("2002::/16", 80))
)
_ISATAP: Final = (0x00005EFE, 0x02005EFE)  # the upper half of such an interface identifier
_GLOBAL: Final = IPv6Network("2000::/3")


def wrapped(address: Address) -> IPv4Address | None:
    """The IPv4 address that an IPv6 one leads to by way of a translator or tunnel; None if it is an address of its own."""
    if isinstance(address, IPv4Address):
        return None
    for network, shift in _WRAPPERS:
        if address in network:
            return IPv4Address(int(address) >> shift & 0xFFFFFFFF)
    if int(address) >> 32 & 0xFFFFFFFF in _ISATAP:
        return IPv4Address(int(address) & 0xFFFFFFFF)
    return None


def floor(own: Callable[[str], bool]) -> Floor:
    """The floor of a host. `own` tells whether an address is one of its own."""

    def judge(address: Address) -> FloorHit | None:
        hit = below(address)
        if hit is None or hit.excusable:
            for each in (address, wrapped(address)):
                if each is not None and own(str(each)):
                    return FloorHit("one of this host's own")
        return hit

    return judge


@lru_cache(maxsize=4096)
def below(address: Address) -> FloorHit | None:
    """Why an address lies below the floor, wherever the host is; None when it is part of the open internet."""
    if address in _METADATA:
        return FloorHit(_METADATA[address])
    inner = wrapped(address)
    if inner is not None:
        hit = below(inner)
        return hit and FloorHit(f"{hit.reason} ({inner} inside of it)", hit.excusable)
    for network, name in _NAMED:
        if isinstance(network, IPv4Network) is isinstance(address, IPv4Address) and address in network:
            return FloorHit(name, name not in _FINAL)
    if isinstance(address, IPv6Address) and address not in _GLOBAL:
        return FloorHit("reserved", excusable=True)
    return None if address.is_global and not address.is_multicast else FloorHit("reserved", excusable=True)
