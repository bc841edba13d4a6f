"""Where the streams that a guest opens meet what carries them out: connections and questions for addresses.

One for each machine. It is closed until the guest is who it is to be, and when the machine is suspended; a stream belongs to
its epoch, and what it was carrying ends with it.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine
from typing import Any, Protocol

from capsem.control.channel import Stream
from capsem.egress.facts import Connection
from capsem.egress.stream import GuestStream
from capsem.wire.messages import STDIN, STDOUT, Egress, EgressEnded, Failed, Resolve, Resolved

# What one guest may have open, and have waiting for it; its agent keeps to less, another might not.
MAX_STREAMS = 512
MAX_BACKLOG = 64 * 1024 * 1024  # bytes

log = logging.getLogger("capsem_process.gateway")


class Carrier(Protocol):
    """What becomes of streams."""

    async def connection(self, stream: GuestStream) -> None:
        """Carry a connection until it is over. Cancelled when its epoch is."""

    async def question(self, query: bytes, process: str | None) -> bytes:
        """The answer to a program's DNS message, b"" when it deserves none."""


class GuestConnection:
    """A connection of a program in the guest; fits `egress.stream.GuestStream`."""

    def __init__(self, stream: Stream, request: Egress) -> None:
        self.connection = Connection(request.address, request.port, explicit=request.explicit, process=request.process)
        self._stream = stream
        self._ended = False  # nothing more will be sent
        self._closed = False

    async def read(self) -> bytes:
        """See ByteStream."""
        data = await self._stream.read(STDOUT)
        if not data and not self._stream.ended(STDOUT):
            raise ConnectionResetError("the guest has reset the connection")
        return data

    async def write(self, data: bytes | memoryview) -> None:
        """See ByteStream."""
        await self._stream.write(STDIN, data)
        if self._stream.over:
            raise ConnectionResetError("the guest has reset the connection")

    async def write_eof(self) -> None:
        """See ByteStream."""
        self._ended = True
        self._stream.end(STDIN)

    def abort(self) -> None:
        """See ByteStream. Once the end was said, what is still on its way there comes first."""
        if self._ended:
            self.finish()
        elif not self._closed:
            self._closed = True
            self._stream.reset()

    def finish(self) -> None:
        """Let the program have what it was sent, then end the connection, if it has not ended otherwise."""
        if not self._closed and not self._stream.over:
            self._closed = True
            self._stream.end(STDIN)
            self._stream.close(EgressEnded())


class Gateway:
    """Serves the streams of one guest with a carrier."""

    def __init__(self, carrier: Carrier) -> None:
        self._carrier = carrier
        self._tasks: set[asyncio.Task[None]] = set()
        self._connections = 0

    @property
    def connections(self) -> int:
        """How many there are."""
        return self._connections

    def opened(self, stream: Stream) -> None:
        """The guest has opened a stream."""
        request = stream.request
        if len(self._tasks) >= MAX_STREAMS or stream.backlog > MAX_BACKLOG:
            log.warning("the guest has too many streams open, or reads too little of them: another one is refused")
            stream.reset()
        elif isinstance(request, Egress):
            self._start(self._carry(stream, request))
        elif isinstance(request, Resolve):
            self._start(self._answer(stream, request))
        else:
            stream.reset()

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("a stream of the guest could not be carried", exc_info=error)

    async def _carry(self, stream: Stream, request: Egress) -> None:
        connection = GuestConnection(stream, request)
        self._connections += 1
        try:
            await self._carrier.connection(connection)
            connection.finish()
        except ConnectionError as error:
            log.debug("a connection ended: %s", error)
            connection.abort()
        except BaseException:
            connection.abort()
            raise
        finally:
            self._connections -= 1

    async def _answer(self, stream: Stream, request: Resolve) -> None:
        answer = b""
        try:
            query = bytes.fromhex(request.query)
        except ValueError:
            query = b""
        try:
            if query:
                answer = await self._carrier.question(query, request.process)
        finally:
            stream.close(
                Resolved(answer=answer.hex()) if answer else Failed(code="unavailable", message="there is no answer")
            )

    def cut(self) -> None:
        """End everything that is under way, as interrupted rather than as whatever its end looks like from there."""
        for task in self._tasks:
            task.cancel()

    async def close(self) -> None:
        """The same, and return when all of it has ended."""
        self.cut()
        await asyncio.gather(*self._tasks, return_exceptions=True)
