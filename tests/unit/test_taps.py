"""Recorded calls of models through taps, in pieces of any size and compressed in any way, and what makes a tap give up."""

from __future__ import annotations

import datetime
import gzip
import json
import logging
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import brotli
import pytest
import zstandard

from capsem.egress.events import ModelCall
from capsem.egress.facts import Action, Layer, Verdict
from capsem.egress.heads import Headers, ResponseHead
from capsem.egress.taps import coding
from capsem.egress.taps import tap as tapping
from capsem.egress.taps.coding import Unreadable, opener
from capsem.egress.taps.found import ARGUMENTS, TOOLS, Found
from capsem.egress.taps.prices import Prices, load
from capsem.egress.taps.tap import Room
from capsem.model.errors import InvalidInput
from model_taps import STREAMS, Kept, pieces, play, tap_for, taps

ANTHROPIC = ("api.anthropic.com", "/v1/messages?beta=true")
CHAT = ("api.openai.com", "/v1/chat/completions")
RESPONSES = ("api.openai.com", "/v1/responses")
GEMINI = ("generativelanguage.googleapis.com", "/v1beta/models/gemini-2.5-flash:streamGenerateContent")
GEMINI_PRO = ("generativelanguage.googleapis.com", "/v1beta/models/gemini-2.5-pro:generateContent?key=k")
SSE, JSON = "text/event-stream; charset=utf-8", "application/json"


class Recorded(NamedTuple):
    """A recorded call, and what its row should say: (model, in, out, read, written, thinking, dollars)."""

    name: str
    where: tuple[str, str]
    figures: tuple[Any, ...]
    tools: list[tuple[str | None, str, Any]]
    responses: list[tuple[str | None, str, bool | None]] = []

    @property
    def answer(self) -> bytes:
        return self._file("sse" if self.streamed_as_events else "json").read_bytes()

    @property
    def request(self) -> bytes:
        return self._file("request.json").read_bytes()

    @property
    def streamed_as_events(self) -> bool:
        return self._file("sse").exists()

    @property
    def kind(self) -> str:
        return SSE if self.streamed_as_events else JSON

    def _file(self, suffix: str) -> Path:
        return STREAMS / f"{self.name}.{suffix}"


RECORDED = [
    Recorded(
        "anthropic-stream", ANTHROPIC,
        ("claude-sonnet-4-5-20250929", 43000, 300, 40000, 2000, None, 0.030375),
        [("toolu_01", "read_file", {"path": "notes.txt"}), ("toolu_02", "stat", {})],
        [("toolu_old", "notes.txt\n[image]", False), ("toolu_bad", "no such tool", True)],
    ),
    Recorded("anthropic-whole", ANTHROPIC, ("claude-opus-4-1-20250805", 10, 20, None, None, None, 0.00165),
             [("toolu_03", "wave", {"hands": 2})]),
    Recorded("openai-chat-stream", CHAT, ("gpt-4o-2024-08-06", 2000, 100, 1000, None, 64, 0.00475),
             [("call_1", "weather", {"city": "Bern"}), ("call_2", "clock", {})], [("call_a", "rain", None)]),
    Recorded("openai-chat-whole", CHAT, ("gpt-4o-mini-2024-07-18", 1000, 500, None, None, None, 0.00045),
             [("call_3", "greet", {"who": "you"})]),
    Recorded("openai-responses-stream", RESPONSES, ("gpt-5-mini-2025-08-07", 4000, 1000, 3000, None, 800, 0.002325),
             [("call_1", "shell", {"cmd": "make"})], [("call_x", "2 failed", None), ("call_y", "fine", None)]),
    Recorded("openai-responses-whole", RESPONSES, ("gpt-5-2025-08-07", 1000, 2000, 0, None, 1500, 0.02125),
             [("call_2", "patch", "*** Begin")]),
    Recorded("gemini-stream", (GEMINI[0], GEMINI[1] + "?alt=sse"), ("gemini-2.5-flash", 120, 80, 40, None, 50, 0.0002252),
             [(None, "open", {"path": "a"})], [("search", '{"hits":["a","b"]}', None)]),
    Recorded("gemini-array", GEMINI, ("gemini-2.5-flash", 120, 80, 40, None, 50, 0.0002252),
             [(None, "open", {"path": "a"})], [("search", '{"hits":["a","b"]}', None)]),
    Recorded("gemini-whole", GEMINI_PRO, ("gemini-2.5-pro", 300000, 1000, None, None, None, 0.765),
             [("f1", "wave", {"hands": [1, 2]})]),
]  # fmt: skip
BY_NAME = {each.name: each for each in RECORDED}


