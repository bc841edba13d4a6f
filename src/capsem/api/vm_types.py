"""What travels between clients and the service about VMs as wholes; the rules are those of `types`."""

from __future__ import annotations

from typing import Annotated

import msgspec

from capsem.api.network_types import NetworkRequest
from capsem.api.types import LONGEST_TIMEOUT, Body, Cpus, DiskMb, Env, Name, RamMb
from capsem.model.errors import InvalidInput
from capsem.model.ids import check_name
from capsem.model.lifecycle import Status
from capsem.model.policy import Policy
from capsem.model.spec import DEFAULT_DISK_MB

FORKS = 64  # at once

_SPAN = Annotated[float, msgspec.Meta(ge=0, le=LONGEST_TIMEOUT)]


class VmPolicy(Body, frozen=True):
    """What becomes of a VM as time goes by; what is not there is off. To change it: what is left out stays as it is, 0
    turns it off.

    `idle_secs`: not used for so long, it is suspended. `ttl_secs`: having run for so long, it is stopped, or deleted
    when it is not persistent. `checkpoint_every_secs`: how often an automatic checkpoint is made; the newest
    `checkpoint_keep` (10) stay, but for those older than `checkpoint_age_secs`.
    """

    idle_secs: _SPAN | None = None
    ttl_secs: _SPAN | None = None
    checkpoint_every_secs: _SPAN | None = None
    checkpoint_keep: Annotated[int, msgspec.Meta(ge=0)] | None = None
    checkpoint_age_secs: _SPAN | None = None

    @classmethod
    def of(cls, policy: Policy) -> VmPolicy:
        """As people are shown it."""
        return cls(**policy.to_dict())  # type: ignore[arg-type]


class ProvisionRequest(Body, frozen=True):
    """Create and boot a VM. What is None comes from the settings; `image` is another word for `from`.

    `secrets` are names of those that it is lent (`GET /secrets`): it gets placeholders.
    `network` is what it may reach: a preset, or that and a policy of its own; a copy has that of its source unless given.
    `profile` names the image it is made from, `default` unless given; a copy has that of its source. `cold`: boot it, though
    there is a template of its size to fork.
    A name alone does not make a VM persistent. Limits of the numbers and of `env` are `model.spec`'s.
    """

    name: Name | None = None
    ram_mb: RamMb | None = None
    cpus: Cpus | None = None
    disk_mb: DiskMb = DEFAULT_DISK_MB
    persistent: bool = False
    env: Env | None = None
    from_: Name | None = msgspec.field(default=None, name="from")
    image: Name | None = None
    profile: Name | None = None
    policy: VmPolicy | None = None
    network: str | NetworkRequest | None = None
    secrets: list[str] | None = None
    cold: bool = False

    def __post_init__(self) -> None:
        if self.name is not None:
            check_name(self.name)
        if self.source is not None:
            check_name(self.source)
        if None not in (self.from_, self.image) and self.from_ != self.image:
            raise InvalidInput("from and image name different VMs", hint="they mean the same: give one")
        if self.profile is not None:
            check_name(self.profile)
            if self.source is not None:
                raise InvalidInput("a copy has the profile of its source", hint="leave the profile out")

    @property
    def source(self) -> str | None:
        """The name of the VM whose disk is cloned, or None."""
        return self.from_ if self.from_ is not None else self.image


class PrepareRequest(Body, frozen=True):
    """Have a template for VMs of that size and profile; what is None comes from the settings, as when a VM is created."""

    ram_mb: RamMb | None = None
    cpus: Cpus | None = None
    disk_mb: DiskMb = DEFAULT_DISK_MB
    profile: Name | None = None

    def __post_init__(self) -> None:
        if self.profile is not None:
            check_name(self.profile)


class PersistRequest(Body, frozen=True):
    """Keep a running ephemeral VM under `name`."""

    name: Name

    def __post_init__(self) -> None:
        check_name(self.name)


class PurgeRequest(Body, frozen=True):
    """Delete every ephemeral VM, and with `all` every other one too."""

    all: bool = False


class ForkRequest(Body, frozen=True):
    """Make a stopped VM `name` on a copy of this one's disk.

    `live`: with a copy of its memory too, and running; `count` of them are then called name-1, name-2 and so on.
    `checkpoint` (an id, or its first digits): of that instant instead of the present. It is lent no secrets of its source's,
    unless `inherit_secrets`: then placeholders of its own, and those that are in its memory are good, too.
    """

    name: Name
    description: str | None = None
    live: bool = False
    count: Annotated[int, msgspec.Meta(ge=1, le=FORKS)] = 1
    checkpoint: str | None = None
    inherit_secrets: bool = False

    def __post_init__(self) -> None:
        for name in self.names:
            check_name(name)
        if not self.live and self.count > 1:
            raise InvalidInput("count: only live forks can be several at once", hint="add live, or fork one by one")

    @property
    def names(self) -> list[str]:
        """What the new VMs are called."""
        return [self.name] if self.count == 1 else [f"{self.name}-{number}" for number in range(1, self.count + 1)]


