"""The way out of one VM: the proxy (capsem.egress) as its policy and its host have it, a new one for each epoch of the guest.

Upstream connections, sessions of TLS and streams belong to an epoch and end with it. What outlives one is the table of names
that addresses were given out for: programs in the guest remember those.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from capsem.egress.core import Egress
from capsem.egress.dial import Dialer, Trust
from capsem.egress.events import Recorder
from capsem.egress.mint import Authority, Minter
from capsem.egress.names import NameTable
from capsem.egress.parts import Broker
from capsem.egress.proxies import BadProxy, from_environment
from capsem.egress.resolve import Resolver
from capsem.egress.stream import GuestStream
from capsem.egress.taps.pick import model_taps
from capsem.egress.taps.prices import Prices
from capsem.supervisor.policing import Policing
from capsem.system import Clock

log = logging.getLogger("capsem_process.outlet")


@dataclass(frozen=True, slots=True)
class Outside:
    """The host as connections need it: the authority that its guests trust, who knows addresses, and what models cost."""

    authority: Authority
    resolver: Resolver
    prices: Prices


class Outlet:
    """A carrier (gateway.Carrier). Without an outside nothing is carried (a simulated host)."""

    def __init__(
        self,
        clock: Clock,
        policing: Policing,
        broker: Broker,
        recorder: Recorder,
        outside: Outside | None,
        changed: Callable[[], None],
    ) -> None:
        """`changed` is called when `open` may have changed."""
        self._names = NameTable()
        self._broker = broker
        self._clock = clock
        self._policing = policing
        self._recorder = recorder
        self._outside = outside
        self._changed = changed
        self._minter = Minter(outside.authority, clock.time) if outside else None
        self._egress: Egress | None = None
        self._former: list[Egress] = []  # of this epoch: they carry what they have begun
        self._made_for = policing.outside
        self._closing: set[asyncio.Task[None]] = set()
        policing.live.on_change(self._policy_changed)

    @property
    def open(self) -> bool:
        """Whether connections are carried at all: if not, the guest need not even ask."""
        return self._outside is not None and self._policing.open

    @property
    def authority(self) -> str | None:
        """The certificate that programs in the guest are to trust."""
        return self._outside.authority.pem.decode("ascii") if self._outside else None

    def known_names(self) -> bytes:
        """Which names the guest was given which addresses for, for a checkpoint; b"" when it has asked for none."""
        return json.dumps(self._names.to_data()).encode() if self._names else b""

    def remember_names(self, known: bytes) -> None:
        """What `known_names` said when the machine was saved, before it goes on. Raises ValueError."""
        self._names = NameTable.from_data(json.loads(known))

    async def connection(self, stream: GuestStream) -> None:
        """See gateway.Carrier."""
        egress = self._present()
        if egress is None:
            stream.abort()
        else:
            await egress.serve(stream)

    async def question(self, query: bytes, process: str | None) -> bytes:
        """See gateway.Carrier."""
        egress = self._present()
        return b"" if egress is None else await egress.resolve(query, process)

    def _present(self) -> Egress | None:
        """The proxy of this epoch, made when it is first needed."""
        if self._egress is None and self._outside is not None and self._minter is not None:
            wanted = self._policing.outside
            certificates = {
                name: (Path(each.cert).expanduser(), Path(each.key).expanduser())
                for name, each in wanted.certificates.items()
            }
            try:
                proxies = from_environment(wanted.proxies)
            except BadProxy as error:
                log.error("nothing is carried: %s", error)
                return None
            self._egress = Egress(
                judge=self._policing.live,
                asker=self._policing.asks,
                resolver=self._outside.resolver,
                dialer=Dialer(Trust([Path(path).expanduser() for path in wanted.extra_ca], certificates), proxies),
                minter=self._minter,
                recorder=self._recorder,
                clock=self._clock,
                broker=self._broker,
                taps=model_taps(self._recorder, self._clock, self._outside.prices),
                names=self._names,
            )
            self._made_for = wanted
        return self._egress

    def _policy_changed(self) -> None:
        if self._egress is not None and self._made_for != self._policing.outside:
            self._former.append(self._egress)
            self._egress = None
        for egress in (*self._former, *([self._egress] if self._egress else [])):
            egress.reload()
        self._changed()

    def new_epoch(self) -> None:
        """The streams of the guest are gone: so is what they led to."""
        ending = [*self._former, *([self._egress] if self._egress else [])]
        self._egress, self._former = None, []
        for egress in ending:
            task = asyncio.create_task(egress.close(), name="end of an epoch")
            self._closing.add(task)
            task.add_done_callback(self._closing.discard)

    async def close(self) -> None:
        """Nothing more is carried."""
        self.new_epoch()
        await asyncio.gather(*self._closing)
