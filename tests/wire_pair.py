"""Two ends of a connection back to back, with the bytes between them in the test's hands."""

from __future__ import annotations

from collections.abc import Iterable

from capsem.wire.decoder import FrameDecoder
from capsem.wire.events import Event
from capsem.wire.frames import DATA, FIRST_NONCE, Frame, Marker
from capsem.wire.streams import Mux


def merged(items: Iterable[Frame | Marker]) -> list[object]:
    """Data as it was meant, in however many pieces it came; markers compare by what they say."""
    found: list[object] = []
    for item in items:
        last = found[-1] if found else None
        if isinstance(item, Marker):
            found.append((item.nonce, item.answer))
        elif isinstance(last, Frame) and item.kind == last.kind == DATA and _place(item) == _place(last):
            found[-1] = Frame(DATA, item.stream, item.channel, bytes(last.payload) + bytes(item.payload))
        elif item.kind != DATA or item.payload:
            found.append(Frame(item.kind, item.stream, item.channel, bytes(item.payload)))
    return found


def _place(frame: Frame) -> tuple[int, int]:
    return frame.stream, frame.channel


class End:
    """One end: its mux, the bytes under way to it, and all that it was told."""

    def __init__(self, mux: Mux) -> None:
        self.mux = mux
        self.inbox = bytearray()
        self.events: list[Event] = []
        self.peer: End = self

    def send(self, pieces: int = 1 << 30) -> int:
        """Put up to `pieces` outputs of the mux on the wire; returns how many there were."""
        for count in range(pieces):
            pieces = self.mux.output()
            if not pieces:
                return count
            self.peer.inbox += b"".join(pieces)
        return pieces

    def take(self, size: int = 1 << 30) -> list[Event]:
        """Receive up to `size` of the bytes under way."""
        data = bytes(self.inbox[:size])
        del self.inbox[:size]
        events = list(self.mux.receive(data)) if data else []
        self.events += events
        return events

    def told(self) -> list[Event]:
        """What happened since this was last asked."""
        events, self.events = self.events, []
        return events


def new_mux(*nonces: bytes, initiator: bool, hunting: bool = False) -> Mux:
    """A mux that waits for the first epoch's nonce, or is already in it."""
    return Mux(FrameDecoder(*(nonces or (FIRST_NONCE,)), hunting=hunting), initiator=initiator)


def pair(*, hunting: bool = False) -> tuple[End, End]:
    """Host and guest; without `hunting` they are in the same epoch already."""
    host, guest = (End(new_mux(initiator=initiator, hunting=hunting)) for initiator in (True, False))
    host.peer, guest.peer = guest, host
    return host, guest


def settle(*ends: End, limit: int = 100_000) -> int:
    """Carry bytes until both ends are silent; returns how many turns it took. Fails when they never are."""
    for turn in range(limit):
        moved = sum(end.send() for end in ends)
        moved += sum(bool(end.inbox) for end in ends)
        if not moved:
            return turn
        for end in ends:
            end.take()
    raise AssertionError("the two ends never fall silent")