def bare_deflate(data: bytes) -> bytes:
    packer = zlib.compressobj(wbits=-15)
    return packer.compress(data) + packer.flush()


def in_two(pack: Callable[[bytes], bytes]) -> Callable[[bytes], bytes]:
    return lambda data: pack(data[: len(data) // 2]) + pack(data[len(data) // 2 :])


PACKED: list[tuple[str | None, Callable[[bytes], bytes]]] = [
    (None, bytes),
    ("identity", bytes),
    ("gzip", gzip.compress),
    ("x-gzip", in_two(gzip.compress)),
    ("deflate", zlib.compress),
    ("deflate", bare_deflate),
    ("br", brotli.compress),
    ("zstd", zstandard.compress),
    ("ZSTD", in_two(zstandard.compress)),
]


def heard(recorded: Recorded, **how: Any) -> ModelCall:
    kept = Kept()
    tap = tap_for(taps(kept), *recorded.where)
    assert tap is not None
    packed = how.pop("pack", bytes)(recorded.answer)
    play(tap, recorded.request, packed, recorded.kind, **how)
    (call,) = kept.calls
    return call


def arguments(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def figures(call: ModelCall) -> tuple[Any, ...]:
    cost = None if call.cost_usd is None else round(call.cost_usd, 10)
    return (call.model, call.input_tokens, call.output_tokens, call.cache_read_tokens, call.cache_write_tokens,
            call.thinking_tokens, cost)  # fmt: skip


def check(recorded: Recorded, call: ModelCall) -> None:
    assert figures(call) == recorded.figures
    assert [(tool.call_id, tool.name, arguments(tool.arguments)) for tool in call.tools] == recorded.tools
    assert [(each.call_id, each.preview, each.is_error) for each in call.responses] == recorded.responses
    assert (call.truncated, call.note, call.status_code) == (False, None, 200)
    assert call.stream == ("whole" not in recorded.name)
    assert call.price_date is not None
    assert "?" not in call.path


@pytest.mark.parametrize("size", [1, 7, 1 << 20])
@pytest.mark.parametrize("recorded", RECORDED, ids=lambda each: each.name)
def test_a_recorded_call_in_pieces(recorded: Recorded, size: int) -> None:
    check(recorded, heard(recorded, size=size))


@pytest.mark.parametrize(("name", "pack"), PACKED)
@pytest.mark.parametrize("recorded", RECORDED, ids=lambda each: each.name)
def test_a_recorded_call_compressed(recorded: Recorded, name: str | None, pack: Callable[[bytes], bytes]) -> None:
    for size in (1, 1 << 20):
        check(recorded, heard(recorded, coding=name, pack=pack, size=size))


@pytest.mark.parametrize("end", [b"\r\n", b"\r"])
def test_other_ends_of_lines(end: bytes) -> None:
    recorded = BY_NAME["anthropic-stream"]
    for size in (1, 7, 1 << 20):
        check(recorded, heard(recorded, pack=lambda data: b"\xef\xbb\xbf: hi\n" + data.replace(b"\n", end), size=size))


def test_a_compressed_request_is_read_too() -> None:
    kept, recorded = Kept(), BY_NAME["openai-responses-stream"]
    tap = tap_for(taps(kept), *recorded.where, (b"content-encoding", b"zstd"))
    assert tap is not None
    play(tap, zstandard.compress(recorded.request), recorded.answer, recorded.kind, size=5)
    check(recorded, kept.calls[0])


@pytest.mark.parametrize(
    ("host", "target", "method"),
    [
        ("api.anthropic.com", "/v1/messages", b"GET"),
        ("api.anthropic.com", "/v1/messages/count_tokens", b"POST"),
        ("api.anthropic.com", "/v1/messages/batches", b"POST"),
        ("api.openai.com", "/v1/files", b"POST"),
        ("api.openai.com", "/v1/messages", b"POST"),
        ("generativelanguage.googleapis.com", "/v1beta/models/g:countTokens", b"POST"),
        ("llm.test", "/v1/chat/completions", b"POST"),
        ("evil-api.openai.com", "/v1/chat/completions", b"POST"),
    ],
)
def test_what_is_no_call_of_a_model(host: str, target: str, method: bytes) -> None:
    assert tap_for(taps(Kept()), host, target, method=method) is None


def test_a_host_that_speaks_an_api_by_rule() -> None:
    kept, recorded = Kept(), BY_NAME["openai-chat-stream"]
    rule = Verdict(Action.ALLOW, "llm", Layer.USER, "", model="openai")
    tap = tap_for(taps(kept), "llm.test", "/deployments/x/chat/completions?v=1", verdict=rule)
    assert tap is not None
    play(tap, recorded.request, recorded.answer, SSE)
    (call,) = kept.calls
    assert (call.provider, call.domain, call.input_tokens, call.cost_usd) == ("llm.test", "llm.test", 2000, None)
    assert call.note == "gpt-4o-2024-08-06 of llm.test is on no price list"
    strange = Verdict(Action.ALLOW, "l", Layer.USER, "", model="x")
    assert tap_for(taps(kept), "llm.test", "/v1/chat/completions", verdict=strange) is None


def test_google_speaks_like_openai_as_well() -> None:
    tap = tap_for(taps(kept := Kept()), GEMINI[0], "/v1beta/openai/chat/completions")
    assert tap is not None
    play(tap, b"", BY_NAME["openai-chat-stream"].answer, SSE)
    assert kept.calls[0].provider == "google"


def test_a_stream_that_tells_no_tokens_has_none_and_no_cost() -> None:
    answer = BY_NAME["openai-chat-stream"].answer
    silent = b"\n\n".join(each for each in answer.split(b"\n\n") if b'"prompt_tokens"' not in each)
    call = heard(BY_NAME["openai-chat-stream"], pack=lambda _data: silent)
    assert (call.input_tokens, call.output_tokens, call.cost_usd, call.truncated) == (None, None, None, False)
    assert call.note is not None
    assert "stream_options" in call.note
    assert len(call.tools) == 2


def test_an_answer_that_breaks_off() -> None:
    call = heard(BY_NAME["anthropic-stream"], pack=lambda data: data[: data.index(b"event: message_delta")])
    assert (call.input_tokens, call.output_tokens) == (43000, 1)
    assert call.note == "the answer broke off"
    kept = Kept()
    tap = tap_for(taps(kept), *ANTHROPIC)
    assert tap is not None
    tap.finish()
    tap.finish()
    tap.response_body(b"late")
    assert [(call.status_code, call.model, call.note) for call in kept.calls] == [(None, None, None)]


def test_a_refusal_is_recorded_without_figures() -> None:
    kept = Kept()
    tap = tap_for(taps(kept), *ANTHROPIC)
    assert tap is not None
    answer = b'{"type":"error","error":{"type":"rate_limit_error"},"usage":{"input_tokens":5,"output_tokens":5}}'
    play(tap, BY_NAME["anthropic-whole"].request, answer, JSON, status=429)
    (call,) = kept.calls
    assert (call.status_code, call.model, call.input_tokens, call.cost_usd, call.note) == (
        429, "claude-opus-4-1", None, None, None,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"service_tier": "priority"}, "served as priority"),
        ({"server_tool_use": {"web_search_requests": 2}}, "searched the web"),
    ],
)
def test_a_call_that_the_price_is_not_for(change: dict[str, Any], why: str) -> None:
    def changed(data: bytes) -> bytes:
        answer = json.loads(data)
        answer["usage"] |= change
        return json.dumps(answer).encode()

    call = heard(BY_NAME["anthropic-whole"], pack=changed)
    assert (call.input_tokens, call.cost_usd, call.price_date) == (10, None, None)
    assert call.note is not None
    assert why in call.note


