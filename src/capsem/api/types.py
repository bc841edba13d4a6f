"""What travels between clients and the service: every request and every answer, once.

Requests are lenient where the contract is: unknown keys are ignored, an optional key may be null. They are strict
about types and names; what is wrong raises InvalidInput while decoding (see codec.py). In answers an optional key
that has nothing to say is left out, never null. Sizes are in MiB (`*_mb`) or bytes (`*_bytes`), times in seconds.
"""

from __future__ import annotations

from typing import Annotated, Any

import msgspec

from capsem.model.errors import InvalidInput, PayloadTooLarge
from capsem.model.ids import NAME_PATTERN, check_name
from capsem.model.lifecycle import Status
from capsem.model.policy import Policy
from capsem.model.spec import CPUS, DEFAULT_DISK_MB, DISK_MB, ENV_KEY_BYTES, ENV_VARS, RAM_MB, check_env
from capsem.wire.environment import BLOCKED_ENV

FORKS = 64  # at once
CONTENT_LIMIT = 512 * 1024  # bytes of text in one file call
LONGEST_TIMEOUT = 10 * 365 * 86400  # beyond this a number of seconds is a mistake

_POSITIVE = msgspec.Meta(gt=0, le=LONGEST_TIMEOUT)
Seconds = Annotated[int, _POSITIVE] | Annotated[float, _POSITIVE]


def _said(**schema: object) -> msgspec.Meta:
    """What the OpenAPI document tells of a field, and code that finds better words for a mistake checks."""
    return msgspec.Meta(extra_json_schema=schema)


Name = Annotated[str, _said(pattern=f"^{NAME_PATTERN}$")]
Text = Annotated[str, _said(pattern=r"^[^\u0000]*$")]
Cpus = Annotated[int, _said(minimum=CPUS.start, maximum=CPUS.stop - 1)]
RamMb = Annotated[int, _said(minimum=RAM_MB.start, maximum=RAM_MB.stop - 1)]
DiskMb = Annotated[int, _said(minimum=DISK_MB.start, maximum=DISK_MB.stop - 1)]
Env = Annotated[
    dict[str, Text],
    _said(
        maxProperties=ENV_VARS,
        propertyNames={"pattern": r"^[^=\u0000]+$", "maxLength": ENV_KEY_BYTES, "not": {"enum": sorted(BLOCKED_ENV)}},
    ),
]


