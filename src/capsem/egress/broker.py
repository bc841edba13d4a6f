"""Lends secrets to a VM: programs in the guest have placeholders, and on the way out, to where a secret belongs, its value is put
in their place. Where a placeholder is going anywhere else, the request is refused and nothing of it is sent.

Looked at are the request's target and its headers, inside the base64 of Basic, too. Bodies are looked at where the secret says
so, and otherwise left alone: a placeholder in one is worth nothing to whoever gets it, and what an agent tells its model is full
of what its commands have printed. Answers from a secret's hosts are kept from repeating it: their headers, and the first 64 KiB
of bodies. For that to work the origin is asked not to compress.

Pure but for `Values`, which knows the values.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Final, Protocol

from capsem.egress import swap
from capsem.egress.facts import Subject
from capsem.egress.grants import MARK, PLACEHOLDER, Grant
from capsem.egress.heads import Headers, RequestHead, ResponseHead
from capsem.egress.parts import SecretMisuse, SecretUnavailable

BODY_LIMIT: Final = 1024 * 1024  # bytes of a request's body that are looked at
ECHO_LIMIT: Final = 64 * 1024  # and of an answer's

_Found = tuple[bytes, Grant]  # a placeholder, all of it, and what it stands for
_LENGTHS: Final = (b"content-length", b"transfer-encoding")
_WITH_BODY: Final = ("POST", "PUT", "PATCH")


class Values(Protocol):
    """Knows values of secrets, for a short time."""

    async def get(self, name: str) -> bytes:
        """The value now. Raises SecretUnavailable."""

    def known(self, name: str) -> Sequence[bytes]:
        """Those that were given out lately, the newest first."""


class Lender:
    """A Broker (parts.Broker) for the grants of one VM. `source` is the VM that it is a fork of, for people."""

    def __init__(self, grants: Sequence[Grant], values: Values, source: str | None = None) -> None:
        self._grants = tuple(grants)
        self._by_text = {text.encode(): grant for grant in grants for text in grant.placeholders}
        self._values = values
        self._source = source

    # -- requests

    async def outgoing(self, subject: Subject, head: RequestHead, *, verified: bool) -> RequestHead:
        """The head with values. Raises SecretMisuse, SecretUnavailable."""
        path, mark, query = head.target.partition(b"?")
        found = [
            *self._find(path, subject, "the path", verified=verified),
            *self._find(query, subject, "the query", verified=verified),
        ]
        for name, value in head.headers:
            found += self._in_header(name, value, subject, verified=verified)
        in_body = [(b"", grant) for grant in self._of_body(subject, head.headers, verified=verified)]
        if not found and not in_body:
            return head
        values = {name: await self._values.get(name) for name in sorted({grant.name for _, grant in found + in_body})}
        put_in = {text: values[grant.name] for text, grant in found}
        headers = Headers((name, _with(value, put_in)) for name, value in head.headers)
        return replace(
            head,
            target=path + mark + _replaced(query, {text: swap.in_query(value) for text, value in put_in.items()}),
            headers=headers.without(b"accept-encoding").plus([(b"Accept-Encoding", b"identity")]),
            secrets=tuple(values),
        )

    def _in_header(self, name: bytes, value: bytes, subject: Subject, *, verified: bool) -> Iterator[_Found]:
        where = name.decode("latin-1").lower()
        yield from self._find(value, subject, f"the header {where}", verified=verified, header=where)
        credentials = swap.basic_credentials(value)
        if credentials is not None:
            yield from self._find(credentials[1], subject, "Basic", verified=verified)

    def _find(
        self, text: bytes, subject: Subject, place: str, *, verified: bool, header: str | None = None
    ) -> Iterator[_Found]:
        """Every placeholder in a text. Raises SecretMisuse for one that must not be there."""
        if MARK not in text:
            return
        for match in PLACEHOLDER.finditer(text):
            name = match[1].decode()
            whole, grant = self._whole(text, match.start(), match.end())
            if grant is None:
                raise SecretMisuse(name, self._foreign(name))
            if (problem := _problem(grant, subject, place, header, verified=verified)) is not None:
                raise SecretMisuse(name, f"the placeholder of the secret {name} was {problem}; nothing was sent")
            yield whole, grant

    def _whole(self, text: bytes, start: int, end: int) -> tuple[bytes, Grant | None]:
        """One of our placeholders that ends there, with its prefix."""
        for placeholder, grant in self._by_text.items():
            if text.endswith(placeholder, 0, end) and len(placeholder) >= end - start:
                return placeholder, grant
        return b"", None

    def _foreign(self, name: str) -> str:
        if self._source is not None:
            return (
                f"this placeholder of the secret {name} is not this VM's: it was lent to another one, perhaps to {self._source}, "
                "which this one is a fork of. A fork is lent nothing of its source's unless it is made with --inherit-secrets"
            )
        return (
            f"this placeholder of the secret {name} is not lent to this VM: it is another one's, or was taken back. "
            f"Programs get theirs from the environment; `capsem create --secret {name}` lends it to a new VM"
        )

    # -- bodies of requests

    def _of_body(self, subject: Subject, headers: Headers, *, verified: bool) -> list[Grant]:
        """The grants whose values may be put into the body."""
        if not verified or subject.host is None or headers.get(b"content-encoding") not in (None, b"identity"):
            return []
        said = [value for name in _LENGTHS if (value := headers.get(name)) is not None]
        if said == [b"0"] or (not said and subject.method not in _WITH_BODY):  # HTTP/2 need not say how long one is
            return []
        return [grant for grant in self._grants if grant.places.body and grant.fits(subject.host)]

    def body(self, subject: Subject, headers: Headers, *, verified: bool) -> Callable[[bytes], bytes] | None:
        """What a request's body has to pass through; see parts.Broker."""
        grants = self._of_body(subject, headers, verified=verified)
        if not grants:
            return None
        form = swap.body_form(headers.get(b"content-type"))
        texts: dict[bytes, bytes | Exception] = {}
        for grant in grants:
            known = self._values.known(grant.name)
            lost = SecretUnavailable(
                grant.name, f"the value of the secret {grant.name} is not known any more: try again"
            )
            texts |= {text.encode(): form(known[0]) if known else lost for text in grant.placeholders}
        return swap.Replacer(texts, BODY_LIMIT)

    # -- answers

    def incoming(self, subject: Subject, head: ResponseHead) -> tuple[ResponseHead, Callable[[bytes], bytes] | None]:
        """An answer that does not repeat a secret; see parts.Broker."""
        masks: dict[bytes, bytes | Exception] = {}
        for grant in self._grants if subject.host is not None else ():
            if grant.fits(subject.host or ""):
                for value in self._values.known(grant.name):
                    masks |= swap.masks(value, grant.placeholders[0].encode())
        if not masks:
            return head, None
        mask = swap.Replacer(masks, ECHO_LIMIT)
        headers = Headers((name, mask.whole(value)) for name, value in head.headers)
        readable = head.headers.get(b"content-encoding") in (None, b"identity")
        return replace(head, headers=headers), mask if readable else None


def _problem(grant: Grant, subject: Subject, place: str, header: str | None, *, verified: bool) -> str | None:
    """Why a placeholder must not go there, as the end of a sentence; None when it may."""
    hosts = " and ".join(grant.hosts)
    if subject.host is None or not grant.fits(subject.host):
        return f"on its way to {subject.host or subject.address}, and may go to {hosts} alone"
    if not verified:
        return f"on its way to {subject.host} without TLS that is checked here"
    allowed = {"the query": grant.places.query, "Basic": grant.places.basic, "the path": False}.get(place)
    if allowed is None:
        listed = grant.places.header
        allowed = listed if isinstance(listed, bool) else header in listed
    return None if allowed else f"in {place}, where its settings do not allow it"


def _with(value: bytes, put_in: dict[bytes, bytes]) -> bytes:
    """A header's value with values of secrets."""
    credentials = swap.basic_credentials(value)
    if credentials is not None and MARK in credentials[1]:
        return swap.with_credentials(credentials[0], _replaced(credentials[1], put_in))
    return _replaced(value, put_in)


def _replaced(text: bytes, put_in: dict[bytes, bytes]) -> bytes:
    if MARK in text:
        for placeholder, value in put_in.items():
            text = text.replace(placeholder, value)
    return text
