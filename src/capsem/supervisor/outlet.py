"""The way out of one VM: the proxy (capsem.egress) as its policy and its host have it, a new one for each epoch of the guest.

Upstream connections, sessions of TLS and streams belong to an epoch and end with it. What outlives one is the table of names
that addresses were given out for: programs in the guest remember those.

What the proxy is made of is imported with the first connection: see supervisor.carrying.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from capsem.egress.authority import AuthorityError
from capsem.egress.events import Recorder
from capsem.egress.names import NameTable
from capsem.egress.parts import Broker
from capsem.egress.stream import GuestStream
from capsem.supervisor.policing import Policing

if TYPE_CHECKING:
    from capsem.egress.core import Egress
    from capsem.supervisor.carrying import Carrying

log = logging.getLogger("capsem_process.outlet")


@dataclass(frozen=True, slots=True)
class Outside:
    """The host as connections need it."""

    authority: str  # the certificate that its guests are to trust
    carrying: Callable[[], Carrying]  # blocks; raises AuthorityError


class Outlet:
    """A carrier (gateway.Carrier). Without an outside nothing is carried (a simulated host)."""

    def __init__(
        self,
        policing: Policing,
        broker: Broker,
        recorder: Recorder,
        outside: Outside | None,
        changed: Callable[[], None],
    ) -> None:
        """`changed` is called when `open` may have changed."""
        self._names = NameTable()
        self._broker = broker
        self._policing = policing
        self._recorder = recorder
        self._outside = outside
        self._changed = changed
        self._carrying: asyncio.Future[Carrying] | None = None
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
        return self._outside.authority if self._outside else None

    def known_names(self) -> bytes:
        """Which names the guest was given which addresses for, for a checkpoint; b"" when it has asked for none."""
        return json.dumps(self._names.to_data()).encode() if self._names else b""

    def remember_names(self, known: bytes) -> None:
        """What `known_names` said when the machine was saved, before it goes on. Raises ValueError."""
        self._names = NameTable.from_data(json.loads(known))

    async def connection(self, stream: GuestStream) -> None:
        """See gateway.Carrier."""
        egress = await self._present()
        if egress is None:
            stream.abort()
        else:
            await egress.serve(stream)

    async def question(self, query: bytes, process: str | None) -> bytes:
        """See gateway.Carrier."""
        egress = await self._present()
        return b"" if egress is None else await egress.resolve(query, process)

    async def _present(self) -> Egress | None:
        """The proxy of this epoch, made when it is first needed."""
        if self._outside is None:
            return None
        if self._carrying is None:
            self._carrying = asyncio.ensure_future(asyncio.to_thread(self._outside.carrying))
        try:
            carrying = await asyncio.shield(self._carrying)  # who asked may be gone; others wait for it, too
        except AuthorityError as error:
            log.error("nothing is carried: %s", error)
            return None
        if self._egress is None:
            wanted = self._policing.outside
            self._egress = carrying.proxy(wanted, self._policing, self._recorder, self._broker, self._names)
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
