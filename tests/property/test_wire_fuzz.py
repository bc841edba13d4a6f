"""Garbage in: frames, messages and events, or one typed error, and nothing else; whole and byte by byte."""

from __future__ import annotations

import json
import struct
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from capsem.wire import frames
from capsem.wire.decoder import FrameDecoder
from capsem.wire.events import Event
from capsem.wire.frames import (
    FIRST_NONCE,
    HEADER,
    MAX_MESSAGE,
    NONCE_SIZE,
    OVERHEAD,
    Frame,
    Marker,
    ProtocolError,
    answer_to,
    encode,
    make_nonce,
)
from capsem.wire.messages import MESSAGES, STREAMS, Exec, ReadFile
from capsem.wire.schema import Message, decode_message, encode_message
from capsem.wire.streams import CHANNELS, Mux
from wire_pair import merged

NONCE = bytes.fromhex("8fe1b70c5ad3926e01f4a83b7d20c695")
KINDS = range(1, len(frames.KINDS) + 1)


def payloads(kind: int) -> st.SearchStrategy[bytes]:
    return {frames.EOF: st.just(b""), frames.CREDIT: st.binary(max_size=8)}.get(kind, st.binary(max_size=80))


whole_frames = st.sampled_from(KINDS).flatmap(
    lambda kind: st.builds(Frame, st.just(kind), st.integers(0, 0xFFFFFFFF), st.integers(0, 255), payloads(kind))
)
# What an attacker would try: frames, halves of frames, headers that lie, markers and parts of them, noise.
headers = st.builds(
    HEADER.pack,
    st.integers(0, 10),
    st.integers(0, 4),
    st.sampled_from([0, 0, 0, 1]),
    st.sampled_from([0, 1, 2, 3, 0xFFFFFFFF]),
    st.sampled_from([0, 1, 5, 8, 9, 40, MAX_MESSAGE, MAX_MESSAGE + 1, 0xFFFFFFFF]),
)
encoded = whole_frames.map(lambda frame: encode(frame.kind, frame.stream, frame.channel, frame.payload))
markers = st.sampled_from([NONCE, answer_to(NONCE)])
cut = st.tuples(st.one_of(encoded, markers), st.integers(0, 100)).map(lambda pair: pair[0][: pair[1]])
noise = st.lists(st.one_of(encoded, cut, markers, headers, st.binary(max_size=30)), max_size=12).map(b"".join)


def chunked(data: bytes, sizes: list[int]) -> list[bytes]:
    """`data` in pieces of these sizes, over and over; at once if there are none."""
    if not sizes:
        return [data]
    chunks, at, turn = [], 0, 0
    while at < len(data):
        chunks.append(data[at : at + sizes[turn % len(sizes)]])
        at += len(chunks[-1])
        turn += 1
    return chunks


sizes = st.lists(st.integers(1, 50), max_size=8)


def outcome(decoder: FrameDecoder, chunks: list[bytes]) -> tuple[list[object], bool]:
    """What was found, and whether it ended in an error. Anything but ProtocolError is a failed test."""
    found: list[Frame | Marker] = []
    for chunk in chunks:
        try:
            for item in decoder.feed(chunk):
                found.append(item)  # noqa: PERF402 - what was found before an error counts
        except ProtocolError:
            return merged(found), True
        assert decoder.buffered <= MAX_MESSAGE + OVERHEAD + NONCE_SIZE
    return merged(found), False


@given(st.lists(whole_frames, max_size=10), sizes)
def test_frames_are_the_same_however_they_come(items: list[Frame], sizes: list[int]) -> None:
    data = b"".join(encode(item.kind, item.stream, item.channel, item.payload) for item in items)
    decoder = FrameDecoder(NONCE, hunting=False)
    assert outcome(decoder, chunked(data, sizes)) == (merged(items), False)
    assert not decoder.buffered


