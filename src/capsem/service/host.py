"""The operations that are about the service and its host, and not about a VM: settings, set-up, the service's log.

Some of the contract's concern parts that this Capsem does not have: VMs have no network, hence no presets of network
policy and no keys to check, and tools of other MCP servers are not offered to guests. Those answer what is true: that
there are none.
"""

from __future__ import annotations

import logging
import os
import shutil
import tomllib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final, Protocol

from capsem import config
from capsem.api.host_types import (
    DetectResponse,
    KeyResponse,
    LintResponse,
    McpPolicy,
    McpServers,
    McpTools,
    PolicyHookSpec,
    PresetsResponse,
    RefreshResponse,
    ReloadResponse,
    SettingInfo,
    SettingsRequest,
    SettingsResponse,
    SetupState,
)
from capsem.api.types import SuccessResponse
from capsem.api.vm_types import AssetHealth, ListResponse
from capsem.model.errors import InvalidInput, NotFound, PermissionDenied, ToolFailed, Unavailable
from capsem.model.lifecycle import Status
from capsem.service.settings_file import changed
from capsem.store import durable
from capsem.store.lines import read_tail

LOG_LIMIT: Final = 100 * 1024  # bytes of service.log in an answer

log = logging.getLogger("capsem_service.host")


class Machines(Protocol):
    """What is needed of those who run the VMs."""

    async def list(self) -> ListResponse:
        """Every VM, and whether there is an image."""


class Host:
    """`apply` is told the settings whenever they have changed."""

    def __init__(
        self,
        environ: Mapping[str, str],
        run_dir: Path,
        machines: Machines,
        apply: Callable[[config.Settings], None] = lambda _settings: None,
    ) -> None:
        self._environ = environ
        self._run_dir = run_dir
        self._machines = machines
        self._apply = apply

    # -- settings

    async def settings(self) -> SettingsResponse:
        """All of them, as the files and the environment have them now."""
        found = config.load(self._environ)
        rows = [
            SettingInfo(
                name=row.name,
                value=found.values[row.name],
                default=row.default,
                help=row.help,
                env=row.env,
                low=None if row.choices else row.low,
                high=None if row.choices else row.high,
                choices=list(row.choices) or None,
            )
            for row in config.SETTINGS
        ]
        return SettingsResponse(settings=rows, path=self._file, warnings=list(found.warnings))

    @property
    def _file(self) -> str:
        return config.user_file(self._environ)

    async def change_settings(self, request: SettingsRequest) -> SettingsResponse:
        """Store settings in the user's file, and let them be in force. Raises InvalidInput; then nothing is changed."""
        values = {name: _setting(name).check(value, "settings") for name, value in request.settings.items()}
        path = Path(self._file)
        try:
            text = path.read_text(encoding="utf-8") if path.exists() else ""
            new = changed(text, values)
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise InvalidInput(f"{path} cannot be read: {error}", hint="correct the file, or move it away") from error
        if new != text:
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            durable.write(path, new.encode())
        await self.reload()
        return await self.settings()

    async def lint_settings(self, request: SettingsRequest) -> LintResponse:
        """Whether `change_settings` would take them."""
        problems = []
        for name, value in request.settings.items():
            try:
                _setting(name).check(value, "settings")
            except InvalidInput as error:
                problems.append(str(error))
        return LintResponse(valid=not problems, problems=problems)

    async def reload(self) -> ReloadResponse:
        """Read the files again. No running VM depends on them: what is set is for those to come. Raises InvalidInput."""
        found = config.load(self._environ)
        for warning in found.warnings:
            log.warning("%s", warning)
        self._apply(found)
        return ReloadResponse(success=True, reloaded=0)

    async def presets(self) -> PresetsResponse:
        """None: they are sets of rules for a network that VMs do not have."""
        return PresetsResponse(presets=[])

    async def use_preset(self, name: str) -> SettingsResponse:
        """Raises NotFound."""
        raise NotFound(f"there is no preset {name}", hint="GET /settings/presets lists those there are: none")

    async def validate_key(self) -> KeyResponse:
        """Keys are for providers on a network."""
        return KeyResponse(valid=False, message="keys are not checked: the service asks nobody on a network")

    # -- set-up

    async def assets(self) -> AssetHealth:
        """The image that VMs are made from."""
        return (await self._machines.list()).asset_health

    async def setup_state(self) -> SetupState:
        """Whether a VM could be started: `capsem setup` does what is missing."""
        missing = list((await self.assets()).missing)
        if self._qemu() is None:
            missing.append("QEMU")
        return SetupState(completed=not missing, missing=missing)

    async def detect(self) -> DetectResponse:
        """What this host has."""
        return DetectResponse(qemu=self._qemu(), kvm=os.access("/dev/kvm", os.R_OK | os.W_OK))

    def _qemu(self) -> str | None:
        return shutil.which(f"qemu-system-{os.uname().machine}", path=self._environ.get("PATH"))

    async def set_corp_config(self) -> SuccessResponse:
        """Raises PermissionDenied."""
        raise PermissionDenied(
            "the corporate settings are not for this user to change",
            hint="whoever starts the service names their file in CAPSEM_CORP_CONFIG",
        )

    async def policy_hooks(self) -> PolicyHookSpec:
        """None."""
        return PolicyHookSpec(hooks=[])

    # -- tools of other MCP servers

    async def mcp_servers(self) -> McpServers:
        """None."""
        return []

    async def mcp_tools(self) -> McpTools:
        """None."""
        return []

    async def mcp_policy(self) -> McpPolicy:
        """What holds where nothing was said."""
        return McpPolicy(global_policy=None, default_tool_permission="allow", blocked_servers=[], tool_permissions={})

    async def refresh_tools(self) -> RefreshResponse:
        """Nothing to ask, nobody to tell."""
        return RefreshResponse(success=True, instances=0)

    async def approve_tool(self, name: str) -> SuccessResponse:
        """Raises NotFound."""
        raise NotFound(f"there is no MCP tool {name}", hint="GET /mcp/tools lists those there are: none")

    async def call_tool(self, name: str) -> None:
        """Raises Unavailable when no VM runs, as the contract has it, and else that there is no such tool."""
        if all(box.status != Status.RUNNING for box in (await self._machines.list()).sandboxes):
            raise Unavailable("no VM is running", hint="tools are called through a running VM: capsem create")
        raise ToolFailed(f"there is no MCP tool {name}", hint="GET /mcp/tools lists those there are: none")

    # -- logs

    async def service_log(self) -> str:
        """The end of the service's log."""
        return read_tail(self._run_dir / "service.log", LOG_LIMIT)


def _setting(name: str) -> config.Setting:
    for row in config.SETTINGS:
        if row.name == name:
            return row
    raise InvalidInput(f"there is no setting {name[:80]!r}", hint="GET /settings lists those there are")