# -- what is too much


def bomb(size: int) -> bytes:
    return b"data: " + b"x" * size


@pytest.mark.parametrize(
    ("name", "pack"), [("gzip", gzip.compress), ("deflate", zlib.compress), ("br", brotli.compress), ("zstd", zstandard.compress)]
)  # fmt: skip
def test_a_bomb_is_not_opened_to_its_end(name: str, pack: Callable[[bytes], bytes]) -> None:
    packed = pack(bomb(200 << 20))
    largest = total = 0
    opened = opener(name.encode())
    with pytest.raises(Unreadable, match="expands too much"):
        for piece in opened.feed(packed):
            largest, total = max(largest, len(piece)), total + len(piece)
    assert largest <= coding.STEP
    assert total <= coding.BASE + coding.RATIO * len(packed)
    call = heard(BY_NAME["anthropic-stream"], coding=name, pack=lambda _data: packed)
    assert call.truncated
    assert call.note == "the answer was not read to its end: it expands too much; the answer broke off"


@pytest.mark.parametrize("name", ["gzip", "deflate", "br", "zstd", "compress", "gzip, br"])
def test_what_cannot_be_opened(name: str) -> None:
    call = heard(BY_NAME["anthropic-whole"], coding=name, pack=lambda _data: b"\x07this is none of these" * 9)
    assert (call.truncated, call.input_tokens, call.model) == (True, None, "claude-opus-4-1")
    assert call.note is not None
    assert call.note.startswith("the answer was not read to its end: it is ")


