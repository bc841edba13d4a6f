"""What becomes of the rest of a request that was refused before all of it had come.

Many clients send the head and then the body, and if the connection breaks in between never look for the answer. So the
answer goes out at once, says that the connection will be closed, and until the client has sent all or hung up, for a
limited time, what still comes is dropped.
"""

from __future__ import annotations

import asyncio
from typing import Final

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

SHORT: Final = 64 * 1024  # bytes of a body for which the connection is not worth closing
SILENCE: Final = 2.0  # seconds without anything, after which nobody is thought to send the rest
LONGEST: Final = 30.0  # seconds


class Lingering:
    """An application whose refusals are read by those, too, who send everything first."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http" or _is_short(Headers(scope=scope)):
            await self._app(scope, receive, send)
            return
        rest = _Rest(receive)
        refused = False

        async def answer(message: Message) -> None:
            nonlocal refused
            if message["type"] == "http.response.start" and message["status"] >= 400 and not rest.ended:
                refused = True
                MutableHeaders(scope=message)["Connection"] = "close"
            elif refused and not message.get("more_body"):
                await send({**message, "more_body": True})
                await rest.drop()
                message = {"type": "http.response.body"}
            await send(message)

        await self._app(scope, rest.receive, answer)


class _Rest:
    """What a client has not sent yet."""

    def __init__(self, receive: Receive) -> None:
        self._receive = receive
        self.ended = False

    async def receive(self) -> Message:
        """The next of it."""
        message = await self._receive()
        self.ended = not message.get("more_body")  # nor is there any more of one who hung up
        return message

    async def drop(self) -> None:
        """Read it for nobody."""
        try:
            async with asyncio.timeout(LONGEST):
                while not self.ended:
                    async with asyncio.timeout(SILENCE):
                        await self.receive()
        except TimeoutError:
            pass  # it waits for the end, or has no end: the connection is closed on it


def _is_short(headers: Headers) -> bool:
    """Whether so little comes, if anything, that the server may well read it and serve the next request."""
    length = headers.get("content-length", "")
    return "transfer-encoding" not in headers and (not length.isdigit() or int(length) <= SHORT)
