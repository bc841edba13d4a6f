"""`capsem mcp`: the tools of other MCP servers that guests may call. (`capsem-mcp` is another thing: it offers Capsem itself.)"""

from __future__ import annotations

import json

import click

from capsem.cli.context import Context
from capsem.cli.terminal import printable, table
from capsem.model.errors import InvalidInput


@click.group("mcp", epilog="\b\nExamples:\n  capsem mcp servers\n  capsem mcp tools --json")
def mcp_command() -> None:
    """Look at MCP servers whose tools guests may call.

    None can be configured yet. For Capsem as an MCP server, see `capsem-mcp`.
    """


@mcp_command.command("servers", epilog="\b\nExample:\n  capsem mcp servers --json")
@click.option("--json", "as_json", is_flag=True, help="The service's answer, as JSON.")
@click.pass_obj
def servers_command(obj: Context, as_json: bool) -> None:
    """List the servers."""
    servers = json.loads(obj.client().fetch("mcp_servers"))
    if as_json:
        click.echo(json.dumps(servers, indent=2))
        return
    rows = [
        (each["name"], "running" if each["running"] else "-", str(each["tool_count"]), each["url"]) for each in servers
    ]
    for line in table(("NAME", "STATE", "TOOLS", "URL"), rows) if rows else ["No MCP servers."]:
        click.echo(printable(line))


@mcp_command.command("tools", epilog="\b\nExample:\n  capsem mcp tools --server docs")
@click.option("--server", metavar="NAME", help="Only those of this server.")
@click.option("--json", "as_json", is_flag=True, help="The service's answer, as JSON.")
@click.pass_obj
def tools_command(obj: Context, server: str | None, as_json: bool) -> None:
    """List their tools."""
    tools = json.loads(obj.client().fetch("mcp_tools"))
    tools = [each for each in tools if server in (None, each["server_name"])]
    if as_json:
        click.echo(json.dumps(tools, indent=2))
        return
    rows = [
        (each["namespaced_name"], "yes" if each["approved"] else "no", each.get("description") or "") for each in tools
    ]
    for line in table(("TOOL", "APPROVED", "DESCRIPTION"), rows) if rows else ["No MCP tools."]:
        click.echo(printable(line))


@mcp_command.command("policy", epilog="\b\nExample:\n  capsem mcp policy")
@click.pass_obj
def policy_command(obj: Context) -> None:
    """Show which tools may be called, as JSON."""
    click.echo(json.dumps(obj.client().call("mcp_policy"), indent=2))


@mcp_command.command("refresh", epilog="\b\nExample:\n  capsem mcp refresh")
@click.pass_obj
def refresh_command(obj: Context) -> None:
    """Ask the servers for their tools again."""
    click.echo(f"Refreshed; {obj.client().call('refresh_tools')['instances']} running VMs were told.")


@mcp_command.command("call", epilog='\b\nExample:\n  capsem mcp call docs__search --args \'{"query": "fork"}\'')
@click.argument("name")
@click.option("--args", "arguments", default="{}", metavar="JSON", help="The tool's arguments, a JSON object.")
@click.pass_obj
def call_command(obj: Context, name: str, arguments: str) -> None:
    """Call a tool, through a running VM, and print its result as JSON."""
    try:
        body = json.loads(arguments)
    except ValueError as error:
        raise InvalidInput(f"--args is no JSON: {error}", hint="such as --args '{\"key\": 1}'") from error
    if not isinstance(body, dict):
        raise InvalidInput("--args is no JSON object", hint="such as --args '{\"key\": 1}'")
    click.echo(json.dumps(obj.client().call("call_tool", vm_id=name, body=body), indent=2))
