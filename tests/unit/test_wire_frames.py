"""Frames and epoch markers: what the decoder finds, whatever the chunks are."""

import itertools
import random

import pytest

from capsem.wire import frames
from capsem.wire.decoder import FrameDecoder
from capsem.wire.frames import (
    FIRST_NONCE,
    HEADER,
    MAX_DATA,
    MAX_MESSAGE,
    NONCE_SIZE,
    ONE_WRITE,
    OVERHEAD,
    Frame,
    Marker,
    ProtocolError,
    answer_to,
    check_nonce,
    encode,
    make_nonce,
)
from wire_pair import merged

NONCE = bytes.fromhex("8fe1b70c5ad3926e01f4a83b7d20c695")
OTHER = bytes.fromhex("b2019d7ce6438fa05d17f2cb3e68940b")
KINDS = range(1, len(frames.KINDS) + 1)
LIMITS = {frames.EOF: 0, frames.DATA: MAX_DATA, frames.CREDIT: 8}
SAMPLE = [
    Frame(frames.CONTROL, 0, 0, b'{"t":"ping"}'),
    Frame(frames.OPEN, 1, 0, b"\n\n\n"),
    Frame(frames.DATA, 1, 2, bytes(range(256))),
    Frame(frames.DATA, 0xFFFFFFFF, 255, b"\n"),
    Frame(frames.EOF, 1, 1, b""),
    Frame(frames.CREDIT, 1, 1, bytes(8)),
]


class Decoder(FrameDecoder):
    """Finds all that is there at once, and says what it means: data however it is cut, markers by what they say. It
    looks for answers, too.
    """

    def __init__(self, *nonces: bytes, hunting: bool = True) -> None:
        super().__init__(*nonces, hunting=hunting)
        for nonce in nonces:
            self.announced(nonce)

    def feed(self, data: bytes | bytearray, size: int | None = None) -> list[object]:  # type: ignore[override]
        return merged(super().feed(data, size))


def wire(*items: Frame) -> bytes:
    return b"".join(encode(item.kind, item.stream, item.channel, item.payload) for item in items)


def fed(decoder: FrameDecoder, chunks: list[bytes]) -> list[object]:
    return merged(item for chunk in chunks for item in FrameDecoder.feed(decoder, chunk))


def bytewise(data: bytes) -> list[bytes]:
    return [data[i : i + 1] for i in range(len(data))]


def cut(data: bytes, *places: int) -> list[bytes]:
    edges = [0, *sorted(places), len(data)]
    return [data[a:b] for a, b in itertools.pairwise(edges)]


# -- encoding


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_round_trips_up_to_its_limit(kind: int) -> None:
    limit = LIMITS.get(kind, MAX_MESSAGE)
    for size in {0, min(1, limit), limit}:
        frame = Frame(kind, 7, 1, b"x" * size)
        assert Decoder(hunting=False).feed(wire(frame)) == merged([frame])
    with pytest.raises(ProtocolError, match=frames.KINDS[kind - 1]):
        encode(kind, 7, 1, b"x" * (limit + 1))


def test_a_frame_is_laid_out_as_documented() -> None:
    assert encode(frames.DATA, 0x01020304, 2, b"abc") == bytes.fromhex("03 02 0000 01020304 00000003") + b"abc\n"
    assert len(encode(frames.EOF, 1)) == OVERHEAD == HEADER.size + 1


def test_a_full_data_frame_is_one_write_to_a_virtio_port() -> None:
    assert len(encode(frames.DATA, 1, 1, bytes(ONE_WRITE))) == 32 * 1024


def test_payloads_may_be_views() -> None:
    assert encode(frames.DATA, 1, 1, memoryview(b"xabcx")[1:4]) == encode(frames.DATA, 1, 1, b"abc")


# -- chunking


