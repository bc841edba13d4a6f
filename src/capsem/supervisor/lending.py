"""The secrets of one VM in its supervisor: what is granted to it, and values for as long as they may be kept.

A value comes from a service, which is asked on the streams that it keeps open; without one there are none. It is forgotten
when its time is over, whether anybody asks or not.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Final, NamedTuple

from capsem.api.secret_messages import LendSecrets, SecretsLent, SecretsSet, SecretValue, SecretWanted, SetSecrets
from capsem.control.channel import Stream
from capsem.egress import grants
from capsem.egress.broker import Lender
from capsem.egress.facts import Subject
from capsem.egress.heads import Headers, RequestHead, ResponseHead
from capsem.egress.parts import SecretUnavailable
from capsem.model.errors import CapsemError
from capsem.wire.schema import Message

ANSWER_LIMIT: Final = 30.0  # seconds for a service to know a value; a command has less
KEPT: Final = 4  # values of one secret, when it changes often

log = logging.getLogger("capsem_process.secrets")


class _Held(NamedTuple):
    """A value, and when it is to be forgotten, in the loop's time."""

    value: bytes
    until: float


class Lending:
    """A Broker (egress.parts) whose grants may change, and the Values (egress.broker) that it needs."""

    def __init__(self) -> None:
        """Nothing is granted until `begin`."""
        self._grants: tuple[grants.Grant, ...] = ()
        self._source: str | None = None
        self._lender = Lender((), self)
        self._held: dict[str, tuple[_Held, ...]] = {}  # the newest first
        self._asking: dict[str, asyncio.Future[bytes]] = {}
        self._services: list[Stream] = []

    def begin(self, granted: str, source: str | None) -> None:
        """What the VM starts with; `source` is the VM that it is a fork of. What cannot be read grants nothing."""
        self._source = source
        try:
            self._grant(grants.from_json(granted))
        except CapsemError as error:
            log.error("no secrets are lent: %s", error)
            self._grant(())

    def set(self, request: SetSecrets) -> SecretsSet:
        """Other grants. Raises InvalidInput: then it is as it was."""
        self._grant(grants.from_json(request.grants))
        self._held.clear()
        return SecretsSet()

    def _grant(self, granted: tuple[grants.Grant, ...]) -> None:
        self._grants = granted
        self._lender = Lender(granted, self, self._source)

    @property
    def environment(self) -> Mapping[str, str]:
        """Placeholders, by the variables that commands of the VM find them in."""
        return grants.environment(self._grants)

    @property
    def placeholders(self) -> dict[str, tuple[str, ...]]:
        """By secret; for the VM's record."""
        return {grant.name: grant.placeholders for grant in self._grants}

    # -- egress.parts.Broker

    async def outgoing(self, subject: Subject, head: RequestHead, *, verified: bool) -> RequestHead:
        """See Broker."""
        return await self._lender.outgoing(subject, head, verified=verified)

    def body(self, subject: Subject, headers: Headers, *, verified: bool) -> Callable[[bytes], bytes] | None:
        """See Broker."""
        return self._lender.body(subject, headers, verified=verified)

    def incoming(self, subject: Subject, head: ResponseHead) -> tuple[ResponseHead, Callable[[bytes], bytes] | None]:
        """See Broker."""
        return self._lender.incoming(subject, head)

    # -- egress.broker.Values

    async def get(self, name: str) -> bytes:
        """The value now. Raises SecretUnavailable."""
        if held := self._held.get(name):
            return held[0].value
        answer = self._asking.get(name)
        if answer is None or answer.done():
            answer = self._asking[name] = asyncio.get_running_loop().create_future()
            answer.add_done_callback(_look_at)
            self._ask(name)
        try:
            async with asyncio.timeout(ANSWER_LIMIT):
                return await asyncio.shield(answer)
        except TimeoutError:
            unknown = SecretUnavailable(
                name, f"the value of the secret {name} was not told within {ANSWER_LIMIT:.0f} s"
            )
            if not answer.done():
                answer.set_exception(unknown)
            raise unknown from None

    def known(self, name: str) -> Sequence[bytes]:
        """Those that were given out lately, the newest first."""
        return [held.value for held in self._held.get(name, ())]

    def _ask(self, name: str) -> None:
        for stream in self._services:
            stream.send(SecretWanted(secret=name))
        if not self._services:
            self._asking[name].set_exception(
                SecretUnavailable(
                    name, f"the value of the secret {name} is not known: Capsem's service, which knows it, does not run"
                )
            )

    # -- services

    async def serve(self, stream: Stream, _request: LendSecrets) -> SecretsLent:
        """A service answers here, until it gives the stream up or is gone."""
        stream.on_message = self._told
        self._services.append(stream)
        try:
            for name, answer in self._asking.items():
                if not answer.done():
                    stream.send(SecretWanted(secret=name))
            await stream.result()
        finally:
            self._services.remove(stream)
        return SecretsLent()

    def _told(self, message: Message) -> None:
        if not isinstance(message, SecretValue):
            return
        name, answer = message.secret, self._asking.get(message.secret)
        if message.value is None:
            if answer is not None and not answer.done():
                problem = message.problem or "it cannot be had"
                answer.set_exception(SecretUnavailable(name, f"the value of the secret {name}: {problem}"))
            return
        loop = asyncio.get_running_loop()
        held = _Held(message.value.encode(), loop.time() + message.seconds)
        others = [each for each in self._held.get(name, ()) if each.value != held.value]
        self._held[name] = (held, *others)[:KEPT]
        loop.call_at(held.until, self._forget, name, held)
        if answer is not None and not answer.done():
            answer.set_result(held.value)

    def _forget(self, name: str, held: _Held) -> None:
        left = tuple(each for each in self._held.get(name, ()) if each is not held)
        if left:
            self._held[name] = left
        else:
            self._held.pop(name, None)


def _look_at(done: asyncio.Future[bytes]) -> None:
    """Nobody may wait for it any more: then nobody is to be told that nobody looked."""
    if not done.cancelled():
        done.exception()
