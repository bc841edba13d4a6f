"""Heads and bodies of HTTP/1.1: what is refused, what is written, and that h11 refuses nothing that we take."""

from __future__ import annotations

import h11
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from capsem.egress.bodies import BodyReader, chunk, last_chunk
from capsem.egress.heads import Headers, ResponseHead
from capsem.egress.http1 import (
    MAX_HEAD,
    BadHead,
    Body,
    HeadReader,
    Request,
    Response,
    parse_request,
    parse_response,
    write_request,
    write_response,
)


def head(text: bytes) -> Request:
    """The request that begins like that, given at once. Raises BadHead, also when it is not whole."""
    reader = HeadReader()
    reader.feed(text)
    block = reader.head()
    if block is None:
        raise BadHead("not whole")
    return parse_request(block)


# Smuggling, and what looks like it: each is refused, by the head or by the beginning of the body.
CORPUS = {
    "CL and TE": b"POST / HTTP/1.1\r\nHost: a.test\r\nContent-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n",
    "TE and CL": b"POST / HTTP/1.1\r\nHost: a.test\r\nTransfer-Encoding: chunked\r\nContent-Length: 4\r\n\r\n",
    "two CL": b"POST / HTTP/1.1\r\nHost: a.test\r\nContent-Length: 4\r\nContent-Length: 5\r\n\r\n",
    "two equal CL": b"POST / HTTP/1.1\r\nHost: a.test\r\nContent-Length: 4\r\nContent-Length: 4\r\n\r\n",
    "list of CL": b"POST / HTTP/1.1\r\nHost: a.test\r\nContent-Length: 4, 4\r\n\r\n",
    "signed CL": b"POST / HTTP/1.1\r\nHost: a.test\r\nContent-Length: +4\r\n\r\n",
    "hexadecimal CL": b"POST / HTTP/1.1\r\nHost: a.test\r\nContent-Length: 0x4\r\n\r\n",
    "empty CL": b"POST / HTTP/1.1\r\nHost: a.test\r\nContent-Length: \r\n\r\n",
    "negative CL": b"POST / HTTP/1.1\r\nHost: a.test\r\nContent-Length: -1\r\n\r\n",
    "huge CL": b"POST / HTTP/1.1\r\nHost: a.test\r\nContent-Length: 99999999999999999999\r\n\r\n",
    "TE with a vertical tab": b"POST / HTTP/1.1\r\nHost: a.test\r\nTransfer-Encoding: \x0bchunked\r\n\r\n",
    "TE xchunked": b"POST / HTTP/1.1\r\nHost: a.test\r\nTransfer-Encoding: xchunked\r\n\r\n",
    "TE identity": b"POST / HTTP/1.1\r\nHost: a.test\r\nTransfer-Encoding: identity\r\n\r\n",
    "TE chunked twice": b"POST / HTTP/1.1\r\nHost: a.test\r\nTransfer-Encoding: chunked, chunked\r\n\r\n",
    "two TE": b"POST / HTTP/1.1\r\nHost: a.test\r\nTransfer-Encoding: chunked\r\nTransfer-Encoding: gzip\r\n\r\n",
    "TE gzip, chunked": b"POST / HTTP/1.1\r\nHost: a.test\r\nTransfer-Encoding: gzip, chunked\r\n\r\n",
    "TE quoted": b'POST / HTTP/1.1\r\nHost: a.test\r\nTransfer-Encoding: "chunked"\r\n\r\n',
    "TE in 1.0": b"POST / HTTP/1.0\r\nHost: a.test\r\nTransfer-Encoding: chunked\r\n\r\n",
    "space before colon": b"POST / HTTP/1.1\r\nHost: a.test\r\nTransfer-Encoding : chunked\r\n\r\n",
    "obs-fold": b"POST / HTTP/1.1\r\nHost: a.test\r\nTransfer-Encoding:\r\n chunked\r\n\r\n",
    "folded first header": b"GET / HTTP/1.1\r\n Host: a.test\r\nHost: a.test\r\n\r\n",
    "bare LF": b"GET / HTTP/1.1\nHost: a.test\n\n",
    "bare LF within": b"GET / HTTP/1.1\r\nHost: a.test\nX: y\r\n\r\n",
    "bare CR": b"GET / HTTP/1.1\r\nHost: a.test\r\nX: a\rY: b\r\n\r\n",
    "zero byte": b"GET / HTTP/1.1\r\nHost: a.test\r\nX: a\0b\r\n\r\n",
    "no name": b"GET / HTTP/1.1\r\nHost: a.test\r\n: x\r\n\r\n",
    "no colon": b"GET / HTTP/1.1\r\nHost: a.test\r\nX\r\n\r\n",
    "two Host": b"GET / HTTP/1.1\r\nHost: a.test\r\nHost: b.test\r\n\r\n",
    "two equal Host": b"GET / HTTP/1.1\r\nHost: a.test\r\nHost: a.test\r\n\r\n",
    "no Host": b"GET / HTTP/1.1\r\nX: y\r\n\r\n",
    "no Host in 1.0": b"GET / HTTP/1.0\r\n\r\n",
    "empty Host": b"GET / HTTP/1.1\r\nHost: \r\n\r\n",
    "Host with user": b"GET / HTTP/1.1\r\nHost: a.test@b.test\r\n\r\n",
    "Host with path": b"GET / HTTP/1.1\r\nHost: a.test/b\r\n\r\n",
    "Host with comma": b"GET / HTTP/1.1\r\nHost: a.test, b.test\r\n\r\n",
    "Host, port 0": b"GET / HTTP/1.1\r\nHost: a.test:0\r\n\r\n",
    "Host, numeric": b"GET / HTTP/1.1\r\nHost: 127.1\r\n\r\n",
    "h2 preface": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "HTTP/0.9": b"GET /\r\n\r\n",
    "HTTP/1.2": b"GET / HTTP/1.2\r\nHost: a.test\r\n\r\n",
    "HTTP/01.1": b"GET / HTTP/01.1\r\nHost: a.test\r\n\r\n",
    "lower-case http": b"GET / http/1.1\r\nHost: a.test\r\n\r\n",
    "two spaces": b"GET  / HTTP/1.1\r\nHost: a.test\r\n\r\n",
    "tab": b"GET\t/\tHTTP/1.1\r\nHost: a.test\r\n\r\n",
    "space in target": b"GET /a b HTTP/1.1\r\nHost: a.test\r\n\r\n",
    "leading empty line": b"\r\nGET / HTTP/1.1\r\nHost: a.test\r\n\r\n",
    "leading space": b" GET / HTTP/1.1\r\nHost: a.test\r\n\r\n",
    "fragment": b"GET /a#b HTTP/1.1\r\nHost: a.test\r\n\r\n",
    "target without slash": b"GET a HTTP/1.1\r\nHost: a.test\r\n\r\n",
    "asterisk of GET": b"GET * HTTP/1.1\r\nHost: a.test\r\n\r\n",
    "ftp": b"GET ftp://a.test/ HTTP/1.1\r\nHost: a.test\r\n\r\n",
    "absolute with user": b"GET http://x@a.test/ HTTP/1.1\r\nHost: a.test\r\n\r\n",
    "CONNECT with body": b"CONNECT a.test:443 HTTP/1.1\r\nHost: a.test\r\nContent-Length: 3\r\n\r\n",
    "70 KB": b"GET / HTTP/1.1\r\nHost: a.test\r\nX: " + b"a" * 70_000 + b"\r\n\r\n",
    "300 fields": b"GET / HTTP/1.1\r\nHost: a.test\r\n" + b"X: a\r\n" * 300 + b"\r\n",
}


