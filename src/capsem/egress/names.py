"""Which names a VM was given which addresses for: what a connection that says no name itself is judged by.

A name that is not allowed is given an address made here, of a range that belongs to nobody (198.18.0.0/15), so that the client
gets as far as the page that says why. The table goes with a checkpoint, as the guest's own caches do.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Mapping
from ipaddress import IPv4Address, IPv4Network
from typing import Any, Final

from capsem.egress import hosts

SYNTHETIC: Final = IPv4Network("198.18.0.0/15")
FORMAT: Final = 1
NAMES: Final = 4096
_ADDRESSES: Final = 32  # of one name: the last that were given


class NameTable:
    """Bounded: the name that was not asked for longest is forgotten first."""

    def __init__(self) -> None:
        self._addresses: OrderedDict[str, list[str]] = OrderedDict()
        self._names: dict[str, dict[str, None]] = {}
        self._next = 1

    def learn(self, name: str, addresses: Iterable[str]) -> None:
        """These are about to be given for a name."""
        known = self._addresses.setdefault(name, [])
        self._addresses.move_to_end(name)
        for address in addresses:
            if address in known:
                known.remove(address)
            known.append(address)
            names = self._names.setdefault(address, {})
            names.pop(name, None)
            names[name] = None
        for old in known[:-_ADDRESSES]:
            self._forget(old, name)
        del known[:-_ADDRESSES]
        if len(self._addresses) > NAMES:
            oldest, theirs = self._addresses.popitem(last=False)
            for each in theirs:
                self._forget(each, oldest)

    def _forget(self, address: str, name: str) -> None:
        names = self._names[address]
        del names[name]
        if not names:
            del self._names[address]

    def synthetic(self, name: str) -> str:
        """An address for a name that no other name has; the same one as long as it is remembered."""
        for known in self._addresses.get(name, ()):
            if is_synthetic(known):
                self.learn(name, [known])
                return known
        while (address := str(SYNTHETIC[self._next])) in self._names:
            self._step()
        self._step()
        self.learn(name, [address])
        return address

    def _step(self) -> None:
        self._next = self._next % (SYNTHETIC.num_addresses - 2) + 1

    def names(self, address: str) -> tuple[str, ...]:
        """Those that an address was given for, the last first."""
        return tuple(reversed(self._names.get(address, {})))

    def __bool__(self) -> bool:
        """Whether any name is known."""
        return bool(self._addresses)

    def to_data(self) -> dict[str, Any]:
        """All of it in JSON's types, for a checkpoint."""
        names = [[name, list(addresses)] for name, addresses in self._addresses.items()]
        return {"format": FORMAT, "next": self._next, "names": names}

    @classmethod
    def from_data(cls, data: Mapping[str, Any]) -> NameTable:
        """The opposite. Raises ValueError for what is no such table."""
        table = cls()
        try:
            if data["format"] != FORMAT:
                raise ValueError(f"its format is {data['format']!r}, {FORMAT} is known")
            for name, addresses in data["names"][-NAMES:]:
                if hosts.host_name(name) != name or any(hosts.address(each) != each for each in addresses):
                    raise ValueError(f"neither a name nor its addresses: {name!r}")
                table.learn(name, addresses)
            table._next = int(data["next"])
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(f"a malformed table of names: {error}") from error
        if not 0 < table._next < SYNTHETIC.num_addresses - 1:
            raise ValueError("a malformed table of names: its next address is out of range")
        return table


def is_synthetic(address: str) -> bool:
    """Whether an address is one of those made here."""
    return ":" not in address and IPv4Address(address) in SYNTHETIC