def test_whole_and_byte_by_byte_and_in_two_pieces_are_the_same() -> None:
    data = NONCE + wire(*SAMPLE)
    expected = [(NONCE, False), *SAMPLE]
    for chunks in ([data], bytewise(data), *(cut(data, place) for place in range(len(data)))):
        assert fed(Decoder(NONCE), chunks) == expected


def test_random_chunks_are_the_same() -> None:
    data = NONCE + wire(*SAMPLE * 5)
    rng = random.Random(7)
    for _ in range(200):
        chunks = cut(data, *(rng.randrange(len(data)) for _ in range(rng.randrange(20))))
        assert fed(Decoder(NONCE), chunks) == [(NONCE, False), *SAMPLE * 5]


def test_a_message_is_delivered_with_its_last_byte_and_not_before() -> None:
    for frame in SAMPLE:
        if frame.kind != frames.DATA:
            data = wire(frame)
            decoder = Decoder(NONCE, hunting=False)
            assert decoder.feed(data[:-1]) == []
            assert decoder.feed(data[-1:]) == [frame]


def test_data_is_delivered_as_it_comes() -> None:
    """A frame may be longer than what is read at a time, and who reads it needs no room for all of it."""
    decoder = Decoder(NONCE, hunting=False)
    payload = bytes(range(40))
    assert NONCE[0] not in payload
    assert NONCE[-1] not in payload
    for place, piece in enumerate(bytewise(wire(Frame(frames.DATA, 1, 1, payload)))):
        at = place - HEADER.size
        expected = [Frame(frames.DATA, 1, 1, payload[at : at + 1])] if 0 <= at < len(payload) else []
        assert decoder.feed(piece) == expected
        assert decoder.buffered == (place + 1 if place < HEADER.size - 1 else 0)


def test_data_is_a_view_of_what_was_fed_and_messages_are_not() -> None:
    """A port reads into one buffer, again and again."""
    buffer = bytearray(wire(SAMPLE[0], SAMPLE[2]) + bytes(1000))
    message, data = FrameDecoder(NONCE, hunting=False).feed(buffer, len(buffer) - 1000)
    buffer[:] = b"x" * len(buffer)
    assert isinstance(message, Frame)
    assert isinstance(data, Frame)
    assert message == SAMPLE[0]
    assert data.payload == b"x" * 256


def test_what_is_left_is_copied_out_of_the_callers_buffer() -> None:
    data, decoder, buffer = NONCE + wire(*SAMPLE * 3), FrameDecoder(NONCE), bytearray(10)
    found: list[object] = []
    for at in range(0, len(data), len(buffer)):
        piece = data[at : at + len(buffer)]
        buffer[: len(piece)] = piece
        found += [_copied(item) for item in decoder.feed(buffer, len(piece))]
        buffer[:] = b"x" * len(buffer)
    assert merged(found) == [(NONCE, False), *SAMPLE * 3]  # type: ignore[arg-type]


def _copied(item: Frame | Marker) -> Frame | Marker:
    return item if isinstance(item, Marker) else Frame(item.kind, item.stream, item.channel, bytes(item.payload))


# -- hunting


def test_everything_before_the_marker_is_dropped() -> None:
    before = wire(*SAMPLE) + b"\x00garbage\xff" + NONCE[:-1] + OTHER
    data = before + NONCE + wire(*SAMPLE)
    for chunks in ([data], bytewise(data), *(cut(data, len(before) + i) for i in range(NONCE_SIZE + 1))):
        assert fed(Decoder(NONCE), chunks) == [(NONCE, False), *SAMPLE]


def test_hunting_keeps_next_to_nothing() -> None:
    decoder = Decoder(NONCE)
    for chunk in (bytes(100_000), NONCE[:-1], NONCE[:8] * 1000):
        decoder.feed(chunk)
        assert decoder.buffered < NONCE_SIZE