@pytest.mark.parametrize("text", CORPUS.values(), ids=CORPUS)
@pytest.mark.parametrize("at_once", [True, False])
def test_what_can_be_read_in_two_ways_is_refused(text: bytes, at_once: bool) -> None:
    reader = HeadReader()
    with pytest.raises(BadHead):
        for piece in [text] if at_once else (text[at : at + 1] for at in range(len(text))):
            reader.feed(piece)
            block = reader.head()
            if block is not None:
                parse_request(block)
        raise AssertionError("it was taken")


def test_a_head_that_came_in_one_read_is_measured_too() -> None:
    reader = HeadReader()
    reader.feed(b"GET / HTTP/1.1\r\nHost: a.test\r\nX: " + b"a" * MAX_HEAD + b"\r\n\r\n")
    with pytest.raises(BadHead) as caught:
        reader.head()
    assert caught.value.status == 431


BODIES = {
    "signed size": b"+5\r\nhello\r\n0\r\n\r\n",
    "negative size": b"-5\r\nhello\r\n0\r\n\r\n",
    "0x": b"0x5\r\nhello\r\n0\r\n\r\n",
    "underscore": b"1_0\r\nhello\r\n0\r\n\r\n",
    "no size": b"\r\nhello\r\n0\r\n\r\n",
    "leading space": b" 5\r\nhello\r\n0\r\n\r\n",
    "trailing space": b"5 \r\nhello\r\n0\r\n\r\n",
    "bare LF": b"5\nhello\n0\n\n",
    "LF in an extension": b"5;a=\nb\r\nhello\r\n0\r\n\r\n",
    "longer than its size": b"5\r\nhelloo\r\n0\r\n\r\n",
    "two other bytes after a chunk": b"5\r\nhelloXX0\r\n\r\n",
    "huge size": b"ffffffffffffffffffff\r\n",
    "long extension": b"5;" + b"a" * 5000 + b"\r\nhello\r\n0\r\n\r\n",
    "folded trailer": b"0\r\nX: a\r\n b\r\n\r\n",
    "malformed trailer": b"0\r\nX : a\r\n\r\n",
    "endless trailers": b"0\r\n" + b"X: a\r\n" * 3000,
}


