"""The MCP server: the protocol is the SDK's, which runs every request as a task of its own; the tools are `tools`.

A call that the client cancels is a cancelled task, which hangs up on the service, which kills the command in the guest.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator
from typing import Any, Final

import mcp_types as types
from mcp.server.lowlevel import Server
from mcp.shared.exceptions import MCPError

from capsem import __version__
from capsem.api.operations import OPERATIONS
from capsem.ledger.schema import schema_text
from capsem.log import trace
from capsem.mcp import translate
from capsem.mcp.asks import Asks
from capsem.mcp.calls import Service
from capsem.mcp.host_tools import VERSION
from capsem.mcp.network_tools import ASKS
from capsem.mcp.record_tools import INSPECT_SCHEMA
from capsem.mcp.schema import input_schema, output_schema
from capsem.mcp.tool import DESTROY, READ, Tool
from capsem.mcp.tools import INSTRUCTIONS, TOOLSETS
from capsem.mcp.vm_tools import JOB_OUTPUT
from capsem.model.errors import CapsemError

NAME: Final = "capsem-mcp"
PROGRESS_EVERY: Final = 1.0  # seconds

log = logging.getLogger("capsem_mcp")


def declaration(tool: Tool) -> types.Tool:
    """The tool as `tools/list` shows it."""
    return types.Tool(
        name=tool.name,
        description=tool.says,
        input_schema=input_schema(tool),
        output_schema=output_schema(tool),
        annotations=types.ToolAnnotations(
            read_only_hint=tool.effect is READ,
            destructive_hint=tool.effect is DESTROY,
            idempotent_hint=OPERATIONS[tool.operation].retry_safe,
            open_world_hint=False,
        ),
    )


class Tools:
    """The tools of a toolset, on a service."""

    def __init__(self, service: Service, toolset: str = "all") -> None:
        self._service = service
        self._asks = Asks(service)
        self._tools = {tool.name: tool for tool in TOOLSETS[toolset]}

    def server(self) -> Server[Any]:
        """A server that has them."""
        return Server(
            NAME,
            version=__version__,
            instructions=INSTRUCTIONS,
            on_list_tools=self._list,
            on_call_tool=self._call,
        )

    async def _list(self, _ctx: Any, _params: types.PaginatedRequestParams | None) -> types.ListToolsResult:
        return types.ListToolsResult(tools=[declaration(tool) for tool in self._tools.values()])

    async def _call(self, ctx: Any, params: types.CallToolRequestParams) -> types.CallToolResult:
        tool = self._tools.get(params.name)
        if tool is None:
            raise MCPError(types.INVALID_PARAMS, f"Unknown tool: {params.name}")
        try:
            async with trace(f"call.{tool.name}", log), _progress(ctx, params.arguments or {}):
                answer = await self._do(tool, params.arguments or {})
        except CapsemError as error:
            return _result(translate.error_text(error), error=True)
        except Exception:
            log.exception("%s failed", tool.name)
            return _result("500: internal error in capsem-mcp (mcp.log has the details)", error=True)
        return _result(answer)

    async def _do(self, tool: Tool, arguments: dict[str, Any]) -> Any:
        if tool.name == INSPECT_SCHEMA:
            return schema_text()
        call = translate.request(tool, arguments)
        if tool.name == ASKS:
            return await self._asks.look(call)
        if tool.name == VERSION:
            return await self._version(call)
        if tool.name == JOB_OUTPUT and call.here["wait"]:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(call.here["wait"]):
                    return translate.result(tool, await self._service.call(call), call.here)
            call = call._replace(body={**(call.body or {}), "wait": False})
        return translate.result(tool, await self._service.call(call), call.here)

    async def _version(self, call: translate.Call) -> dict[str, str]:
        try:
            await self._service.call(call)
        except CapsemError as error:
            return {"mcp_version": __version__, "service": f"unreachable: {error}"}
        return {"mcp_version": __version__, "service": "connected"}


def _result(answer: Any, *, error: bool = False) -> types.CallToolResult:
    return types.CallToolResult(
        content=[types.TextContent(type="text", text=translate.text_of(answer))],
        structured_content=answer if isinstance(answer, dict) else None,
        is_error=error,
    )


@contextlib.asynccontextmanager
async def _progress(ctx: Any, arguments: dict[str, Any]) -> AsyncIterator[None]:
    """Tell a client that wants to know that the call goes on, every second, with how many seconds it has been."""

    async def tell() -> None:
        loop = asyncio.get_running_loop()
        began = loop.time()
        limit = arguments.get("timeout")
        while True:
            await asyncio.sleep(PROGRESS_EVERY)
            passed = round(loop.time() - began, 1)
            await ctx.session.report_progress(passed, limit, f"for {passed:g} s")

    telling = asyncio.create_task(tell())
    try:
        yield
    finally:
        telling.cancel()
        await asyncio.gather(telling, return_exceptions=True)
