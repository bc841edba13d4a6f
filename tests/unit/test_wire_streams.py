"""Streams on one connection: order, credit, fairness, and what belongs to no stream."""

import struct
from collections.abc import Callable

import pytest

from capsem.wire import frames
from capsem.wire.decoder import FrameDecoder
from capsem.wire.events import (
    Closed,
    CreditReceived,
    DataReceived,
    EndReceived,
    EpochStarted,
    Event,
    MessageReceived,
    Opened,
    ResetReceived,
)
from capsem.wire.frames import FIRST_NONCE, ONE_WRITE, ProtocolError, answer_to, encode
from capsem.wire.messages import (
    STDERR,
    STDIN,
    STDOUT,
    Egress,
    EgressEnded,
    Exec,
    Exited,
    Failed,
    FileRead,
    Ping,
    Pong,
    ReadFile,
    Signal,
    Sync,
    Synced,
)
from capsem.wire.schema import Message, encode_message
from capsem.wire.streams import MAX_STREAMS, NARROW, SHARED, WINDOW, Mux
from wire_pair import End, new_mux, pair, settle

EXEC = Exec(job="j", command="c")
DONE = Exited(exit_code=0)


def opened(request: Message = EXEC) -> tuple[End, End, int]:
    host, guest = pair()
    stream = host.mux.open(request)
    settle(host, guest)
    (event,) = guest.told()
    assert isinstance(event, Opened)
    assert (event.stream, event.message) == (stream, request)
    return host, guest, stream


def content(end: End, stream: int, channel: int) -> bytes:
    return b"".join(
        event.data
        for event in end.events
        if isinstance(event, DataReceived) and (event.stream, event.channel) == (stream, channel)
    )


def kinds(data: bytes) -> list[str]:
    found = FrameDecoder(hunting=False).feed(data)
    return [frames.KINDS[frame.kind - 1] for frame in found if isinstance(frame, frames.Frame)]


def received(mux: Mux, data: bytes) -> list[Event]:
    return list(mux.receive(data))


def outputs(mux: Mux) -> list[bytes]:
    return [b"".join(pieces) for pieces in iter(mux.output, [])]


# -- a stream's life


def test_a_request_its_data_and_its_result() -> None:
    host, guest, stream = opened()
    assert guest.mux.request(stream) == EXEC
    host.mux.send(stream, STDIN, b"in")
    host.mux.end(stream, STDIN)
    guest.mux.send(stream, STDOUT, b"out")
    guest.mux.send(stream, STDERR, b"err")
    guest.mux.end(stream, STDOUT)
    settle(host, guest)
    guest.mux.close(stream, DONE)
    settle(host, guest)
    assert [(type(event), event.stream) for event in guest.events] == [(DataReceived, stream), (EndReceived, stream)]
    assert content(guest, stream, STDIN) == b"in"
    assert content(host, stream, STDOUT) == b"out"
    assert content(host, stream, STDERR) == b"err"
    last = host.events[-1]
    assert isinstance(last, Closed)
    assert last.message == DONE
    assert host.mux.streams == guest.mux.streams == 0
    assert host.mux.request(stream) is None