@pytest.mark.parametrize("text", BODIES.values(), ids=BODIES)
@pytest.mark.parametrize("at_once", [True, False])
def test_chunks_that_can_be_read_in_two_ways_are_refused(text: bytes, at_once: bool) -> None:
    reader = BodyReader(Body.CHUNKED)
    with pytest.raises(BadHead):
        for piece in [text] if at_once else (text[at : at + 1] for at in range(len(text))):
            if not reader.whole():
                reader.feed(piece)


# Requests that are almost right: most have one or two parts that are odd.
def mostly(good: list[bytes], odd: list[bytes]) -> st.SearchStrategy[bytes]:
    return st.integers(0, 9).flatmap(lambda lot: st.sampled_from(good if lot else odd))


names = mostly(
    [b"X", b"Accept", b"Connection", b"Content-Length", b"Transfer-Encoding"],
    [b"Host", b"X ", b"", b"\x0b", b"content-length ", b"Transfer_Encoding"],
)
values = {
    b"Connection": mostly([b"close", b"keep-alive", b"x"], [b"", b"Content-Length"]),
    b"Content-Length": mostly([b"5", b"0", b"05"], [b"5, 5", b"+5", b"", b"6", b"\xb5", b"5 5"]),
    b"Transfer-Encoding": mostly(
        [b"chunked", b"Chunked"], [b"chunked, chunked", b"gzip", b"", b"chunked;q=1", b"\x0bchunked"]
    ),
}
other_values = mostly([b"a", b"a b", b"a\tb", b"\xff", b"", b"x" * 300], [b"a\0b", b"a\rb", b"\x7f", b" "])
colons = mostly([b": ", b":", b":\t", b":  "], [b" : ", b""])
ends = mostly([b"\r\n"], [b"\n", b"\r", b"\r\n ", b" \r\n", b"\r\r\n"])
lines = names.flatmap(lambda name: st.tuples(st.just(name), colons, values.get(name, other_values), ends).map(b"".join))
firsts = st.tuples(
    mostly([b"GET", b"POST", b"get", b"OPTIONS"], [b"CONNECT", b"G(T", b""]),
    mostly([b" "], [b"  ", b"\t"]),
    mostly([b"/", b"/a?b", b"http://a.test/"], [b"*", b"a.test:443", b"/\x80", b"/ x", b"", b"/#x"]),
    mostly([b" "], [b"  "]),
    mostly([b"HTTP/1.1", b"HTTP/1.0"], [b"HTTP/2.0", b"HTTP/1.10", b"http/1.1"]),
    ends,
).map(b"".join)
sizes_of_chunks = mostly([b"5", b"05", b"5;a=b", b"5 ;a"], [b"+5", b"5 ", b"0x5", b"6", b"4", b""])
bodies = mostly([b"", b"hello", b"0\r\n\r\n", b"hello0\r\n\r\n"], [b"0\n\n", b"hell"]) | st.tuples(
    sizes_of_chunks,
    ends,
    st.just(b"hello"),
    ends,
    mostly([b"0\r\n\r\n", b"0\r\nX: y\r\n\r\n"], [b"0\r\nX\r\n\r\n", b"-0\r\n\r\n"]),
).map(b"".join)
hosts_lines = mostly(
    [b"Host: a.test\r\n", b"host:a.test:80\r\n", b"Host: [::1]\r\n"], [b"", b"Host: a\r\nHost: b\r\n", b"Host: a b\r\n"]
)
requests = st.tuples(firsts, hosts_lines, st.lists(lines, max_size=3).map(b"".join), ends, bodies).map(b"".join)


