"""Taps take whatever comes: any bytes, in any pieces, under any headers, and valid JSON of any shape in the places where figures
should be. They record one row, log no failure, and give back what they held."""

from __future__ import annotations

import gzip
import itertools
import json
import zlib
from collections.abc import Callable
from typing import Any
from unittest import mock

import brotli
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from capsem.egress.events import ModelCall
from capsem.egress.facts import Action, Layer, Verdict
from capsem.egress.record import model_rows
from capsem.egress.taps import tap as tapping
from capsem.egress.taps.arrays import Elements
from capsem.egress.taps.coding import STEP, Unreadable, opener
from capsem.egress.taps.sse import Events
from model_taps import STREAMS, Kept, play, tap_for, taps

FILES = sorted(path for path in STREAMS.iterdir() if path.suffix in (".sse", ".json"))
TARGETS = [
    ("anthropic", "/v1/messages"),
    ("openai", "/v1/chat/completions"),
    ("openai", "/v1/responses"),
    ("gemini", "/v1/models/m:generateContent"),
    ("gemini", "/v1/models/m:streamGenerateContent"),
]
KINDS = ["text/event-stream", "application/json", "", "text/html"]
CODINGS: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    "gzip": gzip.compress,
    "deflate": zlib.compress,
    "br": brotli.compress,
    "zstd": zstandard.compress,
}


def cut(data: bytes, places: list[int]) -> list[bytes]:
    edges = sorted({0, len(data), *(place % (len(data) + 1) for place in places)})
    return [data[start:end] for start, end in itertools.pairwise(edges)]


def listen(
    target: tuple[str, str], request: bytes, answer: bytes, kind: str, coding: str = "", *, size: int = 1 << 20
) -> ModelCall:
    """One call through a tap, its row made into statements; nothing was logged, and nothing is held."""
    kept = Kept()
    rooms: list[tapping.Room] = []

    class Watched(tapping.Room):
        def __init__(self) -> None:
            super().__init__()
            rooms.append(self)

    with mock.patch("capsem.egress.taps.pick.Room", Watched), mock.patch.object(tapping.log, "exception") as failed:
        api, path = target
        tap = tap_for(taps(kept), "h.test", path, verdict=Verdict(Action.ALLOW, "r", Layer.USER, "", model=api))
        assert tap is not None
        play(tap, request, answer, kind, size=size, coding=coding or None)
        failed.assert_not_called()
    assert rooms[0]._free == tapping.ROOM
    (call,) = kept.calls
    model_rows(call)
    for count in (call.input_tokens, call.output_tokens, call.cache_read_tokens, call.thinking_tokens):
        assert count is None or 0 <= count < 1 << 56
    return call


anything = st.binary(max_size=300)
sizes = st.sampled_from([1, 3, 7, 1 << 20])


@given(st.sampled_from(TARGETS), anything, anything, st.sampled_from(KINDS), st.sampled_from(sorted(CODINGS)), sizes)
def test_any_bytes(target: tuple[str, str], request: bytes, answer: bytes, kind: str, coding: str, size: int) -> None:
    listen(target, request, answer, kind, coding, size=size)


@given(
    st.sampled_from(TARGETS),
    st.sampled_from(FILES),
    st.data(),
    st.sampled_from(KINDS),
    st.sampled_from(sorted(CODINGS)),
)
def test_a_recording_with_damage(
    target: tuple[str, str], path: Any, data: st.DataObject, kind: str, coding: str
) -> None:
    recording = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 5))):
        place = data.draw(st.integers(0, len(recording) - 1))
        recording[place : place + data.draw(st.integers(0, 9))] = data.draw(st.binary(max_size=9))
    packed = bytearray(CODINGS[coding](bytes(recording)))
    if coding and data.draw(st.booleans()):
        packed[data.draw(st.integers(0, len(packed) - 1))] ^= data.draw(st.integers(1, 255))
    listen(target, bytes(recording), bytes(packed), kind, coding, size=data.draw(sizes))


