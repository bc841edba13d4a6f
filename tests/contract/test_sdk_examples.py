"""The adapters in examples/, as an agent's framework calls them, without any model."""

from __future__ import annotations

import asyncio
import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any

from served_world import served_world

from capsem import AsyncSandbox, Client

EXAMPLES = Path(__file__).parent.parent.parent / "examples"


def example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


async def use(call: Any) -> None:
    """What an agent might do, whatever calls its tools."""
    assert await call("write_file", path="a.py", content="print(6 * 7)") == "wrote a.py"
    assert await call("read_file", path="/root/a.py") == "print(6 * 7)"
    assert await call("bash", command="python3 a.py") == "42"
    assert await call("bash", command="echo oops >&2; exit 3") == "oops\n[exit code 3]"
    assert await call("bash", command="true") == "[no output]"
    told = await call("read_file", path="nothing")
    assert "nothing" in told
    assert "error" in told.lower()


def test_langchain_tools() -> None:
    async def scene(socket: str) -> None:
        async with await AsyncSandbox.create(client=Client(socket)) as box:
            tools = {tool.name: tool for tool in example("langchain_tools").sandbox_tools(box)}
            assert set(tools["write_file"].args) == {"path", "content"}
            assert "relative to /root" in tools["write_file"].description

            async def call(name: str, **arguments: str) -> str:
                return str(await tools[name].ainvoke(arguments))

            await use(call)

    with served_world() as socket:
        asyncio.run(scene(socket))


def test_openai_agents_tools() -> None:
    from agents.tool_context import ToolContext

    async def scene(socket: str) -> None:
        async with await AsyncSandbox.create(client=Client(socket)) as box:
            tools = {tool.name: tool for tool in example("openai_agents_tools").sandbox_tools(box)}
            assert set(tools["write_file"].params_json_schema["required"]) == {"path", "content"}

            async def call(name: str, **arguments: str) -> str:
                text = json.dumps(arguments)
                context = ToolContext(None, tool_name=name, tool_call_id="1", tool_arguments=text)
                return str(await tools[name].on_invoke_tool(context, text))

            await use(call)

    with served_world() as socket:
        asyncio.run(scene(socket))