def ours(text: bytes) -> tuple[bytes, bytes, int | Body, bytes, bool] | None:
    """Method, target, framing, body, whole; None when it is refused or its head is not whole."""
    reader = HeadReader()
    reader.feed(text)
    try:
        block = reader.head()
        if block is None:
            return None
        request = parse_request(block)
        body = BodyReader(request.framing)
        content = b"" if body.whole() else body.feed(reader.rest())
    except BadHead:
        return None
    return request.head.method, request.head.target, request.framing, content, body.whole()


def theirs(text: bytes) -> tuple[bytes, bytes, bytes, bool] | None:
    connection = h11.Connection(h11.SERVER, max_incomplete_event_size=MAX_HEAD)
    try:
        connection.receive_data(text)
        request = connection.next_event()
        if not isinstance(request, h11.Request):
            return None
        content, event = b"", connection.next_event()
        while isinstance(event, h11.Data):
            content += bytes(event.data)
            event = connection.next_event()
    except h11.RemoteProtocolError:
        return None
    return request.method, request.target, content, isinstance(event, h11.EndOfMessage)


@given(requests | st.binary(max_size=200))
@example(b"GET / HTTP/1.1\r\nHost: a.test\r\n\r\n")
@example(b"POST / HTTP/1.1\r\nHost: a.test\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n")
def test_what_h11_refuses_is_refused_and_the_rest_is_read_alike(text: bytes) -> None:
    found = ours(text)
    if found is None:
        return
    other = theirs(text)
    assert other is not None, "h11 refuses it"
    method, target, _, content, whole = found
    if not other[1].startswith(b"http") and method != b"CONNECT":
        assert (method, target) == other[:2]
    assert (content, whole) == other[2:]


@given(requests)
def test_what_is_written_is_read_by_h11_as_the_same(text: bytes) -> None:
    try:
        request = head(text)
    except BadHead:
        return
    if request.connect:
        return
    found = ours(text)
    if found is None:
        return
    content = found[3]
    data = write_request(request)
    data += (chunk(content) if content else b"") + last_chunk() if request.framing is Body.CHUNKED else content
    other = theirs(data)
    assert other is not None
    assert other[:3] == (request.head.method, request.head.target, content)
    again = head(data)
    assert again.framing == request.framing
    assert again.head.headers.all(b"host") == request.head.headers.all(b"host")


@given(st.binary(max_size=400) | requests, st.lists(st.integers(1, 40), max_size=8))
def test_pieces_make_no_difference(text: bytes, sizes: list[int]) -> None:
    def outcome(pieces: list[bytes]) -> object:
        reader = HeadReader()
        try:
            for piece in pieces:
                reader.feed(piece)
                block = reader.head()
                if block is not None:
                    return parse_request(block)
        except BadHead:
            return "refused"
        return None

    pieces, at, turn = [], 0, 0
    while at < len(text):
        size = sizes[turn % len(sizes)] if sizes else len(text)
        pieces.append(text[at : at + size])
        at, turn = at + size, turn + 1
    assert outcome(pieces) == outcome([text])


@given(
    st.lists(st.binary(min_size=1, max_size=50), max_size=6),
    st.binary(max_size=20),
    st.lists(st.integers(1, 9), max_size=4),
)
def test_chunks_come_out_as_they_went_in(parts: list[bytes], after: bytes, sizes: list[int]) -> None:
    trailers = Headers([(b"X-Sum", b"1")])
    data = b"".join(chunk(part) for part in parts) + last_chunk(trailers) + after
    reader, found, at, turn = BodyReader(Body.CHUNKED), b"", 0, 0
    while not reader.whole():
        size = sizes[turn % len(sizes)] if sizes else len(data)
        found += reader.feed(data[at : at + size])
        at, turn = at + size, turn + 1
    assert found == b"".join(parts)
    assert reader.trailers == trailers
    assert reader.rest + data[at:] == after


