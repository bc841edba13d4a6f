"""Secrets in a supervisor: values that services tell, how long they are known, and grants that change."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from capsem.api.secret_messages import LendSecrets, SecretValue, SecretWanted, SetSecrets
from capsem.egress import grants
from capsem.egress.facts import Subject
from capsem.egress.grants import Grant
from capsem.egress.heads import Headers, RequestHead, ResponseHead
from capsem.egress.parts import SecretMisuse, SecretUnavailable
from capsem.model.errors import InvalidInput
from capsem.simulation.loop import SimLoop
from capsem.supervisor.lending import ANSWER_LIMIT, Lending
from capsem.wire.schema import Message

OWN = "capsem-key-" + "a" * 20
GRANTED = grants.to_json([Grant("key", (OWN,), ("own.test",), env="KEY")])


class Service:
    """A stream's other end, which answers by `values`, or says nothing."""

    def __init__(self, **values: str | None) -> None:
        self.values = values
        self.asked: list[str] = []
        self.on_message: Callable[[Message], None] = lambda _message: None
        self.gone = asyncio.Event()
        self.seconds = 10.0

    def send(self, message: Message) -> None:
        assert isinstance(message, SecretWanted)
        self.asked.append(message.secret)
        if message.secret in self.values:
            self.tell(message.secret)

    def tell(self, name: str) -> None:
        value = self.values[name]
        problem = None if value is not None else "the command gh failed"
        told = SecretValue(secret=name, value=value, seconds=self.seconds, problem=problem)
        asyncio.get_running_loop().call_soon(lambda: self.on_message(told))

    async def result(self) -> Message:
        await self.gone.wait()
        raise ConnectionError


def play(scene: Coroutine[Any, Any, None]) -> None:
    loop = SimLoop(random.Random(1))
    try:
        loop.run_until_complete(scene)
    finally:
        loop.close()


async def begun(*services: Service) -> Lending:
    lending = Lending()
    lending.begin(GRANTED, None)
    for service in services:
        asyncio.create_task(serving(lending, service))  # noqa: RUF006
    await asyncio.sleep(0)
    return lending


async def serving(lending: Lending, service: Service) -> None:
    with contextlib.suppress(ConnectionError):
        await lending.serve(service, LendSecrets())  # type: ignore[arg-type]


def test_a_value_is_known_for_as_long_as_it_was_told() -> None:
    async def scene() -> None:
        service = Service(key="one")
        lending = await begun(service)
        assert lending.known("key") == []
        assert await asyncio.gather(*(lending.get("key") for _ in range(9))) == [b"one"] * 9
        await asyncio.sleep(9)
        assert await lending.get("key") == b"one"
        assert service.asked == ["key"]
        await asyncio.sleep(1)
        assert lending.known("key") == [], "forgotten, though nobody has asked"
        service.values["key"] = "two"
        assert await lending.get("key") == b"two"

    play(scene())


def test_a_value_before_is_masked_until_its_time_is_over() -> None:
    async def scene() -> None:
        service = Service(key="one-one-one")
        lending = await begun(service)
        await lending.get("key")
        await asyncio.sleep(5)
        service.values["key"] = "two-two-two"
        service.tell("key")
        await asyncio.sleep(0)
        assert lending.known("key") == [b"two-two-two", b"one-one-one"]
        answer = ResponseHead(200, b"OK", Headers([(b"X", b"one-one-one two-two-two")]))
        head, _ = lending.incoming(Subject(443, "own.test"), answer)
        assert b"one" not in head.headers[0][1]
        assert b"two" not in head.headers[0][1]
        await asyncio.sleep(6)
        assert lending.known("key") == [b"two-two-two"]

    play(scene())


def test_a_value_that_cannot_be_had() -> None:
    async def scene() -> None:
        lending = await begun()
        with pytest.raises(SecretUnavailable, match="Capsem's service, which knows it, does not run"):
            await lending.get("key")
        service = Service(key=None)
        lending = await begun(service)
        for _ in range(2):
            with pytest.raises(SecretUnavailable, match="the command gh failed"):
                await lending.get("key")
        silent = Service()
        lending = await begun(silent)
        began = asyncio.get_running_loop().time()
        with pytest.raises(SecretUnavailable, match="was not told within"):
            await lending.get("key")
        assert asyncio.get_running_loop().time() - began == ANSWER_LIMIT
        silent.values["key"] = "late"
        assert await lending.get("key") == b"late"

    play(scene())


def test_another_service_is_asked_what_the_first_has_not_told() -> None:
    async def scene() -> None:
        first, second = Service(), Service(key="v")
        lending = await begun(first)
        asking = asyncio.create_task(lending.get("key"))
        await asyncio.sleep(1)
        first.gone.set()
        await asyncio.sleep(1)
        serving_second = asyncio.create_task(serving(lending, second))
        assert await asking == b"v"
        assert not serving_second.done()

    play(scene())


def test_grants_that_change_take_what_was_known_along() -> None:
    async def scene() -> None:
        service = Service(key="v", other="w")
        lending = await begun(service)
        head = RequestHead(b"GET", b"/", Headers([(b"X-Key", OWN.encode())]))
        subject = Subject(443, "own.test")
        assert (await lending.outgoing(subject, head, verified=True)).headers[0] == (b"X-Key", b"v")
        assert lending.environment == {"KEY": OWN}
        assert lending.placeholders == {"key": (OWN,)}
        lending.set(SetSecrets(grants=grants.to_json([])))
        assert lending.known("key") == []
        assert lending.environment == {}
        with pytest.raises(SecretMisuse, match="taken back"):
            await lending.outgoing(subject, head, verified=True)
        with pytest.raises(InvalidInput):
            lending.set(SetSecrets(grants="{"))

    play(scene())


def test_what_cannot_be_read_grants_nothing() -> None:
    lending = Lending()
    lending.begin("[3]", "parent")
    assert lending.placeholders == {}


def test_a_value_is_in_no_text_about_it() -> None:
    assert "hidden" not in repr(SecretValue(secret="key", value="hidden", seconds=1.0))
