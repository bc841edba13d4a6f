"""What travels about the service itself: its settings, its set-up, and tools of other MCP servers; rules as in `types`."""

from __future__ import annotations

from typing import Annotated, Any

import msgspec

from capsem.api.types import Body

Value = str | int | float  # of a setting


class SettingInfo(Body, frozen=True):
    """A setting: its `value` in force; `choices`, or the bounds `low` and `high`; the variable `env` overrides the file."""

    name: str
    value: Value
    default: Value
    help: str
    env: str
    low: float | None = None
    high: float | None = None
    choices: list[str] | None = None


class SettingsResponse(Body, frozen=True):
    """All settings; `path` is the user's file, `warnings` are what was found in the files and means nothing."""

    settings: list[SettingInfo]
    path: str
    warnings: list[str] = []


class SettingsRequest(Body, frozen=True):
    """Settings by their dotted names, and the values that they are to have."""

    settings: dict[str, Value]


class LintRequest(Body, frozen=True):
    """Settings as for `change_settings`, and a network policy (TOML) of a `layer`: vm, user or corporate."""

    settings: dict[str, Value] = {}
    policy: str | None = None
    layer: str = "vm"


class LintResponse(Body, frozen=True):
    """Whether settings and policy could be stored as they are, and if not, why."""

    valid: bool
    problems: list[str]


class Preset(Body, frozen=True):
    """What VMs may reach beneath all rules, by a name. `rules` are those that it stands for on this host; `active`: it is that
    of new VMs."""

    id: str
    description: str
    rules: list[dict[str, Any]] = []
    active: bool = False


class PresetsResponse(Body, frozen=True):
    """The presets that there are."""

    presets: list[Preset]


class KeyRequest(Body, frozen=True):
    """A key of a provider."""

    provider: str = ""
    key: str = ""


class KeyResponse(Body, frozen=True):
    """Whether the provider takes the key; `message` when that cannot be told."""

    valid: bool
    message: str


class SetupState(Body, frozen=True):
    """Whether everything is there to run a VM, and if not, what is missing."""

    completed: bool
    missing: list[str]


class DetectResponse(Body, frozen=True):
    """What was found on this host: the hypervisor's program, and whether KVM's device may be opened (it may still not work:
    `capsem doctor` tries)."""

    qemu: str | None = None
    kvm: bool = False


class PolicyHookSpec(Body, frozen=True):
    """Places where a program of the user's is asked."""

    hooks: list[str]


class ReloadResponse(Body, frozen=True):
    """The settings in force are those of the files; `reloaded` VMs had to be told."""

    success: bool
    reloaded: int


class McpServer(Body, frozen=True):
    """An MCP server whose tools guests may call."""

    name: str
    url: str
    has_bearer_token: bool
    custom_header_count: int
    source: str
    enabled: bool
    running: bool
    tool_count: int
    is_stdio: bool


McpServers = list[McpServer]


class McpTool(Body, frozen=True):
    """One tool of such a server."""

    namespaced_name: str
    original_name: str
    server_name: str
    approved: bool
    pin_changed: bool
    description: str | None = None
    annotations: dict[str, Any] | None = None
    pin_hash: str | None = None


McpTools = list[McpTool]


class McpPolicy(Body, frozen=True):
    """Who may call what."""

    default_tool_permission: str
    blocked_servers: list[str]
    tool_permissions: dict[str, str]
    global_policy: Annotated[str | None, msgspec.Meta(description="null: none is set")]


class RefreshResponse(Body, frozen=True):
    """The lists of tools are new; `instances` running VMs were told."""

    success: bool
    instances: int


class ToolArguments(Body, frozen=True):
    """The arguments of a tool: any JSON object."""


class ToolResult(Body, frozen=True):
    """What the tool has said: its own JSON."""


class LogText(Body, frozen=True):
    """Not JSON: lines of text."""
