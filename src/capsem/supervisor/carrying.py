"""What carries connections: the proxy (capsem.egress) with all that it is made of.

This takes a third of a supervisor's memory, and a tenth of a second to import. Most VMs never open a connection: so it is
imported when the first one does, and by `supervisor.outlet` alone.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path

from capsem.egress.compose import Outside as Wanted
from capsem.egress.core import Egress
from capsem.egress.dial import Dialer, Trust
from capsem.egress.events import Recorder
from capsem.egress.mint import Authority, Minter, read_authority
from capsem.egress.names import NameTable
from capsem.egress.parts import Broker
from capsem.egress.proxies import BadProxy, from_environment
from capsem.egress.resolve import Resolver, with_hosts
from capsem.egress.taps import prices
from capsem.egress.taps.pick import model_taps
from capsem.model.errors import InvalidInput
from capsem.supervisor.policing import Policing
from capsem.system import Clock

HOSTS = "CAPSEM_HOSTS"  # a file like /etc/hosts with names that come first

log = logging.getLogger("capsem_process.outlet")


class Carrying:
    """What all epochs of a guest have in common."""

    def __init__(self, authority: Authority, resolver: Resolver, known: prices.Prices, clock: Clock) -> None:
        """`authority`: whom the guest trusts; `resolver`: who knows addresses; `known`: what models cost."""
        self._resolver = resolver
        self._prices = known
        self._clock = clock
        self._minter = Minter(authority, clock.time)

    def proxy(
        self, wanted: Wanted, policing: Policing, recorder: Recorder, broker: Broker, names: NameTable
    ) -> Egress | None:
        """One for an epoch; None, with the reason in the log, when the policy names a proxy of the host's that is none."""
        certificates = {
            name: (Path(each.cert).expanduser(), Path(each.key).expanduser())
            for name, each in wanted.certificates.items()
        }
        try:
            proxies = from_environment(wanted.proxies)
        except BadProxy as error:
            log.error("nothing is carried: %s", error)
            return None
        return Egress(
            judge=policing.live,
            asker=policing.asks,
            resolver=self._resolver,
            dialer=Dialer(Trust([Path(path).expanduser() for path in wanted.extra_ca], certificates), proxies),
            minter=self._minter,
            recorder=recorder,
            clock=self._clock,
            broker=broker,
            taps=model_taps(recorder, self._clock, self._prices),
            names=names,
        )


def of_host(home: Path, authority: bytes, clock: Clock) -> Carrying:
    """As this host has it; `authority` is what its file in `home` had when the guest was told whom to trust.

    Raises AuthorityError.
    """
    try:
        known = prices.load(home / prices.FILE)
    except InvalidInput as error:
        log.error("costs of models are told without the user's list: %s", error)
        known = prices.load()
    names = os.environ.get(HOSTS)
    resolver = Resolver(with_hosts(Path(names))) if names else Resolver()
    return Carrying(read_authority(home, authority), resolver, known, clock)