@given(st.binary(max_size=300), st.sampled_from([Body.CHUNKED, Body.CLOSE, 0, 5, 250]), st.booleans())
def test_any_body_is_read_or_refused(data: bytes, framing: int | Body, at_once: bool) -> None:
    reader = BodyReader(framing)
    try:
        for piece in [data] if at_once else [data[at : at + 1] for at in range(len(data))]:
            if not reader.whole():
                reader.feed(piece)
        if not reader.whole():
            reader.eof()
    except BadHead:
        return


@given(st.binary(max_size=300), st.sampled_from([b"GET", b"HEAD"]))
@example(b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n", b"GET")
@example(b"HTTP/1.1 101 Switching Protocols\r\nConnection: upgrade\r\nUpgrade: websocket\r\n\r\n", b"GET")
def test_any_answer_is_read_or_refused(data: bytes, method: bytes) -> None:
    try:
        response = parse_response(data + b"\r\n\r\n", method)
    except BadHead:
        return
    written = write_response(response, method=method, framing=response.framing, keep_alive=True)
    assert parse_response(written, method).head.status == response.head.status


def test_what_is_of_one_connection_stays_there() -> None:
    request = head(
        b"GET / HTTP/1.1\r\nHost: a.test\r\nConnection: x-mine, keep-alive, host\r\nX-Mine: 1\r\nKeep-Alive: 5\r\n"
        b"Proxy-Authorization: Basic eA==\r\nTE: trailers, deflate\r\nUpgrade: h2c\r\nX-Yours: 2\r\n\r\n"
    )
    assert write_request(request) == (
        b"GET / HTTP/1.1\r\nHost: a.test\r\nX-Yours: 2\r\nTE: trailers\r\nConnection: TE\r\n\r\n"
    )


def test_the_way_to_http3_is_not_told() -> None:
    response = parse_response(b'HTTP/1.1 200 OK\r\nAlt-Svc: h3=":443"\r\nContent-Length: 0\r\n\r\n', b"GET")
    assert b"h3" not in write_response(response, method=b"GET", framing=0, keep_alive=True)


@pytest.mark.parametrize(
    ("answer", "method", "framing"),
    [
        (b"HTTP/1.1 204 No Content\r\nContent-Length: 5\r\n\r\n", b"GET", 0),
        (b"HTTP/1.1 304 Not Modified\r\nContent-Length: 5\r\n\r\n", b"GET", 0),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n", b"HEAD", 0),
        (b"HTTP/1.1 200 OK\r\n\r\n", b"GET", Body.CLOSE),
        (b"HTTP/1.1 200\r\nTransfer-Encoding: chunked\r\n\r\n", b"GET", Body.CHUNKED),
    ],
)
def test_where_answers_end(answer: bytes, method: bytes, framing: int | Body) -> None:
    response = parse_response(answer, method)
    assert response.framing == framing
    written = write_response(response, method=method, framing=framing, keep_alive=True)
    # What HEAD and 304 say of a length is about a body that does not come.
    assert (b"Content-Length: 5" in written) is (response.head.status == 304 or method == b"HEAD")


def test_protocols_to_go_on_with() -> None:
    web = head(b"GET / HTTP/1.1\r\nHost: a.test\r\nConnection: Upgrade\r\nUpgrade: WebSocket\r\n\r\n")
    assert web.upgrade == b"websocket"
    assert write_request(web).endswith(b"Upgrade: websocket\r\nConnection: Upgrade\r\n\r\n")
    for other in (b"h2c", b"HTTP/2.0", b"TLS/1.0", b"a, b", b""):
        assert (
            head(b"GET / HTTP/1.1\r\nHost: a.test\r\nConnection: Upgrade\r\nUpgrade: " + other + b"\r\n\r\n").upgrade
            is None
        )


def test_a_response_of_ours_is_whole() -> None:
    response = Response(ResponseHead(403, b"Forbidden", Headers([(b"X", b"y")])), 3, True)
    assert write_response(response, method=b"GET", framing=3, keep_alive=False) == (
        b"HTTP/1.1 403 Forbidden\r\nX: y\r\nContent-Length: 3\r\nConnection: close\r\n\r\n"
    )
