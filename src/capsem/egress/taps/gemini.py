"""The Gemini API (POST .../models/MODEL:generateContent and :streamGenerateContent).

A stream's pieces are whole answers, each with what it adds and with the tokens so far: the last one counts. The model stands in
the path; `modelVersion` says which one it was.
"""

from __future__ import annotations

import re
from typing import Any, Final

import msgspec

from capsem.egress.taps.found import ARGUMENTS, PREVIEW, Found
from capsem.egress.taps.values import at, compact, count, each, last_turn, text

_PATH: Final = re.compile(r"/models/([^/:]+):")


class Gemini:
    """Reads what generateContent says."""

    silence = "the answer tells no tokens"

    def __init__(self, path: str) -> None:
        self.found = Found()
        if match := _PATH.search(path):
            self.found.asked = match[1]

    def request(self, request: dict[str, msgspec.Raw]) -> None:
        """What the functions of the model's last turn answered."""
        for content in last_turn(request.get("contents"), lambda it: at(it, "role") == "model"):
            for part in each(at(content, "parts")):
                if (answer := at(part, "functionResponse") or at(part, "function_response")) is not None:
                    call_id = at(answer, "id") or at(answer, "name")
                    self.found.response(call_id, compact(at(answer, "response"), PREVIEW))

    def piece(self, data: Any) -> None:
        """A part of the answer."""
        found = self.found
        found.name(at(data, "modelVersion"))
        for candidate in each(at(data, "candidates")):
            if text(at(candidate, "finishReason")):
                found.ended = True
            for part in each(at(candidate, "content", "parts")):
                if (call := at(part, "functionCall")) is not None:
                    arguments = compact(at(call, "args"), ARGUMENTS + 1)
                    found.tool(at(call, "id"), at(call, "name"), arguments)
            if at(candidate, "groundingMetadata", "webSearchQueries"):
                found.unpriced = "it searched the web, which costs by the search"
        usage = at(data, "usageMetadata")
        if (asked := count(at(usage, "promptTokenCount"))) is None:
            return
        found.cache_read = count(at(usage, "cachedContentTokenCount"))
        found.thinking = count(at(usage, "thoughtsTokenCount"))
        found.input_tokens = asked + (count(at(usage, "toolUsePromptTokenCount")) or 0)
        # A piece without candidates' tokens is an early one; thoughts alone may be all there is.
        written = count(at(usage, "candidatesTokenCount"))
        if written is not None or found.thinking is not None:
            found.output_tokens = (written or 0) + (found.thinking or 0)
        if any(at(part, "modality") == "AUDIO" for part in each(at(usage, "promptTokensDetails"))):
            found.unpriced = "some of it is sound, which costs more"
        if any(at(part, "modality") in ("AUDIO", "IMAGE") for part in each(at(usage, "candidatesTokensDetails"))):
            found.unpriced = "some of the answer is no text, which costs more"

    def whole(self, data: Any) -> None:
        """The answer."""
        self.piece(data)
        self.found.ended = True
