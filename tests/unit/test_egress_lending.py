"""Secrets and taps in the proxy core: between clients in memory and real origins in TLS on the loopback interface."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import Awaitable, Callable, Sequence
from functools import wraps
from pathlib import Path
from typing import Any

from capsem.egress.broker import Lender
from capsem.egress.grants import Grant, Places
from capsem.egress.parts import SecretUnavailable
from capsem.egress.taps.pick import model_taps
from capsem.egress.taps.prices import load
from capsem.system.real import RealClock
from egress_bench import Bench, Client, Handler, Rows, answering, bench, read_head, sites
from model_taps import STREAMS

SECRET = b"sk-live-0123456789"
OWN = b"sk-capsem-key-" + b"a" * 20
PARENTS = b"sk-capsem-key-" + b"b" * 20


class Known:
    def __init__(self) -> None:
        self.value: bytes | None = SECRET

    async def get(self, name: str) -> bytes:
        if self.value is None:
            raise SecretUnavailable(name, "the command `gh auth token` failed")
        return self.value

    def known(self, _name: str) -> Sequence[bytes]:
        return [self.value] if self.value is not None else []


def lending(known: Known | None = None, **places: Any) -> Lender:
    grant = Grant("key", (OWN.decode(),), ("own.test",), Places(**places), env="KEY")
    return Lender([grant], known or Known(), "parent")


def run(test: Callable[..., Awaitable[None]]) -> Callable[..., None]:
    """Run an asynchronous test, and end it if it hangs."""

    @wraps(test)
    def wrapper(*args: Any, **more: Any) -> None:
        async def limited() -> None:
            async with asyncio.timeout(60):
                await test(*args, **more)

        asyncio.run(limited())

    return wrapper


async def reach(world: Bench, handler: Handler, host: str = "own.test") -> Client:
    return await world.tls(host, port=await world.origin(handler, host))


def get(*lines: bytes, host: bytes = b"own.test", target: bytes = b"/x") -> bytes:
    return b"".join(
        (b"GET ", target, b" HTTP/1.1\r\nHost: ", host, b"\r\n", *(line + b"\r\n" for line in lines), b"\r\n")
    )


@run
async def test_the_origin_sees_the_secret_and_the_guest_does_not(tmp_path: Path) -> None:
    seen: list[bytes] = []
    echo = b'{"authorization": "Bearer ' + SECRET + b'"}'
    async with bench(tmp_path, sites("own.test"), broker=lending()) as world:
        client = await reach(world, answering(echo, seen=seen, head=b"X-Echo: " + SECRET + b"\r\n"))
        for header in (b"Authorization: Bearer " + OWN, b"Authorization: Basic " + base64.b64encode(b"git:" + OWN)):
            await client.send(get(header, b"Accept-Encoding: gzip"))
            status, headers, body = await client.answer()
            assert (status, len(body), headers["content-length"]) == (200, len(echo), str(len(echo)))
            assert SECRET not in body
            assert SECRET.decode() not in headers["x-echo"]
            assert b'"Bearer sk-capsem' in body
    assert b"Authorization: Bearer " + SECRET in seen[0]
    assert b"Authorization: Basic " + base64.b64encode(b"git:" + SECRET) in seen[1]
    assert all(b"gzip" not in head and b"capsem" not in head for head in seen)
    assert [(row.decision, row.secrets) for row in world.rows.requests] == [("allowed", ("key",))] * 2


@run
async def test_misuse_is_refused_recorded_and_the_last_word_on_that_connection(tmp_path: Path) -> None:
    seen: list[bytes] = []
    header = b"Authorization: Bearer " + OWN
    async with bench(tmp_path, sites("own.test", "other.test"), broker=lending()) as world:
        elsewhere = await reach(world, answering(seen=seen), "other.test")
        plain = world.plain(port=await world.origin(answering(seen=seen)))
        at_home = await reach(world, answering(seen=seen))
        cases = [
            (elsewhere, get(header, host=b"other.test"), "on its way to other.test"),
            (plain, get(header), "without TLS that is checked here"),
            (at_home, get(b"X-Key: " + PARENTS), "perhaps to parent, which this one is a fork of"),
        ]
        for client, request, why in cases:
            await client.send(request)
            status, headers, body = await client.answer()
            assert (status, headers["x-capsem-decision"]) == (403, "denied")
            told = json.loads(body)
            assert why in told["error"]
            assert (told["code"], "do not retry" in told["hint"]) == ("egress_denied", True)
            assert await client.rest() == b""
    assert seen == []
    for row, (_, _, why) in zip(world.rows.requests, cases, strict=True):
        assert (row.decision, row.secrets, row.status_code) == ("denied", ("key",), 403)
        assert why in (row.error or "")


@run
async def test_a_redirect_to_another_host_gets_nothing(tmp_path: Path) -> None:
    """What a client does that takes its headers along."""
    seen: list[bytes] = []
    async with bench(tmp_path, sites("own.test", "other.test"), broker=lending(query=True)) as world:
        there = await world.origin(answering(seen=seen), "other.test")
        location = b"https://other.test:%d/?key=%b" % (there, SECRET)
        client = await reach(world, answering(head=b"Location: " + location + b"\r\n"))
        await client.send(get(target=b"/?key=" + OWN))
        _, headers, _ = await client.answer()
        assert SECRET.decode() not in headers["location"]
        follower = await world.tls("other.test", port=there)
        await follower.send(get(b"Authorization: Bearer " + OWN, host=b"other.test", target=b"/?key=" + OWN))
        assert (await follower.answer())[0] == 403
    assert seen == []


@run
async def test_a_value_that_cannot_be_had_and_then_another_one(tmp_path: Path) -> None:
    seen: list[bytes] = []
    known = Known()
    known.value = None
    async with bench(tmp_path, sites("own.test"), broker=lending(known)) as world:
        port = await world.origin(answering(seen=seen), "own.test")
        client = await world.tls("own.test", port=port)
        await client.send(get(b"X-Key: " + OWN))
        status, headers, body = await client.answer()
        assert (status, headers["x-capsem-decision"]) == (502, "error")
        assert "gh auth token" in json.loads(body)["error"]
        known.value = b"rotated-value"
        client = await world.tls("own.test", port=port)
        await client.send(get(b"X-Key: " + OWN))
        assert (await client.answer())[0] == 200
    assert [b"X-Key: rotated-value" in head for head in seen] == [True]
    assert [row.decision for row in world.rows.requests] == ["error", "allowed"]


@run
async def test_a_body_is_measured_anew(tmp_path: Path) -> None:
    bodies: list[tuple[bytes, bytes]] = []

    async def origin(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            head = await read_head(reader)
            length = next(int(line[16:]) for line in head.split(b"\r\n") if line.lower().startswith(b"content-length:"))
            bodies.append((head, await reader.readexactly(length)))
            writer.write(b"HTTP/1.1 204 No Content\r\n\r\n")

    form = b"grant_type=client_credentials&client_secret=" + OWN
    async with bench(tmp_path, sites("own.test"), broker=lending(body=True)) as world:
        client = await reach(world, origin)
        head = b"POST /token HTTP/1.1\r\nHost: own.test\r\nContent-Type: application/x-www-form-urlencoded\r\n"
        await client.send(head + b"Content-Length: %d\r\n\r\n" % len(form) + form[:50])
        await client.send(form[50:])
        assert (await client.answer())[0] == 204
    assert bodies[0][1] == form.replace(OWN, SECRET)
    assert world.rows.requests[0].secrets == ("key",)


@run
async def test_a_call_of_a_model_has_its_row_and_its_tap_never_saw_the_secret(tmp_path: Path) -> None:
    recording = (STREAMS / "anthropic-stream.sse").read_bytes()
    events = [event + b"\n\n" for event in recording.split(b"\n\n") if event]
    leak = b'{\\"token\\": \\"' + SECRET + b'\\"}'
    events = [event.replace(b'"partial_json":"{}"', b'"partial_json":"' + leak + b'"') for event in events]

    async def origin(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await read_head(reader)
        assert b"x-api-key: " + SECRET in head
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n")
        for event in events:
            writer.write(b"%x\r\n%b\r\n" % (len(event), event))
            await writer.drain()
        writer.write(b"0\r\n\r\n")

    rows = Rows()
    taps = model_taps(rows, RealClock(), load())
    allowed = sites("own.test", model="anthropic")
    async with bench(tmp_path, allowed, broker=lending(), taps=taps, recorder=rows) as world:
        client = await reach(world, origin)
        request = (STREAMS / "anthropic-stream.request.json").read_bytes()
        head = b"POST /v1/messages HTTP/1.1\r\nHost: own.test\r\nx-api-key: " + OWN + b"\r\n"
        await client.send(head + b"Content-Length: %d\r\n\r\n" % len(request) + request)
        status, _, body = await client.answer()
    assert (status, len(body)) == (200, len(b"".join(events)))
    (call,) = rows.calls
    assert (call.provider, call.model, call.input_tokens, call.output_tokens) == (
        "own.test", "claude-sonnet-4-5-20250929", 43000, 300,
    )  # fmt: skip
    assert [tool.name for tool in call.tools] == ["read_file", "stat"]
    assert "sk-capsem-key" in call.tools[1].arguments
    assert SECRET.decode() not in repr(call)
    assert SECRET not in body
    assert rows.requests[0].secrets == ("key",)
