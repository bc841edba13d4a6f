"""docs/mcp-tools.md, made from the table of tools: `python -m capsem.mcp.reference`."""

from __future__ import annotations

import sys
from collections.abc import Iterator

from capsem.api.operations import OPERATIONS
from capsem.mcp.tool import ID, Param, Tool
from capsem.mcp.tools import TOOLS, TOOLSETS

HEAD = """# MCP tools

Generated from `capsem.mcp.tools` by `make docs`; do not edit. [How to set the server up](mcp.md).

A result is text: the answer of the service as JSON, and the same as structured content. An error is a result too, with
`isError` and a text that begins with the status, as in `404: no VM is called x`. Arguments that a tool does not have are
ignored. Tools marked *core* are those of `--toolset core`.
"""


def to_markdown() -> str:
    """The page."""
    lines = [HEAD]
    lines += ["| tool | what it does to things | request |", "|---|---|---|"]
    for tool in TOOLS.values():
        row = OPERATIONS[tool.operation]
        core = " (core)" if tool in TOOLSETS["core"] else ""
        lines.append(f"| [`{tool.name}`](#{tool.name}){core} | {tool.effect.value} | `{row.method} {row.path}` |")
    lines.append("")
    for tool in TOOLS.values():
        lines += _tool(tool)
    return "\n".join(lines[:-1]) + "\n"


def _tool(tool: Tool) -> Iterator[str]:
    yield f"## {tool.name}"
    yield ""
    text, found, example = tool.says.partition("Example: ")
    yield text.strip()
    yield ""
    if found:
        yield from ("```json", example, "```", "")
    for param in tool.params:
        yield f"- `{param.name}`: {_words(param)}"
    if tool.params:
        yield ""


def _words(param: Param) -> str:
    words = [param.kind, "required"] if param.required else [param.kind]
    if param.default is not None:
        words.append(f"default {param.default}".lower())
    says = param.says or ("the VM's id" if param.goes_to == ID else "")
    return ", ".join(words) + (f"; {says}" if says else "")


if __name__ == "__main__":
    sys.stdout.write(to_markdown())