class Body(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A JSON object. A field without a default is always there."""


def _no_nul(key: str, text: str) -> None:
    if "\0" in text:
        raise InvalidInput(f"{key}: holds a NUL character", hint="remove it")


# -- requests


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


class Offsets(Body, frozen=True):
    """How much of a command's output a client has already."""

    stdout: Annotated[int, msgspec.Meta(ge=0)] = 0
    stderr: Annotated[int, msgspec.Meta(ge=0)] = 0


class Terminal(Body, frozen=True):
    """A terminal of so many characters."""

    rows: Annotated[int, msgspec.Meta(ge=1, le=0xFFFF)] = 24
    columns: Annotated[int, msgspec.Meta(ge=1, le=0xFFFF)] = 80


class ExecRequest(Body, frozen=True):
    """Run `command` with `bash -c`; no time limit unless one is given.

    `env` comes on top of the VM's own, `cwd` is /root unless given, `job` is the id under which the run can be found
    again (one is made up unless given). With `offsets` nothing is started: the output of the run `job` is followed
    from there, by a client whose connection broke; such a request can `keep` the command when its client hangs up.
    Without `wait` nobody waits for the command's end: a new one runs in the background, with `stdin` open for
    `feed_job`; of one that is followed comes what there is.

    With a `terminal` the command runs on one of its own, all it shows is its standard output, and it goes on when its
    client hangs up; who follows it again with `terminal` and `offsets` has its keyboard too. For streams alone.
    """

    command: Text | None = None
    timeout_secs: Seconds | None = None
    env: Env | None = None
    cwd: Text | None = None
    job: Name | None = None
    offsets: Offsets | None = None
    wait: bool = True
    keep: bool = False
    stdin: bool = False
    terminal: Terminal | None = None

    def __post_init__(self) -> None:
        if self.terminal is not None and (self.timeout_secs is not None or not self.wait):
            raise InvalidInput(
                "a terminal has no time limit, and is not for the background", hint="leave one of them out"
            )
        if (self.offsets is None) != (self.command is not None) or (self.offsets is not None and self.job is None):
            raise InvalidInput(
                "missing required field `command`",
                hint="give a command to run, or a job and the offsets to follow it from",
            )
        _no_nul("command", self.command or "")
        _no_nul("cwd", self.cwd or "")
        check_env(self.env or {})
        if self.job is not None:
            check_name(self.job)
        if self.offsets is None and self.keep:
            raise InvalidInput("`keep` is for following a job", hint="give its id and offsets")
        if self.stdin and (self.wait or self.offsets is not None):
            raise InvalidInput(
                "`stdin` is for a new command in the background", hint='add "wait": false, or stream its input'
            )


class ForwardRequest(Body, frozen=True):
    """Connect to a TCP port in a VM."""

    port: Annotated[int, msgspec.Meta(ge=1, le=65535)]


class KillJobRequest(Body, frozen=True):
    """Send a signal, SIGKILL unless given, to all processes of the command `job`."""

    job: Name
    signal: Annotated[int, msgspec.Meta(ge=1, le=64)] = 9

    def __post_init__(self) -> None:
        check_name(self.job)


class RunRequest(Body, frozen=True):
    """Run `command` in a VM made for it and destroyed after it; `profile` names the image, `default` unless given; `cold`:
    boot it.
    """

    command: Text
    timeout_secs: Seconds | None = None
    ram_mb: RamMb | None = None
    cpus: Cpus | None = None
    disk_mb: DiskMb = DEFAULT_DISK_MB
    env: Env | None = None
    profile: Name | None = None
    cold: bool = False

    def __post_init__(self) -> None:
        _no_nul("command", self.command)
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
    `checkpoint` (an id, or its first digits): of that instant instead of the present.
    """

    name: Name
    description: str | None = None
    live: bool = False
    count: Annotated[int, msgspec.Meta(ge=1, le=FORKS)] = 1
    checkpoint: str | None = None

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


class WriteFileRequest(Body, frozen=True):
    """Replace the content of a text file in the guest."""

    path: str
    content: str

    def __post_init__(self) -> None:
        # Counting the bytes needs a second copy; the number of characters often settles it.
        if len(self.content) > CONTENT_LIMIT or len(self.content.encode()) > CONTENT_LIMIT:
            raise PayloadTooLarge(
                "content: too long for one call", hint=f"at most {CONTENT_LIMIT >> 10} KiB; send it in parts"
            )


class ReadFileRequest(Body, frozen=True):
    """Read a text file in the guest."""

    path: str


# -- queries


class ListFilesQuery(Body, frozen=True):
    """Which directory of the workspace, and how many levels of it; more than 6 count as 6."""

    path: str = ""
    depth: Annotated[int, msgspec.Meta(ge=1)] = 1


class GetFileQuery(Body, frozen=True):
    """Which file of the workspace; `whole`: without the limit of 10 MiB."""

    path: str
    whole: bool = False


class PutFileQuery(Body, frozen=True):
    """Which file of the workspace, and its mode, three octal digits."""

    path: str
    mode: Annotated[str, msgspec.Meta(pattern=r"^[0-7]{3}\Z")] = "644"


class FeedJobQuery(Body, frozen=True):
    """Which command takes the body as its standard input; `end`: it is the end of that."""

    job: Name
    end: bool = False

    def __post_init__(self) -> None:
        check_name(self.job)


class ExportQuery(Body, frozen=True):
    """Which checkpoint: its id, or its first digits."""

    checkpoint: str


class ImportQuery(Body, frozen=True):
    """What the new VM is called; `trust`: its memory is taken too, as something that its maker could break out with."""

    name: Name
    trust: bool = False

    def __post_init__(self) -> None:
        check_name(self.name)


# -- answers


class SuccessResponse(Body, frozen=True):
    """It is done."""

    success: bool


class VersionResponse(Body, frozen=True):
    """The version of the service."""

    version: str


class OpenApiDocument(Body, frozen=True):
    """An OpenAPI document of this revision; every operation of the service is in it."""

    openapi: str
    info: dict[str, str]
    paths: dict[str, dict[str, Any]]
    components: dict[str, dict[str, Any]]


class ErrorBody(Body, frozen=True):
    """What an answer with an error's status holds: `error` is `message` with the `hint`; `code` is stable. `retry_after` is
    in seconds, `job` a command that may go on."""

    error: str
    code: str
    message: str
    hint: str | None = None
    retry_after: float | None = None
    job: str | None = None


class ProvisionResponse(Body, frozen=True):
    """A VM that runs; `uds_path` is its control socket, a path that no client may compute itself.

    `boot_kind` is cold, warm, forked, template or cold-after-failure, `boot_note` why it was not what could be expected. It
    waited `waited_ms` until its turn came, because of what happened to other VMs.
    """

    id: str
    uds_path: str
    boot_kind: str | None = None
    boot_note: str | None = None
    waited_ms: float | None = None


class SandboxInfo(Body, frozen=True):
    """One VM. `pid` is its supervisor's, 0 when it does not run; `name` only for a persistent VM.

    `last_error` says why it is Defunct; `reason`, in any other status, how its last run ended, or what is wrong with
    the present one; `warning` tells what keeps a running VM from getting on, such as a full disk of the host, or that
    there may be no room to suspend it. `waiting`: what it waits for to begin, while others of this host are being
    started, stopped, saved or resumed.

    `started_from` says how its last run began: template, checkpoint, or disk.

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


class AssetHealth(Body, frozen=True):
    """Whether there is an image to boot, its version, and what is missing."""

    ready: bool
    missing: list[str]
    version: str | None = None


class ListResponse(Body, frozen=True):
    """Every VM: those that run, and the persistent ones that do not."""

    sandboxes: list[SandboxInfo]
    asset_health: AssetHealth


class VmUsage(Body, frozen=True):
    """What a VM takes: layers that it and its checkpoints alone name, layers that others name too, its session directory,
    the memory of its checkpoints, and what is being made of one for it."""

    id: str
    own_bytes: int
    shared_bytes: int
    session_bytes: int
    memory_bytes: int = 0
    draft_bytes: int = 0


class CheckpointUsage(Body, frozen=True):
    """What a checkpoint takes: its memory, layers that nothing else names, and layers that something else names too."""

    id: str
    vm: str
    kind: str
    memory_bytes: int
    own_bytes: int
    shared_bytes: int
    hidden: bool = False


class ImageUsage(Body, frozen=True):
    """What an image takes, and the VMs that were made from it."""

    name: str
    digest: str
    size_bytes: int
    vms: list[str]


class UsageResponse(Body, frozen=True):
    """Disk space, holes not counted. A layer counts once in `layers_bytes`, however many VMs name it.

    `unreferenced_bytes` are layers that nothing names; `failed_bytes` the kept logs of ephemeral VMs that failed;
    `checkpoints` are all, hidden ones too, `memory_bytes` their RAM; `draft_bytes` checkpoints and layers in the making;
    `total_bytes` is all of it, with everything else in the run directory's store, and `free_bytes` are left.
    """

    vms: list[VmUsage]
    images: list[ImageUsage]
    layers_bytes: int
    unreferenced_bytes: int
    failed_bytes: int
    total_bytes: int
    checkpoints: list[CheckpointUsage] = []
    memory_bytes: int = 0
    draft_bytes: int = 0
    free_bytes: int = 0


class ExecResponse(Body, frozen=True):
    """How a command ended. Bytes that are no UTF-8 are replaced. `truncated`: output beyond the cap was dropped.

    `running`: it has not ended, and the exit code means nothing. `signal` is the one that ended it.
    """

    stdout: str
    stderr: str
    exit_code: int
    truncated: bool = False
    job: str | None = None
    running: bool = False
    signal: int | None = None


class ExecResult(Body, frozen=True):
    """The end of an exec stream: ExecResponse without the output, which came before it."""

    exit_code: int
    truncated: bool = False
    job: str | None = None
    running: bool = False
    signal: int | None = None


class ForwardResult(Body, frozen=True):
    """The end of a forward stream: nothing more will come from the port."""

    success: bool


class ReadFileResponse(Body, frozen=True):
    """The text of a file."""

    content: str


class FileEntry(Body, frozen=True):
    """A file or directory of the workspace; `path` is relative to that. Only directories have `children`, as deep as
    was asked for.
    """

    name: str
    path: str
    type: str
    size: int
    mtime: int
    mime: str | None = None
    is_text: bool | None = None
    children: list[FileEntry] | None = None


class FilesResponse(Body, frozen=True):
    """What is in a directory. `truncated`: there was more than is listed."""

    entries: list[FileEntry]
    truncated: bool = False


class FileContent(Body, frozen=True):
    """Not JSON: the answer is the file's bytes."""


class FileWrittenResponse(Body, frozen=True):
    """The file is durable in the guest's file system."""

    success: bool
    size: int


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

    Of a live fork of a running VM, `pause_ms` is how long that stood still. `waited_ms`: see ProvisionResponse.
    """

    name: str
    size_bytes: int
    names: list[str] | None = None
    pause_ms: float | None = None
    waited_ms: float | None = None


class JobInfo(Body, frozen=True):
    """One command; `command` is how it begins. One that has ended has an exit code, or the error that ended it."""

    id: str
    command: str
    running: bool
    exit_code: int | None = None
    error: str | None = None


class JobsResponse(Body, frozen=True):
    """Commands of a running VM by id, oldest first, those of them that still run, and what is known of each."""

    jobs: list[str]
    running: list[str]
    details: list[JobInfo] = []


class KillJobResponse(Body, frozen=True):
    """`running`: the command had not ended, and gets the signal; its end is told to those who follow it."""

    success: bool
    running: bool


class FeedJobResponse(Body, frozen=True):
    """So many bytes are on their way to the command; one that does not read lets the request wait."""

    success: bool
    size: int


class LogsResponse(Body, frozen=True):
    """The guest's console; what else there is in the way of logs; what SandboxInfo has as `warning`."""

    logs: str
    serial_logs: str | None = None
    process_logs: str | None = None
    warning: str | None = None
