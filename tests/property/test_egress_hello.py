"""The first message of a TLS client: real ones are read, whole or in pieces, and anything else ends in one typed error."""

from __future__ import annotations

import ssl
import struct

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from capsem.egress import hosts
from capsem.egress.hello import MAX_HELLO, Hello, HelloError, HelloReader


def client_hello(name: str | None, alpn: list[str] | None = None) -> bytes:
    """As OpenSSL sends it."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    if alpn:
        context.set_alpn_protocols(alpn)
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    with pytest.raises(ssl.SSLWantReadError):
        context.wrap_bio(incoming, outgoing, server_hostname=name).do_handshake()
    return outgoing.read()


def built(*extensions: tuple[int, bytes], before: bytes = b"", after: bytes = b"") -> bytes:
    """A hello with just these extensions."""
    listed = before + b"".join(struct.pack("!HH", kind, len(content)) + content for kind, content in extensions)
    body = b"\3\3" + bytes(32) + b"\0" + b"\0\2\x13\1" + b"\1\0" + struct.pack("!H", len(listed)) + listed + after
    return records(b"\1" + len(body).to_bytes(3, "big") + body)


def records(message: bytes, size: int = 16384) -> bytes:
    pieces = [message[at : at + size] for at in range(0, len(message), size)]
    return b"".join(b"\x16\3\1" + struct.pack("!H", len(piece)) + piece for piece in pieces)


def sni(*names: bytes, kind: int = 0) -> tuple[int, bytes]:
    listed = b"".join(struct.pack("!BH", kind, len(name)) + name for name in names)
    return 0, struct.pack("!H", len(listed)) + listed


def read(data: bytes, sizes: list[int] | None = None) -> Hello | None:
    reader, at, turn = HelloReader(), 0, 0
    while at < len(data):
        size = sizes[turn % len(sizes)] if sizes else len(data)
        hello = reader.feed(data[at : at + size])
        at, turn = at + size, turn + 1
        assert bytes(reader.raw) == data[:at]
        if hello is not None:
            return hello
    return None


def outcome(data: bytes, sizes: list[int] | None = None) -> Hello | str | None:
    """Anything but HelloError is a failed test."""
    try:
        return read(data, sizes)
    except HelloError:
        return "refused"


REAL = client_hello("Example.COM", ["h2", "http/1.1"])


@pytest.mark.parametrize("size", [1, 2, 3, 5, 100, None])
def test_a_real_hello_is_read_whole_and_in_pieces(size: int | None) -> None:
    assert read(REAL, [size] if size else None) == Hello("example.com", (b"h2", b"http/1.1"), ech=False)


@pytest.mark.parametrize("size", [1, 7, 100, 511])
def test_a_hello_may_be_split_over_records(size: int) -> None:
    assert read(records(REAL[5:], size), [3]) == Hello("example.com", (b"h2", b"http/1.1"), ech=False)


def test_what_is_not_there_is_none() -> None:
    assert read(client_hello(None)) == Hello(None, (), ech=False)
    assert read(built()) == Hello(None, (), ech=False)


def test_a_name_that_may_be_hidden_is_told_of() -> None:
    assert read(built(sni(b"front.test"), (0xFE0D, b"\0whatever"))) == Hello("front.test", (), ech=True)


@pytest.mark.parametrize(
    ("name", "found"),
    [
        (b"A.Test", "a.test"),
        (b"a.test.", "a.test"),
        (b"xn--bcher-kva.test", "xn--bcher-kva.test"),
        (b"192.0.2.1", None),
        (b"::1", None),
    ],
)
def test_names_have_one_form(name: bytes, found: str | None) -> None:
    assert read(built(sni(name))) == Hello(found, (), ech=False)


REFUSED = {
    "two names": built(sni(b"a.test", b"b.test")),
    "no name": built(sni()),
    "empty name": built(sni(b"")),
    "unknown kind": built(sni(b"a.test", kind=1)),
    "name with a zero byte": built(sni(b"a.test\0.b.test")),
    "name with a space": built(sni(b"a .test")),
    "name with a slash": built(sni(b"a.test/b")),
    "name of 8 bits": built(sni("bücher.test".encode())),
    "wildcard": built(sni(b"*.test")),
    "two dots": built(sni(b"a..test")),
    "only a dot": built(sni(b".")),
    "short number": built(sni(b"127.1")),
    "long name": built(sni(b"a." * 130 + b"test")),
    "long label": built(sni(b"a" * 64 + b".test")),
    "sni twice": built(sni(b"a.test"), sni(b"a.test")),
    "alpn empty": built((16, b"\0\0")),
    "alpn of nothing": built((16, b"\0\1\0")),
    "alpn too long": built((16, b"\0\5\2h2")),
    "sni too long": built((0, b"\xff\xff\0\0\6a.test")),
    "extensions cut off": built(before=b"\0\0\0"),
    "something after": built(after=b"\0"),
    "no compression": records(b"\1\0\0\x29" + b"\3\3" + bytes(32) + b"\0" + b"\0\2\x13\1" + b"\0" + b"\0"),
    "half a suite": records(b"\1\0\0\x2a" + b"\3\3" + bytes(32) + b"\0" + b"\0\3\x13\1\1" + b"\1\0"),
    "server hello": records(b"\2" + REAL[6:]),
    "too much of it": records(REAL[5:] + b"\1"),
    "empty record": b"\x16\3\1\0\0" + REAL,
    "long record": b"\x16\3\1\x40\1",
    "huge message": records(b"\1" + (MAX_HELLO + 1).to_bytes(3, "big")),
    "SSL 2": b"\x16\2\0\0\5",
    "an alert between": b"\x16\3\1\0\1\1" + b"\x15\3\1\0\2\2\0",
    "HTTP": b"GET / HTTP/1.1\r\n",
}


@pytest.mark.parametrize("data", REFUSED.values(), ids=REFUSED)
@pytest.mark.parametrize("sizes", [None, [1]])
def test_what_is_no_plain_hello_is_refused(data: bytes, sizes: list[int] | None) -> None:
    with pytest.raises(HelloError):
        read(data, sizes)


def test_a_hello_is_bounded_however_small_its_records_are() -> None:
    endless = records(b"\1" + MAX_HELLO.to_bytes(3, "big") + bytes(MAX_HELLO - 1), 1)
    with pytest.raises(HelloError, match="no ClientHello in"):
        read(endless, [1000])


mutations = st.lists(
    st.tuples(
        st.integers(0, len(REAL) - 1), st.sampled_from(["set", "cut", "insert", "repeat"]), st.binary(max_size=6)
    ),
    max_size=4,
)


@given(mutations, st.lists(st.integers(1, 60), max_size=4))
@settings(max_examples=400)
def test_a_mutated_hello_is_read_or_refused_and_pieces_make_no_difference(
    changes: list[tuple[int, str, bytes]], sizes: list[int]
) -> None:
    data = bytearray(REAL)
    for at, how, what in changes:
        if how == "set":
            data[at : at + len(what)] = what
        elif how == "cut":
            del data[at : at + len(what)]
        elif how == "insert":
            data[at:at] = what
        else:
            data[at:at] = data[at : at + 50]
    found = outcome(bytes(data))
    assert outcome(bytes(data), sizes or None) == found
    if isinstance(found, Hello) and found.sni is not None:
        assert hosts.host_name(found.sni) == found.sni


@given(st.binary(max_size=100), st.binary(max_size=300), st.booleans())
@example(b"", b"", True)
def test_any_bytes_are_read_or_refused(content: bytes, body: bytes, whole: bool) -> None:
    message = b"\1" + len(body).to_bytes(3, "big") + body
    for data in (content, b"\x16\3\1" + content, records(message) if body else b""):
        assert outcome(data) == outcome(data, [1] if whole else [3, 7])
