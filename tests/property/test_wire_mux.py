"""Two muxes back to back under anything that applications and the wire can do: all data arrives, in order, once."""

from __future__ import annotations

from collections import defaultdict

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from capsem.wire import frames, streams
from capsem.wire.events import (
    Closed,
    CreditReceived,
    DataReceived,
    EndReceived,
    Event,
    MessageReceived,
    Opened,
    ResetReceived,
)
from capsem.wire.messages import Egress, EgressEnded, Exec, Exited, Ping
from wire_pair import End, pair, settle

WINDOW, NARROW, SHARED, WIDE, LARGEST, ONE_WRITE = 64, 24, 100, 200, 20, 12  # small ones are reached sooner

ANY = st.integers(0, 5)
SIZES = st.sampled_from([1, 2, 19, 64, 65, 100, 200])

Key = tuple[int, int]  # stream, channel


class Side:
    """One application: what it has sent, and what it was told."""

    def __init__(self, end: End, name: str) -> None:
        self.end = end
        self.name = name
        self.peer: Side = self
        self.sent: dict[Key, bytearray] = defaultdict(bytearray)
        self.ended: set[Key] = set()
        self.pouring: set[Key] = set()
        self.closing: set[int] = set()
        self.received: dict[Key, bytearray] = defaultdict(bytearray)
        self.consumed: dict[Key, int] = defaultdict(int)
        self.windows: dict[Key, int] = defaultdict(lambda: WINDOW)
        self.end_seen: set[Key] = set()
        self.close_seen: set[int] = set()
        self.over: set[int] = set()  # nothing is sent on these any more
        self.reset: set[int] = set()
        self.pings = 0
        self.pings_seen = 0

    def told(self, event: Event) -> None:
        stream = event.stream
        if isinstance(event, Opened):
            assert stream not in self.over
        elif isinstance(event, DataReceived):
            key = (stream, event.channel)
            assert key not in self.end_seen, "data after the end"
            assert stream not in self.close_seen, "data after the close"
            self.received[key] += event.data
            assert self.peer.sent[key].startswith(self.received[key]), "lost, twice or out of order"
            assert len(self.received[key]) <= self.consumed[key] + self.windows[key], "over the credit"
        elif isinstance(event, CreditReceived):
            assert self.end.mux.room(stream, event.channel) >= 0
        elif isinstance(event, EndReceived):
            key = (stream, event.channel)
            assert key in self.peer.ended
            assert self.received[key] == self.peer.sent[key], "the end before all data"
            self.end_seen.add(key)
        elif isinstance(event, ResetReceived):
            assert stream in self.peer.reset
            self.over.add(stream)
        elif isinstance(event, Closed):
            assert stream in self.peer.closing
            for (of, channel), data in self.peer.sent.items():
                assert of != stream or data == self.received[of, channel], "the close before all data"
            self.close_seen.add(stream)
            self.over.add(stream)
        elif isinstance(event, MessageReceived) and not stream:
            self.pings_seen += 1

    def take(self, size: int) -> None:
        for event in self.end.take(size):
            self.told(event)
        self.end.told()


