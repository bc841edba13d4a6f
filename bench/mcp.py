"""`python -m bench mcp`: what an MCP tool call costs over the same request by HTTP, and how long the server takes to start.

The VMs are simulated: what they do takes no time, and all that is left is ours. Calls and requests take turns.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

from mcp import StdioServerParameters
from mcp.client.client import Client as McpClient

from bench.host import BIN, environment, milliseconds, service
from bench.table import Row


async def measure(calls: int) -> list[Row]:
    """All rows."""
    rows = []
    with (
        tempfile.TemporaryDirectory(prefix="capsem-") as text,
        service(Path(text), CAPSEM_HYPERVISOR="sim") as (http, _pid),
    ):
        server = StdioServerParameters(command=str(BIN / "capsem-mcp"), env=environment(Path(text)))
        http.call("provision", body={"name": "box", "persistent": True})
        starts = []
        for _ in range(3):
            began = time.perf_counter()
            async with McpClient(server, mode="legacy"):
                starts.append(milliseconds(began))
        async with McpClient(server, mode="legacy") as client:
            questions: list[tuple[str, str, dict[str, Any], dict[str, Any]]] = [
                ("list", "capsem_list", {}, {}),
                (
                    "exec",
                    "capsem_exec",
                    {"id": "box", "command": "true"},
                    {"vm_id": "box", "body": {"command": "true", "timeout_secs": 30}},
                ),
            ]
            for operation, tool, arguments, request in questions:
                ours, floor = [], []
                for _ in range(calls):
                    began = time.perf_counter()
                    await client.call_tool(tool, arguments)
                    ours.append(milliseconds(began))
                    began = time.perf_counter()
                    http.call(operation, **request)
                    floor.append(milliseconds(began))
                over = [one - other for one, other in zip(sorted(ours), sorted(floor), strict=True)]
                rows.append(Row(f"{tool}, beside HTTP (ms)", ours, floor))
                rows.append(Row("  over HTTP (ms)", over, (), "under 15"))
        rows.append(Row("capsem-mcp: start to initialized (ms)", starts))
    return rows
