"""What every connection of one epoch of a VM shares."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from capsem.egress.admit import Admission
from capsem.egress.dial import Dialer
from capsem.egress.events import NetEvent, Recorder
from capsem.egress.facts import Connection, TlsMode, Verdict
from capsem.egress.parts import Broker, Judge, Taps
from capsem.egress.peer import Peer
from capsem.egress.pool import Pool
from capsem.egress.splice import Splice
from capsem.system import Clock

Allowed = Callable[[Judge], bool]  # whether that judge still lets a spliced connection be


@dataclass(slots=True)
class Door:
    """Who decides, dials, lends, listens and records; and the spliced connections, which a new policy may cut. `dialer` may be
    replaced.
    """

    admission: Admission
    dialer: Dialer
    pool: Pool
    broker: Broker | None
    taps: Taps | None
    recorder: Recorder
    clock: Clock
    splices: dict[Splice, Allowed] = field(default_factory=dict)

    async def splice(self, guest: Peer, origin: Peer, allowed: Allowed, event: NetEvent) -> None:
        """Carry bytes between two peers until both have ended, or another policy does not allow it. Raises ConnectionError."""
        splice = Splice(guest, origin, event)
        self.splices[splice] = allowed
        try:
            await splice.run()
        finally:
            del self.splices[splice]


@dataclass(frozen=True, slots=True)
class Arrival:
    """What is known of a connection before there is a request. `port` is where it was going to; `host` is the name that its TLS
    or its tunnel was for, None where requests name theirs freely; `address` is what it wanted by number, where it has no
    name. `mismatch` says why every request on it is refused, if so.
    """

    connection: Connection
    port: int
    host: str | None = None
    address: str | None = None
    tls: TlsMode = TlsMode.NONE
    tunnelled: bool = False
    mismatch: str | None = None


def note(event: NetEvent, verdict: Verdict) -> None:
    """Write down what was decided, and by which rule."""
    event.matched_rule = verdict.rule
    event.rule_layer = verdict.layer.value
    event.policy_version = verdict.policy_version
