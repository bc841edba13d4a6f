"""What serves one stream."""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from capsem.wire.schema import Message


class Servant:
    """Base: takes what happens on its stream; what it does not expect it ignores."""

    def feed(self, data: bytes | memoryview) -> None:
        """Bytes from the host, to be dealt with or copied before this returns. Raises Refused, OSError: the stream is
        then closed with that.
        """

    def feed_end(self) -> None:
        """No more bytes will come."""

    def credit(self, channel: int) -> None:
        """The host takes more on a channel. Raises as `feed`."""

    def message(self, message: Message) -> None:
        """A message from the host."""

    def closed(self, result: Message) -> None:
        """The host has closed a stream that this end opened."""

    def cancelled(self) -> None:
        """The host gave the stream up: stop."""

    def orphaned(self) -> None:
        """A new epoch began, the stream is gone: a command goes on, anything else stops."""
        self.cancelled()