@settings(max_examples=150)
@given(noise, sizes)
@example(b"\xff" * 12 + NONCE[:15], [1])
def test_garbage_for_the_decoder(data: bytes, sizes: list[int]) -> None:
    for pieces in (sizes, [1]):
        decoder = FrameDecoder(NONCE, hunting=False)
        decoder.announced(NONCE)
        outcome(decoder, chunked(data, pieces))
    outcome(FrameDecoder(hunting=False), [data])


@settings(max_examples=150)
@given(st.lists(whole_frames, max_size=4), encoded, st.data(), st.booleans(), st.lists(whole_frames, max_size=4), sizes)
def test_a_marker_inside_a_half_read_frame(
    before: list[Frame], victim: bytes, data: st.DataObject, answer: bool, after: list[Frame], sizes: list[int]
) -> None:
    """What was whole is delivered, of what was cut the data that had been in it and nothing else, everything after; and
    no byte is waited for.
    """
    place = data.draw(st.integers(0, len(victim) - 1))
    kind, channel, _, stream, length = HEADER.unpack_from(victim)
    meant = victim[HEADER.size : min(place, HEADER.size + length)] if kind == frames.DATA else b""
    marker = answer_to(NONCE) if answer else NONCE
    first, last = (
        b"".join(encode(item.kind, item.stream, item.channel, item.payload) for item in items)
        for items in (before, after)
    )
    decoder = FrameDecoder(NONCE, hunting=False)
    decoder.announced(NONCE)
    chunks = chunked(first + victim[:place] + marker + last, sizes)
    expected = [*merged([*before, Frame(frames.DATA, stream, channel, meant)]), (NONCE, answer), *merged(after)]
    assert outcome(decoder, chunks) == (expected, False)
    assert not decoder.buffered


@given(st.binary(max_size=200), st.lists(whole_frames, max_size=3), sizes)
def test_hunting_never_fails(data: bytes, after: list[Frame], sizes: list[int]) -> None:
    rest = b"".join(encode(item.kind, item.stream, item.channel, item.payload) for item in after)
    expected = [(NONCE, False), *merged(after)]
    assert outcome(FrameDecoder(NONCE), chunked(data + NONCE + rest, sizes)) == (expected, False)


@given(st.binary(min_size=20, max_size=60).filter(lambda data: len(data.replace(b"\n", b"")) >= NONCE_SIZE))
def test_a_nonce_holds_no_trailer(data: bytes) -> None:
    nonce = make_nonce(lambda _size: data)
    assert len(nonce) == NONCE_SIZE
    assert b"\n" not in nonce


# -- messages

texts = st.text(st.characters(exclude_categories=()), max_size=30)  # lone surrogates too
scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(1 << 70), 1 << 70),
    st.floats(allow_nan=True, allow_infinity=True),
    texts,
    st.sampled_from(sorted(MESSAGES)),
)
values = st.recursive(
    scalars,
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(texts, inner, max_size=3)),
    max_leaves=6,
)
field_names = sorted({name for cls in MESSAGES.values() for name in cls._fields})
nearly_messages = st.builds(
    lambda tag, fields: json.dumps({"t": tag, **fields}).encode(),
    st.one_of(st.sampled_from(sorted(MESSAGES)), values),
    st.dictionaries(st.sampled_from(field_names), values, max_size=6),
)
by_kind: dict[str, st.SearchStrategy[Any]] = {
    "str": st.text(max_size=20),
    "int": st.integers(-(1 << 63), (1 << 63) - 1),
    "bool": st.booleans(),
    "float": st.floats(allow_nan=False, allow_infinity=False),
    "list[str]": st.lists(st.text(max_size=5), max_size=3),
    "dict[str, str]": st.dictionaries(st.text(max_size=5), st.text(max_size=5), max_size=3),
    "dict[str, float]": st.dictionaries(
        st.text(max_size=5), st.floats(allow_nan=False, allow_infinity=False), max_size=3
    ),
    "None": st.none(),
}


def instances(cls: type[Message]) -> st.SearchStrategy[Message]:
    fields = {
        name: st.one_of(*(by_kind[part.strip()] for part in cls.__annotations__[name].split("|")))
        for name in cls._fields
    }
    return st.fixed_dictionaries(fields).map(lambda values: cls(**values))