def test_hunting_again_drops_what_was_half_read() -> None:
    decoder = Decoder(NONCE, hunting=False)
    decoder.feed(wire(*SAMPLE)[:-3])
    decoder.hunt()
    assert decoder.feed(wire(*SAMPLE) + NONCE + wire(SAMPLE[0])) == [(NONCE, False), SAMPLE[0]]


# -- markers


@pytest.mark.parametrize(("marker", "answer"), [(NONCE, False), (answer_to(NONCE), True)])
def test_a_marker_is_found_inside_a_half_read_frame_at_every_cut(marker: bytes, answer: bool) -> None:
    victim = Frame(frames.DATA, 3, 1, b"\n" + bytes(range(40)) + b"\n")
    whole = wire(victim)
    after = wire(*SAMPLE)
    for place in range(len(whole)):
        data = wire(SAMPLE[0], SAMPLE[2]) + whole[:place] + marker + after
        meant = Frame(frames.DATA, 3, 1, victim.payload[: max(0, place - HEADER.size)])
        expected = [SAMPLE[0], SAMPLE[2], *([meant] if meant.payload else []), (NONCE, answer), *SAMPLE]
        begins = len(data) - len(after) - NONCE_SIZE
        near = range(begins - 3, begins + NONCE_SIZE + 3)
        for chunks in ([data], bytewise(data), *(cut(data, at) for at in near)):
            decoder = Decoder(NONCE, hunting=False)
            assert fed(decoder, chunks) == expected, place


def test_a_marker_after_a_whole_frame_loses_nothing() -> None:
    data = wire(*SAMPLE) + NONCE + wire(SAMPLE[1]) + answer_to(NONCE) + wire(SAMPLE[2])
    for chunks in ([data], bytewise(data)):
        assert fed(Decoder(NONCE, hunting=False), chunks) == [
            *SAMPLE,
            (NONCE, False),
            SAMPLE[1],
            (NONCE, True),
            SAMPLE[2],
        ]


def test_the_first_of_several_armed_markers_wins() -> None:
    half = wire(Frame(frames.OPEN, 1, 0, bytes(256)))[:30]
    data = half + OTHER + wire(SAMPLE[0]) + half + NONCE + wire(SAMPLE[1])
    for chunks in ([data], bytewise(data)):
        decoder = Decoder(NONCE, OTHER, hunting=False)
        assert fed(decoder, chunks) == [(OTHER, False), SAMPLE[0], (NONCE, False), SAMPLE[1]]


def test_a_nonce_that_is_not_armed_is_payload() -> None:
    frame = Frame(frames.DATA, 1, 1, OTHER + answer_to(OTHER))
    assert Decoder(NONCE, hunting=False).feed(wire(frame)) == [frame]
    decoder = Decoder(OTHER, hunting=False)
    decoder.arm(NONCE)
    assert decoder.feed(wire(frame)) == [frame]


def test_an_answer_to_what_was_not_announced_is_payload() -> None:
    frame = Frame(frames.DATA, 1, 1, answer_to(NONCE))
    decoder = FrameDecoder(NONCE, hunting=False)
    assert merged(decoder.feed(wire(frame))) == [frame]
    decoder.announced(NONCE)
    decoder.arm(OTHER, NONCE)
    assert merged(decoder.feed(wire(frame)[:20] + answer_to(NONCE)))[-1] == (NONCE, True)
    decoder.arm(OTHER)
    decoder.arm(OTHER, NONCE)
    assert merged(decoder.feed(wire(frame))) == [frame]


def test_arming_in_the_middle_of_a_frame_finds_what_is_already_buffered() -> None:
    decoder = Decoder(NONCE, hunting=False)
    assert decoder.feed(wire(Frame(frames.OPEN, 1, 0, bytes(256)))[:20] + OTHER[:9]) == []
    decoder.arm(NONCE, OTHER)
    assert decoder.feed(OTHER[9:] + wire(SAMPLE[0])) == [(OTHER, False), SAMPLE[0]]


