"""The APIs of OpenAI, and of the many hosts that speak like it: chat completions, responses, completions, embeddings.

Streamed chat tells its tokens in its last chunk, and only if the request said so (`stream_options.include_usage`).
Streamed responses end with one event that holds the whole of the response.
"""

from __future__ import annotations

from typing import Any

import msgspec

from capsem.egress.events import ToolCall
from capsem.egress.taps.found import ARGUMENTS, Found
from capsem.egress.taps.values import at, compact, count, decode, each, last_turn, text, told

_STANDARD = (None, "auto", "default", "standard")


class _Reader:
    silence = "the answer tells no tokens"

    def __init__(self) -> None:
        self.found = Found()

    def _count(self, usage: Any, came_in: str, came_out: str) -> None:
        """Tokens; details are of either, and named after it."""
        if usage is None:
            return
        found = self.found
        found.input_tokens = count(at(usage, came_in))
        found.output_tokens = count(at(usage, came_out))
        details = at(usage, f"{came_in}_details")
        found.cache_read = count(at(details, "cached_tokens"))
        if found.cache_read is None:  # where DeepSeek has it
            found.cache_read = count(at(usage, "prompt_cache_hit_tokens"))
        found.cache_write = count(at(details, "cache_write_tokens"))
        found.thinking = count(at(usage, f"{came_out}_details", "reasoning_tokens"))
        if count(at(details, "audio_tokens")) or count(at(usage, f"{came_out}_details", "audio_tokens")):
            found.unpriced = "some of it is sound, which costs more"

    def _tier(self, data: Any) -> None:
        tier = at(data, "service_tier")
        if tier not in _STANDARD:
            self.found.unpriced = f"it was served as {compact(tier, 20)}: the list has no such price"


class Chat(_Reader):
    """Reads chat completions, plain completions and embeddings."""

    silence = "the answer tells no tokens: of a stream only when the request asks for stream_options.include_usage"

    def __init__(self) -> None:
        super().__init__()
        self._open: dict[tuple[int, int], ToolCall | None] = {}  # by choice and number

    def request(self, request: dict[str, msgspec.Raw]) -> None:
        """The model that is asked, and what the tools of its last turn answered."""
        self.found.asked = text(decode(request.get("model", b"null")))
        for message in last_turn(request.get("messages"), lambda it: at(it, "role") == "assistant"):
            if at(message, "role") == "tool":
                self.found.response(at(message, "tool_call_id"), told(at(message, "content")))

    def piece(self, data: Any) -> None:
        """A chunk."""
        self.found.name(at(data, "model"))
        self._tier(data)
        self._count(at(data, "usage") or at(data, "x_groq", "usage"), "prompt_tokens", "completion_tokens")
        for choice in each(at(data, "choices")):
            if at(choice, "finish_reason") is not None:
                self.found.ended = True
            for call in each(at(choice, "delta", "tool_calls")):
                self._more(count(at(choice, "index")) or 0, call)

    def _more(self, choice: int, call: Any) -> None:
        number, name = count(at(call, "index")) or 0, text(at(call, "function", "name"))
        key = choice, number
        if key not in self._open or (name and at(call, "id") and self._open[key] is None):
            self._open[key] = self.found.tool(at(call, "id"), name)
        self.found.more(self._open[key], at(call, "function", "arguments"))

    def whole(self, data: Any) -> None:
        """A completion, or embeddings."""
        self.found.name(at(data, "model"))
        self._tier(data)
        self._count(at(data, "usage"), "prompt_tokens", "completion_tokens")
        if at(data, "object") == "list" and self.found.input_tokens is not None:
            self.found.output_tokens = 0  # embeddings: nothing is written
        for choice in each(at(data, "choices")):
            for call in each(at(choice, "message", "tool_calls")):
                inner = at(call, text(at(call, "type")) or "function")  # function, custom
                arguments = at(inner, "arguments") if at(inner, "arguments") is not None else at(inner, "input")
                self.found.tool(at(call, "id"), at(inner, "name"), compact(arguments, ARGUMENTS + 1))
        self.found.ended = True


class Responses(_Reader):
    """Reads responses."""

    def request(self, request: dict[str, msgspec.Raw]) -> None:
        """The model that is asked, and what the tools of its last turn answered."""
        self.found.asked = text(decode(request.get("model", b"null")))
        for item in last_turn(request.get("input"), _is_models):
            if (text(at(item, "type")) or "").endswith("_call_output"):
                self.found.response(at(item, "call_id"), told(at(item, "output")))

    def piece(self, data: Any) -> None:
        """An event; all but the last only tell whose answer it is, and which tools it wants in case there is no last."""
        kind = text(at(data, "type")) or ""
        if kind in ("response.completed", "response.incomplete", "response.failed"):
            self.found.tools.clear()
            self.whole(at(data, "response"))
        elif kind == "response.created":
            self.found.name(at(data, "response", "model"))
        elif kind == "response.output_item.done":
            self._item(at(data, "item"))
        elif kind == "error":
            self.found.ended = True

    def whole(self, data: Any) -> None:
        """A response."""
        self.found.name(at(data, "model"))
        self._tier(data)
        self._count(at(data, "usage"), "input_tokens", "output_tokens")
        for item in each(at(data, "output")):
            self._item(item)
        self.found.ended = True

    def _item(self, item: Any) -> None:
        kind = text(at(item, "type")) or ""
        if not kind.endswith("_call"):
            return
        for name in ("arguments", "input", "action", "code", "queries"):
            if (arguments := at(item, name)) is not None:
                break
        call_id = at(item, "call_id") or at(item, "id")
        self.found.tool(
            call_id, at(item, "name") or kind.removesuffix("_call"), compact(arguments or "", ARGUMENTS + 1)
        )
        if kind in ("web_search_call", "file_search_call", "code_interpreter_call", "image_generation_call"):
            self.found.unpriced = "it used a tool of the provider's own, which costs by the call"


def _is_models(item: Any) -> bool:
    kind = text(at(item, "type")) or ""
    return at(item, "role") == "assistant" or kind == "reasoning" or kind.endswith("_call")
