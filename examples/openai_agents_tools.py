"""A sandbox as tools for the OpenAI Agents SDK: `Agent(name=..., tools=sandbox_tools(box))`."""

from __future__ import annotations

from typing import Any

from agents import RunContextWrapper, Tool, function_tool

from capsem import AsyncSandbox, Result


def sandbox_tools(box: AsyncSandbox) -> list[Tool]:
    """Tools to run commands in `box`, and to read and write its files.

    An error is told to the model, with its hint, so that it can act on it.
    """

    async def bash(command: str) -> str:
        """Run a bash command in the sandbox and return its output. It keeps its files between calls."""
        return shown(await box.exec(command, timeout=120))

    async def read_file(path: str) -> str:
        """Read a text file of the sandbox; paths are relative to /root."""
        return (await box.files.read(path)).decode(errors="replace")

    async def write_file(path: str, content: str) -> str:
        """Write a text file in the sandbox; paths are relative to /root."""
        await box.files.write(path, content)
        return f"wrote {path}"

    return [function_tool(tool, failure_error_function=told) for tool in (bash, read_file, write_file)]


def told(_context: RunContextWrapper[Any], error: Exception) -> str:
    """What the model is told when a tool fails."""
    return f"error: {error}"


def shown(result: Result) -> str:
    """A result as a model reads it best."""
    parts = [result.stdout, result.stderr, f"[exit code {result.exit_code}]" if not result.ok else ""]
    return "\n".join(part.rstrip("\n") for part in parts if part) or "[no output]"
