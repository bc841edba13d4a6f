"""Requests of the service from asyncio, as many at once as there are tool calls."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any, Final

from capsem.api.operation import TEXT
from capsem.api.operations import OPERATIONS
from capsem.client.http import Answer, BadAnswer, encode_head
from capsem.client.request import decode_error, path_of
from capsem.client.sync import Client
from capsem.mcp.translate import Call
from capsem.model.errors import Interrupted, TimedOut

_RECEIVE: Final = 256 * 1024


class Service:
    """The service at the other end of `client`, which is started when a call finds that it does not run."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self._connecting = asyncio.Lock()  # calls that come together are to start one service

    async def call(self, call: Call) -> Any:
        """The answer: JSON, or text. A call that is cancelled hangs up, whereupon the service ends what it waited for.

        Raises the CapsemError that the service answers with, Unavailable, Interrupted, TimedOut.
        """
        row = OPERATIONS[call.operation]
        body = b"" if call.body is None else json.dumps(call.body).encode()
        headers = {"Content-Type": "application/json", "Content-Length": str(len(body))}
        head = encode_head(row.method, path_of(row, call.vm_id, call.query), headers)
        try:
            async with asyncio.timeout(row.answer_within):
                answer, content = await self._exchange(head + body)
        except TimeoutError:
            raise TimedOut(
                f"the service did not answer within {row.answer_within:g} s", hint="capsem_list shows how things stand"
            ) from None
        except (BadAnswer, OSError) as exc:
            raise Interrupted(f"the service went away before it had answered: {exc}") from exc
        if not 200 <= answer.status < 300:
            raise decode_error(answer.status, answer.headers, content)
        if row.gives == TEXT:
            return content.decode("utf-8", "replace")
        return json.loads(content)

    async def follow(self, operation: str, heard: Callable[[], None]) -> None:
        """Stay at an operation that tells events, for as long as the service does, and say that something has come."""
        row = OPERATIONS[operation]
        reader, writer = await self._connected()
        answer = Answer()
        try:
            writer.write(encode_head(row.method, path_of(row, None, {}), {"Content-Length": "0"}))
            while not answer.done:
                if not (received := await reader.read(_RECEIVE)):
                    return
                if answer.feed(received):
                    heard()
        finally:
            writer.transport.abort()

    async def _connected(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        async with self._connecting:
            connection = await asyncio.to_thread(self._client.connect)
        connection.setblocking(False)
        return await asyncio.open_connection(sock=connection)

    async def _exchange(self, data: bytes) -> tuple[Answer, bytes]:
        reader, writer = await self._connected()
        answer, parts = Answer(), []
        try:
            writer.write(data)
            while not answer.done:
                if received := await reader.read(_RECEIVE):
                    parts.append(answer.feed(received))
                else:
                    answer.eof()
        finally:
            writer.transport.abort()
        return answer, b"".join(parts)
