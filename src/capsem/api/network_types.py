"""What travels between clients and the service about what VMs may reach, and did; rules as in `types`.

A policy travels as the text of a policy file (TOML), or as its table [network] in JSON.
"""

from __future__ import annotations

from typing import Annotated, Any

import msgspec

from capsem.api.types import Body, Name, Seconds, Text
from capsem.model.errors import InvalidInput
from capsem.model.ids import check_name

Table = dict[str, Any]
Port = Annotated[int, msgspec.Meta(ge=1, le=65535)]
MOST_LOGGED = 5000


class NetworkRequest(Body, frozen=True):
    """What a VM may reach: a `preset`, a `policy` of its own (with a preset or none in it), or both. What is left out stays
    as it is; of a new VM, the preset is then that of the settings, and there are no rules."""

    preset: str | None = None
    policy: Text | Table | None = None


class NetworkInfo(Body, frozen=True):
    """What a VM may reach. `preset` is what holds, `own` its own policy and `policy` that as the text of a file; `rules` are
    all that hold, from strong to weak, each with its `layer` and `where` it was written. `learning_since` is in seconds since
    1970: what no rule denies is let through."""

    id: str
    preset: str
    own: Table
    policy: str
    rules: list[Table]
    otherwise: str
    learning_since: float | None = None


class AllowRequest(Body, frozen=True):
    """Let a VM reach a host: a name, `*.` and a domain, or an address, with a port after a colon or in `port`; the ports of
    the web (80, 443) unless said. `tcp`: for something other than HTTP.

    It holds for this VM and its forks; `for_secs`: for so long; `always`: also for all VMs with the preset medium. `once`: only
    what waits for an answer now. `ask` is one of those, instead of a host.
    """

    host: Text | None = None
    port: Port | None = None
    tcp: bool = False
    method: list[str] | None = None
    once: bool = False
    for_secs: Seconds | None = None
    always: bool = False
    ask: str | None = None

    def __post_init__(self) -> None:
        if self.host is None and self.ask is None:
            raise InvalidInput("neither a host nor an ask is named", hint='{"host": "example.com"}')
        if self.once + self.always + (self.for_secs is not None) > 1:
            raise InvalidInput("once, always and for_secs exclude each other", hint="give one of them")
        if self.ask is not None and self.host is not None:
            raise InvalidInput("host and ask are both given", hint="an ask knows its host: give one of them")


class DenyRequest(Body, frozen=True):
    """Keep a VM from a host, whatever allows it; as for AllowRequest. With `once`, or an `ask`: only what waits now."""

    host: Text | None = None
    port: Port | None = None
    once: bool = False
    ask: str | None = None

    def __post_init__(self) -> None:
        if (self.host is None) == (self.ask is None):
            raise InvalidInput("one of host and ask is needed", hint='{"host": "example.com"}')


class AllowResponse(Body, frozen=True):
    """What came of it: the `rule` that was added to the VM's own, if any; what it took the place of; how many requests had
    waited and were `answered`; what a person should know (`message`)."""

    message: str
    rule: Table | None = None
    removed: list[str] = []
    answered: int = 0


class CheckQuery(Body, frozen=True):
    """What would be decided on `url` (tcp://HOST:PORT for something other than HTTP), for the VM `id`, or one that would be
    created now. Nothing is looked up, and no one is asked."""

    url: Text
    id: Name | None = None
    method: str = "GET"

    def __post_init__(self) -> None:
        if self.id is not None:
            check_name(self.id)


class CheckResponse(Body, frozen=True):
    """The verdict: `action` is allow, deny or ask, by `rule` of `layer`, written at `where`. `remedy` is the command that would
    allow it. `note`: what else would decide, once the name has been looked up."""

    action: str
    rule: str
    layer: str
    reason: str
    host: str
    port: int
    protocol: str
    method: str | None = None
    path: str | None = None
    where: str | None = None
    remedy: str | None = None
    note: str | None = None


class AsksQuery(Body, frozen=True):
    """Of one VM alone."""

    id: Name | None = None

    def __post_init__(self) -> None:
        if self.id is not None:
            check_name(self.id)


class AskInfo(Body, frozen=True):
    """A request of the VM `id` that waits for an answer, since when, and why: `ask` is what to answer it by."""

    id: str
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


class AsksResponse(Body, frozen=True):
    """What waits. Requests wait only while somebody follows `network_events`; otherwise they are denied at once. `followers`:
    how many do."""

    asks: list[AskInfo]
    followers: int


class NetworkEvents(Body, frozen=True):
    """A stream of server-sent events for as long as the client stays: `ask`, with an AskInfo, when something waits, and `over`,
    with {id, ask, outcome}, when it does not any more. A line that begins with a colon comes now and then, and means nothing."""


class NetworkLogQuery(Body, frozen=True):
    """The newest `limit` entries; `decision`: of these alone, with commas (allowed, denied, error, interrupted); `after`: those
    that came after the one with that id; `since`: 30m, 1h, 7d, or a time as RFC 3339."""

    since: str | None = None
    limit: Annotated[int, msgspec.Meta(ge=1, le=MOST_LOGGED)] = 100
    decision: str | None = None
    after: Annotated[int, msgspec.Meta(ge=0)] | None = None


class NetworkLogResponse(Body, frozen=True):
    """Entries, oldest first, each with the columns of net_events that have a value; `last` is to be given as `after`."""

    events: list[Table]
    last: int


class LearnRequest(Body, frozen=True):
    """`action`: start, to let through and record what no rule denies; stop, which ends that and gives the policy that was
    learnt; show, which gives it and goes on; denials, which gives the policy that would have allowed what was denied, `since`
    when, or all of it. `paths`: with paths."""

    action: str
    paths: bool = False
    since: str | None = None

    def __post_init__(self) -> None:
        if self.action not in {"start", "stop", "show", "denials"}:
            raise InvalidInput(f"action is {self.action!r}", hint="it has to be one of: start, stop, show, denials")
        if self.since is not None and self.action != "denials":
            raise InvalidInput("since is for denials alone", hint="what is learnt begins where learning did")


class LearnResponse(Body, frozen=True):
    """Whether the VM is `learning`; the `policy` as the text of a file, made of so many `events`; what was `left_out`, and
    why."""

    learning: bool
    policy: str | None = None
    events: int = 0
    left_out: list[str] = []
    learning_since: float | None = None


class AuthorityInfo(Body, frozen=True):
    """The authority that signs what guests see of the hosts they reach, made for this installation alone: its `certificate`
    (PEM), SHA-256 fingerprint, and when it ends, in seconds since 1970. `file` holds its key, too. `message` is for people."""

    certificate: str
    fingerprint: str
    not_after: float
    file: str
    message: str | None = None


class CorporateRequest(Body, frozen=True):
    """The text of a corporate file, as $CAPSEM_HOME/corp.toml; an empty one removes it."""

    config: Text