class Connection(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.patch = pytest.MonkeyPatch()
        for name, value in (("WINDOW", WINDOW), ("NARROW", NARROW), ("SHARED", SHARED)):
            self.patch.setattr(streams, name, value)
        self.patch.setattr(frames, "ONE_WRITE", ONE_WRITE)
        host, guest = pair()
        host.mux.largest = guest.mux.largest = LARGEST
        self.host, self.guest = Side(host, "host"), Side(guest, "guest")
        self.host.peer, self.guest.peer = self.guest, self.host
        self.open_ids: list[tuple[int, Side]] = []  # with who opened it
        for of_host in (True, False):
            self.opens(of_host)
        settle(host, guest)

    def teardown(self) -> None:
        """Let everything arrive: nothing may be stuck, and nothing missing."""
        try:
            for _ in range(1000):
                moved = False
                for side in (self.host, self.guest):
                    moved |= bool(side.end.send())
                    moved |= bool(side.end.inbox)
                    side.take(1 << 30)
                    for key, data in side.received.items():
                        moved |= side.consumed[key] < len(data)
                        self._consume(side, key, len(data) - side.consumed[key])
                if not moved:
                    break
            else:
                raise AssertionError("never silent")
            for side in (self.host, self.guest):
                assert side.peer.pings_seen == side.pings
                for (stream, channel), data in side.sent.items():
                    if (
                        side.end.mux.request(stream)
                        and not {(stream, channel)} & side.ended
                        and stream not in side.closing
                    ):
                        window = NARROW if isinstance(side.end.mux.request(stream), Egress) else WINDOW
                        assert side.end.mux.room(stream, channel) > window // 2, f"{len(data)} bytes sent, none to send"
                assert side.peer.end.mux.streams == side.end.mux.streams
                for key, data in side.sent.items():
                    if key[0] not in side.over | side.peer.over | side.reset | side.peer.reset:
                        assert data == side.peer.received[key]
                        assert (key in side.ended) == (key in side.peer.end_seen)
                assert {stream for stream in side.closing if stream not in side.reset | side.peer.reset} <= (
                    side.peer.close_seen
                )
        finally:
            self.patch.undo()

    def _side(self, of_host: bool) -> Side:
        return self.host if of_host else self.guest

    def _consume(self, side: Side, key: Key, size: int) -> None:
        side.consumed[key] += size
        side.end.mux.consumed(*key, size)

    def _pick(self, index: int) -> tuple[int, Side]:
        """A stream, more likely a late one: the first are soon over."""
        return self.open_ids[-1 - index % len(self.open_ids)]

    # -- the applications

    @precondition(lambda self: len(self.open_ids) < 6)
    @rule(of_host=st.booleans())
    def opens(self, of_host: bool) -> None:
        side = self._side(of_host)
        request = Exec(job="j", command="c") if of_host else Egress(address="192.0.2.1", port=1)
        self.open_ids.append((side.end.mux.open(request), side))

    @rule(index=ANY, of_host=st.booleans(), channel=st.integers(0, 2), size=SIZES)
    def sends(self, index: int, of_host: bool, channel: int, size: int) -> None:
        side = self._side(of_host)
        stream, _ = self._pick(index)
        key = (stream, channel)
        known = side.end.mux.request(stream) is not None
        if not known or key in side.ended or stream in side.over | side.closing:
            return
        at = len(side.sent[key])
        data = bytes((at + i) % 251 for i in range(size))
        side.sent[key] += data
        side.end.mux.send(stream, channel, data)

    @rule(index=ANY, of_host=st.booleans(), channel=st.integers(0, 2), size=SIZES)
    def pours(self, index: int, of_host: bool, channel: int, size: int) -> None:
        """It is asked for no more than what goes out at once: what it gives counts as sent."""
        side = self._side(of_host)
        stream, _ = self._pick(index)
        key = (stream, channel)
        known = side.end.mux.request(stream) is not None
        if not known or key in side.ended | side.pouring or stream in side.over | side.closing:
            return
        side.pouring.add(key)
        left = size

        def source(room: int) -> bytes:
            nonlocal left
            assert 0 < room <= LARGEST
            at = len(side.sent[key])
            data = bytes((at + i) % 251 for i in range(min(room, left)))
            left -= len(data)
            side.sent[key] += data
            if not data:
                side.pouring.discard(key)
            return data

        side.end.mux.pour(stream, channel, source)

    @rule(index=ANY, of_host=st.booleans(), channel=st.integers(0, 2))
    def widens(self, index: int, of_host: bool, channel: int) -> None:
        side = self._side(of_host)
        stream, opener = self._pick(index)
        if side.end.mux.request(stream) is not None and opener is self.host:
            side.windows[stream, channel] = WIDE
            side.end.mux.widen(stream, channel, WIDE)

    @rule(index=ANY, of_host=st.booleans(), channel=st.integers(0, 2))
    def ends(self, index: int, of_host: bool, channel: int) -> None:
        side = self._side(of_host)
        stream, _ = self._pick(index)
        if side.end.mux.request(stream) is not None and stream not in side.closing:
            side.ended.add((stream, channel))
            side.end.mux.end(stream, channel)

    @rule(index=ANY)
    def closes(self, index: int) -> None:
        """Who serves a stream closes it."""
        stream, opener = self._pick(index)
        side = opener.peer
        if side.end.mux.request(stream) is not None:
            side.closing.add(stream)
            side.end.mux.close(stream, Exited(exit_code=0) if opener is self.host else EgressEnded())

    @rule(index=ANY, of_host=st.booleans())
    def resets(self, index: int, of_host: bool) -> None:
        side = self._side(of_host)
        stream, _ = self._pick(index)
        if side.end.mux.request(stream) is not None:
            side.reset.add(stream)
            side.over.add(stream)
            side.end.mux.reset(stream)

    @rule(of_host=st.booleans(), index=ANY, share=st.floats(0, 1))
    def consumes(self, of_host: bool, index: int, share: float) -> None:
        side = self._side(of_host)
        keys = [key for key, data in side.received.items() if side.consumed[key] < len(data)]
        if keys:
            key = keys[index % len(keys)]
            left = len(side.received[key]) - side.consumed[key]
            self._consume(side, key, max(1, int(left * share)))

    @rule(of_host=st.booleans())
    def pings(self, of_host: bool) -> None:
        """Control is never held up by data or by a lack of credit: it is the next thing on the wire."""
        side = self._side(of_host)
        side.pings += 1
        side.end.mux.control(Ping(id=side.pings))
        while side.end.mux._urgent:
            side.end.send(1)

    # -- the wire

    @rule(of_host=st.booleans(), pieces=st.integers(1, 10))
    def writes(self, of_host: bool, pieces: int) -> None:
        self._side(of_host).end.send(pieces)

    @rule(of_host=st.booleans(), size=SIZES)
    def reads(self, of_host: bool, size: int) -> None:
        self._side(of_host).take(size)

    # -- always

    @invariant()
    def room_tells_the_truth(self) -> None:
        """What `room` allows, together with what is under way, never exceeds what the peer has granted."""
        for side in (self.host, self.guest):
            for stream, _ in self.open_ids:
                for channel in range(streams.CHANNELS):
                    key = (stream, channel)
                    if side.end.mux.room(stream, channel):
                        granted = side.peer.consumed[key] + side.peer.windows[key]
                        assert len(side.sent[key]) + side.end.mux.room(stream, channel) <= granted

    @invariant()
    def what_streams_of_the_guest_may_have_under_way_is_bounded(self) -> None:
        for side in (self.host, self.guest):
            beyond = 0
            for stream, opener in self.open_ids:
                if opener is self.guest:
                    rooms = (side.end.mux.room(stream, channel) for channel in range(streams.CHANNELS))
                    beyond += sum(max(0, room - NARROW) for room in rooms)
            assert beyond <= SHARED


TestConnection = Connection.TestCase
TestConnection.settings = settings(max_examples=70, stateful_step_count=50)
