"""What a peer did, as the Mux of streams tells it: one event at a time, in the order of arrival."""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from capsem.wire.schema import Message


class Event:
    """Something that a peer did. `stream` is 0 where it concerns the whole connection."""

    __slots__ = ("stream",)

    def __init__(self, stream: int = 0) -> None:
        self.stream = stream

    def __repr__(self) -> str:
        names = [name for cls in type(self).__mro__ for name in getattr(cls, "__slots__", ())]
        return f"{type(self).__name__}({', '.join(f'{name}={getattr(self, name)!r:.80}' for name in names)})"


class EpochStarted(Event):
    """The epoch of `nonce` began: every stream is gone. `answer` when this end began it and the peer agrees."""

    __slots__ = ("answer", "nonce")

    def __init__(self, nonce: bytes, *, answer: bool) -> None:
        super().__init__()
        self.nonce = nonce
        self.answer = answer


class MessageReceived(Event):
    """A message for the connection (stream 0) or on a stream."""

    __slots__ = ("message",)

    def __init__(self, stream: int, message: Message) -> None:
        super().__init__(stream)
        self.message = message


class Opened(MessageReceived):
    """The peer opened a stream with a request."""

    __slots__ = ()


class Closed(MessageReceived):
    """The peer closed a stream with a result; it has sent all its data before."""

    __slots__ = ()


class DataReceived(Event):
    """Bytes on a channel; give them back with `consumed` once they are dealt with. `data` may be a view of what was
    received: see FrameDecoder.feed."""

    __slots__ = ("channel", "data")

    def __init__(self, stream: int, channel: int, data: bytes | memoryview) -> None:
        super().__init__(stream)
        self.channel = channel
        self.data = data


class EndReceived(Event):
    """The peer will send nothing more on a channel."""

    __slots__ = ("channel",)

    def __init__(self, stream: int, channel: int) -> None:
        super().__init__(stream)
        self.channel = channel


class CreditReceived(EndReceived):
    """There is room to send on a channel that may have been blocked."""

    __slots__ = ()


class ResetReceived(Event):
    """The peer gave up a stream: nothing more comes, nothing more is wanted."""

    __slots__ = ()