@pytest.mark.parametrize("begun", range(1, NONCE_SIZE))
def test_a_frame_that_ends_like_a_marker_begins_is_delivered_at_once(begun: int) -> None:
    """No frame ends inside a marker, so a whole frame never waits for what may follow."""
    for text in (NONCE, answer_to(NONCE)):
        for kind, waiting in ((frames.DATA, [Frame(frames.DATA, 1, 1, b"x" * 40)]), (frames.OPEN, [])):
            frame = Frame(kind, 1, 1, b"x" * 40 + text[:begun])
            decoder = Decoder(NONCE, hunting=False)
            data = wire(frame)
            assert decoder.feed(data[:-1]) == waiting
            assert merged([*waiting, *FrameDecoder.feed(decoder, data[-1:])]) == [frame]
            assert decoder.feed(data) == [frame]
            assert not decoder.buffered


def test_a_marker_that_only_begins_between_frames_is_an_error_as_soon_as_it_differs() -> None:
    for begun in range(1, NONCE_SIZE):
        decoder = Decoder(NONCE, hunting=False)
        assert decoder.feed(wire(SAMPLE[0]) + NONCE[:begun]) == [SAMPLE[0]]
        with pytest.raises(ProtocolError):
            decoder.feed(bytes([NONCE[begun] ^ 0xFF]) * (HEADER.size + 1))


# -- garbage


@pytest.mark.parametrize(
    "bad",
    [
        HEADER.pack(0, 0, 0, 0, 0),
        HEADER.pack(9, 0, 0, 0, 0),
        HEADER.pack(255, 0, 0, 0, 0),
        HEADER.pack(frames.DATA, 0, 1, 1, 0),
        HEADER.pack(frames.DATA, 0, 0, 1, MAX_DATA + 1),
        HEADER.pack(frames.EOF, 0, 0, 1, 1),
        HEADER.pack(frames.CREDIT, 0, 0, 1, 9),
        HEADER.pack(frames.CONTROL, 0, 0, 0, MAX_MESSAGE + 1),
        HEADER.pack(frames.CONTROL, 0, 0, 0, 0xFFFFFFFF),
        HEADER.pack(frames.DATA, 0, 0, 1, 3) + b"abcX",
        HEADER.pack(frames.EOF, 0, 0, 1, 0) + b"\x00",
    ],
    ids=range(11),
)
def test_garbage_is_an_error_at_once(bad: bytes) -> None:
    decoder = Decoder(NONCE, hunting=False)
    with pytest.raises(ProtocolError):
        decoder.feed(wire(SAMPLE[0]) + bad)
    decoder = Decoder(NONCE, hunting=False)
    items = fed(decoder, bytewise(wire(SAMPLE[0]) + bad[:-1]))
    assert items == [SAMPLE[0], *([Frame(frames.DATA, 1, 0, b"abc")] if b"abc" in bad else [])]
    with pytest.raises(ProtocolError):
        decoder.feed(bad[-1:])


def test_an_error_shows_little_of_the_garbage() -> None:
    with pytest.raises(ProtocolError) as caught:
        Decoder(hunting=False).feed(b"\xff" * 1_000_000)
    assert len(str(caught.value)) < 100


def test_the_way_out_of_garbage_is_to_hunt() -> None:
    decoder = Decoder(NONCE, hunting=False)
    with pytest.raises(ProtocolError):
        decoder.feed(b"\xff" * 50)
    decoder.hunt()
    assert decoder.hunting
    assert decoder.feed(b"\xff" * 50 + NONCE + wire(*SAMPLE)) == [(NONCE, False), *SAMPLE]
    assert not decoder.hunting


