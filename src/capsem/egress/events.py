"""What is recorded of the traffic, and who takes it. The rows are those of interface.md 8 and a few columns more."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

from capsem.egress.facts import TlsMode


@dataclass(slots=True)
class NetEvent:
    """One request, or one connection where there are no requests to tell apart. Filled in as it goes on; recorded at its end.

    `decision` is "allowed", "denied", "error", or "interrupted" (the VM was suspended or forked meanwhile). Sizes are bytes of
    bodies (of everything where there is no HTTP); `address` is the one that was dialled, None if none was. `path` is without
    its query. `secrets` are names: of those that were lent (RequestHead.secrets), or of the one that was misused.
    """

    time: float
    domain: str | None
    port: int
    decision: str = "error"
    process_name: str | None = None
    method: str | None = None
    path: str | None = None
    status_code: int | None = None
    bytes_sent: int = 0
    bytes_received: int = 0
    duration: float = 0.0
    matched_rule: str | None = None
    rule_layer: str | None = None
    policy_version: int | None = None
    address: str | None = None
    tls: TlsMode = TlsMode.NONE
    error: str | None = None
    secrets: tuple[str, ...] = ()


@dataclass(slots=True)
class DnsEvent:
    """One question. `decision`: "allowed", "denied", "synthetic" (not allowed: an address of our own was given), "error"."""

    time: float
    domain: str
    record_type: str
    decision: str
    answer: str | None = None
    process_name: str | None = None
    duration: float = 0.0
    matched_rule: str | None = None
    rule_layer: str | None = None
    policy_version: int | None = None


@dataclass(slots=True)
class ToolCall:
    """A tool that a model asked for."""

    index: int
    call_id: str | None
    name: str
    arguments: str


@dataclass(slots=True)
class ToolResponse:
    """What a program answered a model that had asked for a tool: the beginning of it."""

    call_id: str | None
    preview: str
    is_error: bool | None = None


@dataclass(slots=True)
class ModelCall:
    """A call of a model's API. What is not known is None, never 0.

    `input_tokens` are all that went in, those of caches included, and `output_tokens` all that came out, thinking included.
    `price_date` is that of the prices of `cost_usd`. `truncated`: not everything was looked at; `note` says why what is
    not known is not.
    """

    time: float
    domain: str
    provider: str
    model: str | None
    method: str
    path: str
    stream: bool
    status_code: int | None
    duration: float = 0.0
    input_tokens: int | None = None
    output_tokens: int | None = None
    cache_read_tokens: int | None = None
    cache_write_tokens: int | None = None
    thinking_tokens: int | None = None
    cost_usd: float | None = None
    price_date: str | None = None
    truncated: bool = False
    note: str | None = None
    tools: list[ToolCall] = field(default_factory=list)
    responses: list[ToolResponse] = field(default_factory=list)


class Recorder(Protocol):
    """Takes events without ever making a byte wait; what it cannot keep it counts."""

    def net(self, event: NetEvent) -> None:
        """A request or connection is over."""

    def dns(self, event: DnsEvent) -> None:
        """A question was answered."""

    def model(self, call: ModelCall) -> None:
        """A call of a model is over."""
