"""One side of an HTTP/1.1 connection: a stream, and what has been read of it beyond what was asked for."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from capsem.egress.http1 import BadHead, HeadReader
from capsem.egress.stream import ByteStream


class Peer:
    """Reads heads and what follows them. `received` is what was read of the stream before."""

    def __init__(self, stream: ByteStream, received: bytes = b"") -> None:
        self.stream = stream
        self._heads = HeadReader()
        self._heads.feed(received)
        self._ahead: asyncio.Task[bytes] | None = None  # a read that began before anybody wanted its result
        self._ended = False

    async def head(self, *, began: Callable[[], None] | None = None) -> bytes | None:
        """The next head; None when the stream ends before one. `began` is called when there is more to come. Raises BadHead,
        ConnectionError."""
        while (block := self._heads.head()) is None:
            if began is not None and self._heads:
                began()
            data = await self._read()
            if not data:
                if self._heads:
                    raise BadHead("the connection ended in the middle of a head")
                return None
            self._heads.feed(data)
        return block

    async def read(self) -> bytes:
        """What comes next, b"" at the end. Raises ConnectionError."""
        return self._heads.rest() or await self._read()

    async def peek(self, *, more: bool = False) -> bytes:
        """What comes next, left where it is: more than is here already if so asked. b"" at the end. Raises ConnectionError."""
        if more or not self._heads:
            self._heads.feed(await self._read())
        return self._heads.peek()

    def rest(self) -> bytes:
        """What has been read already."""
        return self._heads.rest()

    def push(self, data: bytes) -> None:
        """Have that read next."""
        assert not self._heads
        self._heads.feed(data)

    def watch(self, gone: Callable[[], None]) -> None:
        """Read ahead once, to call `gone` should the connection break meanwhile. What arrives is there for who reads next."""
        if self._ahead is None and not self._ended:
            self._ahead = asyncio.create_task(self._watch(gone))

    async def _watch(self, gone: Callable[[], None]) -> bytes:
        try:
            return await self.stream.read()
        except ConnectionError:
            gone()
            raise

    async def _read(self) -> bytes:
        if self._ended:
            return b""
        if self._ahead is not None:
            data = await asyncio.shield(self._ahead)
            self._ahead = None
        else:
            data = await self.stream.read()
        self._ended = not data
        return data

    async def finish(self) -> None:
        """Nothing more will be read."""
        if self._ahead is not None:
            self._ahead.cancel()
            await asyncio.gather(self._ahead, return_exceptions=True)
            self._ahead = None
