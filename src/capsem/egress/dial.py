"""Connections from the host to origins: to the very address that was checked, or to the proxy that the host is told to use."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Final

from capsem.egress.proxies import HostProxies, HostProxy
from capsem.egress.sockets import SocketStream
from capsem.egress.stream import ByteStream
from capsem.egress.tls import TlsStream
from capsem.egress.tunnels import NoTunnel, tunnel

_CONNECT: Final = 10.0  # seconds for one address
_HEAD_START: Final = 0.25  # seconds of one address before the next is tried beside it
_ATTEMPTS: Final = 8  # addresses of a name
_HANDSHAKE: Final = 15.0


class DialError(Exception):
    """No connection: what happened, for a person. `status` is what to answer an HTTP request."""

    def __init__(self, message: str, status: int = 502) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True, slots=True)
class Target:
    """Where to: `host` is a name or an address, `certificate` the name of the client certificate to show; `http2`: to be
    offered."""

    host: str
    port: int
    tls: bool
    certificate: str | None = None
    http2: bool = False


class Trust:
    """What the host takes for a true certificate: its own store, and the authorities in the files of `extra`. `certificates`
    are those that it can show itself: by name, the files of a chain and of its key.

    Loading the store takes tens of milliseconds: that is done once for each client certificate, and by a thread, while other
    connections go on.
    """

    def __init__(
        self, extra: Sequence[Path] = (), certificates: Mapping[str, tuple[Path, Path]] = MappingProxyType({})
    ) -> None:
        self._extra = tuple(extra)
        self._certificates = certificates
        self._contexts: dict[tuple[str | None, bool], asyncio.Future[ssl.SSLContext]] = {}

    async def context(self, certificate: str | None = None, *, http2: bool = False) -> ssl.SSLContext:
        """For the client's side. Raises DialError for a file that cannot be used; the next who asks tries again."""
        key = certificate, http2
        making = self._contexts.get(key)
        if making is None:
            making = asyncio.ensure_future(asyncio.to_thread(self._make, certificate, http2=http2))
            self._contexts[key] = making
            making.add_done_callback(lambda made: self._made(key, made))
        return await asyncio.shield(making)  # who leaves meanwhile takes it from nobody

    def _made(self, key: tuple[str | None, bool], made: asyncio.Future[ssl.SSLContext]) -> None:
        if made.cancelled() or made.exception() is not None:
            del self._contexts[key]

    def _make(self, certificate: str | None, *, http2: bool) -> ssl.SSLContext:
        context = ssl.create_default_context()
        # Later Pythons set it; many companies' own authorities do not live up to it, and curl takes those.
        context.verify_flags &= ~ssl.VERIFY_X509_STRICT
        context.set_alpn_protocols(["h2", "http/1.1"] if http2 else ["http/1.1"])
        for path in self._extra:
            try:
                context.load_verify_locations(path)
            except (OSError, ssl.SSLError) as error:
                raise DialError(f"the authority's file {path} cannot be read: {error}") from error
        if certificate is not None:
            if certificate not in self._certificates:
                raise DialError(f"there is no client certificate named {certificate}")
            try:
                context.load_cert_chain(*self._certificates[certificate])
            except (OSError, ssl.SSLError) as error:
                raise DialError(f"the client certificate {certificate} cannot be used: {error}") from error
        return context


@dataclass(frozen=True, slots=True)
class Dialled:
    """A connection: `stream` to speak on, `socket` below it. `address` is what was dialled. `relayed`: plain HTTP by way of
    this proxy, which wants to be asked in absolute form. `alpn`: what TLS has agreed upon. `received`: what has come already."""

    stream: ByteStream
    socket: SocketStream
    address: str
    relayed: HostProxy | None = None
    alpn: str | None = None
    received: bytes = b""


