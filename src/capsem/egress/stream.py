"""The only I/O that the core of the proxy knows: a stream of bytes in two directions, and who gives it one."""

from __future__ import annotations

from typing import Protocol

from capsem.egress.facts import Connection


class ByteStream(Protocol):
    """A connection: with a program in the guest, or with an origin. Reads and writes fail with ConnectionError when the
    other side, or the epoch of the VM that it belongs to, is gone."""

    async def read(self) -> bytes:
        """The next bytes, at most 64 KiB or so; b"" when no more will come. Not reading is what holds a sender back. There is one
        reader at a time; cancelling it loses nothing."""

    async def write(self, data: bytes | memoryview) -> None:
        """Send all of it; waits while the other side takes no more."""

    async def write_eof(self) -> None:
        """Send nothing more; the other direction goes on."""

    def abort(self) -> None:
        """End both directions at once (a reset, for TCP). Safe to call again, and after the end."""


class GuestStream(ByteStream, Protocol):
    """A stream that the guest has opened."""

    @property
    def connection(self) -> Connection:
        """What the guest says that it is for."""
