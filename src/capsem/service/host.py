"""The operations that are about the service and its host, and not about a VM: settings, set-up, the service's log.

Some of the contract's concern parts that this Capsem does not have: keys are not checked, and tools of other MCP servers are
not offered to guests. Those answer what is true: that there are none.
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
    LintRequest,
    LintResponse,
    McpPolicy,
    McpServers,
    McpTools,
    PolicyHookSpec,
    Preset,
    PresetsResponse,
    RefreshResponse,
    ReloadResponse,
    SettingInfo,
    SettingsRequest,
    SettingsResponse,
    SetupState,
)
from capsem.api.network_types import CorporateRequest
from capsem.api.types import SuccessResponse
from capsem.api.vm_types import AssetHealth, ListResponse
from capsem.egress.document import Document
from capsem.egress.facts import Layer
from capsem.egress.schema import PRESETS
from capsem.model.errors import InvalidInput, MachineFailed, NotFound, PermissionDenied, ToolFailed, Unavailable
from capsem.model.lifecycle import Status
from capsem.service import secret_settings
from capsem.service.network import Network
from capsem.service.policies import Policies
from capsem.service.settings_file import changed
from capsem.store import durable
from capsem.store.lines import read_tail

LINTED: Final = ("vm", "user", "corporate")
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
        policies: Policies,
        network: Network,
        apply: Callable[[config.Settings], None] = lambda _settings: None,
    ) -> None:
        self._environ = environ
        self._run_dir = run_dir
        self._machines = machines
        self._policies = policies
        self._network = network
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

    async def lint_settings(self, request: LintRequest) -> LintResponse:
        """Whether `change_settings`, or a VM, or a file, would take them."""
        problems = []
        if request.policy is not None:
            if request.layer not in LINTED:
                raise InvalidInput(f"there is no layer {request.layer!r}", hint=f"there are: {', '.join(LINTED)}")
            found = self._policies.check(request.policy, Layer(request.layer), "policy")[1]
            problems += [problem.at("policy") for problem in found]
        for name, value in request.settings.items():
            try:
                _setting(name).check(value, "settings")
            except InvalidInput as error:
                problems.append(str(error))
        return LintResponse(valid=not problems, problems=problems)

    async def reload(self) -> ReloadResponse:
        """Read the files again. Settings are for VMs to come; running ones get the new network policy, and their connections go
        on. Raises InvalidInput: a file is wrong, and everything stays as it was; MachineFailed: some VMs could not be told.
        """
        found = config.load(self._environ)
        secret_settings.load(self._environ)  # what is wrong with them is told before anything is changed
        await self._policies.reload()
        for warning in found.warnings:
            log.warning("%s", warning)
        self._apply(found)
        told, failures = await self._network.spread()
        if failures:
            raise MachineFailed(
                f"{len(failures)} VMs go on with the policy that they had, {told} have the new one: {'; '.join(failures)}",
                hint="restart those VMs, or try again",
            )
        return ReloadResponse(success=True, reloaded=told)

    async def presets(self) -> PresetsResponse:
        """What VMs may reach, by name, with what that means on this host."""
        active = config.load(self._environ).network_preset
        found = []
        for name, description in PRESETS.items():
            layers = await self._policies.layers(Document(preset=name))
            rules = [{**rule.to_dict(), "where": rule.where} for rule in layers.preset.rules]
            found.append(Preset(id=name, description=description, rules=rules, active=name == active))
        return PresetsResponse(presets=found)

    async def use_preset(self, name: str) -> SettingsResponse:
        """Make a preset that of new VMs. Raises NotFound."""
        if name not in PRESETS:
            raise NotFound(f"there is no preset {name[:40]}", hint=f"there are: {', '.join(PRESETS)}")
        return await self.change_settings(SettingsRequest(settings={config.NETWORK_PRESET: name}))

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

    async def set_corp_config(self, request: CorporateRequest) -> SuccessResponse:
        """Put the company's file in place, where nobody else has named one. Raises PermissionDenied, InvalidInput."""
        path = self._policies.corporate_file
        if self._environ.get("CAPSEM_CORP_CONFIG"):
            raise PermissionDenied(
                f"the corporate settings are those of {path}, and not for this user to change",
                hint="whoever starts the service names their file in CAPSEM_CORP_CONFIG",
            )
        self._policies.parse(request.config, Layer.CORPORATE, "config")
        before = path.read_bytes() if path.exists() else b""
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        durable.write(path, request.config.encode())
        try:
            await self.reload()
        except InvalidInput:  # it is a policy, and its settings are wrong
            durable.write(path, before)
            raise
        return SuccessResponse(success=True)

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
