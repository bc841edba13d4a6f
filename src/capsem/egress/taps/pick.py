"""Which requests are calls of a model, of whose, and in which of the APIs that are known here.

Three hosts are known by name. Any other host is listened to when the rule that allows it says which API it speaks
(`model = "openai"`): the provider is then called by the host's name.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from types import MappingProxyType
from typing import Final, NamedTuple

from capsem.egress.events import ModelCall, Recorder
from capsem.egress.facts import Subject, Verdict
from capsem.egress.heads import RequestHead
from capsem.egress.parts import Tap, Taps
from capsem.egress.taps.anthropic import Anthropic
from capsem.egress.taps.found import Reader
from capsem.egress.taps.gemini import Gemini
from capsem.egress.taps.openai import Chat, Responses
from capsem.egress.taps.prices import Prices
from capsem.egress.taps.tap import ModelTap, Room
from capsem.system import Clock

APIS: Final = ("anthropic", "openai", "gemini")
_HOSTS: Final = MappingProxyType(
    {
        "api.anthropic.com": ("anthropic", "anthropic"),
        "api.openai.com": ("openai", "openai"),
        "generativelanguage.googleapis.com": ("google", "gemini"),
    }
)  # host -> provider, API


class _Endpoint(NamedTuple):
    path: re.Pattern[str]
    reader: Callable[[str], Reader]


def _endpoint(pattern: str, reader: Callable[[str], Reader]) -> _Endpoint:
    return _Endpoint(re.compile(pattern), reader)


_OPENAI: Final = (
    _endpoint(r"/(?:chat/completions|completions|embeddings)$", lambda _path: Chat()),
    _endpoint(r"/responses$", lambda _path: Responses()),
)
_ENDPOINTS: Final = MappingProxyType(
    {
        "anthropic": (_endpoint(r"/messages$", lambda _path: Anthropic()),),
        "openai": _OPENAI,
        # Google also speaks like OpenAI, on the same host.
        "gemini": (_endpoint(r":(?:streamG|g)enerateContent$", Gemini), *_OPENAI),
    }
)


def model_taps(recorder: Recorder, clock: Clock, prices: Prices) -> Taps:
    """Taps of one VM, which share what they may hold."""
    room = Room()

    def tap(subject: Subject, head: RequestHead, verdict: Verdict) -> Tap | None:
        if head.method != b"POST" or subject.host is None:
            return None
        provider, api = _HOSTS.get(subject.host, (None, None))
        if verdict.model is not None:
            provider, api = provider or subject.host, verdict.model
        target, _, query = head.target.partition(b"?")
        path = target.decode("utf-8", "replace")
        reader = _reader(api, path)
        if provider is None or reader is None:
            return None
        call = ModelCall(
            time=clock.time(),
            domain=subject.host,
            provider=provider,
            model=None,
            method="POST",
            path=path,
            stream=path.endswith(":streamGenerateContent"),
            status_code=None,
        )
        in_elements = call.stream and b"alt=sse" not in query.split(b"&")
        return ModelTap(call, reader, head.headers, recorder, clock, prices, room, in_elements=in_elements)

    return tap


def _reader(api: str | None, path: str) -> Reader | None:
    for endpoint in _ENDPOINTS.get(api or "", ()):
        if endpoint.path.search(path):
            return endpoint.reader(path)
    return None
