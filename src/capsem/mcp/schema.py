"""What `tools/list` says of a tool's input and output, as JSON Schema."""

from __future__ import annotations

from typing import Any

import msgspec

from capsem.api.operations import OPERATIONS
from capsem.mcp.tool import Param, Tool


def input_schema(tool: Tool) -> dict[str, Any]:
    """An object with the tool's parameters. Others are ignored, so it does not forbid them."""
    schema: dict[str, Any] = {"type": "object", "properties": {param.name: _property(param) for param in tool.params}}
    if required := [param.name for param in tool.params if param.required]:
        schema["required"] = required
    return schema


def _property(param: Param) -> dict[str, Any]:
    found: dict[str, Any] = {"type": param.kind}
    if param.says:
        found["description"] = param.says
    if param.default is not None:
        found["default"] = param.default
    return found


def output_schema(tool: Tool) -> dict[str, Any] | None:
    """An object with what the operation's answer always has and what it may have; None where only the text is given."""
    if not tool.structured:
        return None
    kind = OPERATIONS[tool.operation].response_type()
    _, components = msgspec.json.schema_components([kind])
    (found,) = components.values()
    schema: dict[str, Any] = {
        "type": "object",
        "properties": {key: _bare(each) for key, each in found["properties"].items()},
        "required": found["required"],
    }
    if tool.operation in ("exec", "run", "read_file"):
        schema["properties"]["note"] = {"type": "string"}
    return schema


def _bare(schema: dict[str, Any]) -> dict[str, Any]:
    """Without defaults, and without null: an answer's optional keys are left out instead."""
    options = [each for each in schema.get("anyOf", []) if each != {"type": "null"}]
    return options[0] if len(options) == 1 else {key: each for key, each in schema.items() if key != "default"}
