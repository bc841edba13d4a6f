"""The broker on whatever a guest may send, and the replacer on whatever is cut anywhere."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Sequence

from hypothesis import example, given
from hypothesis import strategies as st

from capsem.egress import swap
from capsem.egress.broker import Lender
from capsem.egress.facts import Subject
from capsem.egress.grants import Grant, Places
from capsem.egress.heads import Headers, RequestHead
from capsem.egress.parts import SecretMisuse

SECRET = b"the real value, which nobody else may see"
OWN = b"sk-capsem-key-" + b"a" * 20
HOST = "own.test"


class Known:
    async def get(self, _name: str) -> bytes:
        return SECRET

    def known(self, _name: str) -> Sequence[bytes]:
        return [SECRET]


BROKER = Lender([Grant("key", (OWN.decode(),), (HOST,), Places(query=True))], Known())

PIECES = st.one_of(
    st.binary(max_size=9),
    st.sampled_from([OWN, OWN[3:], OWN[:-1], b"capsem-", b"Basic ", base64.b64encode(b"u:" + OWN)]),
)
TEXTS = st.lists(PIECES, max_size=4).map(b"".join)


HEADERS = st.lists(st.tuples(st.sampled_from([b"Authorization", b"X"]), TEXTS), max_size=3)


@given(HEADERS, TEXTS, st.sampled_from([HOST, "e.test", None]), st.booleans())
@example([(b"Authorization", b"Basic " + base64.b64encode(OWN))], b"/", "e.test", True)
def test_a_value_leaves_for_its_host_alone_and_no_placeholder_does(
    headers: list[tuple[bytes, bytes]], target: bytes, host: str | None, verified: bool
) -> None:
    head = RequestHead(b"GET", target, Headers(headers))
    subject = Subject(443, host, None if host else "192.0.2.1")
    try:
        sent = asyncio.run(BROKER.outgoing(subject, head, verified=verified))
    except SecretMisuse:
        return
    opened = [swap.basic_credentials(value) for _, value in sent.headers]
    texts = [sent.target, *(value for _, value in sent.headers), *(each[1] for each in opened if each)]
    assert not any(OWN in text for text in texts)
    if host != HOST or not verified:
        assert sent == head
        assert not any(SECRET in text for text in texts)


def cut(data: bytes, places: list[int]) -> list[bytes]:
    edges = sorted({0, len(data), *(place % (len(data) + 1) for place in places)})
    return [data[start:end] for start, end in zip(edges, edges[1:], strict=False)]  # noqa: RUF007


NEEDLES = st.sampled_from([b"abab", b"aab", b"b", b"abcabd", b"aaaa", b"ab"])


@given(
    st.dictionaries(NEEDLES, st.binary(max_size=3), min_size=1, max_size=1),
    st.lists(st.sampled_from([b"a", b"b", b"c", b"d"]), max_size=60).map(b"".join),
    st.lists(st.integers(0, 99)),
)
def test_one_text_is_replaced_wherever_chunks_end(texts: dict[bytes, bytes], data: bytes, places: list[int]) -> None:
    replacer = swap.Replacer(texts, 1 << 20)
    ((text, instead),) = texts.items()
    assert b"".join(replacer(piece) for piece in cut(data, places)) + replacer(b"") == data.replace(text, instead)


@given(
    st.binary(min_size=8, max_size=40), st.binary(max_size=30), st.binary(max_size=30), st.lists(st.integers(0, 999))
)
def test_no_form_of_a_value_comes_through(value: bytes, before: bytes, after: bytes, places: list[int]) -> None:
    masks = dict(swap.masks(value, b"capsem-mask-"))
    for form in (swap.as_it_is, swap.in_query, swap.in_json):
        data = before + b"\x00" + form(value) + b"\x00" + after
        replacer = swap.Replacer(masks, 1 << 20)
        out = b"".join(replacer(piece) for piece in cut(data, places)) + replacer(b"")
        assert len(out) == len(data)
        assert form(value) not in out or form(value) in b"capsem-mask-" + b"*" * 200


@given(st.binary(max_size=80))
def test_credentials_are_opened_and_closed_to_the_same(credentials: bytes) -> None:
    opened = swap.basic_credentials(swap.with_credentials(b"Basic ", credentials))
    assert opened == ((b"Basic ", credentials) if credentials else None)


@given(st.binary(max_size=60) | st.binary(max_size=60).map(lambda text: b"Basic " + text))
def test_no_header_is_too_strange(value: bytes) -> None:
    swap.basic_credentials(value)
