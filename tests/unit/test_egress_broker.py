"""The broker: where a placeholder becomes its secret, where it is refused, and what an answer may not repeat."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from capsem.egress import grants, swap
from capsem.egress.broker import BODY_LIMIT, ECHO_LIMIT, Lender
from capsem.egress.facts import Subject
from capsem.egress.grants import Grant, Places
from capsem.egress.heads import Header, Headers, RequestHead, ResponseHead
from capsem.egress.parts import SecretMisuse, SecretUnavailable
from capsem.model.errors import InvalidInput

SECRET = b'sk-live/0123456789+"abcdef'
OWN = "sk-capsem-openai-" + "a" * 20
OLD = "sk-capsem-openai-" + "b" * 20
FOREIGN = "sk-capsem-openai-" + "c" * 20
GRANT = Grant("openai", (OWN, OLD), ("api.openai.com", "*.lab.test"), env="OPENAI_API_KEY")
HOST = "api.openai.com"


class Vault:
    """Values; one that is None cannot be had."""

    def __init__(self, **values: bytes | None) -> None:
        self.values = values
        self.asked: list[str] = []

    async def get(self, name: str) -> bytes:
        self.asked.append(name)
        value = self.values.get(name)
        if value is None:
            raise SecretUnavailable(name, "its source is gone")
        return value

    def known(self, name: str) -> Sequence[bytes]:
        value = self.values.get(name) if name in self.asked else None
        return [value] if value is not None else []


def lender(*more: Grant, places: Places = GRANT.places, source: str | None = None, **values: bytes | None) -> Lender:
    vault = Vault(**{"openai": SECRET, **values})
    made = Lender((replace(GRANT, places=places), *more), vault, source)
    made.vault = vault  # type: ignore[attr-defined]
    return made


def send(
    broker: Lender,
    *headers: Header,
    target: bytes = b"/v1/x?y=1",
    host: str | None = HOST,
    verified: bool = True,
    method: bytes = b"POST",
) -> RequestHead:
    head = RequestHead(method, target, Headers(headers), (host or "").encode())
    return asyncio.run(broker.outgoing(Subject(443, host, None if host else "192.0.2.1"), head, verified=verified))


def bearer(placeholder: str = OWN) -> Header:
    return b"Authorization", b"Bearer " + placeholder.encode()


def basic(text: str) -> Header:
    return b"Authorization", b"Basic " + base64.b64encode(text.encode())


def test_a_header_gets_the_value_and_the_answer_is_asked_for_plain() -> None:
    broker = lender()
    head = send(broker, (b"Accept-Encoding", b"gzip"), bearer(), (b"X-Other", b"keep"))
    assert head.headers == (
        (b"Authorization", b"Bearer " + SECRET),
        (b"X-Other", b"keep"),
        (b"Accept-Encoding", b"identity"),
    )
    assert (head.target, head.secrets) == (b"/v1/x?y=1", ("openai",))
    assert send(broker, bearer(OLD)).headers.get(b"authorization") == b"Bearer " + SECRET
    assert send(broker, bearer(), host="deep.in.lab.test").secrets == ("openai",)


def test_what_has_no_placeholder_is_left_as_it_is() -> None:
    broker = lender()
    headers = ((b"Accept-Encoding", b"gzip"), (b"Authorization", b"Bearer capsem-openai-short"), basic("me:mine"))
    head = send(broker, *headers, host="anywhere.test", verified=False)
    assert head.headers == headers
    assert head.secrets == ()
    assert broker.vault.asked == []  # type: ignore[attr-defined]


@pytest.mark.parametrize("scheme", [b"Basic ", b"basic  "])
@pytest.mark.parametrize("padding", [True, False])
def test_basic_is_opened_and_closed_again(scheme: bytes, padding: bool) -> None:
    for user in ("u", "us", "usr", OWN):
        credentials = f"{user}:{OWN}" if user != OWN else f"{OWN}:"
        encoded = base64.b64encode(credentials.encode())
        head = send(lender(), (b"Authorization", scheme + (encoded if padding else encoded.rstrip(b"="))))
        value = head.headers.get(b"authorization")
        assert value is not None
        assert value[: len(scheme)] == scheme
        assert base64.b64decode(value[len(scheme) :]) == credentials.replace(OWN, SECRET.decode()).encode()


def test_a_query_gets_it_encoded_where_that_is_allowed() -> None:
    target = b"/v1/x?a=1&key=" + OWN.encode() + b"&b=2"
    head = send(lender(places=Places(query=True)), target=target)
    assert head.target == b"/v1/x?a=1&key=sk-live%2F0123456789%2B%22abcdef&b=2"
    both = send(lender(places=Places(query=True)), bearer(), target=target)
    assert both.headers.get(b"authorization") == b"Bearer " + SECRET
    assert both.target == head.target
    with pytest.raises(SecretMisuse, match="in the query, where its settings do not allow it"):
        send(lender(), target=target)
    with pytest.raises(SecretMisuse, match="in the path"):
        send(lender(places=Places(query=True)), target=b"/bot" + OWN.encode() + b"/send")


@pytest.mark.parametrize(
    ("how", "why"),
    [
        ({"host": "evil.test"}, "on its way to evil.test, and may go to api.openai.com and \\*.lab.test alone"),
        ({"host": "lab.test"}, "on its way to lab.test"),
        ({"host": "api.openai.com.evil.test"}, "on its way to"),
        ({"host": None}, "on its way to 192.0.2.1"),
        ({"verified": False}, "without TLS that is checked"),
    ],
)
def test_a_placeholder_goes_nowhere_else(how: dict[str, Any], why: str) -> None:
    for header in (
        bearer(),
        basic(f"me:{OWN}"),
        (b"X-Anything", OWN.encode()),
        (b"Referer", b"http://x/" + OWN.encode()),
    ):
        broker = lender()
        with pytest.raises(SecretMisuse, match=why) as raised:
            send(broker, header, **how)
        assert raised.value.secret == "openai"
        assert broker.vault.asked == []  # type: ignore[attr-defined]
    with pytest.raises(SecretMisuse, match=why):
        send(lender(places=Places(query=True)), target=b"/?key=" + OWN.encode(), **how)


def test_only_the_headers_that_are_named() -> None:
    broker = lender(places=Places(header=("x-api-key",)))
    assert send(broker, (b"X-Api-Key", OWN.encode())).headers.get(b"x-api-key") == SECRET
    with pytest.raises(SecretMisuse, match="in the header authorization"):
        send(broker, bearer())
    assert send(broker, basic(f"u:{OWN}")).secrets == ("openai",)
    with pytest.raises(SecretMisuse, match="in Basic"):
        send(lender(places=Places(basic=False)), basic(f"u:{OWN}"))
    with pytest.raises(SecretMisuse, match="in the header"):
        send(lender(places=Places(header=False)), bearer())


@pytest.mark.parametrize(
    "text", [FOREIGN, FOREIGN.removeprefix("sk-"), OWN.removeprefix("sk-"), "capsem-github-" + "d" * 20]
)
def test_somebody_elses_placeholder(text: str) -> None:
    for header in (bearer(text), basic(f"me:{text}")):
        with pytest.raises(SecretMisuse, match="not lent to this VM"):
            send(lender(), header)
        with pytest.raises(SecretMisuse, match=r"perhaps to parent, which this one is a fork of.*--inherit-secrets"):
            send(lender(source="parent"), header)
    with pytest.raises(SecretMisuse):
        send(lender(), bearer(), target=b"/?x=" + text.encode())


def test_several_secrets_in_one_request() -> None:
    other = Grant("gh-token", ("ghp_capsem-gh-token-" + "e" * 20,), (HOST,))
    broker = lender(other, **{"gh-token": b"ghp_real"})
    head = send(broker, bearer(), (b"X-Gh", other.placeholders[0].encode() + b", " + OWN.encode()))
    assert head.headers.get(b"x-gh") == b"ghp_real, " + SECRET
    assert head.secrets == ("gh-token", "openai")


def test_a_value_that_cannot_be_had() -> None:
    with pytest.raises(SecretUnavailable, match="its source is gone"):
        send(lender(openai=None), bearer())


# -- bodies

LENGTH = (b"Content-Length", b"100")


def body(
    broker: Lender, chunks: list[bytes], *headers: Header, host: str = HOST, verified: bool = True
) -> bytes | None:
    send(broker, LENGTH, *headers, host=host, verified=verified)
    through = broker.body(Subject(443, host), Headers((LENGTH, *headers)), verified=verified)
    if through is None:
        return None
    return b"".join(through(chunk) for chunk in chunks) + through(b"")


IN_BODY = Places(body=True)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        (b"application/json; charset=utf-8", b'sk-live/0123456789+\\"abcdef'),
        (b"application/vnd.api+json", b'sk-live/0123456789+\\"abcdef'),
        (b"application/x-www-form-urlencoded", b"sk-live%2F0123456789%2B%22abcdef"),
        (b"text/plain", SECRET),
    ],
)
@pytest.mark.parametrize("size", [1, 7, 1000])
def test_a_body_gets_it_as_its_form_wants_it(kind: bytes, expected: bytes, size: int) -> None:
    sent = b'{"key":"' + OWN.encode() + b'","again":"' + OLD.encode() + b'","not":"' + FOREIGN.encode() + b'"}'
    chunks = [sent[start : start + size] for start in range(0, len(sent), size)]
    out = body(lender(places=IN_BODY), chunks, (b"Content-Type", kind))
    assert out == sent.replace(OWN.encode(), expected).replace(OLD.encode(), expected)


def test_bodies_are_left_alone_unless_it_says_so() -> None:
    assert body(lender(), [OWN.encode()]) is None
    assert body(lender(places=IN_BODY), [OWN.encode()], host="evil.test") is None
    assert body(lender(places=IN_BODY), [OWN.encode()], verified=False) is None
    assert body(lender(places=IN_BODY), [OWN.encode()], (b"Content-Encoding", b"gzip")) is None
    broker = lender(places=IN_BODY)
    assert broker.body(Subject(443, HOST), Headers(), verified=True) is None
    assert send(broker, method=b"GET").secrets == ()
    assert broker.body(Subject(443, HOST, method="GET"), Headers(), verified=True) is None
    assert broker.body(Subject(443, HOST, method="POST"), Headers([(b"Content-Length", b"0")]), verified=True) is None
    assert broker.body(Subject(443, HOST, method="POST"), Headers(), verified=True) is not None
    assert broker.vault.asked == []  # type: ignore[attr-defined]
    assert send(broker, LENGTH).secrets == ("openai",)  # it may be in there, and that is told


def test_a_body_is_looked_at_so_far_and_no_further() -> None:
    padding, own = b"x" * (BODY_LIMIT - 50), OWN.encode()
    out = body(lender(places=IN_BODY), [own, padding, own, own])
    assert out == SECRET + padding + SECRET + own  # what begins within the limit is whole in its chunk


def test_a_body_whose_value_is_gone() -> None:
    broker = lender(places=IN_BODY)
    headers = Headers((LENGTH,))
    through = broker.body(Subject(443, HOST), headers, verified=True)  # nobody has asked for the value before
    assert through is not None
    assert through(b"nothing here") == b"nothing here"
    with pytest.raises(SecretUnavailable):
        through(OWN.encode() + b"!")


# -- answers


def answer(
    broker: Lender, chunks: list[bytes], *headers: Header, host: str = HOST, lent: bool = True
) -> tuple[Headers, bytes | None, list[bytes]]:
    if lent:
        send(broker, bearer())
    head, through = broker.incoming(Subject(443, host), ResponseHead(200, b"OK", Headers(headers)))
    if through is None:
        return head.headers, None, []
    passed = [through(chunk) for chunk in chunks]
    return head.headers, b"".join(passed) + through(b""), passed


@pytest.mark.parametrize("size", [1, 7, 10_000])
def test_an_answer_does_not_repeat_it_in_any_form(size: int) -> None:
    text = SECRET.decode()
    said = json.dumps({"headers": {"Authorization": f"Bearer {text}"}}).encode()
    forms = [
        said,
        SECRET,
        swap.in_query(SECRET),
        *(base64.b64encode(b"u" * n + b":" + SECRET + b"tail") for n in range(3)),
    ]
    sent = b" | ".join(forms)
    headers, out, _ = answer(
        lender(), [sent[at : at + size] for at in range(0, len(sent), size)], (b"X-Echo", b"<" + SECRET + b">")
    )
    assert out is not None
    assert len(out) == len(sent), "nothing has to be measured anew"
    for form in (SECRET, text[4:].encode(), swap.in_query(SECRET), swap.in_json(SECRET)):
        assert form not in out
    for coded in out.split(b" | ")[3:]:
        assert SECRET[3:-3] not in base64.b64decode(coded.replace(b"-", b"A").replace(b"*", b"A"))
    assert headers == ((b"X-Echo", b"<" + OWN.encode()[: len(SECRET)].ljust(len(SECRET), b"*") + b">"),)


def test_what_streams_is_not_held_back() -> None:
    events = [b"data: 1\n\n", b"data: s", b"k-live", b"ly\n\n", b"", b"data: 2\n\n"]
    _, out, passed = answer(lender(), [each for each in events if each])
    assert passed == [b"data: 1\n\n", b"data: ", b"", b"sk-lively\n\n", b"data: 2\n\n"]
    assert out == b"".join(events)


def test_an_answer_is_looked_at_so_far_and_no_further() -> None:
    sent = [b"y" * (ECHO_LIMIT - 5), SECRET, SECRET]
    _, out, _ = answer(lender(), sent)
    assert out is not None
    assert out.count(SECRET) == 1
    assert out.endswith(SECRET)


def test_answers_of_others_pass_as_they_are() -> None:
    assert answer(lender(), [SECRET], host="other.test")[1] is None
    assert answer(lender(), [SECRET], lent=False)[1] is None
    headers, out, _ = answer(lender(), [b"x"], (b"Content-Encoding", b"gzip"), (b"X-Echo", SECRET))
    assert out is None  # it was asked not to; what it does instead cannot be looked into
    assert SECRET not in dict(headers)[b"X-Echo"]


def test_a_short_secret_is_not_masked() -> None:
    broker = lender(openai=b"1234567")
    assert answer(broker, [b"1234567"])[1] is None


# -- grants


def test_placeholders_look_as_they_are_expected_to() -> None:
    drawn = grants.new_placeholder("my-key", "sk-ant-api03-", lambda size: b"\xfe" * size)
    assert grants.PLACEHOLDER.search(drawn.encode()).group(1) == b"my-key"  # type: ignore[union-attr]
    assert drawn.startswith("sk-ant-api03-capsem-my-key-")
    numbers = iter(range(100))
    made = {grants.new_placeholder("a", "", lambda size: bytes([next(numbers)] * size)) for _ in range(100)}
    assert len(made) == 100


def test_grants_travel_as_text() -> None:
    given = (GRANT, replace(GRANT, name="b", places=Places(("x-key",), False, True, True), env=None))
    assert grants.from_json(grants.to_json(given)) == given
    assert grants.from_json("") == ()
    assert grants.environment(given) == {"OPENAI_API_KEY": OWN}
    for text in ("{", "3", "[3]", '[{"name":"x"}]'):
        with pytest.raises(InvalidInput, match="cannot be read"):
            grants.from_json(text)


@pytest.mark.parametrize("name", ["", "A", "-a", "a-", "a b", "a" * 41, "a.b", 3, None])
def test_names_that_are_none(name: object) -> None:
    with pytest.raises(InvalidInput, match="cannot be a secret's name"):
        grants.check_name(name)
    assert grants.check_name("a") == "a"
