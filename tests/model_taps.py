"""What the tests of taps share: a recorder that keeps, a clock that stands, and calls played through a tap."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from capsem.egress.events import DnsEvent, ModelCall, NetEvent
from capsem.egress.facts import Action, Layer, Subject, Verdict
from capsem.egress.heads import Header, Headers, RequestHead, ResponseHead
from capsem.egress.parts import Tap, Taps
from capsem.egress.taps.pick import model_taps
from capsem.egress.taps.prices import load

STREAMS = Path(__file__).parent / "model_streams"
NOW = 1_793_000_000.0  # in October 2026
ALLOWED = Verdict(Action.ALLOW, "r", Layer.USER, "a rule allows it")


@dataclass
class Kept:
    calls: list[ModelCall] = field(default_factory=list)

    def net(self, event: NetEvent) -> None:
        raise AssertionError(event)

    def dns(self, event: DnsEvent) -> None:
        raise AssertionError(event)

    def model(self, call: ModelCall) -> None:
        self.calls.append(call)


class Clock:
    def time(self) -> float:
        return NOW

    def monotonic(self) -> float:
        return 5.0


def taps(kept: Kept) -> Taps:
    return model_taps(kept, Clock(), load())  # type: ignore[arg-type]


def tap_for(
    all_taps: Taps, host: str, target: str, *headers: Header, method: bytes = b"POST", verdict: Verdict = ALLOWED
) -> Tap | None:
    head = RequestHead(method, target.encode(), Headers(headers), host.encode())
    return all_taps(Subject(443, host), head, verdict)


def pieces(data: bytes, size: int) -> list[bytes]:
    return [data[start : start + size] for start in range(0, len(data), size)]


def play(
    tap: Tap,
    request: bytes,
    answer: bytes,
    kind: str,
    *,
    size: int = 1 << 20,
    status: int = 200,
    coding: str | None = None,
) -> None:
    for piece in pieces(request, size):
        tap.request_body(piece)
    headers: list[Header] = [(b"Content-Type", kind.encode())]
    if coding is not None:
        headers.append((b"Content-Encoding", coding.encode()))
    tap.response(ResponseHead(100, b"Continue", Headers()))
    tap.response(ResponseHead(status, b"", Headers(headers)))
    for piece in pieces(answer, size):
        tap.response_body(piece)
    tap.finish()
