"""What a program in the guest is told instead of an answer: JSON, or a page for those who ask for HTML. Pure.

Agents read it: it says what happened, by which rule, that another way round is useless, and what their user can type.
"""

from __future__ import annotations

import json
from html import escape
from typing import Final

from capsem.egress.facts import DECISION_HEADER, RULE_HEADER, Action, Layer, Subject, Verdict
from capsem.egress.heads import Header, Headers, ResponseHead

_POLICY: Final = "This is policy, not a fault: do not retry, and do not try another proxy, DNS server or address."
_REASONS: Final = {
    400: b"Bad Request",
    403: b"Forbidden",
    408: b"Request Timeout",
    421: b"Misdirected Request",
    431: b"Request Header Fields Too Large",
    501: b"Not Implemented",
    502: b"Bad Gateway",
    503: b"Service Unavailable",
    504: b"Gateway Timeout",
    505: b"HTTP Version Not Supported",
}


def denied(subject: Subject, verdict: Verdict, accept: bytes | None) -> tuple[ResponseHead, bytes]:
    """The answer to a request that policy does not let pass."""
    where = subject.host or subject.address or "this destination"
    remedy = verdict.remedy
    text = f"Capsem did not let this request to {where} pass: {verdict.reason}"
    facts: dict[str, object] = {
        "error": text,
        "code": "egress_denied",
        "decision": "denied",
        "host": where,
        "port": subject.port,
        "rule": verdict.rule,
        "layer": verdict.layer.value,
        "hint": f"{_POLICY} {_advice(verdict)}",
    }
    if remedy is not None:
        facts["remedy"] = remedy
    more = [(DECISION_HEADER.encode(), b"denied"), (RULE_HEADER.encode(), _header(verdict.rule))]
    return _page(403, facts, more, accept)


def failed(status: int, message: str, accept: bytes | None, *, decision: str = "error") -> tuple[ResponseHead, bytes]:
    """The answer to a request that could not be carried out, or could not be understood."""
    code = "egress_denied" if decision == "denied" else "egress_failed"
    facts: dict[str, object] = {"error": f"Capsem's proxy: {message}", "code": code, "decision": decision}
    if status == 403:
        facts["hint"] = _POLICY
    return _page(status, facts, [(DECISION_HEADER.encode(), decision.encode())], accept)


def _advice(verdict: Verdict) -> str:
    if verdict.remedy is not None:
        return f"The user of this machine can allow it on the host with: {verdict.remedy}"
    if verdict.layer is Layer.CORPORATE:
        return "The rule is the company's: ask whoever looks after it."
    if verdict.action is Action.ASK:
        return "The user of this machine was asked and did not allow it."
    return "It cannot be allowed from within the machine."


def _header(text: str) -> bytes:
    """Text from a policy file, as it may stand in a header."""
    return "".join(each if " " <= each <= "~" else "?" for each in text).strip().encode("ascii")


def _page(
    status: int, facts: dict[str, object], more: list[Header], accept: bytes | None
) -> tuple[ResponseHead, bytes]:
    if accept is not None and b"text/html" in accept.lower():
        kind = b"text/html; charset=utf-8"
        rows = "".join(
            f"<dt>{escape(name)}</dt><dd>{escape(str(value))}</dd>" for name, value in facts.items() if name != "error"
        )
        title = escape(str(facts["error"]))
        body = f"<!doctype html><title>{status}</title><h1>{title}</h1><dl>{rows}</dl>\n".encode()
    else:
        kind = b"application/json"
        body = json.dumps(facts, indent=1).encode() + b"\n"
    headers = [(b"Content-Type", kind), (b"Cache-Control", b"no-store"), *more]
    return ResponseHead(status, _REASONS.get(status, b"Error"), Headers(headers)), body
