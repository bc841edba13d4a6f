"""A life of a real VM in one session of an MCP client, through the program as it is installed."""

from __future__ import annotations

import asyncio
import json
from typing import Any

from mcp import StdioServerParameters
from mcp.client.client import Client

from real_service import BIN, Service


def test_list_tools_create_exec_suspend_resume_fork_delete(service: Service) -> None:
    async def scene() -> None:
        async with Client(StdioServerParameters(command=str(BIN / "capsem-mcp"), env=service.env)) as client:

            async def call(tool: str, **arguments: object) -> dict[str, Any]:
                result = await client.call_tool(f"capsem_{tool}", arguments)
                (content,) = result.content
                assert content.type == "text"
                assert not result.is_error, content.text
                answer: dict[str, Any] = json.loads(content.text)
                return answer

            assert "capsem_exec" in [tool.name for tool in (await client.list_tools()).tools]
            assert (await call("create", name="agent", ramMb=512, cpuCount=1))["id"] == "agent"
            begun = await call("exec", id="agent", command="sleep 1000 & echo $! > /run/pid; uname -s")
            assert (begun["stdout"], begun["exit_code"]) == ("Linux\n", 0)
            await call("write_file", id="agent", path="/root/a/notes", content="grüße\n")
            await call("suspend", id="agent")
            assert (await call("read_file", id="agent", path="/root/a/notes"))["content"] == "grüße\n"
            assert (await call("resume", name="agent"))["boot_kind"] == "warm"
            alive = "cat /root/a/notes; kill -0 $(cat /run/pid) && echo alive"
            assert (await call("exec", id="agent", command=alive))["stdout"] == "grüße\nalive\n"
            await call("fork", id="agent", name="agent-2", live=True)
            both = (call("exec", id=name, command=f"{alive}; hostname") for name in ("agent", "agent-2"))
            assert [each["stdout"] for each in await asyncio.gather(*both)] == [
                "grüße\nalive\nagent\n",
                "grüße\nalive\nagent-2\n",
            ]
            for name in ("agent", "agent-2"):
                assert await call("delete", id=name) == {"success": True}
            assert {"agent", "agent-2"}.isdisjoint(box["id"] for box in (await call("list"))["sandboxes"])

    asyncio.run(scene())
