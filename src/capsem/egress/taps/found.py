"""What has been learnt of a call so far, and the one who reads it out of what a provider says."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Final, Protocol

import msgspec

from capsem.egress.events import ToolCall, ToolResponse
from capsem.egress.taps.values import text

TOOLS: Final = 128  # of one call
ARGUMENTS: Final = 16 * 1024  # characters of a tool's arguments
PREVIEW: Final = 1024  # characters of what a tool answered


@dataclass(slots=True)
class Found:
    """Counts are None as long as nobody has told them.

    `input_tokens` are all that went in: `cache_read` and `cache_write` are parts of them, and `cache_write_hour` the part of
    `cache_write` that is kept for an hour. `output_tokens` are all that came out, `thinking` among them. `unpriced` says why
    no price list applies, though it may know the model. `ended`: the answer came to its own end.
    """

    model: str | None = None  # by the provider's word
    asked: str | None = None  # by the request's
    input_tokens: int | None = None
    output_tokens: int | None = None
    cache_read: int | None = None
    cache_write: int | None = None
    cache_write_hour: int | None = None
    thinking: int | None = None
    unpriced: str | None = None
    ended: bool = False
    crowded: bool = False  # there were more tools, or longer arguments, than are kept
    tools: list[ToolCall] = field(default_factory=list)
    responses: list[ToolResponse] = field(default_factory=list)

    def name(self, model: Any) -> None:
        """The provider names the model."""
        self.model = text(model) or self.model

    def tool(self, call_id: Any, name: Any, arguments: str = "") -> ToolCall | None:
        """One more tool is asked for; None when there are too many."""
        if len(self.tools) >= TOOLS:
            self.crowded = True
            return None
        tool = ToolCall(len(self.tools), text(call_id), text(name) or "?", "")
        self.tools.append(tool)
        self.more(tool, arguments)
        return tool

    def more(self, tool: ToolCall | None, arguments: Any) -> None:
        """More of a tool's arguments."""
        if tool is None or not isinstance(arguments, str):
            return
        room = ARGUMENTS - len(tool.arguments)
        self.crowded = self.crowded or len(arguments) > room
        if room > 0:
            tool.arguments += arguments[:room]

    def response(self, call_id: Any, preview: str, *, is_error: bool | None = None) -> None:
        """What a tool answered is told to the model."""
        if len(self.responses) >= TOOLS:
            self.crowded = True
        else:
            self.responses.append(ToolResponse(text(call_id), preview[:PREVIEW], is_error))


class Reader(Protocol):
    """Knows one API. Whatever it is handed, it raises nothing. `silence`: why an answer may tell no tokens."""

    found: Found
    silence: str

    def request(self, request: dict[str, msgspec.Raw]) -> None:
        """The members of the request's body."""

    def piece(self, data: Any) -> None:
        """The next piece of a streamed answer."""

    def whole(self, data: Any) -> None:
        """An answer that was not streamed."""