class ResumeRequest(Body, frozen=True):
    """Start a VM; `cold`: from its disk, though it has memory to come back with."""

    cold: bool = False


class ProvisionResponse(Body, frozen=True):
    """A VM that runs; `uds_path` is its control socket, a path that no client may compute itself.

    `boot_kind` is cold, warm, forked, template, pool or cold-after-failure, `boot_note` why it was not what could be expected. It
    waited `waited_ms` until its turn came, because of what happened to other VMs. `lost`: of a machine that was restored,
    how many `streams` (connections of its programs) it does not have any more; each was reset before it went on.
    """

    id: str
    uds_path: str
    boot_kind: str | None = None
    boot_note: str | None = None
    waited_ms: float | None = None
    lost: dict[str, int] | None = None


class PrepareResponse(Body, frozen=True):
    """`ready`: the template is there. `making`: it is being made, or will be; neither: templates are turned off."""

    ready: bool
    making: bool


class SandboxInfo(Body, frozen=True):
    """One VM. `pid` is its supervisor's, 0 when it does not run; `name` only for a persistent VM.

    `last_error` says why it is Defunct; `reason`, in any other status, how its last run ended, or what is wrong with
    the present one; `warning` tells what keeps a running VM from getting on, such as a full disk of the host, or that
    there may be no room to suspend it. `waiting`: what it waits for to begin, while others of this host are being
    started, stopped, saved or resumed.

    `started_from` says how its last run began: pool, template, checkpoint, or disk.

    What it has done so far, a fork since it was one: `total_estimated_cost` is in US dollars, without the
    `unpriced_model_calls`, whose price is not known.

    `can_resume`, of a VM that does not run: whether `resume` would do on this host as it is, and if not,
    `resume_blocked_reason`. `available_actions` are operations; `resume_cold` is `resume` with `cold`.
    """

    id: str
    pid: int
    status: Status
    persistent: bool
    name: str | None = None
    ram_mb: int | None = None
    cpus: int | None = None
    disk_mb: int | None = None
    version: str | None = None
    forked_from: str | None = None
    description: str | None = None
    size_bytes: int | None = None
    created_at: str | None = None
    uptime_secs: int | None = None
    boot_kind: str | None = None
    boot_note: str | None = None
    started_from: str | None = None
    checkpoint: str | None = None
    last_error: str | None = None
    reason: str | None = None
    warning: str | None = None
    waiting: str | None = None
    can_resume: bool | None = None
    resume_blocked_reason: str | None = None
    available_actions: list[str] | None = None
    policy: VmPolicy | None = None
    secrets: list[str] | None = None
    total_input_tokens: int | None = None
    total_output_tokens: int | None = None
    total_estimated_cost: float | None = None
    total_tool_calls: int | None = None
    total_mcp_calls: int | None = None
    total_requests: int | None = None
    allowed_requests: int | None = None
    denied_requests: int | None = None
    total_file_events: int | None = None
    model_call_count: int | None = None
    unpriced_model_calls: int | None = None


class AssetHealth(Body, frozen=True):
    """Whether there is an image to boot, its version, and what is missing."""

    ready: bool
    missing: list[str]
    version: str | None = None


class ListResponse(Body, frozen=True):
    """Every VM: those that run, and the persistent ones that do not."""

    sandboxes: list[SandboxInfo]
    asset_health: AssetHealth


class StopResponse(Body, frozen=True):
    """The VM has stopped; one that is not persistent is gone. `waited_ms`: see ProvisionResponse."""

    success: bool
    persistent: bool
    waited_ms: float | None = None


class PersistResponse(Body, frozen=True):
    """The VM is persistent; `name` is its id from here on."""

    success: bool
    name: str


class PurgeResponse(Body, frozen=True):
    """How many VMs are gone."""

    purged: int
    persistent_purged: int
    ephemeral_purged: int


class ForkResponse(Body, frozen=True):
    """A forked VM: `size_bytes` counts its whole chain of layers, those it shares too. `names`: all live ones.

    Of a live fork of a running VM, `pause_ms` is how long that stood still. `waited_ms`: see ProvisionResponse. `lost` is what
    a live fork has lost; its source has lost nothing.
    """

    name: str
    size_bytes: int
    names: list[str] | None = None
    pause_ms: float | None = None
    waited_ms: float | None = None
    lost: dict[str, int] | None = None


class LogsResponse(Body, frozen=True):
    """The guest's console; what else there is in the way of logs; what SandboxInfo has as `warning`."""

    logs: str
    serial_logs: str | None = None
    process_logs: str | None = None
    warning: str | None = None
