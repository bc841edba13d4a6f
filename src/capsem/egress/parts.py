"""What the core of the proxy is handed: who decides, who answers what must be asked, who knows secrets, who listens in."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from capsem.egress.facts import Subject, Verdict
from capsem.egress.heads import Headers, RequestHead, ResponseHead


class SecretRefused(Exception):
    """A request cannot have a secret put in: `secret` is its name; the message is for a person."""

    def __init__(self, secret: str, reason: str) -> None:
        super().__init__(reason)
        self.secret = secret


class SecretMisuse(SecretRefused):
    """A placeholder was about to go where its secret must not."""


class SecretUnavailable(SecretRefused):
    """It may go there, and its value cannot be had."""


class Judge(Protocol):
    """The policy of a VM. It may be another one at the next call: kept connections are judged again at each request."""

    def judge(self, subject: Subject) -> Verdict:
        """The verdict; pure and quick. The floor is judged when `subject.address` is given, which is what is about to be
        dialled, or what was asked for by number.

        The core asks in this order. For TLS, before there is a request (HTTP, no method): rules for methods and paths count as
        if those matched; a verdict whose `protocol` is PASSTHROUGH leaves TLS alone, `http2` offers that. For each request, with
        method and path. For each address that the name has, once more with that. For what is not HTTP, with protocol TCP.
        """

    def judge_name(self, host: str) -> Verdict:
        """What to say to a look-up, when neither port nor protocol is known: ALLOW or ASK when that is what some rule could say
        about something there; DENY when rules deny everything; DENY of the layer DEFAULT when none speaks of that name."""


class Asker(Protocol):
    """Whoever may be asked about what a rule says must be asked."""

    async def ask(self, subject: Subject, verdict: Verdict) -> Verdict:
        """The final verdict, ALLOW or DENY; at once a denial when nobody listens."""


class Broker(Protocol):
    """Lends secrets: the guest has placeholders, real values are put in on the way out."""

    async def outgoing(self, subject: Subject, head: RequestHead, *, verified: bool) -> RequestHead:
        """The head with real values. `verified`: it goes over TLS that we have checked against `subject.host`, which is the
        SNI, too. Raises SecretRefused."""

    def body(self, subject: Subject, headers: Headers, *, verified: bool) -> Callable[[bytes], bytes] | None:
        """What a request's body has to pass through, chunk by chunk (b"" is the end), and may get longer or shorter by; None
        when it can go as it is. The function raises SecretRefused. `outgoing` of the same request comes first."""

    def incoming(self, subject: Subject, head: ResponseHead) -> tuple[ResponseHead, Callable[[bytes], bytes] | None]:
        """An answer that does not repeat a secret to the guest: its head, and what its body passes through (as `body`, but it
        gets neither longer nor shorter)."""


class Tap(Protocol):
    """Listens to one request and its answer, as the guest has them: before secrets are put in, and after they are taken
    out. It sees chunks of bodies as they pass, free of their framing (chunked) but as compressed as they are, may drop what
    is too much for it, and never raises."""

    def request_body(self, chunk: bytes) -> None:
        """A piece of the request."""

    def response(self, head: ResponseHead) -> None:
        """The answer begins."""

    def response_body(self, chunk: bytes) -> None:
        """A piece of it."""

    def finish(self) -> None:
        """That was all, or as much as there will be: what was learnt is recorded."""


Taps = Callable[[Subject, RequestHead, Verdict], Tap | None]  # for the guest's own head, without secrets
