"""Names to addresses, by the host's own resolver; and whether an address is one of this host's.

A name is looked up once for a connection: what is found is checked and dialled, so that no second answer can slip in between.
"""

from __future__ import annotations

import asyncio
import ipaddress
import socket
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final

_THREADS: Final = 8
_KEPT: Final = 10.0  # seconds; the host's resolver, which knows how long, does not tell
_NAMES: Final = 1024
_LONGEST: Final = 15.0  # seconds


class NotFound(Exception):
    """The host's resolver gives no address; the message has its words. `final`: because there is no such name."""

    def __init__(self, message: str, *, final: bool = False) -> None:
        super().__init__(message)
        self.final = final


Lookup = Callable[[str], list[str]]


def host_lookup(name: str) -> list[str]:
    """As the host's programs see it: /etc/hosts, DNS, whatever it is set up with. IPv4 first. Blocks. Raises OSError."""
    found = socket.getaddrinfo(name, None, type=socket.SOCK_STREAM, proto=socket.IPPROTO_TCP)
    addresses = [str(entry[4][0]) for entry in found]
    # An address with a scope is of a link of this host.
    return sorted(dict.fromkeys(each for each in addresses if "%" not in each), key=lambda each: ":" in each)


class Resolver:
    """Looks names up in threads, each name once at a time, and remembers the answers for some seconds."""

    def __init__(self, lookup: Lookup = host_lookup) -> None:
        self._lookup = lookup
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="resolve")
        self._known: OrderedDict[str, tuple[float, list[str]]] = OrderedDict()
        self._asked: dict[str, asyncio.Future[list[str]]] = {}

    async def addresses(self, name: str) -> list[str]:
        """All of them, as `ipaddress` writes them. Raises NotFound."""
        loop = asyncio.get_running_loop()
        known = self._known.get(name)
        if known is not None and loop.time() - known[0] < _KEPT:
            return known[1]
        asked = self._asked.get(name)
        if asked is None:
            asked = self._asked[name] = loop.run_in_executor(self._threads, self._look_up, name)
            asked.add_done_callback(lambda future: self._answered(name, future))
        try:
            async with asyncio.timeout(_LONGEST):
                found = await asyncio.shield(asked)
        except TimeoutError as error:
            raise NotFound(f"{name}: the host's resolver did not answer within {_LONGEST:.0f} s") from error
        except (OSError, UnicodeError) as error:
            final = isinstance(error, socket.gaierror) and error.errno in (socket.EAI_NONAME, socket.EAI_NODATA)
            raise NotFound(f"{name}: {getattr(error, 'strerror', None) or error}", final=final) from error
        if not found:
            raise NotFound(f"{name}: no address")
        return found

    def _look_up(self, name: str) -> list[str]:
        return [str(ipaddress.ip_address(each)) for each in self._lookup(name)]

    def _answered(self, name: str, future: asyncio.Future[list[str]]) -> None:
        del self._asked[name]
        if not future.cancelled() and future.exception() is None:
            self._known[name] = (asyncio.get_running_loop().time(), future.result())
            self._known.move_to_end(name)
            if len(self._known) > _NAMES:
                self._known.popitem(last=False)

    def close(self) -> None:
        """Ask no more; a look-up that hangs is not waited for."""
        self._threads.shutdown(wait=False, cancel_futures=True)


def is_own(address: str) -> bool:
    """Whether an address is one of this host's: then a packet to it would come from it. Nothing is sent."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((address, 9))
            return bool(ipaddress.ip_address(probe.getsockname()[0]) == ipaddress.ip_address(address))
        except OSError:  # no way leads there
            return False


def with_hosts(path: Path, lookup: Lookup = host_lookup) -> Lookup:
    """As `lookup`, but names in a file like /etc/hosts come first; one that begins with "*." means all below it. The file is
    read again for each name. Blocks. Raises OSError."""

    def look_up(name: str) -> list[str]:
        found = []
        for line in path.read_text(encoding="utf-8").splitlines():
            address, *names = line.partition("#")[0].split() or [""]
            if any(name == each or (each.startswith("*.") and name.endswith(each[1:])) for each in names):
                found.append(address)
        return found or lookup(name)

    return look_up
