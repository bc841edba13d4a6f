"""Requests that are refused before all of them has come: how long the service listens to what it does not want."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator

import pytest
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from capsem.service import unread
from capsem.service.unread import Lingering

PIECE: Message = {"type": "http.request", "body": b"x", "more_body": True}
END: Message = {"type": "http.request", "body": b"", "more_body": False}
GONE: Message = {"type": "http.disconnect"}


def ask(status: int, rest: Iterator[Message], *headers: tuple[bytes, bytes], read: int = 0) -> list[Message]:
    """What an application sends that answers with `status` after so many messages of the request."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        for _ in range(read):
            await receive()
        await Response(b"{}", status)(scope, receive, send)

    async def receive() -> Message:
        await asyncio.sleep(0)
        for message in rest:
            return message
        await asyncio.Event().wait()
        raise AssertionError

    sent: list[Message] = []

    async def send(message: Message) -> None:
        sent.append(message)

    asyncio.run(Lingering(app)({"type": "http", "headers": list(headers)}, receive, send))
    return sent


LONG = (b"content-length", b"50000000")
CHUNKED = (b"transfer-encoding", b"chunked")


def closes(sent: list[Message]) -> bool:
    return (b"connection", b"close") in sent[0]["headers"]


@pytest.mark.parametrize("header", [LONG, CHUNKED])
@pytest.mark.parametrize("last", [END, GONE])
def test_a_refusal_goes_out_before_the_rest_is_read_and_ends_after_it(
    header: tuple[bytes, bytes], last: Message
) -> None:
    rest = iter([PIECE, PIECE, last])
    sent = ask(404, rest, header)
    assert [message.get("more_body", False) for message in sent[1:]] == [True, False]
    assert sent[1]["body"] == b"{}"
    assert closes(sent)
    assert list(rest) == []


@pytest.mark.parametrize(
    ("status", "headers", "read"),
    [(200, [LONG], 0), (404, [LONG], 3), (404, [(b"content-length", b"2")], 0), (404, [], 0)],
    ids=["taken", "all has come", "short", "nothing comes"],
)
def test_there_is_nothing_to_wait_for(status: int, headers: list[tuple[bytes, bytes]], read: int) -> None:
    sent = ask(status, iter([PIECE, PIECE, END]), *headers, read=read)
    assert len(sent) == 2
    assert not closes(sent)


def endless() -> Iterator[Message]:
    while True:
        yield PIECE


@pytest.mark.parametrize(("limit", "rest"), [("SILENCE", lambda: iter([PIECE])), ("LONGEST", endless)])
def test_who_never_ends_is_not_waited_for(
    monkeypatch: pytest.MonkeyPatch, limit: str, rest: Callable[[], Iterator[Message]]
) -> None:
    monkeypatch.setattr(unread, limit, 0.01)
    assert len(ask(413, rest(), CHUNKED)) == 3
