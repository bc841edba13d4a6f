"""Traffic as rows of a `session.db`: what a Recorder is told becomes a statement for the ledger's queue.

Whatever the guest sent is cut to what a row should hold. A model's call and the tools in it are one unit: they are written, or
lost, together.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from typing import Any, Final

from capsem.egress.events import DnsEvent, ModelCall, NetEvent
from capsem.ledger.events import text
from capsem.ledger.schema import iso
from capsem.ledger.writer import Statement

NAME: Final = 256  # characters of a host, a program, a model, a rule, an id
PATH: Final = 4096
DETAIL: Final = 1024  # of a reason, and of what a tool answered
ARGUMENTS: Final = 16 * 1024  # of what a tool was asked for

_PARENT: Final = "(SELECT max(id) FROM model_calls)"


class TrafficRecord:
    """A Recorder that makes statements; `put` takes them and neither waits nor raises."""

    def __init__(self, put: Callable[[Statement], None]) -> None:
        self._put = put

    def net(self, event: NetEvent) -> None:
        """A request or connection is over."""
        self._put(net_row(event))

    def dns(self, event: DnsEvent) -> None:
        """A question was answered."""
        self._put(dns_row(event))

    def model(self, call: ModelCall) -> None:
        """A call of a model is over."""
        self._put(model_rows(call))


def net_row(event: NetEvent) -> Statement:
    """A row of net_events."""
    return _insert(
        "net_events",
        {
            "timestamp": iso(event.time),
            "domain": _cut(event.domain, NAME),
            "port": event.port,
            "decision": event.decision,
            "process_name": _cut(event.process_name, NAME),
            "method": _cut(event.method, NAME),
            "path": _cut(event.path, PATH),
            "status_code": event.status_code,
            "bytes_sent": event.bytes_sent,
            "bytes_received": event.bytes_received,
            "duration_ms": _milliseconds(event.duration),
            "matched_rule": _cut(event.matched_rule, NAME),
            "rule_layer": event.rule_layer,
            "policy_version": event.policy_version,
            "address": _cut(event.address, NAME),
            "tls": str(event.tls),
            "error": _cut(event.error, DETAIL),
            "secrets": _cut(",".join(event.secrets) or None, DETAIL),
        },
    )


def dns_row(event: DnsEvent) -> Statement:
    """A row of dns_events."""
    return _insert(
        "dns_events",
        {
            "timestamp": iso(event.time),
            "domain": _cut(event.domain, NAME),
            "record_type": _cut(event.record_type, NAME),
            "decision": event.decision,
            "answer": _cut(event.answer, DETAIL),
            "process_name": _cut(event.process_name, NAME),
            "duration_ms": _milliseconds(event.duration),
            "matched_rule": _cut(event.matched_rule, NAME),
            "rule_layer": event.rule_layer,
            "policy_version": event.policy_version,
        },
    )


def model_rows(call: ModelCall) -> Statement:
    """A row of model_calls, followed by those of its tool_calls and tool_responses."""
    at = iso(call.time)
    tools = [
        {
            "timestamp": at,
            "call_index": tool.index,
            "call_id": _cut(tool.call_id, NAME),
            "tool_name": _cut(tool.name, NAME),
            "arguments": _cut(tool.arguments, ARGUMENTS),
            "origin": "native",
        }
        for tool in call.tools
    ]
    responses = [
        {
            "timestamp": at,
            "call_id": _cut(response.call_id, NAME),
            "content_preview": _cut(response.preview, DETAIL),
            "is_error": response.is_error,
        }
        for response in call.responses
    ]
    return _insert(
        "model_calls",
        {
            "timestamp": at,
            "domain": _cut(call.domain, NAME),
            "provider": _cut(call.provider, NAME),
            "model": _cut(call.model, NAME),
            "method": _cut(call.method, NAME),
            "path": _cut(call.path, PATH),
            "stream": call.stream,
            "input_tokens": call.input_tokens,
            "output_tokens": call.output_tokens,
            "cache_read_tokens": call.cache_read_tokens,
            "cache_write_tokens": call.cache_write_tokens,
            "thinking_tokens": call.thinking_tokens,
            "duration_ms": _milliseconds(call.duration),
            "estimated_cost_usd": call.cost_usd,
            "price_date": call.price_date,
            "status_code": call.status_code,
            "truncated": call.truncated,
            "note": _cut(call.note, DETAIL),
        },
        then=(
            *(_insert("tool_calls", row, of_model_call=True) for row in tools),
            *(_insert("tool_responses", row, of_model_call=True) for row in responses),
        ),
    )


def _insert(
    table: str, row: Mapping[str, Any], *, of_model_call: bool = False, then: tuple[Statement, ...] = ()
) -> Statement:
    """`of_model_call`: it belongs to the model call written last, of which it is a `then`."""
    return Statement(_sql(table, tuple(row), of_model_call), tuple(row.values()), then=then)


@cache
def _sql(table: str, names: tuple[str, ...], of_model_call: bool) -> str:
    columns, values = ", ".join(names), ", ".join("?" * len(names))
    if of_model_call:
        columns, values = f"{columns}, model_call_id", f"{values}, {_PARENT}"
    return f"INSERT INTO {table} ({columns}) VALUES ({values})"  # noqa: S608


def _cut(value: str | None, limit: int) -> str | None:
    return None if value is None else text(value, limit)


def _milliseconds(seconds: float) -> float:
    return round(seconds * 1000, 3)