@pytest.mark.parametrize(("name", "package"), [("br", "brotli"), ("zstd", "zstandard")])
def test_without_its_library_the_row_says_so(name: str, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    call = heard(BY_NAME["anthropic-whole"], coding=name, pack=lambda _data: b"?")
    assert call.note is not None
    assert f"the package {package} is not installed" in call.note


def test_a_library_that_cannot_be_held_back_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    class Old:
        error = Exception
        Decompressor = object

    monkeypatch.setitem(sys.modules, "brotli", Old)
    with pytest.raises(Unreadable, match=r"older than 1\.2"):
        opener(b"br")


def test_a_zstandard_stream_that_looks_back_too_far() -> None:
    parameters = zstandard.ZstdCompressionParameters(window_log=27)
    packed = zstandard.ZstdCompressor(compression_params=parameters).compress(b"x" * (64 << 20))
    with pytest.raises(Unreadable):
        list(opener(b"zstd").feed(packed))


def test_one_event_too_long_is_left_out_and_told_of() -> None:
    recorded = BY_NAME["anthropic-stream"]
    long = b'data: {"type":"message_delta","usage":{"output_tokens":1}' + b" " * (3 << 20) + b"}\n\n"
    for size in (999, 1 << 22):
        call = heard(recorded, pack=lambda data: long + data, size=size)
        assert figures(call) == recorded.figures
        assert (call.truncated, call.note) == (True, "the answer was not read to its end: a part of it was too long")


def test_a_request_too_long_leaves_the_answer_readable() -> None:
    kept, recorded = Kept(), BY_NAME["anthropic-stream"]
    tap = tap_for(taps(kept), *recorded.where)
    assert tap is not None
    play(tap, b" " * (tapping.WHOLE + 1) + recorded.request, recorded.answer, SSE, size=65536)
    (call,) = kept.calls
    assert (call.input_tokens, call.responses, call.truncated) == (43000, [], True)
    assert call.note == "the request was not read to its end: a part of it was too long"


def test_all_taps_hold_no_more_than_they_may(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = Kept()
    all_taps = taps(kept)
    recorded = BY_NAME["anthropic-whole"]
    half = b"{" + b" " * (tapping.WHOLE - 10)
    greedy = [tap for _ in range(40) if (tap := tap_for(all_taps, *recorded.where)) is not None]
    for tap in greedy:
        tap.request_body(half)
    for tap in greedy:
        tap.finish()
    held = [call.note for call in kept.calls]
    too_many = "the request was not read to its end: too many calls are listened to at once"
    assert held.count(too_many) == 40 - tapping.ROOM // len(half)
    check(recorded, heard(recorded))
    tap = tap_for(all_taps, *recorded.where)  # and what they held is free again
    assert tap is not None
    play(tap, recorded.request, recorded.answer, JSON)
    check(recorded, kept.calls[-1])


def test_room_comes_back_from_a_tap_that_failed(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    rooms: list[Room] = []
    monkeypatch.setattr(Room, "__init__", lambda self: rooms.append(self) or setattr(self, "_free", tapping.ROOM))
    kept = Kept()
    tap = tap_for(taps(kept), *ANTHROPIC)
    assert tap is not None
    tap.request_body(b"{}")
    monkeypatch.setattr(tapping, "fields", lambda _data: 1 / 0)
    with caplog.at_level(logging.ERROR):
        tap.finish()
    assert [record.getMessage() for record in caplog.records] == ["a tap failed; the call goes on unheard"]
    assert (kept.calls[0].truncated, kept.calls[0].note) == (True, "the tap failed; the log of the VM says how")
    assert rooms[0]._free == tapping.ROOM


def test_more_tools_than_are_kept() -> None:
    block = {"type": "tool_use", "id": "t", "name": "n", "input": {"x": "y" * (ARGUMENTS + 5)}}
    answer = {
        "model": "claude-opus-4-1",
        "usage": {"input_tokens": 1, "output_tokens": 1},
        "content": [block, *[block | {"input": {}}] * (TOOLS + 3)],
    }
    call = heard(BY_NAME["anthropic-whole"], pack=lambda _data: json.dumps(answer).encode())
    assert (len(call.tools), len(call.tools[0].arguments), call.truncated) == (TOOLS, ARGUMENTS, True)
    assert call.note == "more tools than are kept, or longer arguments"


def test_one_byte_at_a_time_does_not_take_the_square_of_it() -> None:
    kept = Kept()
    tap = tap_for(taps(kept), *ANTHROPIC)
    assert tap is not None
    tap.response(ResponseHead(200, b"", Headers([(b"content-type", SSE.encode())])))
    for piece in pieces(bomb(300_000), 1):
        tap.response_body(piece)
    tap.finish()
    assert kept.calls[0].note == "the answer broke off"


# -- prices

DAY = datetime.date(2026, 10, 26)


def found(model: str, came_in: int = 1_000_000, came_out: int = 0, **more: Any) -> Found:
    return Found(model=model, input_tokens=came_in, output_tokens=came_out, **more)


def listed(text: str) -> Prices:
    import tomllib

    return Prices([tomllib.loads(text)])


def test_the_packages_list_is_whole() -> None:
    prices = load()
    assert prices.cost("anthropic", found("claude-sonnet-4-5-20250929", 200_000), DAY).dollars == 0.6
    assert prices.cost("anthropic", found("claude-sonnet-4-5-20250929", 200_001), DAY).reason is not None
    assert prices.cost("anthropic", found("claude-haiku-5-5", 100_001), DAY).dollars == pytest.approx(0.0500005)
    assert prices.cost("google", found("models/gemini-3.8-flash"), DAY).dollars == 0.75
    assert prices.cost("google", found("gemini-3.8-flash"), datetime.date(2027, 1, 1)).dollars is None
    assert prices.cost("openai", found("gpt-4o-2024-05-13"), DAY).dollars == 5
    assert prices.cost("openai", found("gpt-4o-2024-08-06"), DAY) == (2.5, "2026-07-01", None)


@pytest.mark.parametrize("model", ["gpt-4o-mini-x", "gpt-4o-audio-preview", "gpt-4", "GPT-4o", "", "claude-opus-4-1"])
def test_a_model_that_is_not_listed_has_no_price(model: str) -> None:
    assert load().cost("openai", found(model), DAY).dollars is None


def test_what_a_price_does_not_say_is_not_guessed() -> None:
    prices = listed("[p]\ndate = 2026-01-01\nm = { input = 1, output = 2 }\nn = { output = 2 }")
    assert prices.cost("p", found("m", 10, 10), DAY).dollars == pytest.approx(30e-6)
    missing = (None, None, "the price list does not say what reading a cache costs")
    assert prices.cost("p", found("m", 10, 10, cache_read=5), DAY) == missing
    assert prices.cost("p", found("m", 10, 10, cache_read=0), DAY).dollars == pytest.approx(30e-6)
    assert prices.cost("p", found("n", 10, 10), DAY).dollars is None
    assert prices.cost("p", Found(model="m", input_tokens=10), DAY) == (None, None, None)


def test_the_users_list_comes_first(tmp_path: Path) -> None:
    own = tmp_path / "prices.toml"
    assert load(own).cost("openai", found("gpt-4o"), DAY).dollars == 2.5
    openai = "[openai]\ndate = 2026-10-01\ngpt-4o = { input = 7, output = 8 }\n"
    own.write_text(openai + '["llm.test"]\ndate = 2026-10-02\nm = { input = 1, output = 1 }\n')
    assert load(own).cost("openai", found("gpt-4o-2024-08-06"), DAY) == (7, "2026-10-01", None)
    assert load(own).cost("openai", found("gpt-4o-mini"), DAY).dollars == 0.15
    assert load(own).cost("llm.test", found("m"), DAY).dollars == 1


@pytest.mark.parametrize(
    "text",
    [
        "[p]\nm = { input = 1 }",
        "[p]\ndate = 2026-01-01\nm = 3",
        '[p]\ndate = 2026-01-01\nm = { input = "1" }',
        "[p]\ndate = 2026-01-01\nm = { input = -1 }",
        "[p]\ndate = 2026-01-01\nm = { inputs = 1 }",
        "[p]\ndate = 2026-01-01\nm = { input = 1, up_to = 1.5 }",
        "p = 1",
        "not toml",
    ],
)
def test_a_list_with_a_mistake_says_so(tmp_path: Path, text: str) -> None:
    own = tmp_path / "prices.toml"
    own.write_text(text)
    with pytest.raises(InvalidInput, match=r"prices\.toml is no price list"):
        load(own)
