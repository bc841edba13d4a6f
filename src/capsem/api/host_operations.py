"""Rows of the table of operations: the service itself, its settings, and the tools it could offer to guests."""

from __future__ import annotations

from typing import Final

from capsem.api.operation import FINISH, Operation
from capsem.model.errors import InvalidInput, NotFound, PermissionDenied, ToolFailed, Unavailable

HOST_OPERATIONS: Final = (
    Operation("version", "GET", "/version", "the version of the service", "VersionResponse", retry_safe=True),
    Operation(
        "openapi",
        "GET",
        "/openapi.json",
        "this table as an OpenAPI document",
        "OpenApiDocument",
        retry_safe=True,
    ),
    Operation(
        "trace",
        "GET",
        "/trace/{name}",
        "what was done, and when, for the requests with this id in their header `Capsem-Trace`",
        "TraceResponse",
        errors=(InvalidInput, NotFound),
        retry_safe=True,
    ),
    Operation(
        "reload_config",
        "POST",
        "/reload-config",
        "read the settings again",
        "ReloadResponse",
        errors=(InvalidInput,),
        retry_safe=True,
    ),
    Operation(
        "settings",
        "GET",
        "/settings",
        "the settings and what they may be",
        "SettingsResponse",
        errors=(InvalidInput,),
        retry_safe=True,
    ),
    Operation(
        "change_settings",
        "POST",
        "/settings",
        "store settings in the user's file; they hold for VMs to come",
        "SettingsResponse",
        request="SettingsRequest",
        errors=(InvalidInput,),
        retry_safe=True,
        on_disconnect=FINISH,
    ),
    Operation(
        "presets", "GET", "/settings/presets", "the presets of what VMs may reach", "PresetsResponse", retry_safe=True
    ),
    Operation(
        "use_preset",
        "POST",
        "/settings/presets/{name}",
        "make a preset that of new VMs",
        "SettingsResponse",
        errors=(InvalidInput, NotFound),
        retry_safe=True,
    ),
    Operation(
        "lint_settings",
        "POST",
        "/settings/lint",
        "whether settings, or a network policy, could be stored",
        "LintResponse",
        request="LintRequest",
        errors=(InvalidInput,),
        retry_safe=True,
    ),
    Operation(
        "validate_key",
        "POST",
        "/settings/validate-key",
        "whether a provider takes a key",
        "KeyResponse",
        request="KeyRequest",
        errors=(InvalidInput,),
        retry_safe=True,
    ),
    Operation(
        "setup_state", "GET", "/setup/state", "whether everything is there to run a VM", "SetupState", retry_safe=True
    ),
    Operation("setup_detect", "GET", "/setup/detect", "what was found on this host", "DetectResponse", retry_safe=True),
    Operation(
        "setup_complete",
        "POST",
        "/setup/complete",
        "end the set-up: says whether it is complete",
        "SetupState",
        retry_safe=True,
    ),
    Operation(
        "setup_retry", "POST", "/setup/retry", "look again whether everything is there", "SetupState", retry_safe=True
    ),
    Operation(
        "setup_assets", "GET", "/setup/assets", "the image that VMs are made from", "AssetHealth", retry_safe=True
    ),
    Operation(
        "set_corp_config",
        "POST",
        "/setup/corp-config",
        "put the company's settings and network rules in place, where whoever starts the service has named no file",
        "SuccessResponse",
        request="CorporateRequest",
        errors=(InvalidInput, PermissionDenied),
        retry_safe=True,
        on_disconnect=FINISH,
    ),
    Operation(
        "policy_hooks",
        "GET",
        "/policy-hook/spec",
        "places where a program of the user's is asked",
        "PolicyHookSpec",
        retry_safe=True,
    ),
    Operation(
        "mcp_servers", "GET", "/mcp/servers", "MCP servers whose tools guests may call", "McpServers", retry_safe=True
    ),
    Operation("mcp_tools", "GET", "/mcp/tools", "the tools of those servers", "McpTools", retry_safe=True),
    Operation("mcp_policy", "GET", "/mcp/policy", "which of those tools may be called", "McpPolicy", retry_safe=True),
    Operation(
        "refresh_tools",
        "POST",
        "/mcp/tools/refresh",
        "ask those servers for their tools again",
        "RefreshResponse",
        retry_safe=True,
    ),
    Operation(
        "approve_tool",
        "POST",
        "/mcp/tools/{name}/approve",
        "allow a tool",
        "SuccessResponse",
        errors=(InvalidInput, NotFound),
        retry_safe=True,
    ),
    Operation(
        "call_tool",
        "POST",
        "/mcp/tools/{name}/call",
        "call a tool through a running VM",
        "ToolResult",
        request="ToolArguments",
        errors=(InvalidInput, ToolFailed, Unavailable),
    ),
)