def test_the_close_comes_after_all_data_even_when_it_waits_for_credit() -> None:
    host, guest, stream = opened()
    data = bytes(range(256)) * (3 * WINDOW // 256)
    guest.mux.send(stream, STDOUT, data)
    guest.mux.send(stream, STDERR, data)
    guest.mux.close(stream, DONE)
    settle(host, guest)
    assert not any(isinstance(event, Closed) for event in host.events)
    assert len(content(host, stream, STDOUT)) == len(content(host, stream, STDERR)) == WINDOW
    done = {STDOUT: 0, STDERR: 0}
    while not isinstance(host.events[-1], Closed):
        for channel in done:
            size = len(content(host, stream, channel))
            host.mux.consumed(stream, channel, size - done[channel])
            done[channel] = size
        assert settle(host, guest)
    assert content(host, stream, STDOUT) == content(host, stream, STDERR) == data


def test_an_end_comes_after_the_data_of_its_channel() -> None:
    host, guest, stream = opened()
    host.mux.send(stream, STDIN, bytes(WINDOW + 1))
    host.mux.end(stream, STDIN)
    settle(host, guest)
    assert not any(isinstance(event, EndReceived) for event in guest.events)
    guest.mux.consumed(stream, STDIN, WINDOW)
    settle(host, guest)
    assert len(content(guest, stream, STDIN)) == WINDOW + 1
    assert isinstance(guest.events[-1], EndReceived)
    assert not isinstance(guest.events[-1], CreditReceived)


def test_ending_twice_says_it_once() -> None:
    host, guest, stream = opened()
    host.mux.end(stream, STDIN)
    host.mux.end(stream, STDIN)
    settle(host, guest)
    host.mux.end(stream, STDIN)
    settle(host, guest)
    assert len(guest.told()) == 1


def test_a_reset_drops_what_was_queued_and_ends_both_sides() -> None:
    host, guest, stream = opened()
    host.mux.send(stream, STDIN, bytes(1000))
    host.mux.reset(stream)
    guest.mux.send(stream, STDOUT, b"under way")
    settle(host, guest)
    assert [type(event) for event in guest.told()] == [ResetReceived]
    assert host.told() == []
    assert host.mux.streams == guest.mux.streams == 0


def test_what_concerns_a_stream_that_is_gone_is_swallowed() -> None:
    host, guest, stream = opened()
    host.mux.reset(stream)
    settle(host, guest)
    guest.told()
    for mux in (host.mux, guest.mux):
        mux.send(stream, STDOUT, b"x")
        mux.end(stream, STDOUT)
        mux.message(stream, Signal(number=9))
        mux.close(stream, DONE)
        mux.reset(stream)
        mux.consumed(stream, STDOUT, 1)
        assert mux.room(stream, STDOUT) == 0
        assert outputs(mux) == []


def test_nothing_is_accepted_after_closing() -> None:
    _, guest, stream = opened()
    guest.mux.close(stream, DONE)
    assert guest.mux.room(stream, STDOUT) == 0
    guest.mux.close(stream, Exited(exit_code=7))
    assert b"".join(outputs(guest.mux)) == encode(frames.CLOSE, stream, payload=encode_message(DONE))


def test_empty_data_is_not_sent() -> None:
    host, _, stream = opened()
    host.mux.send(stream, STDIN, b"")
    assert outputs(host.mux) == []


def test_the_guest_can_open_streams_too() -> None:
    host, guest = pair()
    stream = guest.mux.open(Sync())
    settle(host, guest)
    (event,) = host.told()
    assert isinstance(event, Opened)
    host.mux.close(stream, Synced(duration=0.0))
    settle(host, guest)
    assert isinstance(guest.told()[-1], Closed)


def test_ids_are_odd_for_the_host_and_even_for_the_guest_and_never_used_twice() -> None:
    host, guest = pair()
    for mux, first in ((host.mux, 1), (guest.mux, 2)):
        ids = []
        for _ in range(5):
            ids.append(mux.open(EXEC))
            mux.reset(ids[-1])
        assert ids == [first + 2 * i for i in range(5)]
    settle(host, guest)


# -- credit


def test_room_shrinks_by_what_is_queued_and_grows_by_what_is_consumed() -> None:
    host, guest, stream = opened()
    assert guest.mux.room(stream, STDOUT) == WINDOW
    guest.mux.send(stream, STDOUT, bytes(1000))
    assert guest.mux.room(stream, STDOUT) == WINDOW - 1000
    settle(host, guest)
    assert guest.mux.room(stream, STDOUT) == WINDOW - 1000
    guest.mux.send(stream, STDOUT, bytes(WINDOW // 2))
    settle(host, guest)
    host.mux.consumed(stream, STDOUT, WINDOW // 2 - 1)
    settle(host, guest)
    assert guest.told() == []
    host.mux.consumed(stream, STDOUT, 1)
    settle(host, guest)
    (event,) = guest.told()
    assert isinstance(event, CreditReceived)
    assert (event.stream, event.channel) == (stream, STDOUT)
    assert guest.mux.room(stream, STDOUT) == WINDOW - 1000
    guest.mux.end(stream, STDOUT)
    assert guest.mux.room(stream, STDOUT) == 0


def test_no_credit_is_wasted_on_a_channel_that_has_ended() -> None:
    host, guest, stream = opened()
    guest.mux.send(stream, STDOUT, bytes(WINDOW))
    guest.mux.end(stream, STDOUT)
    settle(host, guest)
    host.mux.consumed(stream, STDOUT, WINDOW)
    assert outputs(host.mux) == []


def test_a_repeated_or_older_credit_does_no_harm() -> None:
    _, guest, stream = opened()
    for limit in (WINDOW + 10, WINDOW, 0, WINDOW + 10):
        received(guest.mux, encode(frames.CREDIT, stream, STDOUT, struct.pack(">Q", limit)))
    assert guest.mux.room(stream, STDOUT) == WINDOW + 10


def test_data_over_the_credit_is_an_error() -> None:
    host, _, stream = opened()
    piece = encode(frames.DATA, stream, STDOUT, bytes(ONE_WRITE))
    for _ in range(WINDOW // ONE_WRITE):
        received(host.mux, piece)
    with pytest.raises(ProtocolError, match="credit"):
        received(host.mux, piece)


def test_a_stalled_channel_stops_only_itself() -> None:
    host, guest, stalled = opened()
    flowing = host.mux.open(EXEC)
    settle(host, guest)
    guest.mux.send(stalled, STDOUT, bytes(2 * WINDOW))
    guest.mux.send(stalled, STDERR, b"other channel")
    guest.mux.send(flowing, STDOUT, b"other stream")
    guest.mux.control(Ping(id=1))
    settle(host, guest)
    assert len(content(host, stalled, STDOUT)) == WINDOW
    assert content(host, stalled, STDERR) == b"other channel"
    assert content(host, flowing, STDOUT) == b"other stream"
    assert outputs(guest.mux) == []
    guest.mux.send(flowing, STDOUT, b", again")
    settle(host, guest)
    assert content(host, flowing, STDOUT) == b"other stream, again"


# -- order


def test_control_overtakes_data() -> None:
    host, _, stream = opened()
    host.mux.send(stream, STDIN, bytes(100_000))
    host.mux.output()
    host.mux.control(Ping(id=1))
    host.mux.message(stream, Signal(number=2))
    second = host.mux.open(ReadFile(path="x"))
    host.mux.consumed(stream, STDOUT, 0)
    assert kinds(b"".join(host.mux.output())) == ["control", "message", "open"]
    assert kinds(b"".join(host.mux.output())) == ["data"]
    host.mux.reset(second)
    assert kinds(b"".join(host.mux.output())) == ["reset"]


def test_small_frames_share_a_write_and_large_ones_do_not() -> None:
    host, _ = pair()
    for i in range(1000):
        host.mux.control(Pong(id=i))
    host.mux.open(Exec(job="j", command="x" * 100_000))
    host.mux.control(Pong(id=1))
    pieces = outputs(host.mux)
    assert sum(len(kinds(piece)) for piece in pieces) == 1002
    assert len(pieces) == 4
    assert all(len(piece) <= ONE_WRITE or len(kinds(piece)) == 1 for piece in pieces)


def test_two_busy_streams_alternate() -> None:
    host, guest, first = opened()
    second = host.mux.open(EXEC)
    settle(host, guest)
    guest.mux.send(first, STDOUT, bytes(WINDOW))
    guest.mux.send(second, STDOUT, bytes(WINDOW))
    guest.send()
    host.take()
    turns = [event.stream for event in host.told() if isinstance(event, DataReceived)]
    assert turns[:16] == [first, second] * 8


def test_a_stream_that_comes_later_is_served_next() -> None:
    host, guest, first = opened()
    second = host.mux.open(EXEC)
    settle(host, guest)
    guest.mux.send(first, STDOUT, bytes(WINDOW))
    guest.send(2)
    guest.mux.send(second, STDOUT, b"short")
    guest.send(2)
    host.take()
    assert second in [event.stream for event in host.told()]


def test_the_channels_of_a_stream_alternate_too() -> None:
    """An error message is not held up by a flood on the other channel."""
    host, guest, stream = opened()
    guest.mux.send(stream, STDOUT, bytes(WINDOW))
    guest.send(1)
    guest.mux.send(stream, STDERR, b"error")
    guest.send(2)
    host.take()
    assert content(host, stream, STDERR) == b"error"


# -- limits, and frames that make no sense


def test_streams_are_limited_on_both_sides() -> None:
    host, guest = pair()
    for _ in range(MAX_STREAMS):
        host.mux.open(EXEC)
    with pytest.raises(ProtocolError, match=str(MAX_STREAMS)):
        host.mux.open(EXEC)
    settle(host, guest)
    with pytest.raises(ProtocolError, match=str(MAX_STREAMS)):
        received(guest.mux, encode(frames.OPEN, 2 * MAX_STREAMS + 1, payload=encode_message(EXEC)))
    host.mux.reset(1)
    assert host.mux.open(EXEC) == 2 * MAX_STREAMS + 1


@pytest.mark.parametrize("ours", [True, False])
def test_a_request_of_a_kind_that_this_end_does_not_know_is_refused_and_no_more(ours: bool) -> None:
    class Novel(Message, tag="novel"):
        """Of a later version."""

    host, guest = pair()
    asking, asked = (host, guest) if ours else (guest, host)
    asking.mux._requests = {**asking.mux._requests, Novel: Synced}
    stream = asking.mux.open(Novel())
    asking.mux.send(stream, STDIN, b"what goes with it")
    settle(host, guest)
    assert asked.told() == []
    (event,) = asking.told()
    assert isinstance(event, Closed)
    assert isinstance(event.message, Failed)
    assert (event.stream, event.message.code) == (stream, "unsupported")
    assert "novel" in event.message.message
    assert host.mux.streams == guest.mux.streams == 0
    asking.mux.open(EXEC)
    settle(host, guest)
    assert len(asked.told()) == 1


def test_a_request_that_is_too_large_opens_nothing() -> None:
    host, guest = pair()
    with pytest.raises(ProtocolError):
        host.mux.open(Exec(job="j", command="x" * frames.MAX_MESSAGE))
    assert host.mux.streams == 0
    assert outputs(host.mux) == []
    assert host.mux.open(EXEC) == 1
    settle(host, guest)
    assert len(guest.told()) == 1


def on_stream_1(mux: Mux) -> None:
    received(mux, encode(frames.OPEN, 1, payload=encode_message(EXEC)))


def closed_stream_1(mux: Mux) -> None:
    on_stream_1(mux)
    mux.reset(1)


def nothing(mux: Mux) -> None:
    del mux


@pytest.mark.parametrize(
    ("before", "data"),
    [
        (nothing, encode(frames.CONTROL, 1, payload=encode_message(Ping(id=1)))),
        (nothing, encode(frames.CONTROL, payload=b"{}")),
        (nothing, encode(frames.CONTROL, payload=b"\xff")),
        (nothing, encode(frames.OPEN, 0, payload=encode_message(EXEC))),
        (nothing, encode(frames.OPEN, 2, payload=encode_message(EXEC))),
        (nothing, encode(frames.OPEN, 1, 3, payload=encode_message(EXEC))),
        (nothing, encode(frames.OPEN, 1, payload=encode_message(DONE))),
        (nothing, encode(frames.OPEN, 1, payload=b"[]")),
        (on_stream_1, encode(frames.OPEN, 1, payload=encode_message(EXEC))),
        (closed_stream_1, encode(frames.OPEN, 1, payload=encode_message(EXEC))),
        (nothing, encode(frames.DATA, 1, 0, b"x")),
        (nothing, encode(frames.DATA, 0, 0, b"x")),
        (nothing, encode(frames.RESET, 1)),
        (nothing, encode(frames.RESET, 2)),
        (nothing, encode(frames.EOF, 1)),
        (nothing, encode(frames.CREDIT, 1, 1, bytes(8))),
        (nothing, encode(frames.MESSAGE, 1, payload=encode_message(Signal(number=1)))),
        (nothing, encode(frames.CLOSE, 1, payload=encode_message(DONE))),
        (on_stream_1, encode(frames.DATA, 1, 3, b"x")),
        (on_stream_1, encode(frames.EOF, 1, 200)),
        (on_stream_1, encode(frames.CREDIT, 1, 1, bytes(7))),
        (on_stream_1, encode(frames.CREDIT, 1, 1)),
        (on_stream_1, encode(frames.MESSAGE, 1, payload=b"{}")),
        (on_stream_1, encode(frames.EOF, 1) + encode(frames.EOF, 1)),
        (on_stream_1, encode(frames.EOF, 1) + encode(frames.DATA, 1, 0, b"x")),
        (on_stream_1, encode(frames.EOF, 1) + encode(frames.DATA, 1, 0)),
        (on_stream_1, encode(frames.CLOSE, 1, payload=encode_message(DONE))),  # only who serves a stream closes it
        (on_stream_1, encode(frames.DATA, 3, 0, b"x")),
        (on_stream_1, encode(frames.DATA, 2, 0, b"x")),
    ],
    ids=range(29),
)
def test_frames_that_make_no_sense_to_the_guest_are_errors(before: Callable[[Mux], None], data: bytes) -> None:
    mux = new_mux(initiator=False)
    before(mux)
    with pytest.raises(ProtocolError):
        received(mux, data)


@pytest.mark.parametrize(
    "result",
    [Ping(id=1), Exited(exit_code=0), Synced(duration=1.0), Signal(number=1), EXEC],
    ids=lambda message: message.tag,
)
def test_a_stream_is_closed_by_what_its_request_asks_for_or_by_failed(result: Message) -> None:
    """What reads a file must not have to cope with the exit of a command."""
    for good in (FileRead(size=0, mode=0), Failed(code="not_found", message="m")):
        host, _ = pair()
        stream = host.mux.open(ReadFile(path="x"))
        (event,) = received(host.mux, encode(frames.CLOSE, stream, payload=encode_message(good)))
        assert isinstance(event, Closed)
    host, _ = pair()
    stream = host.mux.open(ReadFile(path="x"))
    with pytest.raises(ProtocolError, match=result.tag):
        received(host.mux, encode(frames.CLOSE, stream, payload=encode_message(result)))


def test_late_frames_of_a_finished_stream_are_ignored_on_both_sides() -> None:
    late = [
        (frames.DATA, STDIN, b"x"),
        (frames.EOF, STDIN, b""),
        (frames.CREDIT, STDOUT, bytes(8)),
        (frames.MESSAGE, 0, encode_message(Signal(number=1))),
        (frames.CLOSE, 0, encode_message(DONE)),
        (frames.RESET, 0, b""),
    ]
    host, guest, stream = opened()
    host.mux.reset(stream)
    settle(host, guest)
    for end in (host, guest):
        for kind, channel, payload in late:
            assert received(end.mux, encode(kind, stream, channel, payload)) == []


def test_frames_on_streams_never_opened_are_errors_whatever_the_peer_has_opened() -> None:
    """The two ends count apart: that the guest has opened stream 8 says nothing about the host's stream 5."""
    host, _ = pair()
    received(host.mux, encode(frames.OPEN, 8, payload=encode_message(Sync())))
    with pytest.raises(ProtocolError, match="never opened"):
        received(host.mux, encode(frames.DATA, 5, 1, b"x"))


def test_an_error_leaves_a_mux_that_begins_a_new_epoch() -> None:
    host, guest, stream = opened()
    guest.mux.send(stream, STDOUT, b"x")
    guest.send()
    host.inbox[0] ^= 0xFF
    with pytest.raises(ProtocolError):
        host.take()
    host.mux.begin_epoch(FIRST_NONCE)
    guest.mux.send(stream, STDOUT, b"of the old epoch, and to be dropped")
    settle(host, guest)
    assert [type(event) for event in host.told()] == [EpochStarted]
    assert [type(event) for event in guest.told()] == [EpochStarted]
    assert host.mux.open(EXEC) == 1
    settle(host, guest)
    assert [type(event) for event in guest.told()] == [Opened]


# -- epochs (test_wire_epochs.py has every interleaving)


def test_beginning_an_epoch_forgets_everything_on_both_sides() -> None:
    host, guest, stream = opened()
    host.mux.send(stream, STDIN, bytes(10 * WINDOW))
    host.mux.control(Ping(id=1))
    guest.mux.send(stream, STDOUT, bytes(10 * WINDOW))
    guest.mux.control(Pong(id=1))
    host.mux.begin_epoch(FIRST_NONCE)
    assert host.mux.output() == [FIRST_NONCE]
    assert host.mux.streams == 0
    host.peer.inbox += FIRST_NONCE
    (event,) = guest.take()
    assert isinstance(event, EpochStarted)
    assert not event.answer
    assert guest.mux.streams == 0
    assert outputs(guest.mux) == [answer_to(FIRST_NONCE)]
    (event,) = received(host.mux, answer_to(FIRST_NONCE))
    assert isinstance(event, EpochStarted)
    assert event.answer
    assert outputs(host.mux) == []


def test_an_answer_is_not_answered() -> None:
    host, _ = pair()
    host.mux.decoder.announced(FIRST_NONCE)
    received(host.mux, answer_to(FIRST_NONCE))
    assert outputs(host.mux) == []


def test_an_answer_to_what_a_predecessor_began_forgets_everything_too() -> None:
    """The peer has forgotten everything before it answered."""
    host, guest, stream = opened()
    host.mux.send(stream, STDIN, b"x")
    host.mux.control(Ping(id=1))
    host.mux.decoder.announced(FIRST_NONCE)
    (event,) = received(host.mux, answer_to(FIRST_NONCE))
    assert isinstance(event, EpochStarted)
    assert host.mux.streams == 0
    assert outputs(host.mux) == []
    assert guest.mux.streams == 1


def test_the_answer_to_what_this_end_began_forgets_nothing_that_was_said_since() -> None:
    host, _ = pair()
    host.mux.begin_epoch(FIRST_NONCE)
    host.mux.control(Ping(id=1))
    received(host.mux, answer_to(FIRST_NONCE))
    assert b"".join(outputs(host.mux)) == FIRST_NONCE + encode(frames.CONTROL, payload=encode_message(Ping(id=1)))


def test_who_begins_an_epoch_hears_nothing_of_the_old_one() -> None:
    """The peer's frames of the old epoch are still under way, about streams that this end has forgotten."""
    host, guest, stream = opened()
    guest.mux.send(stream, STDOUT, b"x" * 100_000)
    guest.send()
    host.take(40_000)
    host.told()
    host.mux.begin_epoch(FIRST_NONCE)
    settle(host, guest)
    assert [type(event) for event in host.told()] == [EpochStarted]


def test_a_message_on_a_stream_arrives_before_its_close() -> None:
    host, guest, stream = opened()
    guest.mux.close(stream, DONE)
    guest.mux.message(stream, Signal(number=1))
    settle(host, guest)
    first, second = host.told()
    assert isinstance(first, MessageReceived)
    assert isinstance(second, Closed)


def test_events_have_short_representations() -> None:
    event = DataReceived(1, 2, bytes(10**6))
    assert len(repr(event)) < 200
    assert "stream=1" in repr(event)


def test_what_is_done_about_one_event_comes_before_the_next() -> None:
    """An answer to what came before an epoch began belongs to the epoch before, and is not sent in the new one."""
    _, guest = pair()
    ping = encode(frames.CONTROL, payload=encode_message(Ping(id=1)))
    for event in guest.mux.receive(ping + FIRST_NONCE + ping):
        if isinstance(event, MessageReceived):
            guest.mux.control(Pong(id=1))
    data = b"".join(outputs(guest.mux))
    assert data == answer_to(FIRST_NONCE) + encode(frames.CONTROL, payload=encode_message(Pong(id=1)))


def test_an_epoch_is_found_behind_what_makes_no_sense() -> None:
    """Both ends give up at once: each other's markers must not be lost with the rest."""
    _, guest = pair()
    nonsense = encode(frames.DATA, 1, 1, b"x")
    with pytest.raises(ProtocolError):
        received(
            guest.mux, nonsense + nonsense + FIRST_NONCE + encode(frames.CONTROL, payload=encode_message(Pong(id=1)))
        )
    guest.mux.begin_epoch(FIRST_NONCE)
    epoch, pong = received(guest.mux, b"")
    assert isinstance(epoch, EpochStarted)
    assert isinstance(pong, MessageReceived)


# -- streams that the guest opens


def connected(count: int) -> tuple[End, End, list[int]]:
    host, guest = pair()
    ids = [guest.mux.open(Egress(address="192.0.2.1", port=443)) for _ in range(count)]
    settle(host, guest)
    return host, guest, ids


def window(host: End, guest: End, stream: int) -> int:
    """The guest sends what it may, and the host deals with it; returns how much the guest may send then."""
    room = guest.mux.room(stream, STDOUT)
    guest.mux.send(stream, STDOUT, bytes(room))
    settle(host, guest)
    host.mux.consumed(stream, STDOUT, room)
    settle(host, guest)
    return guest.mux.room(stream, STDOUT)


def test_the_window_of_a_guests_stream_widens_with_its_first_credit() -> None:
    host, guest, (stream,) = connected(1)
    assert guest.mux.room(stream, STDOUT) == host.mux.room(stream, STDIN) == NARROW
    assert window(host, guest, stream) == WINDOW
    assert host.mux.room(stream, STDIN) == NARROW


def test_all_windows_of_a_guests_streams_together_are_bounded() -> None:
    widest = SHARED // (WINDOW - NARROW)
    host, guest, ids = connected(widest + 2)
    windows = [window(host, guest, stream) for stream in ids]
    assert windows == [WINDOW] * widest + [NARROW] * 2
    host.mux.close(ids[0], EgressEnded())
    guest.mux.reset(ids[1])
    settle(host, guest)
    assert [window(host, guest, stream) for stream in ids[-2:]] == [WINDOW] * 2


def test_what_is_queued_is_known() -> None:
    host, guest, (one, two) = connected(2)
    host.mux.send(one, STDIN, bytes(NARROW + 1))
    host.mux.send(two, STDIN, bytes(NARROW + 2))
    assert host.mux.backlog == 2 * NARROW + 3
    settle(host, guest)
    assert host.mux.backlog == 3
    host.mux.reset(one)
    assert host.mux.backlog == 2
    guest.mux.reset(two)
    settle(host, guest)
    assert host.mux.backlog == 0