class Dialer:
    """Makes connections."""

    def __init__(self, trust: Trust, proxies: HostProxies = HostProxies()) -> None:  # noqa: B008 - a frozen value
        self._trust = trust
        self._proxies = proxies

    def proxy(self, target: Target, *, http: bool) -> HostProxy | None:
        """The proxy on the way there; then names may be known to it alone. `http`: HTTP is what will be spoken."""
        return self._proxies.to(target.host, target.port, plain=http and not target.tls)

    def looks_names_up(self, host: str) -> bool:
        """Whether a proxy of the host's stands on the way to a name, so that it need not be known here."""
        return any(self._proxies.to(host, port, plain=plain) for port, plain in ((443, False), (80, True)))

    async def dial(self, target: Target, addresses: Sequence[str], *, http: bool = True) -> Dialled:
        """A connection to one of `addresses`, which have been checked: see `_first`. Raises DialError."""
        proxy = self.proxy(target, http=http)
        received = b""
        context = await self._trust.context(target.certificate, http2=target.http2) if target.tls else None
        if proxy is None:
            socket, address = await self._first(target, addresses)
            stream: ByteStream = socket
        else:
            socket, address = await connect(proxy.host, proxy.port), proxy.host
            tunnelled = proxy.socks or target.tls or not http
            stream, received = await self._through(proxy, socket, target, tunnelled=tunnelled)
            if not tunnelled:
                return Dialled(stream, socket, address, relayed=proxy)
        if context is None:
            return Dialled(stream, socket, address, received=received)
        if received:
            stream.abort()
            raise DialError(f"{target.host} speaks before the TLS handshake")
        tls = await self._secure(stream, context, target.host)
        return Dialled(tls, socket, address, alpn=tls.alpn)

    async def _first(self, target: Target, addresses: Sequence[str]) -> tuple[SocketStream, str]:
        """The one that answers first, each tried when the one before it has failed or said nothing for a while (RFC 8305).
        asyncio does the same for a name, but looks it up itself: what is dialled here is what was checked."""
        waiting, failure = list(addresses[:_ATTEMPTS]), None
        trying: dict[asyncio.Task[SocketStream], str] = {}
        try:
            while waiting or trying:
                if waiting:
                    address = waiting.pop(0)
                    trying[asyncio.create_task(connect(address, target.port))] = address
                done, _ = await asyncio.wait(
                    trying, timeout=_HEAD_START if waiting else None, return_when=asyncio.FIRST_COMPLETED
                )
                for task in done:
                    address = trying.pop(task)
                    error = task.exception()
                    if error is None:
                        return task.result(), address
                    if not isinstance(error, DialError):
                        raise error
                    failure = failure or error
            raise failure or DialError(f"{target.host} has no address")
        finally:
            await _give_up(trying)

    async def _secure(self, stream: ByteStream, context: ssl.SSLContext, name: str) -> TlsStream:
        tls = TlsStream(stream, context, server_hostname=name)
        try:
            async with asyncio.timeout(_HANDSHAKE):
                await tls.handshake()
        except TimeoutError as error:
            tls.abort()
            raise DialError(f"{name} did not finish the TLS handshake within {_HANDSHAKE:.0f} s", 504) from error
        except ConnectionError as error:
            tls.abort()
            raise DialError(f"no TLS with {name}: {error}") from error
        except BaseException:
            tls.abort()
            raise
        return tls

    async def _through(
        self, proxy: HostProxy, socket: SocketStream, target: Target, *, tunnelled: bool
    ) -> tuple[ByteStream, bytes]:
        """The stream that leads through a proxy, and what has come out of a tunnel already."""
        stream: ByteStream = socket
        received = b""
        try:
            if proxy.tls:
                stream = await self._secure(socket, await self._trust.context(), proxy.host)
            if tunnelled:
                async with asyncio.timeout(_HANDSHAKE):
                    received = await tunnel(stream, proxy, target.host, target.port)
        except (ConnectionError, NoTunnel, TimeoutError) as error:
            stream.abort()
            raise DialError(f"the host's proxy {proxy.host} made no tunnel: {error or 'no answer in time'}") from error
        except BaseException:
            stream.abort()
            raise
        return stream, received


async def _give_up(trying: Iterable[asyncio.Task[SocketStream]]) -> None:
    """End attempts that nobody waits for any more; one may have just succeeded."""
    for task in trying:
        task.cancel()
    for made in await asyncio.gather(*trying, return_exceptions=True):
        if isinstance(made, SocketStream):
            made.abort()


async def connect(address: str, port: int) -> SocketStream:
    """A TCP connection. Raises DialError."""
    loop = asyncio.get_running_loop()
    try:
        async with asyncio.timeout(_CONNECT):
            _, stream = await loop.create_connection(SocketStream, address, port)
    except TimeoutError as error:
        raise DialError(f"{address} port {port} did not answer within {_CONNECT:.0f} s", 504) from error
    except OSError as error:
        raise DialError(f"{address} port {port}: {error.strerror or error}") from error
    return stream
