"""Two connections made one: bytes pass both ways, unread, until both sides have ended or one breaks."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from capsem.egress.events import NetEvent
from capsem.egress.peer import Peer


class Splice:
    """Carries bytes between the guest and an origin; what passes is counted in `event`."""

    def __init__(self, guest: Peer, origin: Peer, event: NetEvent) -> None:
        self._guest = guest
        self._origin = origin
        self._event = event
        self._cut: str | None = None

    async def run(self) -> None:
        """Returns when both directions have ended. Raises ConnectionError when one breaks, and aborts both."""
        ways = (
            asyncio.create_task(self._carry(self._guest, self._origin, self._sent)),
            asyncio.create_task(self._carry(self._origin, self._guest, self._received)),
        )
        try:
            await asyncio.gather(*ways)
        except BaseException as error:
            self._guest.stream.abort()
            self._origin.stream.abort()
            if self._cut is not None and isinstance(error, ConnectionError):
                raise ConnectionAbortedError(self._cut) from error
            raise
        finally:
            for way in ways:
                way.cancel()
            await asyncio.gather(*ways, return_exceptions=True)

    def cut(self, reason: str) -> None:
        """Break both at once."""
        self._cut = reason
        self._guest.stream.abort()
        self._origin.stream.abort()

    @staticmethod
    async def _carry(source: Peer, sink: Peer, count: Callable[[int], None]) -> None:
        while data := await source.read():
            await sink.stream.write(data)
            count(len(data))
        await sink.stream.write_eof()

    def _sent(self, size: int) -> None:
        self._event.bytes_sent += size

    def _received(self, size: int) -> None:
        self._event.bytes_received += size