@settings(max_examples=150)
@given(st.sampled_from(sorted(MESSAGES.values(), key=lambda cls: cls.tag)).flatmap(instances))
def test_every_message_round_trips(message: Message) -> None:
    assert decode_message(encode_message(message), MESSAGES) == message


@settings(max_examples=250)
@given(st.one_of(nearly_messages, st.binary(max_size=100), values.map(lambda value: json.dumps(value).encode())))
def test_garbage_for_decode_message(payload: bytes) -> None:
    """A message, which then can be sent on as it is, or ProtocolError."""
    try:
        message = decode_message(payload, MESSAGES)
    except ProtocolError:
        return
    assert decode_message(encode_message(message), MESSAGES) == message
    assert len(repr(message)) < 2000


# -- both together

near_frames = st.builds(
    encode,
    st.sampled_from(KINDS),
    st.sampled_from([0, 1, 1, 1, 2, 2, 3, 4, 5, 0xFFFFFFFF]),
    st.sampled_from([0, 0, 1, 2, 3, 255]),
    st.just(b""),
)
on_wire = st.one_of(
    near_frames,
    st.builds(
        lambda kind, stream, payload: encode(kind, stream, payload=payload),
        st.sampled_from([frames.CONTROL, frames.OPEN, frames.MESSAGE, frames.CLOSE, frames.RESET]),
        st.sampled_from([0, 1, 1, 2, 2, 3, 4]),
        st.one_of(
            nearly_messages,
            st.sampled_from(sorted(MESSAGES.values(), key=lambda cls: cls.tag)).flatmap(instances).map(encode_message),
            st.sampled_from(list(STREAMS)).flatmap(instances).map(encode_message),
        ),
    ),
    st.builds(
        lambda stream, channel, payload: encode(frames.DATA, stream, channel, payload),
        st.sampled_from([1, 2, 3]),
        st.integers(0, 3),
        st.binary(max_size=50),
    ),
    st.builds(
        lambda stream, offset: encode(frames.CREDIT, stream, 1, struct.pack(">Q", offset)),
        st.sampled_from([1, 2, 3]),
        st.integers(0, (1 << 64) - 1),
    ),
    st.sampled_from([FIRST_NONCE, answer_to(FIRST_NONCE), FIRST_NONCE[:9]]),
    st.binary(max_size=5),
)


@pytest.mark.parametrize("initiator", [True, False])
@settings(max_examples=150)
@given(st.lists(on_wire, max_size=25).map(b"".join), sizes)
def test_garbage_for_a_mux(initiator: bool, data: bytes, sizes: list[int]) -> None:
    """Whatever comes, when it has two streams of its own open: events, or ProtocolError and a new epoch that works."""
    mux = Mux(FrameDecoder(FIRST_NONCE, hunting=False), initiator=initiator)
    mux.open(Exec(job="j", command="c", stdin=True))
    mux.open(ReadFile(path="p"))
    for chunk in chunked(data, sizes):
        left: bytes | None = chunk
        while left is not None:
            try:
                for event in mux.receive(left):
                    _use(mux, event)
                left = None
            except ProtocolError:
                mux.begin_epoch(FIRST_NONCE)
                left = b""
    for _ in range(10_000):
        if not mux.output():
            break
    else:
        raise AssertionError("a mux that never has said all")
    mux.begin_epoch(FIRST_NONCE)
    assert len(list(mux.receive(answer_to(FIRST_NONCE)))) == 1
    assert mux.streams == 0


def _use(mux: Mux, event: Event) -> None:
    """What an application does: it takes the data, and answers what was asked."""
    assert repr(event)
    channel, data = getattr(event, "channel", None), getattr(event, "data", None)
    if channel is not None:
        assert channel < CHANNELS
    if data is not None:
        mux.consumed(event.stream, channel, len(data))
        mux.send(event.stream, channel, data)
    assert mux.streams <= 1024
