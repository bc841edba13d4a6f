"""A sandbox as tools for a LangChain agent: `create_agent(model, tools=sandbox_tools(box))`."""

from __future__ import annotations

from langchain_core.tools import BaseTool, StructuredTool

from capsem import AsyncSandbox, CapsemError, Result


def sandbox_tools(box: AsyncSandbox) -> list[BaseTool]:
    """Tools to run commands in `box`, and to read and write its files. Errors become text that a model can act on."""

    async def bash(command: str) -> str:
        """Run a bash command in the sandbox and return its output. It keeps its files between calls."""
        try:
            return shown(await box.exec(command, timeout=120))
        except CapsemError as error:
            return f"error: {error}"

    async def read_file(path: str) -> str:
        """Read a text file of the sandbox; paths are relative to /root."""
        try:
            return (await box.files.read(path)).decode(errors="replace")
        except CapsemError as error:
            return f"error: {error}"

    async def write_file(path: str, content: str) -> str:
        """Write a text file in the sandbox; paths are relative to /root."""
        try:
            await box.files.write(path, content)
        except CapsemError as error:
            return f"error: {error}"
        return f"wrote {path}"

    return [StructuredTool.from_function(coroutine=tool) for tool in (bash, read_file, write_file)]


def shown(result: Result) -> str:
    """A result as a model reads it best."""
    parts = [result.stdout, result.stderr, f"[exit code {result.exit_code}]" if not result.ok else ""]
    return "\n".join(part.rstrip("\n") for part in parts if part) or "[no output]"
