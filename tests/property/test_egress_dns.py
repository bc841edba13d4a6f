"""Questions of DNS: any datagram is one, or is refused; and every answer is a message that holds together."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from capsem.egress.dns import MAX_QUERY, BadQuery, Code, Kind, answer, parse


def encoded(name: str) -> bytes:
    return b"".join(bytes([len(label)]) + label.encode("latin-1") for label in name.split(".") if label) + b"\0"


def question(
    name: bytes,
    kind: int = 1,
    family: int = 1,
    number: int = 7,
    flags: int = 0x0100,
    more: bytes = b"",
    counts: tuple[int, ...] = (1, 0, 0, 0),
) -> bytes:
    return struct.pack("!6H", number, flags, *counts) + name + struct.pack("!2H", kind, family) + more


OPT = b"\0" + struct.pack("!HHIH", 41, 4096, 0, 0)


def unpack(message: bytes) -> tuple[int, int, bytes, list[bytes]]:
    """Number, code, question and addresses of an answer; every byte of it accounted for."""
    number, flags, questions, answers, authorities, additional = struct.unpack_from("!6H", message)
    assert flags & 0x8000
    assert authorities == 0
    at = 12
    if questions:
        while message[at]:
            at += 1 + message[at]
        at += 5
    asked, found = message[12:at], []
    for _ in range(answers):
        pointer, kind, family, _ttl, size = struct.unpack_from("!HHHIH", message, at)
        assert (pointer, kind, family, size) == (0xC00C, 1, 1, 4)
        found.append(message[at + 12 : at + 16])
        at += 16
    if additional:
        assert message[at : at + 3] == b"\0\0\x29"
        at += 11
    assert at == len(message)
    return number, flags & 0xF, asked, found


def test_a_question_and_its_answer() -> None:
    query = parse(question(encoded("Www.Example.Test")))
    assert (query.name, query.kind, query.kind_name) == ("www.example.test", Kind.A, "A")
    number, code, asked, found = unpack(answer(query, Code.OK, ["192.0.2.1", "192.0.2.2"], 30))
    assert (number, code, found) == (7, 0, [b"\xc0\0\2\1", b"\xc0\0\2\2"])
    # Case is kept: some resolvers put randomness there.
    assert asked == encoded("Www.Example.Test") + b"\0\1\0\1"


def test_nothing_of_a_kind_and_no_such_name_are_different() -> None:
    query = parse(question(encoded("a.test"), Kind.AAAA))
    assert unpack(answer(query, Code.OK))[1::2] == (0, [])
    assert unpack(answer(query, Code.NXDOMAIN))[1::2] == (3, [])
    assert parse(question(encoded("a.test"), 999)).kind_name == "TYPE999"


def test_edns_is_answered_with_edns() -> None:
    query = parse(question(encoded("a.test"), more=OPT, counts=(1, 0, 0, 1)))
    assert query.extended
    assert unpack(answer(query, Code.OK, ["192.0.2.1"]))[3] == [b"\xc0\0\2\1"]
    assert answer(query, Code.OK).count(b"\0\0\x29") == 1


def test_addresses_are_bounded() -> None:
    query = parse(question(encoded("a.test")))
    assert len(unpack(answer(query, Code.OK, [f"192.0.2.{each}" for each in range(200)]))[3]) == 16


BAD = {
    "empty": (b"", None),
    "half a header": (b"\0\7\1\0\0\1", None),
    "an answer": (question(encoded("a.test"), flags=0x8100), None),
    "an update": (question(encoded("a.test"), flags=5 << 11), Code.NOTIMP),
    "two questions": (question(encoded("a.test"), counts=(2, 0, 0, 0)), Code.FORMERR),
    "no question": (struct.pack("!6H", 7, 0x0100, 0, 0, 0, 0), Code.FORMERR),
    "an answer in it": (question(encoded("a.test"), counts=(1, 1, 0, 0)), Code.FORMERR),
    "pointer": (question(b"\xc0\x0c"), Code.FORMERR),
    "label of 64": (question(b"\x40" + b"a" * 64 + b"\0"), Code.FORMERR),
    "name too long": (question(encoded(".".join(["a" * 63] * 4 + ["b"]))), Code.FORMERR),
    "cut off": (question(encoded("a.test"))[:-1], Code.FORMERR),
    "something follows": (question(encoded("a.test"), more=b"x"), Code.FORMERR),
    "odd record": (
        question(encoded("a.test"), more=b"\0" + struct.pack("!HHIH", 1, 1, 0, 0), counts=(1, 0, 0, 1)),
        Code.FORMERR,
    ),
    "opt cut off": (question(encoded("a.test"), more=OPT[:5], counts=(1, 0, 0, 1)), Code.FORMERR),
    "opt that lies": (question(encoded("a.test"), more=OPT[:-1] + b"\5", counts=(1, 0, 0, 1)), Code.FORMERR),
    "chaos": (question(encoded("version.bind"), 16, 3), Code.REFUSED),
    "too long": (question(encoded("a.test"), more=b"x" * MAX_QUERY), Code.FORMERR),
}


@pytest.mark.parametrize(("data", "code"), BAD.values(), ids=BAD)
def test_what_is_no_plain_question_is_refused(data: bytes, code: Code | None) -> None:
    with pytest.raises(BadQuery) as caught:
        parse(data)
    if code is None:
        assert caught.value.reply == b""
    else:
        assert unpack(caught.value.reply)[:2] == (7, code)


labels = st.binary(min_size=0, max_size=20).map(lambda label: bytes([len(label)]) + label)
almost = st.builds(
    question,
    st.lists(labels, max_size=5).map(b"".join) | st.binary(max_size=300),
    st.sampled_from([1, 28, 65, 255, 999]),
    st.sampled_from([1, 1, 1, 3]),
    st.integers(0, 0xFFFF),
    st.sampled_from([0x0100, 0x0110, 0, 0x7900, 0x8100]),
    st.sampled_from([b"", OPT, b"x"]) | st.binary(max_size=30),
    st.tuples(st.integers(0, 2), st.integers(0, 1), st.just(0), st.integers(0, 2)),
)


@given(st.binary(max_size=100) | almost)
def test_any_datagram_is_a_question_or_refused(data: bytes) -> None:
    query, refusal = None, b""
    try:
        query = parse(data)
    except BadQuery as error:
        refusal = error.reply
    if query is None:
        assert not refusal or unpack(refusal)[0] == int.from_bytes(data[:2], "big")
        return
    number, code, asked, found = unpack(answer(query, Code.OK, ["192.0.2.1"]))
    assert (number, code, found) == (query.number, 0, [b"\xc0\0\2\1"])
    assert data[12:].startswith(asked)
