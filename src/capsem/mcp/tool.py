"""What a tool of the MCP server is: its name, the operation of the service behind it, its parameters, and what a model is told.

A tool says what it is called and read as; what it does is the operation's. So its row holds names of `api.operations`
and keys of `api.types`, and `translate` does the rest. A description is written for a model that has never seen Capsem,
and pays for every word of it in every conversation: when to use it, what it costs, what comes back, an example.
"""

from __future__ import annotations

from enum import Enum
from typing import Any, Final, NamedTuple

ID: Final = "{id}"  # where a parameter goes that stands in the path
HERE: Final = ""  # one that is used on this side, on the answer


class Effect(Enum):
    """What a tool does to what is there; a client may ask its user before it lets one destroy."""

    READ = "read"
    CHANGE = "change"
    DESTROY = "destroy"


READ, CHANGE, DESTROY = Effect.READ, Effect.CHANGE, Effect.DESTROY


class Param(NamedTuple):
    """One parameter. `key` is its name in the request, ID or HERE; its own unless given."""

    name: str
    kind: str  # of JSON Schema
    says: str = ""
    key: str | None = None
    required: bool = False
    default: Any = None

    @property
    def goes_to(self) -> str:
        """The key."""
        return self.name if self.key is None else self.key


class Tool(NamedTuple):
    """One row; `fixed` are keys of the request that the caller has no say in. `structured`: its output has a schema."""

    name: str
    operation: str
    says: str
    params: tuple[Param, ...] = ()
    effect: Effect = CHANGE
    core: bool = False
    fixed: tuple[tuple[str, Any], ...] = ()
    structured: bool = False


def vm(says: str = "") -> Param:
    """The parameter `id` of a tool that is about one VM."""
    return Param("id", "string", says, key=ID, required=True)


SINCE: Final = Param("since", "string", "how far back: 30m, 1h, 7d, or a time as RFC 3339")
TAIL: Final = Param("tail", "integer", "only the last N lines (after grep)", key=HERE)
