"""From a tool's arguments to a request of the service, and from its answer to what a model reads; no I/O.

Clients of the contract parse the text of a result, which is the service's answer as JSON. What is too long for a model
loses its middle (of a log, its beginning), in the place of which stands, in words, how much that was and how to get it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Final, NamedTuple

from capsem.api.operations import OPERATIONS
from capsem.mcp.tool import HERE, ID, Param, Tool
from capsem.mcp.vm_tools import JOB_OUTPUT
from capsem.model.errors import CapsemError, InvalidInput

LOG_CHARACTERS: Final = 60_000
EXEC_TIMEOUT: Final = 30

_KINDS: Final[dict[str, tuple[Any, str]]] = {
    "string": (str, "a string"),
    "integer": (int, "a whole number"),
    "number": ((int, float), "a number"),
    "boolean": (bool, "true or false"),
    "object": (dict, "an object"),
}


class Call(NamedTuple):
    """A request of the service, and `here`, what is still to be done to its answer."""

    operation: str
    vm_id: str | None
    body: dict[str, Any] | None
    query: dict[str, str]
    here: dict[str, Any]


def request(tool: Tool, arguments: Mapping[str, Any]) -> Call:
    """What to ask the service for. Arguments that the tool does not have are ignored, null is as if left out.

    Raises InvalidInput that names the argument.
    """
    row = OPERATIONS[tool.operation]
    sent: dict[str, Any] = dict(tool.fixed)
    here: dict[str, Any] = {}
    vm_id = None
    for param in tool.params:
        value = _checked(tool, param, arguments.get(param.name))
        if param.goes_to == ID:
            vm_id = value
        elif param.goes_to == HERE:
            here[param.name] = value
        elif value is not None:
            sent[param.goes_to] = value
    if tool.name == "capsem_create":
        sent["persistent"] = bool(sent.get("name"))
        if "secrets" in sent:
            sent["secrets"] = [name.strip() for name in sent["secrets"].split(",") if name.strip()]
    elif tool.name == "capsem_exec":
        if here["background"]:
            sent["wait"] = False
        else:
            sent.setdefault("timeout_secs", EXEC_TIMEOUT)
    elif tool.name == JOB_OUTPUT:
        sent["wait"] = here["wait"] > 0
    elif tool.name == "capsem_mcp_call":
        sent = sent["arguments"]
    if row.query:
        return Call(tool.operation, vm_id, None, {key: _word(value) for key, value in sent.items()}, here)
    return Call(tool.operation, vm_id, sent if row.request else None, {}, here)


def _checked(tool: Tool, param: Param, value: Any) -> Any:
    if value is None:
        if param.required:
            names = ", ".join(each.name for each in tool.params if each.required)
            raise InvalidInput(f"missing required argument `{param.name}`", hint=f"{tool.name} needs: {names}")
        return param.default
    kind, words = _KINDS[param.kind]
    if param.kind == "integer" and isinstance(value, float) and value.is_integer():
        value = int(value)  # in JSON, 2 and 2.0 are the same
    if not isinstance(value, kind) or (isinstance(value, bool) and param.kind != "boolean"):
        raise InvalidInput(f"{param.name} has to be {words}, not {json.dumps(value)[:40]}")
    if param.goes_to == HERE and param.kind in ("integer", "number") and value < 0:
        raise InvalidInput(f"{param.name} is {value}", hint="it has to be 0 or more")
    return value


def _word(value: Any) -> str:
    return json.dumps(value) if isinstance(value, bool) else str(value)


def result(tool: Tool, answer: Any, here: Mapping[str, Any]) -> Any:
    """What the tool gives back of the service's answer: an object, a list, or text."""
    if isinstance(answer, str):
        return _log(answer, here)
    if tool.name == "capsem_mcp_tools" and here["server"] is not None:
        return [each for each in answer if each["server_name"] == here["server"]]
    if tool.operation in ("exec", "run"):
        return _output(answer, here)
    if tool.operation == "logs":
        return {key: _log(text, here) if key.endswith("logs") else text for key, text in answer.items()}
    if tool.operation == "read_file" and (here["startLine"], here["lines"]) != (None, None):
        return _lines(answer["content"], here)
    return answer


def _output(answer: dict[str, Any], here: Mapping[str, Any]) -> dict[str, Any]:
    answer = dict(answer)
    notes = ["output beyond the newest 10 MiB was dropped"] if answer.get("truncated") else []
    if here.get("background"):
        notes.append("it runs in the background: capsem_job_output tells how it gets on, capsem_job_kill ends it")
    for key in ("stdout", "stderr"):
        text = _tail(answer[key], here.get("tail"))
        answer[key] = clipped = clip(text, here["maxOutput"])
        if clipped is not text:
            answer["truncated"] = True
            notes.append(
                f"{key} had {len(text)} characters, the middle is left out: ask for more with maxOutput, or have the "
                "command write to a file and look at parts of it"
            )
    if notes:
        answer["note"] = "; ".join(notes)
    return answer


def clip(text: str, limit: int) -> str:
    """`text`, or the first and last part of it, `limit` characters in all, with words in between."""
    if len(text) <= limit:
        return text
    left_out = len(text) - limit
    return f"{text[: limit // 2]}\n[... {left_out} characters left out ...]\n{text[len(text) - (limit + 1) // 2 :]}"


def _log(text: str, here: Mapping[str, Any]) -> str:
    if here.get("grep"):
        wanted = here["grep"].casefold()
        text = "".join(line for line in text.splitlines(keepends=True) if wanted in line.casefold())
    text = _tail(text, here.get("tail"))
    if len(text) <= LOG_CHARACTERS:
        return text
    left_out = len(text) - LOG_CHARACTERS
    return f"[... {left_out} characters before this left out: use grep or tail ...]\n{text[-LOG_CHARACTERS:]}"


def _tail(text: str, lines: int | None) -> str:
    if lines is None:
        return text
    return "".join(text.splitlines(keepends=True)[-lines:]) if lines else ""


def _lines(content: str, here: Mapping[str, Any]) -> dict[str, Any]:
    lines = content.splitlines(keepends=True)
    first = max(1, here["startLine"] or 1)
    last = len(lines) if here["lines"] is None else first - 1 + here["lines"]
    part = lines[first - 1 : last]
    return {"content": "".join(part), "note": f"lines {first} to {first - 1 + len(part)} of {len(lines)}"}


def text_of(answer: Any) -> str:
    """The text of a result: what is text already, as it is; everything else as JSON."""
    return answer if isinstance(answer, str) else json.dumps(answer, indent=2, ensure_ascii=False)


def error_text(error: CapsemError) -> str:
    """The text of a result that is an error."""
    return f"{error.status}: {error}"
