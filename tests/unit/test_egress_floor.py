"""Addresses below the floor, in all their forms."""

from __future__ import annotations

import socket
from ipaddress import IPv4Address, IPv6Address, ip_address

import pytest
from hypothesis import given
from hypothesis import strategies as st

from capsem.egress.floor import below, floor
from capsem.egress.resolve import is_own

OPEN = "8.8.8.8 1.1.1.1 93.184.215.14 2606:4700::1 ::ffff:8.8.8.8 64:ff9b::808:808 2002:808:808:: 192.0.0.9".split()
SHUT = {
    "127.0.0.1": "loopback",
    "127.255.255.254": "loopback",
    "0.0.0.0": "unspecified",
    "0.1.2.3": "unspecified",
    "10.0.0.1": "private",
    "172.31.255.255": "private",
    "192.168.1.1": "private",
    "169.254.1.1": "link-local",
    "169.254.169.254": "a metadata service of the cloud",
    "168.63.129.16": "a metadata service of the cloud",
    "192.0.0.192": "a metadata service of the cloud",
    "100.100.100.200": "a metadata service of the cloud",
    "fd00:ec2::254": "a metadata service of the cloud",
    "100.64.0.1": "shared by a carrier (CGNAT)",
    "198.18.0.1": "reserved for benchmarks, and used for names that are not allowed",
    "192.0.2.1": "reserved",
    "224.0.0.1": "multicast",
    "239.255.255.250": "multicast",
    "255.255.255.255": "reserved",
    "240.0.0.1": "reserved",
    "::": "unspecified",
    "::1": "loopback",
    "fe80::1": "link-local",
    "fec0::1": "site-local",
    "fc00::1": "private",
    "ff02::1": "multicast",
    "2001:db8::1": "reserved",
    "3fff::1": "reserved for documentation",
    "100::1": "reserved",
    "4000::1": "reserved",
    "::ffff:127.0.0.1": "loopback (127.0.0.1 inside of it)",
    "::ffff:0:10.0.0.1": "private (10.0.0.1 inside of it)",
    "64:ff9b::7f00:1": "loopback (127.0.0.1 inside of it)",
    "64:ff9b:1::808:808": "reserved (local NAT64)",
    "2002:7f00:1::": "loopback (127.0.0.1 inside of it)",
    "2002:a9fe:a9fe::1": "a metadata service of the cloud (169.254.169.254 inside of it)",
    "2606::5efe:10.0.0.1": "private (10.0.0.1 inside of it)",
    "::127.0.0.1": "reserved (IPv4 in disguise)",
    "2001:0:4136:e378:8000:63bf:3fff:fdd2": "reserved (Teredo)",
}


@pytest.mark.parametrize("text", OPEN)
def test_the_open_internet_is_above_it(text: str) -> None:
    assert below(ip_address(text)) is None


@pytest.mark.parametrize(("text", "reason"), SHUT.items())
def test_everything_else_is_below_it(text: str, reason: str) -> None:
    hit = below(ip_address(text))
    assert hit is not None
    assert hit.reason == reason


@pytest.mark.parametrize(
    "text", ["127.0.0.1", "0.0.0.0", "169.254.169.254", "::1", "::ffff:127.0.0.1", "224.0.0.1", "64:ff9b::a9fe:a9fe"]
)
def test_some_are_so_for_every_name(text: str) -> None:
    hit = below(ip_address(text))
    assert hit is not None
    assert not hit.excusable


def test_this_host_is_below_it_by_whatever_form() -> None:
    judge = floor(lambda text: text == "203.0.113.9" or text == "8.8.4.4")
    for text in ("8.8.4.4", "::ffff:8.8.4.4", "64:ff9b::808:404", "203.0.113.9"):
        hit = judge(ip_address(text))
        assert hit is not None
        assert not hit.excusable
    assert judge(ip_address("8.8.8.8")) is None


@given(st.integers(0, 2**32 - 1).map(IPv4Address))
def test_what_wraps_an_address_is_no_better_than_it(inner: IPv4Address) -> None:
    for outer in (f"::ffff:{inner}", f"64:ff9b::{inner}"):
        assert (below(ip_address(outer)) is None) is (below(inner) is None)
    six = IPv6Address((0x2002 << 112) | (int(inner) << 80))
    assert (below(six) is None) is (below(inner) is None)
    assert inner.is_global or below(inner) is not None


def test_own_addresses_are_known_by_asking_the_kernel() -> None:
    assert is_own("127.0.0.1")
    assert not is_own("192.0.2.1")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))
        except OSError:
            return  # a host without a way out has no address but loopback
        assert is_own(probe.getsockname()[0])
