"""The part of the protocol between service and supervisor (`internal`) that is about the network.

A VM's policy has two parts. Its own is in its record; the other layers (egress.compose.Layers) are the service's to know, and
come with the bootstrap and with each `SetNetwork`. What must be asked about is held by the supervisor as long as a `FollowAsks`
stream is open; without one it is denied at once.
"""

from __future__ import annotations

from capsem.wire.schema import Message


class SetNetwork(Message, tag="set-network"):
    """The VM has another policy from here on: `layers` as `Layers.to_json` has them, `own` a document as JSON, which goes into
    the record. `learning`: what no rule denies is let through, or not any more. None: as it was.

    Connections go on; they are judged by the new policy at their next request.
    """

    layers: str | None = None
    own: str | None = None
    learning: bool | None = None


class NetworkSet(Message, tag="network-set"):
    """Closes a SetNetwork stream: it is in force, and in the record. `version` counts changes since the VM started."""

    version: int


class AnswerAsk(Message, tag="answer-ask"):
    """Answer what waits, for once: the ask `ask`, or all about `host`."""

    allow: bool
    ask: str | None = None
    host: str | None = None


class AskAnswered(Message, tag="ask-answered"):
    """Closes it: so many had waited."""

    count: int


class FollowAsks(Message, tag="follow-asks"):
    """Tell what waits for an answer, now and later, until this stream is given up. With `wait` false: now, and no more."""

    wait: bool = True


class AskHeld(Message, tag="ask-held"):
    """On a FollowAsks stream: something waits. `since` is in seconds since 1970, `remedy` what allows it for good."""

    ask: str
    port: int
    protocol: str
    rule: str
    reason: str
    since: float
    host: str | None = None
    address: str | None = None
    method: str | None = None
    path: str | None = None
    remedy: str | None = None


class AskOver(Message, tag="ask-over"):
    """On a FollowAsks stream: it waits no more; `outcome` is allowed, denied or unanswered."""

    ask: str
    outcome: str


class AsksFollowed(Message, tag="asks-followed"):
    """Closes a FollowAsks stream."""


NETWORK_REQUESTS: dict[type[Message], type[Message]] = {
    SetNetwork: NetworkSet,
    AnswerAsk: AskAnswered,
    FollowAsks: AsksFollowed,
}
NETWORK_MESSAGES: tuple[type[Message], ...] = (AskHeld, AskOver, *NETWORK_REQUESTS, *NETWORK_REQUESTS.values())
