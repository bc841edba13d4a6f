"""The frames of an exec stream."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from capsem.api import stream
from capsem.model.errors import InvalidInput

frames = st.lists(st.tuples(st.integers(0, 255), st.binary(max_size=300)), max_size=8)


@given(frames, st.data())
def test_frames_survive_any_cutting(sent: list[tuple[int, bytes]], data: st.DataObject) -> None:
    wire = b"".join(stream.encode(channel, payload) for channel, payload in sent)
    decoder, got, at = stream.Decoder(), [], 0
    while at < len(wire):
        size = data.draw(st.integers(1, max(1, len(wire) - at)))
        got += decoder.feed(wire[at : at + size])
        at += size
    assert got == sent
    assert not decoder.partial


@given(st.binary(max_size=100), st.integers(1, 100))
def test_garbage_is_frames_or_invalid_input(data: bytes, size: int) -> None:
    outcomes = []
    for step in (len(data) or 1, size, 1):
        decoder, got = stream.Decoder(), []
        try:
            for at in range(0, len(data), step):
                got += decoder.feed(data[at : at + step])
        except InvalidInput:
            outcomes.append("bad")
        else:
            outcomes.append(repr(got))
    assert len(set(outcomes)) == 1


def test_the_layout() -> None:
    assert stream.encode(2, b"hi") == b"\x02\x00\x00\x00\x02hi"
    assert stream.encode_credit(5) == b"\x05\x00\x00\x00\x04\x00\x00\x00\x05"


def test_long_payloads_become_several_frames() -> None:
    data = bytes(2 * stream.MAX_PAYLOAD + 1)
    got = stream.Decoder().feed(stream.encode(1, data))
    assert [len(payload) for _, payload in got] == [stream.MAX_PAYLOAD, stream.MAX_PAYLOAD, 1]


def test_a_frame_over_the_limit_is_refused_by_its_head() -> None:
    with pytest.raises(InvalidInput, match="frame of"):
        stream.Decoder().feed(b"\x00\x00\x10\x00\x01")


def test_a_partial_frame_is_told() -> None:
    decoder = stream.Decoder()
    assert decoder.feed(b"\x00\x00") == []
    assert decoder.partial


@given(st.integers(0, 2**32 - 1))
def test_credit(size: int) -> None:
    [(channel, payload)] = stream.Decoder().feed(stream.encode_credit(size))
    assert (channel, stream.decode_credit(payload)) == (stream.CREDIT, size)


def test_bad_credit() -> None:
    with pytest.raises(InvalidInput):
        stream.decode_credit(b"abc")