LEAVES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=9),
    st.sampled_from([2**53, -1, 2**63, 2**64, 1e300]),
)
VALUES = st.recursive(
    LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
)


@st.composite
def reshaped(draw: st.DrawFn, data: bytes) -> bytes:
    """The same JSON, with other values in some places."""
    value = json.loads(data)

    def walk(node: Any) -> Any:
        if draw(st.integers(0, 19)) == 0:
            return draw(VALUES)
        if isinstance(node, dict):
            return {name: walk(member) for name, member in node.items()}
        return [walk(member) for member in node] if isinstance(node, list) else node

    return json.dumps(walk(value)).encode()


@given(st.sampled_from(TARGETS), st.sampled_from(FILES), st.data())
def test_json_of_another_shape(target: tuple[str, str], path: Any, data: st.DataObject) -> None:
    content = path.read_bytes()
    if path.suffix == ".json":
        changed = data.draw(reshaped(content))
        listen(target, changed, changed, "application/json")
    else:
        events = [each[6:] for each in content.splitlines() if each.startswith(b"data: {")]
        lines = [b"data: " + data.draw(reshaped(each)) + b"\n\n" for each in events]
        listen(target, b"", b"".join(lines), "text/event-stream")


LINES = st.sampled_from([b"data: x", b"\n", b"\r", b"\r\n", b"data", b":c", b"data:y"])


@given(st.binary(max_size=200) | st.lists(LINES).map(b"".join), st.lists(st.integers(0, 999)))
def test_events_do_not_depend_on_how_they_are_cut(data: bytes, places: list[int]) -> None:
    whole, pieces = Events(), Events()
    expected = whole.feed(data) + whole.end()
    assert [event for piece in cut(data, places) for event in pieces.feed(piece)] + pieces.end() == expected
    assert pieces.held <= len(data)


@given(
    st.lists(st.lists(st.text(alphabet="ab\n: ", max_size=9).filter(lambda it: "\n" not in it), min_size=1), max_size=5)
)
def test_events_that_were_written_are_read(events: list[list[str]]) -> None:
    sent = "".join("".join(f"data: {line}\n" for line in event) + "\n" for event in events).encode()
    assert Events().feed(sent) == ["\n".join(event).encode() for event in events]


OBJECTS = st.dictionaries(st.text(max_size=5), VALUES, max_size=3)


@given(st.lists(OBJECTS, max_size=5), st.sampled_from([None, 2]), st.lists(st.integers(0, 9999)))
def test_elements_that_were_written_are_read(values: list[Any], indent: int | None, places: list[int]) -> None:
    data = json.dumps(values, indent=indent, ensure_ascii=False).encode("utf-8", "surrogatepass")
    elements = Elements()
    found = [element for piece in cut(data, places) for element in elements.feed(piece)]
    assert [json.dumps(json.loads(each.decode("utf-8", "surrogatepass"))) for each in found] == [
        json.dumps(each) for each in values
    ]
    assert elements.held == 0


@given(st.binary(max_size=300), st.lists(st.integers(0, 999)))
def test_elements_of_anything_do_not_depend_on_how_it_is_cut(data: bytes, places: list[int]) -> None:
    whole, pieces = Elements(), Elements()
    assert [each for piece in cut(data, places) for each in pieces.feed(piece)] == whole.feed(data)


@given(
    st.sampled_from([b"gzip", b"deflate", b"br", b"zstd"]),
    st.binary(max_size=500),
    st.booleans(),
    st.lists(st.integers(0, 999)),
)
def test_anything_is_opened_or_is_unreadable(name: bytes, data: bytes, packed: bool, places: list[int]) -> None:
    sent = CODINGS[name.decode()](data) if packed else data
    opened, out = opener(name), b""
    try:
        for piece in cut(sent, places):
            for part in opened.feed(piece):
                assert len(part) <= STEP
                out += part
    except Unreadable:
        assert not packed
    else:
        assert not packed or out == data
