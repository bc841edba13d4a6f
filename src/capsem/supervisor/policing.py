"""The policy of one VM in its supervisor: put together from the record and from what the service sends, changed while it runs,
and what must be asked about."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from typing import Any

from capsem.api.network_messages import (
    AnswerAsk,
    AskAnswered,
    AskHeld,
    AskOver,
    AsksFollowed,
    FollowAsks,
    NetworkSet,
    SetNetwork,
)
from capsem.control.channel import Stream
from capsem.egress.asks import Ask, Asks
from capsem.egress.compose import compose, layers_from_json
from capsem.egress.document import Document, from_dict
from capsem.egress.facts import Action, Layer
from capsem.egress.live import LivePolicy
from capsem.egress.policy import Floor
from capsem.model.errors import CapsemError, InvalidInput
from capsem.system import Clock
from capsem.wire.schema import Message

log = logging.getLogger("capsem_process.policy")

# (own document, learning since): into the record, durably. Raises OSError.
WriteDown = Callable[[Mapping[str, Any], float | None], None]


class Policing:
    """`live` judges, `asks` is asked; `outside` is what connections need beside that, as of the last change."""

    def __init__(self, clock: Clock, floor: Floor, write_down: WriteDown) -> None:
        """Everything is denied until `begin`."""
        self._clock = clock
        self._floor = floor
        self._write_down = write_down
        self._layers = ""
        self._own = Document()
        self._learning: float | None = None
        self._preset: str | None = None
        self._vm = ""
        policy, self.outside = compose(layers_from_json(""), self._own, floor=floor, vm="")
        self.live = LivePolicy(policy, clock.time)
        self.asks = Asks(self.live.judge, clock.time)
        self.live.on_change(self.asks.changed)

    def begin(self, vm: str, layers: str, own: Mapping[str, Any], learning: float | None) -> None:
        """The policy that the VM starts with. One that cannot be read (it is of a newer Capsem) denies everything."""
        self._vm, self._learning = vm, learning
        try:
            self._change(layers, _document(own))
        except CapsemError as error:
            log.error("the network policy of %s cannot be used, and everything is denied: %s", vm, error)

    def set(self, request: SetNetwork) -> NetworkSet:
        """Another policy. Raises InvalidInput, OSError: then the old one stays in force."""
        own = self._own if request.own is None else _document(table_of(request.own))
        layers = self._layers if request.layers is None else request.layers
        learning = self._learning
        if request.learning is not None:
            learning = (learning or self._clock.time()) if request.learning else None
        parsed = layers_from_json(layers)
        composed = compose(parsed, own, floor=self._floor, vm=self._vm, learning=learning is not None)
        if own != self._own or learning != self._learning:
            self._write_down(own.to_dict(), learning)
        self._layers, self._own, self._learning, self._preset = layers, own, learning, parsed.preset.preset
        policy, self.outside = composed
        self.live.replace(policy)
        log.info("network policy %d: %d rules", self.live.version, len(policy.rules))
        return NetworkSet(version=self.live.version)

    @property
    def open(self) -> bool:
        """Whether a program's connections are worth being carried here: something may pass, or, with any preset but off, it is
        told and recorded why it does not."""
        policy = self.live.policy
        return (
            self._preset not in {None, "off"}
            or policy.learning
            or policy.otherwise is not Action.DENY
            or any(rule.action is not Action.DENY for rule in policy.rules)
        )

    def rename(self, vm: str) -> None:
        """The VM has another name, by which commands call it."""
        self._vm = vm
        self._change(self._layers, self._own)

    def _change(self, layers: str, own: Document) -> None:
        parsed = layers_from_json(layers)
        policy, self.outside = compose(parsed, own, floor=self._floor, vm=self._vm, learning=self._learning is not None)
        self._layers, self._own, self._preset = layers, own, parsed.preset.preset
        self.live.replace(policy)

    def answer(self, request: AnswerAsk) -> AskAnswered:
        """Somebody has answered what waits."""
        return AskAnswered(count=self.asks.answer(request.ask, request.host, allow=request.allow))

    async def follow(self, stream: Stream, request: FollowAsks) -> AsksFollowed:
        """Tell a peer what waits, until it gives the stream up; as long as it listens, there is somebody to be asked."""
        if not request.wait:
            for ask in self.asks.waiting():
                stream.send(_held(ask))
            return AsksFollowed()
        leave = self.asks.listen(_Teller(lambda message: None if stream.over else stream.send(message)))
        try:
            await stream.result()
        finally:
            leave()
        return AsksFollowed()


class _Teller:
    """An egress.asks.Listener that sends messages."""

    def __init__(self, send: Callable[[Message], None]) -> None:
        self._send = send

    def held(self, ask: Ask) -> None:
        """See Listener."""
        self._send(_held(ask))

    def over(self, ask: Ask, outcome: str) -> None:
        """See Listener."""
        self._send(AskOver(ask=ask.id, outcome=outcome))


def _held(ask: Ask) -> AskHeld:
    subject, verdict = ask.subject, ask.verdict
    return AskHeld(
        ask=ask.id,
        port=subject.port,
        protocol=str(subject.protocol),
        rule=verdict.rule,
        reason=verdict.reason,
        since=ask.since,
        host=subject.host,
        address=subject.address,
        method=subject.method,
        path=subject.path,
        remedy=verdict.remedy,
    )


def table_of(text: str) -> Mapping[str, Any]:
    """A VM's own policy, as it travels; "" is none. Raises InvalidInput."""
    if not text:
        return {}
    try:
        table = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InvalidInput(f"the VM's network policy is no JSON: {error}") from error
    if not isinstance(table, dict):
        raise InvalidInput("the VM's network policy is no table")
    return table


def _document(table: Mapping[str, Any]) -> Document:
    return from_dict(table, Layer.VM, "the VM's policy")
