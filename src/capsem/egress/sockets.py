"""Sockets of the host as streams of bytes (see `capsem.egress.stream`), with no more than two times 64 KiB in memory."""

from __future__ import annotations

import asyncio
from collections import deque
from typing import Final

HIGH_WATER: Final = 64 * 1024


class SocketStream(asyncio.BufferedProtocol):
    """A connected socket, as a ByteStream."""

    # A read of the event loop fills it and is told of at once, so that one serves all: nothing waits in it.
    _shared = bytearray(HIGH_WATER)

    def __init__(self) -> None:
        self._transport: asyncio.Transport | None = None
        self._chunks: deque[bytes] = deque()
        self._size = 0
        self._paused = False
        self._eof = False
        self._lost: ConnectionError | None = None
        self._reader: asyncio.Future[None] | None = None
        self._writers: deque[asyncio.Future[None]] = deque()
        self._full = False

    # What the event loop calls.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """See asyncio."""
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        transport.set_write_buffer_limits(high=HIGH_WATER)

    def get_buffer(self, sizehint: int) -> bytearray:
        """See asyncio."""
        return self._shared

    def buffer_updated(self, nbytes: int) -> None:
        """See asyncio."""
        self._chunks.append(bytes(memoryview(self._shared)[:nbytes]))
        self._size += nbytes
        if self._size >= HIGH_WATER and not self._paused:
            assert self._transport is not None
            self._paused = True
            self._transport.pause_reading()
        self._wake()

    def eof_received(self) -> bool:
        """See asyncio; the other direction stays open."""
        self._eof = True
        self._wake()
        return True

    def connection_lost(self, exc: Exception | None) -> None:
        """See asyncio."""
        self._eof = True
        self._lost = ConnectionResetError(f"the connection was lost: {exc}" if exc else "the connection is closed")
        self._lost.__cause__ = exc
        self._wake()
        self.resume_writing()

    def pause_writing(self) -> None:
        """See asyncio."""
        self._full = True

    def resume_writing(self) -> None:
        """See asyncio."""
        self._full = False
        while self._writers:
            waiter = self._writers.popleft()
            if not waiter.done():
                waiter.set_result(None)

    def _wake(self) -> None:
        if self._reader is not None and not self._reader.done():
            self._reader.set_result(None)

    # ByteStream.

    async def read(self) -> bytes:
        """See ByteStream. Cancelling it loses nothing."""
        while not self._chunks:
            if self._lost is not None and self._lost.__cause__ is not None:
                raise ConnectionResetError(str(self._lost)) from self._lost.__cause__
            if self._eof:
                return b""
            assert self._reader is None, "two readers of one stream"
            self._reader = asyncio.get_running_loop().create_future()
            try:
                await self._reader
            finally:
                self._reader = None
        return self.take()

    def take(self) -> bytes:
        """What has arrived and was not read, without waiting."""
        data = self._chunks.popleft() if len(self._chunks) == 1 else b"".join(self._chunks)
        self._chunks.clear()
        self._size = 0
        if self._paused and self._transport is not None and not self._transport.is_closing():
            self._paused = False
            self._transport.resume_reading()
        return data

    async def write(self, data: bytes | memoryview) -> None:
        """See ByteStream."""
        if self._lost is not None:
            raise ConnectionResetError(str(self._lost))
        assert self._transport is not None
        self._transport.write(data)
        if self._full:
            waiter = asyncio.get_running_loop().create_future()
            self._writers.append(waiter)
            await waiter
            if self._lost is not None:
                raise ConnectionResetError(str(self._lost))

    async def write_eof(self) -> None:
        """See ByteStream."""
        if self._lost is None and self._transport is not None and not self._transport.is_closing():
            self._transport.write_eof()

    def abort(self) -> None:
        """See ByteStream."""
        if self._transport is not None:
            self._transport.abort()

    @property
    def waiting(self) -> bool:
        """Whether something has arrived that was not read."""
        return bool(self._chunks)

    @property
    def ended(self) -> bool:
        """Whether nothing more will arrive than has."""
        return self._eof