@pytest.mark.parametrize("begun", range(NONCE_SIZE))
def test_a_marker_that_begins_behind_garbage_is_not_dropped_with_it(begun: int) -> None:
    decoder = Decoder(NONCE, hunting=False)
    with pytest.raises(ProtocolError):
        decoder.feed(b"\xff" * 50 + NONCE[:begun])
    decoder.hunt()
    assert decoder.feed(b"") == []
    assert decoder.feed(NONCE[begun:] + wire(SAMPLE[0])) == [(NONCE, False), SAMPLE[0]]


def test_what_is_done_about_one_frame_holds_for_the_next() -> None:
    """A message may arm the decoder for a marker that came in the same piece, or make the rest of it worthless."""
    decoder = FrameDecoder(NONCE, hunting=False)
    found = decoder.feed(wire(*SAMPLE[:2]) + OTHER + wire(*SAMPLE[:3]) + NONCE + wire(SAMPLE[0]))
    assert next(found) == SAMPLE[0]
    decoder.arm(NONCE, OTHER)
    assert merged(next(found) for _ in range(3)) == [SAMPLE[1], (OTHER, False), SAMPLE[0]]
    decoder.hunt()
    assert merged(found) == [(NONCE, False), SAMPLE[0]]


@pytest.mark.parametrize("begin", [NONCE[:1], NONCE[:9], answer_to(NONCE)[:1], NONCE[:1] + answer_to(NONCE)[:3]])
def test_garbage_that_keeps_ending_like_a_marker_begins_does_not_pile_up(begin: bytes) -> None:
    """A peer that knows the nonce must not be able to fill our memory by never finishing it."""
    for error in (b"\xff" * HEADER.size, HEADER.pack(frames.DATA, 0, 0, 1, 3) + b"abcX", wire(SAMPLE[1])[:-1] + b"X"):
        decoder = Decoder(NONCE, hunting=False)
        with pytest.raises(ProtocolError):
            fed(decoder, [error + begin] * 1000)


def test_memory_is_bounded_by_one_frame() -> None:
    decoder = Decoder(NONCE, hunting=False)
    data = encode(frames.CONTROL, payload=bytes(MAX_MESSAGE)) * 3
    rng = random.Random(11)
    at = 0
    while at < len(data):
        size = rng.randrange(1, 100_000)
        decoder.feed(data[at : at + size])
        at += size
        assert decoder.buffered <= MAX_MESSAGE + OVERHEAD + NONCE_SIZE
    assert not decoder.buffered


# -- nonces


def test_a_nonce_never_contains_the_trailer() -> None:
    rng = random.Random(5)
    for _ in range(2000):
        nonce = make_nonce(rng.randbytes)
        assert check_nonce(nonce) == nonce
        assert check_nonce(answer_to(nonce)) == nonce[::-1]


def test_a_nonce_is_made_from_a_source_that_gives_mostly_trailers() -> None:
    pieces = iter([b"\n" * 16, b"\n" * 15 + b"a", b"\n".join([b"bcdefgh", b"ijklmnop"]), b"q" * 16])
    assert make_nonce(lambda _size: next(pieces)) == b"abcdefghijklmnop"


@pytest.mark.parametrize("bad", [b"", NONCE[:-1], NONCE + b"x", NONCE[:-1] + b"\n"])
def test_bad_nonces_are_refused(bad: bytes) -> None:
    for use in (check_nonce, Decoder, Decoder(NONCE).arm):
        with pytest.raises(ProtocolError):
            use(bad)


def test_the_first_nonce_is_good_and_cannot_begin_a_frame() -> None:
    for text in (check_nonce(FIRST_NONCE), answer_to(FIRST_NONCE)):
        with pytest.raises(ProtocolError):
            Decoder(NONCE, hunting=False).feed(text)


def test_representations_are_short() -> None:
    assert repr(Frame(frames.DATA, 1, 2, bytes(10**6))) == "Frame(data, stream=1, channel=2, 1000000 bytes)"
    assert "99" in repr(Frame(99, 1, 2, b""))
    assert NONCE.hex() in repr(Marker(NONCE, answer=True))
