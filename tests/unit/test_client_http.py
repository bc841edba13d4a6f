"""The HTTP that the client speaks, without a socket."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from capsem.api.operations import OPERATIONS
from capsem.client import request
from capsem.client.http import HEAD_LIMIT, Answer, BadAnswer, encode_chunk, encode_head
from capsem.model.errors import AlreadyExists, CapsemError, Interrupted, NotRunning, Unavailable

HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: x\r\n"


def feed(data: bytes, cuts: list[int]) -> tuple[Answer, bytes]:
    answer, body, at = Answer(), b"", 0
    for size in [*cuts, len(data)]:
        if answer.done or at >= len(data):
            break
        body += answer.feed(data[at : at + size])
        at += size
    return answer, body


cuts = st.lists(st.integers(1, 40), max_size=40)


@given(st.binary(max_size=200), cuts)
def test_a_body_with_a_length(body: bytes, sizes: list[int]) -> None:
    answer, got = feed(HEAD + b"content-length: %d\r\n\r\n" % len(body) + body, sizes)
    if not body and not answer.done:
        answer.feed(b"")
    assert (answer.status, answer.done, got) == (200, True, body)
    assert answer.headers["content-type"] == "x"
    answer.eof()


@given(st.lists(st.binary(min_size=1, max_size=60), max_size=6), cuts, st.booleans())
def test_a_body_in_chunks(pieces: list[bytes], sizes: list[int], trailer: bool) -> None:
    data = HEAD + b"Transfer-Encoding: Chunked\r\n\r\n" + b"".join(map(encode_chunk, pieces))
    data += b"0;ext=1\r\n" + (b"X-T: 1\r\n" if trailer else b"") + b"\r\n"
    answer, got = feed(data, sizes)
    assert (answer.done, got) == (True, b"".join(pieces))


@given(st.binary(max_size=100), cuts)
def test_a_body_to_the_end_of_the_connection(body: bytes, sizes: list[int]) -> None:
    answer, got = feed(HEAD + b"\r\n" + body, sizes)
    assert (answer.done, got) == (False, body)
    answer.eof()
    assert answer.done


def test_interim_answers_are_passed_over() -> None:
    answer, got = feed(b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\nx", [])
    assert (answer.status, got) == (200, b"x")


@pytest.mark.parametrize(
    "data",
    [b"", b"HTTP/1.1 200", HEAD + b"content-length: 5\r\n\r\nabc", HEAD + b"transfer-encoding: chunked\r\n\r\n3\r\nab"],
)
def test_an_answer_that_is_cut_off(data: bytes) -> None:
    answer = Answer()
    answer.feed(data)
    with pytest.raises(BadAnswer):
        answer.eof()


@pytest.mark.parametrize(
    "data",
    [
        b"hello\r\n\r\n",
        b"HTTP/1.1 2x0 OK\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nno colon\r\n\r\n",
        HEAD + b"content-length: -1\r\n\r\n",
        HEAD + b"content-length: 1_0\r\n\r\n",
        HEAD + b"transfer-encoding: chunked\r\n\r\nxyz\r\n",
        HEAD + b"transfer-encoding: chunked\r\n\r\n1\r\nabc\r\n",
        HEAD + b"transfer-encoding: chunked\r\n\r\n" + b"1" * 5000,
        b"x" * (HEAD_LIMIT + 1),
    ],
)
def test_what_is_no_answer(data: bytes) -> None:
    with pytest.raises(BadAnswer):
        Answer().feed(data)


@given(
    st.binary(max_size=300)
    | st.binary(max_size=100).map(lambda tail: HEAD + b"transfer-encoding: chunked\r\n\r\n" + tail)
)
def test_garbage_raises_nothing_else(data: bytes) -> None:
    try:
        answer = Answer()
        answer.feed(data)
        answer.eof()
    except BadAnswer:
        pass


def test_requests() -> None:
    assert request.encode_request(OPERATIONS["info"], "a/b c", None) == (
        b"GET /info/a%2Fb%20c HTTP/1.1\r\nHost: capsem\r\nConnection: close\r\n"
        b"Content-Type: application/json\r\nContent-Length: 2\r\n\r\n{}"
    )
    data = request.encode_request(OPERATIONS["provision"], None, {"name": "é", "ram_mb": None, "persistent": False})
    assert data.endswith(b'\r\n\r\n{"name": "\\u00e9", "persistent": false}')
    assert b"Transfer-Encoding: chunked" in request.encode_stream_head(OPERATIONS["exec_stream"], "box")
    assert encode_head("GET", "/", {}).endswith(b"\r\n\r\n")


def test_an_id_where_it_belongs() -> None:
    with pytest.raises(ValueError, match="needs an id"):
        request.encode_request(OPERATIONS["info"], None, None)
    with pytest.raises(ValueError, match="takes no id"):
        request.encode_request(OPERATIONS["list"], "box", None)
    with pytest.raises(KeyError):
        request.operation("fly")


def test_answers() -> None:
    assert request.decode_answer(200, {}, b'{"a": 1}') == {"a": 1}
    for body in (b"", b"[]", b"x", b"[" * 100_000):
        with pytest.raises(Interrupted):
            request.decode_answer(200, {}, body)


@pytest.mark.parametrize("error", [NotRunning("gone", hint="do"), AlreadyExists("there"), CapsemError("odd")])
def test_errors_come_back_as_they_were(error: CapsemError) -> None:
    import json

    with pytest.raises(type(error)) as caught:
        request.decode_answer(error.status, {}, json.dumps(error.to_dict()).encode())
    assert (caught.value.message, caught.value.hint) == (error.message, error.hint)


def test_errors_of_others() -> None:
    assert "502" in request.decode_error(502, {}, b"<html>").message
    assert request.decode_error(400, {}, b'{"error": "no"}').message == "no"
    error = request.decode_error(503, {"retry-after": "7"}, b'{"error": "no", "code": "unavailable"}')
    assert isinstance(error, Unavailable)
    assert error.retry_after == 7
