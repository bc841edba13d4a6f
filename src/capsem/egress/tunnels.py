"""Tunnels through a proxy of the host's: by CONNECT of HTTP, or by SOCKS 5 (RFC 1928, 1929). The proxy is asked for the name."""

from __future__ import annotations

from ipaddress import ip_address
from typing import Final

from capsem.egress import hosts
from capsem.egress.http1 import BadHead, parse_response
from capsem.egress.peer import Peer
from capsem.egress.proxies import HostProxy
from capsem.egress.stream import ByteStream

_NOTHING, _LOGIN = 0, 2  # ways to prove who one is
_CONNECT, _IPV4, _NAME, _IPV6 = 1, 1, 3, 4
_REASONS: Final = {
    1: "it failed",
    2: "its rules do not allow it",
    3: "the network is unreachable",
    4: "the host is unreachable",
    5: "the connection was refused",
    6: "it took too long",
}


class NoTunnel(Exception):
    """Why not, for a person."""


async def tunnel(stream: ByteStream, proxy: HostProxy, host: str, port: int) -> bytes:
    """Have a proxy carry what comes to a host; returns what has come back from there already, as where a server speaks first.
    Raises NoTunnel, ConnectionError."""
    return await (_by_socks if proxy.socks else _by_connect)(stream, proxy, host, port)


async def _by_connect(stream: ByteStream, proxy: HostProxy, host: str, port: int) -> bytes:
    authority = hosts.join_authority(host, port, 0).encode()
    lines = [b"CONNECT %b HTTP/1.1" % authority, b"Host: " + authority]
    if proxy.authorization:
        lines.append(b"Proxy-Authorization: " + proxy.authorization)
    peer = Peer(stream)
    await stream.write(b"\r\n".join((*lines, b"", b"")))
    try:
        block = await peer.head()
        if block is None:
            raise NoTunnel("it hung up")
        status = parse_response(block, b"CONNECT").head.status
    except BadHead as error:
        raise NoTunnel(str(error)) from error
    if not 200 <= status < 300:
        raise NoTunnel(f"it refuses {authority.decode()} with status {status}")
    return peer.rest()


async def _by_socks(stream: ByteStream, proxy: HostProxy, host: str, port: int) -> bytes:
    answer = _Answer(stream)
    await stream.write(bytes((5, 2, _NOTHING, _LOGIN) if proxy.authorization else (5, 1, _NOTHING)))
    version, way = await answer.take(2)
    if version != 5:
        raise NoTunnel("it does not speak SOCKS 5")
    if way == _LOGIN and proxy.authorization:
        await stream.write(proxy.authorization)
        if (await answer.take(2))[1] != 0:
            raise NoTunnel("it does not take this user and password")
    elif way != _NOTHING:
        raise NoTunnel("it wants a user and a password")
    await stream.write(bytes((5, _CONNECT, 0)) + _destination(host) + port.to_bytes(2, "big"))
    _, code, _, kind = await answer.take(4)
    if code:
        raise NoTunnel(f"it refuses {host} port {port}: {_REASONS.get(code, f'code {code}')}")
    if kind not in (_IPV4, _NAME, _IPV6):
        raise NoTunnel(f"its answer has an address of kind {kind}")
    size = {_IPV4: 4, _IPV6: 16}.get(kind) or (await answer.take(1))[0]
    await answer.take(size + 2)  # where it connects from, which nobody needs
    return answer.rest


def _destination(host: str) -> bytes:
    if hosts.address(host) is None:
        return bytes((_NAME, len(host))) + host.encode("ascii")
    packed = ip_address(host).packed
    return bytes((_IPV4 if len(packed) == 4 else _IPV6,)) + packed


class _Answer:
    """What a proxy says, taken in pieces of known size."""

    def __init__(self, stream: ByteStream) -> None:
        self._stream = stream
        self.rest = b""

    async def take(self, size: int) -> bytes:
        while len(self.rest) < size:
            data = await self._stream.read()
            if not data:
                raise NoTunnel("it hung up")
            self.rest += data
        taken, self.rest = self.rest[:size], self.rest[size:]
        return taken
