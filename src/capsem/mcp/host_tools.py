"""Tools for what there is on the host beside VMs: keys, versions, the MCP servers of programs inside VMs. See `tool`."""

from __future__ import annotations

from typing import Final

from capsem.mcp.tool import HERE, ID, READ, Param, Tool

VERSION: Final = "capsem_version"

HOST_TOOLS: Final = (
    Tool(
        "capsem_secrets",
        "secrets",
        "The keys that VMs may be lent: name, hosts they work for, and the variable (env) that holds a placeholder in the VM. "
        "The proxy puts the key in on its way to those hosts alone; nobody in a VM, nor you, can see it. Only the user can add "
        "one (`capsem secret set`). capsem_create takes names.",
        effect=READ,
    ),
    Tool(
        VERSION,
        "version",
        "Versions, and whether the service answers: {mcp_version, service}.",
        effect=READ,
    ),
    Tool(
        "capsem_mcp_servers",
        "mcp_servers",
        "MCP servers whose tools programs inside VMs may call; often none.",
        effect=READ,
    ),
    Tool(
        "capsem_mcp_tools",
        "mcp_tools",
        "The tools of those servers.",
        (Param("server", "string", "of this server alone", key=HERE),),
        effect=READ,
    ),
    Tool(
        "capsem_mcp_call",
        "call_tool",
        "Call one of those tools by its namespaced name, through a running VM.",
        (
            Param("name", "string", "server__tool", key=ID, required=True),
            Param("arguments", "object", "what the tool takes", default={}),
        ),
    ),
)
