"""docs/http.md, made from OPERATIONS and the types that it names: `python -m capsem.api.reference`."""

from __future__ import annotations

import inspect
import sys
import types
import typing
from collections.abc import Iterator
from typing import Any

import msgspec

from capsem.api import stream
from capsem.api.operation import FINISH, JSON, Operation
from capsem.api.operations import OPERATIONS
from capsem.model.errors import BY_CODE, CapsemError
from capsem.model.lifecycle import State

HEAD = """# HTTP

Generated from `capsem.api.operations` by `make docs`; do not edit.

The service listens on a Unix socket, by default `$CAPSEM_HOME/run/service.sock`, and speaks HTTP/1.1. Who may open the
socket (mode 0600) may do everything; there is no other authentication. Bodies are JSON objects unless said otherwise.
Unknown fields of a request are ignored, optional ones may be null; fields of an answer that say nothing are left out.

    curl --unix-socket ~/.capsem/run/service.sock http://capsem/list

`GET /openapi.json` is the same as an OpenAPI document, for programs.

An error is a status and `{"error": text, "code": code, "message": text, "hint": text}`; `error` is the message with the
hint. `code` is one of the table at the end. With `interrupted` comes `job`, the id of a command that may go on. Every
operation may also answer `internal` and, while the host refuses something, `machine_failed`. A client that hangs up ends
what it waited for; operations marked *goes on* run to their end.
"""


def to_markdown() -> str:
    """The page."""
    lines = [HEAD]
    for operation in OPERATIONS.values():
        lines += _operation(operation)
    lines += ["## Types", ""]
    for kind in _named():
        lines += _type(kind)
    lines += ["## The frames of an exec stream", "", "```text", inspect.cleandoc(stream.__doc__ or ""), "```", ""]
    lines += ["## Error codes", "", "| code | status | meaning |", "|---|---|---|"]
    lines += [f"| {code} | {error.status} | {_sentence(error)} |" for code, error in BY_CODE.items()]
    return "\n".join(lines) + "\n"


def _operation(operation: Operation) -> Iterator[str]:
    yield f"## {operation.name}"
    yield ""
    goes_on = "; *goes on*" if operation.on_disconnect is FINISH else ""
    yield f"`{operation.method} {operation.path}` - {operation.summary}{goes_on}."
    yield ""
    if operation.request:
        yield f"- request: `{operation.request}`, at most {operation.body_limit >> 10} KiB"
    if operation.query:
        yield f"- query: `{operation.query}`"
    kind = operation.response_type()
    answer = f"`{operation.response}`" if isinstance(kind, type) else f"list of `{typing.get_args(kind)[0].__name__}`"
    yield f"- answer: {answer}" + (f", as {operation.gives}" if operation.gives != JSON else "")
    if operation.legal is not None:
        states = "any" if operation.legal >= set(State) - {State.DELETING, State.DELETED} else ""
        yield f"- states: {states or ', '.join(sorted(operation.legal))}"
    yield f"- trying again: {'is safe' if operation.retry_safe else 'may do it twice'}"
    if operation.errors:
        yield f"- errors: {', '.join(f'{kind.code} ({kind.status})' for kind in operation.errors)}"
    yield ""


def _named() -> list[type[msgspec.Struct]]:
    """The types that the table names, and those that they name, each once."""
    found: dict[type[msgspec.Struct], None] = {}

    def add(kind: type[msgspec.Struct]) -> None:
        if kind not in found:
            found[kind] = None
            for hint in typing.get_type_hints(kind).values():
                for part in (hint, *typing.get_args(hint)):
                    if isinstance(part, type) and issubclass(part, msgspec.Struct):
                        add(part)

    for operation in OPERATIONS.values():
        for kind in (operation.request_type(), operation.query_type(), operation.response_type()):
            for part in (kind, *typing.get_args(kind)):  # of a list, what is in it
                if isinstance(part, type) and issubclass(part, msgspec.Struct):
                    add(part)
    return list(found)


def _type(kind: type[msgspec.Struct]) -> Iterator[str]:
    yield f"### {kind.__name__}"
    yield ""
    yield inspect.cleandoc(kind.__doc__ or "")
    yield ""
    for field in msgspec.structs.fields(kind):
        default = "" if field.required else ", optional"
        if not field.required and field.default not in (None, msgspec.NODEFAULT):
            default = f", default {msgspec.json.encode(field.default).decode()}"
        yield f"- `{field.encode_name}`: {_words(field.type)}{default}"
    yield ""


_JSON = {str: "string", int: "integer", float: "number", bool: "true or false", types.NoneType: "null"}


def _words(hint: Any) -> str:
    """A type as JSON has it."""
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Annotated:
        return _words(parts[0])
    if origin in (typing.Union, types.UnionType):
        words = dict.fromkeys(_words(part) for part in parts if part is not types.NoneType)
        return "number" if words.keys() == {"integer", "number"} else " or ".join(words)
    if origin is typing.Literal:
        return " or ".join(f'"{word}"' for word in parts)
    if hint is Any:
        return "anything"
    if origin is list:
        return f"list of {_words(parts[0])}"
    if origin is dict:
        return f"object of {_words(parts[1])}"
    return _JSON.get(hint) or (f"`{hint.__name__}`" if issubclass(hint, msgspec.Struct) else "string")


def _sentence(kind: type[CapsemError]) -> str:
    if kind is CapsemError:
        return "Something that the service did not expect; its log has the details"
    return " ".join(inspect.cleandoc(kind.__doc__ or "").split()).partition(". ")[0].rstrip(".")


if __name__ == "__main__":
    sys.stdout.write(to_markdown())
