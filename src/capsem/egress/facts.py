"""What is known of a connection or a request, and what was decided about it. Values; no I/O."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Final


class Action(StrEnum):
    """What a rule says. `ASK` is a denial when nobody is there to answer."""

    ALLOW = "allow"
    DENY = "deny"
    ASK = "ask"


class Layer(StrEnum):
    """Where a rule stands; an upper one beats a lower one, and within one deny beats ask beats allow."""

    FLOOR = "floor"
    CORPORATE = "corporate"
    VM = "vm"
    USER = "user"
    PRESET = "preset"
    DEFAULT = "default"  # no rule matched


class Protocol(StrEnum):
    """What is spoken. A rule is for HTTP (plain or in TLS that we end) unless it says otherwise."""

    HTTP = "http"
    TCP = "tcp"
    PASSTHROUGH = "passthrough"  # TLS that we do not end: the name in its hello is all that is judged


class TlsMode(StrEnum):
    """What became of TLS on a connection."""

    NONE = "none"
    INTERCEPTED = "intercepted"
    PASSTHROUGH = "passthrough"


@dataclass(frozen=True, slots=True)
class Connection:
    """A connection that a program in the guest made. All but `port` and `address` are labels for the record, and those
    two are only what the guest says was wanted.

    `explicit`: it came to the guest's proxy port, and says itself where it wants to go (CONNECT, absolute form).
    """

    address: str
    port: int
    explicit: bool = False
    process: str | None = None
    pid: int | None = None


@dataclass(frozen=True, slots=True)
class Subject:
    """What is to be judged. `host` is lower-case ASCII (punycode) without a final dot, None where no name is known;
    `address` the literal that was asked for, or the one about to be dialled; `method` and `path` (normalised, without
    query) are None before there is a request.
    """

    port: int
    host: str | None = None
    address: str | None = None
    protocol: Protocol = Protocol.HTTP
    method: str | None = None
    path: str | None = None


@dataclass(frozen=True, slots=True)
class Verdict:
    """A decision, with what a record and a reader need to know of it.

    `rule` is its name; `reason` one sentence for a person. `http2`: the rule asks for it. `certificate` names the client
    certificate to show upstream; `ech`: pass through even a hello that may hide its true name. `model` is the API of models
    that is spoken there, by the rule's word: "anthropic", "openai", "gemini"; None where the rule says nothing of it. `remedy`
    is the command that would allow it, None where the user cannot.
    `policy_version` counts reloads.
    """

    action: Action
    rule: str
    layer: Layer
    reason: str
    policy_version: int = 0
    protocol: Protocol = Protocol.HTTP
    http2: bool = False
    certificate: str | None = None
    ech: bool = False
    model: str | None = None
    remedy: str | None = None


DECISION_HEADER: Final = "x-capsem-decision"
RULE_HEADER: Final = "x-capsem-rule"
