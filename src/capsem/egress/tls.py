"""TLS over a stream of bytes, either side: what OpenSSL wants read and written passes through memory, never through a socket.

One record at a time is taken off the stream below, so that what is not read is held back there.
"""

from __future__ import annotations

import asyncio
import ssl
from typing import Final

from capsem.egress.sockets import SocketStream
from capsem.egress.stream import ByteStream

READ_SIZE: Final = 64 * 1024


class TlsRefused(ConnectionError):
    """The handshake failed. `by_peer`: the other side broke it off with an alert, as a client does that does not trust us;
    `alert` is OpenSSL's name for what happened."""

    def __init__(self, message: str, *, alert: str, by_peer: bool) -> None:
        super().__init__(message)
        self.alert = alert
        self.by_peer = by_peer


class TlsStream:
    """A ByteStream inside of TLS. `handshake` comes first."""

    def __init__(
        self, below: ByteStream, context: ssl.SSLContext, *, server: bool = False, server_hostname: str | None = None
    ) -> None:
        self._below = below
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = context.wrap_bio(
            self._incoming, self._outgoing, server_side=server, server_hostname=server_hostname
        )
        self._buffer = bytearray(READ_SIZE)
        self._view = memoryview(self._buffer)
        self._order = asyncio.Lock()  # records must reach the stream below in the order in which they were made
        self._ended = False  # below
        self._closed = False  # by the peer's word

    async def handshake(self, received: bytes = b"") -> None:
        """Shake hands; `received` is what was read from the stream below already. Raises TlsRefused or ConnectionError."""
        self._incoming.write(received)
        while True:
            try:
                self._tls.do_handshake()
            except ssl.SSLWantReadError:
                await self._flush()
                await self._fill()
                if self._ended:
                    raise TlsRefused(
                        "the connection ended during the TLS handshake", alert="EOF", by_peer=True
                    ) from None
            except ssl.SSLError as error:
                await self._say_goodbye()
                raise refused(error) from error
            else:
                await self._flush()
                return

    @property
    def alpn(self) -> str | None:
        """The protocol that both have agreed upon."""
        return self._tls.selected_alpn_protocol()

    @property
    def version(self) -> str | None:
        """Such as "TLSv1.3"."""
        return self._tls.version()

    async def read(self) -> bytes:
        """See ByteStream."""
        while True:
            size = self._decrypted()
            if self._outgoing.pending:
                await self._flush()
            if size:
                return bytes(self._view[:size])
            if self._closed:
                return b""
            if self._ended:
                # Without its close_notify an end may be somebody's who cut the line.
                raise ConnectionResetError("the connection ended without the end of TLS")
            await self._fill()

    def _decrypted(self) -> int:
        """How many bytes of what has arrived are in the buffer now; 0 when there is no whole record."""
        size = 0
        try:
            # Asking OpenSSL for what is not there costs an exception.
            while size < READ_SIZE and (self._incoming.pending or self._ended or self._tls.pending()):
                got = self._tls.read(READ_SIZE - size, self._view[size:])
                if not got:  # the peer has said that it is done
                    self._closed = True
                    break
                size += int(got)
        except ssl.SSLWantReadError:
            pass
        except ssl.SSLError as error:
            if not size:
                raise ConnectionResetError(f"TLS failed: {error.reason or error}") from error
        return size

    def digest(self) -> bool:
        """Take in what has arrived below, when that is a socket; False if it was more than TLS needs for itself, such as session
        tickets."""
        assert isinstance(self._below, SocketStream)
        self._incoming.write(self._below.take())
        try:
            self._tls.read(1)
        except ssl.SSLWantReadError:
            return True
        except ssl.SSLError:
            return False
        return False

    async def write(self, data: bytes | memoryview) -> None:
        """See ByteStream."""
        try:
            self._tls.write(data)
        except ssl.SSLError as error:
            raise ConnectionResetError(f"TLS failed: {error.reason or error}") from error
        await self._flush()

    async def write_eof(self) -> None:
        """See ByteStream. The peer may take this for the end of both directions, as TLS 1.2 had it."""
        try:
            self._tls.unwrap()
        except ssl.SSLWantReadError:
            pass
        except ssl.SSLError as error:
            raise ConnectionResetError(f"TLS failed: {error.reason or error}") from error
        await self._flush()
        await self._below.write_eof()

    def abort(self) -> None:
        """See ByteStream."""
        self._below.abort()

    async def _fill(self) -> None:
        data = await self._below.read()
        if data:
            self._incoming.write(data)
        else:
            self._ended = True
            self._incoming.write_eof()

    async def _flush(self) -> None:
        if not self._outgoing.pending:
            return
        async with self._order:
            data = self._outgoing.read()
            if data:
                await self._below.write(data)

    async def _say_goodbye(self) -> None:
        """Send the alert that says why."""
        try:
            await self._flush()
        except ConnectionError:  # it did not wait for that
            return


def refused(error: ssl.SSLError) -> TlsRefused:
    """What a failed handshake means."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return TlsRefused(
            f"its certificate is not trusted: {error.verify_message}", alert="CERTIFICATE_VERIFY_FAILED", by_peer=False
        )
    reason = error.reason or "UNKNOWN"
    return TlsRefused(
        f"the TLS handshake failed: {reason.replace('_', ' ').lower()}", alert=reason, by_peer="ALERT" in reason
    )
