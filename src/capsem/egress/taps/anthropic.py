"""The Messages API of Anthropic (POST /v1/messages).

Streamed: `message_start` has the model and what went in; `message_delta` what came out so far, all of it each time, and in
newer versions what went in once more. `input_tokens` there are those that no cache has to do with.
"""

from __future__ import annotations

from typing import Any

import msgspec

from capsem.egress.events import ToolCall
from capsem.egress.taps.found import ARGUMENTS, Found
from capsem.egress.taps.values import at, compact, count, decode, each, last_turn, text, told

_USAGE = ("input_tokens", "cache_read_input_tokens", "cache_creation_input_tokens", "output_tokens")
_STANDARD = (None, "standard")


class Anthropic:
    """Reads Messages."""

    silence = "the answer tells no tokens"

    def __init__(self) -> None:
        self.found = Found()
        self._usage: dict[str, int] = {}
        self._open: dict[int, ToolCall | None] = {}  # by content block

    def request(self, request: dict[str, msgspec.Raw]) -> None:
        """The model that is asked, and what the tools of its last turn answered."""
        self.found.asked = text(decode(request.get("model", b"null")))
        for message in last_turn(request.get("messages"), lambda it: at(it, "role") == "assistant"):
            for block in each(at(message, "content")):
                if at(block, "type") == "tool_result":
                    failed = at(block, "is_error")
                    self.found.response(at(block, "tool_use_id"), told(at(block, "content")), is_error=failed is True)

    def piece(self, data: Any) -> None:
        """An event."""
        kind = at(data, "type")
        if kind == "message_start":
            message = at(data, "message")
            self.found.name(at(message, "model"))
            self._count(at(message, "usage"))
        elif kind == "content_block_start":
            index, block = count(at(data, "index")), at(data, "content_block")
            if index is not None and _is_tool(block):
                self._open[index] = self.found.tool(at(block, "id"), at(block, "name"))
        elif kind == "content_block_delta":
            if at(data, "delta", "type") == "input_json_delta":
                self.found.more(self._open.get(count(at(data, "index")) or 0), at(data, "delta", "partial_json"))
        elif kind == "message_delta":
            self._count(at(data, "usage"))
        elif kind in ("message_stop", "error"):
            self.found.ended = True

    def whole(self, data: Any) -> None:
        """A message."""
        self.found.name(at(data, "model"))
        self._count(at(data, "usage"))
        for block in each(at(data, "content")):
            if _is_tool(block):
                arguments = compact(at(block, "input"), ARGUMENTS + 1)
                self.found.tool(at(block, "id"), at(block, "name"), arguments)
        self.found.ended = True

    def _count(self, usage: Any) -> None:
        for name in _USAGE:
            if (number := count(at(usage, name))) is not None:
                self._usage[name] = number
        found, (fresh, read, written, out) = self.found, (self._usage.get(name) for name in _USAGE)
        if fresh is not None:
            found.input_tokens = fresh + (read or 0) + (written or 0)
        found.output_tokens, found.cache_read, found.cache_write = out, read, written
        if (hour := count(at(usage, "cache_creation", "ephemeral_1h_input_tokens"))) is not None:
            found.cache_write_hour = hour
        if (thinking := count(at(usage, "output_tokens_details", "thinking_tokens"))) is not None:
            found.thinking = thinking
        tier, speed = at(usage, "service_tier"), at(usage, "speed")
        if tier not in _STANDARD or speed not in _STANDARD:
            found.unpriced = f"it was served as {compact(tier, 20)}, {compact(speed, 20)}: the list has no such price"
        elif count(at(usage, "server_tool_use", "web_search_requests")):
            found.unpriced = "it searched the web, which costs by the search"


def _is_tool(block: Any) -> bool:
    return (text(at(block, "type")) or "").endswith("tool_use")  # server_tool_use, mcp_tool_use as well
