"""One end of an HTTP/2 connection: the state machine of the h2 library over a stream of bytes, with what that leaves to us."""

from __future__ import annotations

import asyncio
import struct
from dataclasses import dataclass
from typing import Final

from h2.config import H2Configuration
from h2.connection import H2Connection
from h2.errors import ErrorCodes
from h2.events import Event
from h2.exceptions import H2Error, ProtocolError
from h2.settings import SettingCodes

from capsem.egress.heads import Header, Headers
from capsem.egress.http1 import MAX_HEAD
from capsem.egress.stream import ByteStream

STREAMS: Final = 100  # at once, on a connection
WINDOW: Final = 64 * 1024  # bytes of a stream that may be under way
CONNECTION_WINDOW: Final = 1024 * 1024  # and of all streams of a connection
_GOAWAY: Final = 7
_MAX_FRAME: Final = 16 * 1024  # what is meant by a peer that was told nothing else
_PREFACE: Final = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"


@dataclass(frozen=True, slots=True)
class GoingAway:
    """The peer takes no new streams; those up to `last` go on to their ends."""

    last: int


class SideFailed(ConnectionError):
    """The peer broke the protocol, and was told so; the message says how."""


class Side:
    """See the module. `server`: the peer is a client."""

    def __init__(self, stream: ByteStream, *, server: bool) -> None:
        self.stream = stream
        self.h2 = H2Connection(H2Configuration(client_side=not server, header_encoding=None))
        self._order = asyncio.Lock()
        self._moved: asyncio.Future[None] | None = None
        self._data = bytearray()
        self._preface = len(_PREFACE) if server else 0

    async def start(self) -> None:
        """Say the first words."""
        self.h2.initiate_connection()
        settings: dict[SettingCodes | int, int] = {
            SettingCodes.MAX_CONCURRENT_STREAMS: STREAMS,
            SettingCodes.INITIAL_WINDOW_SIZE: WINDOW,
            SettingCodes.MAX_HEADER_LIST_SIZE: MAX_HEAD,
        }
        if self.h2.config.client_side:
            settings[SettingCodes.ENABLE_PUSH] = 0
        self.h2.update_settings(settings)
        self.h2.increment_flow_control_window(CONNECTION_WINDOW - 65535)
        await self.flush()

    async def flush(self) -> None:
        """Send what there is to send. Raises ConnectionError."""
        async with self._order:
            data = self.h2.data_to_send()
            if data:
                await self.stream.write(data)

    async def events(self) -> list[Event | GoingAway] | None:
        """What the peer says next, None at its end. Raises SideFailed, ConnectionError."""
        data = await self.stream.read()
        if not data:
            return None
        self._data += data
        found: list[Event | GoingAway] = []
        try:
            while (piece := self._piece()) is not None:
                if isinstance(piece, GoingAway):
                    found.append(piece)
                else:
                    found += self.h2.receive_data(piece)
        except (H2Error, ValueError) as error:
            # The library has words for the peer, and for some errors none.
            if not isinstance(error, ProtocolError):
                self.h2.close_connection(ErrorCodes.PROTOCOL_ERROR)
            await self.flush()
            raise SideFailed(f"HTTP/2: {error or type(error).__name__}") from error
        self._wake()
        await self.flush()
        return found

    def _piece(self) -> bytes | GoingAway | None:
        """All whole frames that are here up to one of GOAWAY, or that. The library takes a connection for closed when it sees
        one, although the streams of before go on."""
        if self._preface:
            size = min(self._preface, len(self._data))
            self._preface -= size
            return self._take(size) if size else None
        at = 0
        while len(self._data) - at >= 9:
            length = int.from_bytes(self._data[at : at + 3], "big")
            if length > _MAX_FRAME:
                raise ValueError(f"a frame of {length} bytes")
            if len(self._data) - at < 9 + length:
                break
            if self._data[at + 3] == _GOAWAY:
                if at:
                    break
                frame = self._take(9 + length)
                if length < 8:
                    raise ValueError("a GOAWAY without its fields")
                return GoingAway(struct.unpack_from("!I", frame, 9)[0] & 0x7FFFFFFF)
            at += 9 + length
        return self._take(at) if at else None

    def _take(self, size: int) -> bytes:
        data = bytes(self._data[:size])
        del self._data[:size]
        return data

    def _wake(self) -> None:
        if self._moved is not None:
            self._moved.set_result(None)
            self._moved = None

    async def moved(self) -> None:
        """Return when the peer has said something: there may be room then."""
        if self._moved is None:
            self._moved = asyncio.get_running_loop().create_future()
        await asyncio.shield(self._moved)

    async def open(self, headers: list[Header], *, end: bool) -> int:
        """Begin a stream; waits while the peer has as many as it wants. Raises ConnectionError, H2Error."""
        while self.h2.open_outbound_streams >= min(self.h2.remote_settings.max_concurrent_streams, STREAMS):
            await self.moved()
        stream_id = self.h2.get_next_available_stream_id()
        self.h2.send_headers(stream_id, headers, end_stream=end)
        await self.flush()
        return stream_id

    async def head(self, stream_id: int, headers: list[Header], *, end: bool) -> None:
        """Send header fields, or trailers. Raises ConnectionError, H2Error."""
        self.h2.send_headers(stream_id, headers, end_stream=end)
        await self.flush()

    async def data(self, stream_id: int, data: bytes, *, end: bool) -> None:
        """Send a piece of a body; waits while the peer takes no more. Raises ConnectionError, H2Error."""
        at = 0
        while at < len(data):
            room = min(self.h2.local_flow_control_window(stream_id), self.h2.max_outbound_frame_size)
            if room <= 0:
                await self.moved()
                continue
            piece = data[at : at + room]
            at += len(piece)
            self.h2.send_data(stream_id, piece, end_stream=end and at == len(data))
            await self.flush()
        if end and not data:
            self.h2.end_stream(stream_id)
            await self.flush()

    async def took(self, stream_id: int, size: int) -> None:
        """So many bytes of a stream went on their way: the peer may send as many more."""
        if not size:
            return
        try:
            self.h2.acknowledge_received_data(size, stream_id)
        except H2Error:  # the connection has ended
            return
        await self.flush()

    async def reset(self, stream_id: int, code: ErrorCodes) -> None:
        """End a stream, unless it has ended."""
        try:
            self.h2.reset_stream(stream_id, code)
        except H2Error:  # it has
            return
        await self.flush()


def plain(headers: list[Header], *without: bytes) -> Headers:
    """Fields that are no pseudo-fields, without those."""
    return Headers((name, value) for name, value in headers if not name.startswith(b":") and name not in without)
