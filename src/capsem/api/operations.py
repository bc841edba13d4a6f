"""Every operation of the service, once: routes, clients, state checks and docs are derived from OPERATIONS.

An operation names its HTTP method and path, the types of its request, of its query and of its answer (by name, in
`api.types`: the command line reads this table and has no time to import msgspec), the errors that a caller should
expect, and the states of a VM in which it is legal. In any other state it is refused with `otherwise`; a VM that is
being deleted is gone for everyone, so there it is NotFound.

`retry_safe`: doing it twice is as good as once. `on_disconnect`: what becomes of it when the client hangs up; a
lifecycle transition is FINISHed, what somebody only waits for is ABANDONed. `answer_within` is how many seconds a
client should wait for the answer, None for as long as it takes. `body_limit` is in bytes.
"""

from __future__ import annotations

from enum import Enum
from types import MappingProxyType
from typing import TYPE_CHECKING, Final, NamedTuple

from capsem.api.stream import CONTENT_TYPE
from capsem.model.errors import (
    AlreadyExists,
    CapsemError,
    Corrupt,
    GuestFailed,
    HostNotReady,
    Interrupted,
    InvalidInput,
    LimitReached,
    MachineFailed,
    NotFound,
    NotRunning,
    PayloadTooLarge,
    PermissionDenied,
    QueryFailed,
    TimedOut,
    ToolFailed,
    Unavailable,
    WrongState,
)
from capsem.model.lifecycle import State

if TYPE_CHECKING:
    import msgspec

JSON_LIMIT: Final = 1024 * 1024
FILE_LIMIT: Final = 4 * 1024 * 1024  # 512 KiB of text, were every character escaped as \u00xx
ENV_LIMIT: Final = 12 * 1024 * 1024  # an environment, of which JSON may make six bytes for one

JSON: Final = "application/json"
BYTES: Final = "application/octet-stream"
TEXT: Final = "text/plain"

QUICK: Final = 30.0
FILE_CALL: Final = 120.0  # waiting for the guest to be ready, then the operation
TRANSITION: Final = 240.0  # waiting for its turn, one try, another try


class OnDisconnect(Enum):
    """What becomes of an operation whose client hangs up."""

    ABANDON = "abandon"
    FINISH = "finish"


ABANDON, FINISH = OnDisconnect.ABANDON, OnDisconnect.FINISH

_GONE: Final = frozenset({State.DELETING, State.DELETED})
_KNOWN: Final = frozenset(State) - _GONE
_AWAKE: Final = frozenset({State.STARTING, State.RUNNING, State.RESUMING})
_BUSY: Final = frozenset({State.STOPPING, State.SUSPENDING})
# A suspend that is under way is waited for, and then the VM is at rest; nobody says when one that stops will be.
_RESTABLE: Final = _KNOWN - {State.STOPPING}
_READABLE: Final = _KNOWN - _BUSY  # running, or with a volume that nobody writes to


class Operation(NamedTuple):
    """One row of the table; see the module."""

    name: str
    method: str
    path: str
    summary: str
    response: str
    request: str | None = None
    query: str | None = None
    errors: tuple[type[CapsemError], ...] = ()
    legal: frozenset[State] | None = None  # None: not about one VM
    otherwise: type[CapsemError] = NotRunning
    retry_safe: bool = False
    on_disconnect: OnDisconnect = ABANDON
    answer_within: float | None = QUICK
    body_limit: int = JSON_LIMIT
    takes: str = JSON  # the media type of the request's body
    gives: str = JSON  # and of the answer's

    @property
    def takes_name(self) -> bool:
        """Whether the path holds a name of something other than a VM."""
        return "{name}" in self.path

    @property
    def takes_id(self) -> bool:
        """Whether the path holds a VM's id."""
        return "{id}" in self.path

    def request_type(self) -> type[msgspec.Struct] | None:
        """The type of the request's body, None if it has none."""
        return None if self.request is None else _type(self.request)

    def query_type(self) -> type[msgspec.Struct] | None:
        """The type of what the query may hold, None if that is nothing."""
        return None if self.query is None else _type(self.query)

    def response_type(self) -> type[msgspec.Struct]:
        """The type of the answer; of some it is a list."""
        return _type(self.response)

    def refusal(self, state: State) -> type[CapsemError] | None:
        """The error that answers this operation in `state`; None if it is legal there."""
        if self.legal is None or state in self.legal:
            return None
        return NotFound if state in _GONE else self.otherwise

    def require(self, state: State, vm_id: str) -> None:
        """Check that the VM may be asked for this in `state`. Raises what `refusal` says, with a hint."""
        refusal = self.refusal(state)
        if refusal is None:
            return
        if refusal is NotFound:
            raise unknown_vm(vm_id)
        if refusal is NotRunning:
            raise NotRunning(f"{vm_id} is not running", hint=f"capsem resume {vm_id}")
        if refusal is WrongState:  # for what could be done of a VM that does not run, but is not
            what = "its files can be written while it runs, and read also when it has stopped"
            raise WrongState(f"{vm_id} is {state}: {what}", hint=f"capsem resume {vm_id}")
        raise refusal(f"{vm_id} is {state}: cannot {self.name} it now", hint="try again in a moment")


def unknown_vm(vm_id: str) -> NotFound:
    """The error for an id that no VM has."""
    return NotFound(f"no VM is called {vm_id}", hint="capsem list shows those there are")


def _type(name: str) -> type[msgspec.Struct]:
    from capsem.api import checkpoint_types, host_types, ledger_types, types

    for module in (types, checkpoint_types, host_types, ledger_types):
        if name in vars(module):
            found: type[msgspec.Struct] = vars(module)[name]
            return found
    raise LookupError(name)


_BOOT: Final = (LimitReached, HostNotReady, MachineFailed, Corrupt, Unavailable)
_GUEST: Final = (NotFound, NotRunning, GuestFailed, Interrupted, TimedOut)

_TABLE: Final = (
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
        "provision",
        "POST",
        "/provision",
        "create a VM and boot it",
        "ProvisionResponse",
        request="ProvisionRequest",
        errors=(InvalidInput, AlreadyExists, NotFound, *_BOOT),
        on_disconnect=FINISH,
        answer_within=TRANSITION,
        body_limit=ENV_LIMIT,
    ),
    Operation("list", "GET", "/list", "every VM", "ListResponse", retry_safe=True),
    Operation("df", "GET", "/df", "what VMs and images take on disk", "UsageResponse", retry_safe=True),
    Operation(
        "info",
        "GET",
        "/info/{id}",
        "one VM",
        "SandboxInfo",
        errors=(InvalidInput, NotFound),
        legal=_KNOWN,
        otherwise=NotFound,
        retry_safe=True,
    ),
    Operation(
        "exec_stream",
        "POST",
        "/exec/{id}/stream",
        "run a command in a VM; its input and output are streamed both ways",
        "ExecResult",
        request="ExecRequest",
        takes=CONTENT_TYPE,
        gives=CONTENT_TYPE,
        errors=(InvalidInput, *_GUEST),
        legal=_AWAKE,
        answer_within=None,
    ),
    Operation(
        "forward",
        "POST",
        "/forward/{id}",
        "a connection to a TCP port in a VM: what is sent is standard input of the stream, what comes its output",
        "ForwardResult",
        request="ForwardRequest",
        takes=CONTENT_TYPE,
        gives=CONTENT_TYPE,
        errors=(InvalidInput, *_GUEST),
        legal=_AWAKE,
        answer_within=None,
    ),
    Operation(
        "exec",
        "POST",
        "/exec/{id}",
        "run a command in a VM and wait for its end",
        "ExecResponse",
        request="ExecRequest",
        errors=(InvalidInput, *_GUEST),
        legal=_AWAKE,
        answer_within=None,
    ),
    Operation(
        "write_file",
        "POST",
        "/write_file/{id}",
        "write a text file in a VM",
        "SuccessResponse",
        request="WriteFileRequest",
        errors=(InvalidInput, PayloadTooLarge, *_GUEST),
        legal=_AWAKE,
        retry_safe=True,
        answer_within=FILE_CALL,
        body_limit=FILE_LIMIT,
    ),
    Operation(
        "read_file",
        "POST",
        "/read_file/{id}",
        "read a text file in a VM",
        "ReadFileResponse",
        request="ReadFileRequest",
        errors=(InvalidInput, PayloadTooLarge, *_GUEST),
        legal=_READABLE,
        retry_safe=True,
        answer_within=FILE_CALL,
    ),
    Operation(
        "list_files",
        "GET",
        "/files/{id}",
        "what is in the directory `?path=` of a VM's workspace, `?depth=` levels of it, 1 to 6",
        "FilesResponse",
        query="ListFilesQuery",
        errors=(InvalidInput, PermissionDenied, WrongState, *_GUEST),
        legal=_READABLE,
        otherwise=WrongState,
        retry_safe=True,
        answer_within=FILE_CALL,
    ),
    Operation(
        "get_file",
        "GET",
        "/files/{id}/content",
        "the bytes of the file `?path=` in a VM's workspace",
        "FileContent",
        query="GetFileQuery",
        gives=BYTES,
        errors=(InvalidInput, PermissionDenied, PayloadTooLarge, WrongState, *_GUEST),
        legal=_READABLE,
        otherwise=WrongState,
        retry_safe=True,
        answer_within=None,
    ),
    Operation(
        "put_file",
        "POST",
        "/files/{id}/content",
        "write the file `?path=` in a VM's workspace from the bytes of the body, however many",
        "FileWrittenResponse",
        query="PutFileQuery",
        takes=BYTES,
        errors=(InvalidInput, PermissionDenied, WrongState, *_GUEST),
        legal=_AWAKE,
        otherwise=WrongState,
        retry_safe=True,
        answer_within=None,
    ),
    Operation(
        "stop",
        "POST",
        "/stop/{id}",
        "power a VM off; one that is not persistent is destroyed",
        "StopResponse",
        errors=(InvalidInput, NotFound, NotRunning, MachineFailed, Unavailable),
        # A VM that is stopping by itself is waited for: the caller wants it stopped, and that is what it gets.
        legal=_AWAKE | {State.STOPPING},
        on_disconnect=FINISH,
        answer_within=TRANSITION,
    ),
    Operation(
        "resume",
        "POST",
        "/resume/{id}",
        "start a VM that does not run, a suspended one from its memory; one that runs is left alone",
        "ProvisionResponse",
        request="ResumeRequest",
        errors=(InvalidInput, NotFound, WrongState, *_BOOT),
        legal=_RESTABLE,
        otherwise=Unavailable,
        retry_safe=True,
        on_disconnect=FINISH,
        answer_within=TRANSITION,
    ),
    Operation(
        "suspend",
        "POST",
        "/suspend/{id}",
        "save a running VM, memory and all, and end its processes",
        "SuspendResponse",
        errors=(InvalidInput, *_GUEST, MachineFailed, Unavailable, WrongState),
        legal=_AWAKE,
        on_disconnect=FINISH,
        answer_within=TRANSITION,
    ),
    Operation(
        "checkpoint",
        "POST",
        "/checkpoint/{id}",
        "make a checkpoint of a VM that goes on running",
        "CheckpointResponse",
        request="CheckpointRequest",
        errors=(InvalidInput, *_GUEST, MachineFailed, Unavailable, WrongState),
        legal=_AWAKE,
        on_disconnect=FINISH,
        answer_within=TRANSITION,
    ),
    Operation(
        "checkpoints",
        "GET",
        "/checkpoints/{id}",
        "the checkpoints of a VM",
        "CheckpointsResponse",
        errors=(InvalidInput, NotFound),
        legal=_KNOWN,
        otherwise=NotFound,
        retry_safe=True,
    ),
    Operation(
        "remove_checkpoint",
        "POST",
        "/checkpoints/{id}/remove",
        "remove a checkpoint of a VM; what others share with it stays",
        "SuccessResponse",
        request="OneCheckpointRequest",
        errors=(InvalidInput, NotFound, WrongState),
        legal=_KNOWN,
        otherwise=NotFound,
        on_disconnect=FINISH,
    ),
    Operation(
        "verify_checkpoint",
        "POST",
        "/checkpoints/{id}/verify",
        "read all of a checkpoint and hold it against its checksums",
        "SuccessResponse",
        request="OneCheckpointRequest",
        errors=(InvalidInput, NotFound, Corrupt),
        legal=_KNOWN,
        otherwise=NotFound,
        retry_safe=True,
        answer_within=None,
    ),
    Operation(
        "export_checkpoint",
        "GET",
        "/checkpoints/{id}/export",
        "the checkpoint `?checkpoint=` of a VM as one file, to be imported elsewhere",
        "CheckpointContent",
        query="ExportQuery",
        gives=BYTES,
        errors=(InvalidInput, NotFound, Corrupt),
        legal=_KNOWN,
        otherwise=NotFound,
        retry_safe=True,
        answer_within=None,
    ),
    Operation(
        "import_checkpoint",
        "POST",
        "/import",
        "make the VM `?name=` of an exported checkpoint, the body; with `?trust=1` of its memory too",
        "ImportResponse",
        query="ImportQuery",
        takes=BYTES,
        errors=(InvalidInput, AlreadyExists, NotFound, Corrupt, WrongState, MachineFailed, HostNotReady),
        answer_within=None,
    ),
    Operation(
        "rollback",
        "POST",
        "/rollback/{id}",
        "take a VM back to a checkpoint; its present is kept as another one",
        "RollbackResponse",
        request="RollbackRequest",
        errors=(InvalidInput, *_GUEST, Corrupt, HostNotReady, LimitReached, MachineFailed, Unavailable, WrongState),
        legal=_RESTABLE,
        otherwise=Unavailable,
        on_disconnect=FINISH,
        answer_within=TRANSITION,
    ),
    Operation(
        "policy",
        "POST",
        "/policy/{id}",
        "change what becomes of a VM as time goes by: suspended when idle, stopped, saved",
        "VmPolicy",
        request="VmPolicy",
        errors=(InvalidInput, NotFound, TimedOut, Unavailable),
        legal=_RESTABLE,
        otherwise=Unavailable,
        retry_safe=True,
        on_disconnect=FINISH,
        answer_within=TRANSITION,
    ),
    Operation(
        "delete",
        "DELETE",
        "/delete/{id}",
        "destroy a VM and all its data",
        "SuccessResponse",
        errors=(InvalidInput, NotFound, Unavailable),
        legal=frozenset(State) - {State.DELETED},
        otherwise=NotFound,
        on_disconnect=FINISH,
        answer_within=TRANSITION,
    ),
    Operation(
        "run",
        "POST",
        "/run",
        "run a command in a VM made for it and destroyed after it",
        "ExecResponse",
        request="RunRequest",
        errors=(InvalidInput, GuestFailed, Interrupted, TimedOut, *_BOOT),
        answer_within=None,
        body_limit=ENV_LIMIT,
    ),
    Operation(
        "persist",
        "POST",
        "/persist/{id}",
        "keep a running ephemeral VM under a name",
        "PersistResponse",
        request="PersistRequest",
        errors=(InvalidInput, AlreadyExists, *_GUEST),
        legal=_AWAKE,
        on_disconnect=FINISH,
        answer_within=TRANSITION,
    ),
    Operation(
        "purge",
        "POST",
        "/purge",
        "delete all ephemeral VMs, or all VMs",
        "PurgeResponse",
        request="PurgeRequest",
        errors=(InvalidInput, Unavailable),
        on_disconnect=FINISH,
        answer_within=TRANSITION,
    ),
    Operation(
        "fork",
        "POST",
        "/fork/{id}",
        "make a stopped VM on a copy of this one's disk, or live ones with a copy of its memory too",
        "ForkResponse",
        request="ForkRequest",
        errors=(InvalidInput, *_GUEST, AlreadyExists, WrongState, *_BOOT),
        legal=_RESTABLE,
        otherwise=Unavailable,
        on_disconnect=FINISH,
        answer_within=TRANSITION,
    ),
    Operation(
        "jobs",
        "GET",
        "/jobs/{id}",
        "the commands of a running VM",
        "JobsResponse",
        errors=(InvalidInput, NotFound, NotRunning),
        legal=_AWAKE,
        retry_safe=True,
    ),
    Operation(
        "kill_job",
        "POST",
        "/jobs/{id}/kill",
        "send a signal to a command of a running VM",
        "KillJobResponse",
        request="KillJobRequest",
        errors=(InvalidInput, WrongState, *_GUEST),
        legal=_AWAKE,
        answer_within=FILE_CALL,
    ),
    Operation(
        "feed_job",
        "POST",
        "/jobs/{id}/input",
        "hand the body to the command `?job=`, which was started with `stdin`, as its standard input",
        "FeedJobResponse",
        query="FeedJobQuery",
        takes=BYTES,
        errors=(InvalidInput, WrongState, *_GUEST),
        legal=_AWAKE,
        answer_within=None,
    ),
    Operation(
        "logs",
        "GET",
        "/logs/{id}",
        "the console and the logs of a VM, running or not",
        "LogsResponse",
        errors=(InvalidInput, NotFound),
        # A VM that crashed and was swept away still has logs; the service looks for them before it says NotFound.
        legal=_KNOWN,
        otherwise=NotFound,
        retry_safe=True,
    ),
    Operation(
        "inspect",
        "POST",
        "/inspect/{id}",
        "one SELECT on the ledger of a running VM, or as `_main` on the index of all VMs",
        "InspectResponse",
        request="InspectRequest",
        errors=(InvalidInput, NotFound, NotRunning, QueryFailed, TimedOut, Corrupt),
        legal=_AWAKE,
        retry_safe=True,
    ),
    Operation(
        "timeline",
        "GET",
        "/timeline/{id}",
        "what happened in a VM, of all kinds",
        "TimelineResponse",
        query="TimelineQuery",
        errors=(InvalidInput, NotFound, TimedOut, Corrupt),
        legal=_KNOWN,
        otherwise=NotFound,
        retry_safe=True,
    ),
    Operation(
        "history",
        "GET",
        "/history/{id}",
        "the commands that were run in a VM",
        "HistoryResponse",
        query="HistoryQuery",
        errors=(InvalidInput, NotFound, TimedOut, Corrupt),
        legal=_KNOWN,
        otherwise=NotFound,
        retry_safe=True,
    ),
    Operation(
        "history_processes",
        "GET",
        "/history/{id}/processes",
        "the programs that were started for a VM's commands",
        "ProcessesResponse",
        errors=(InvalidInput, NotFound, TimedOut, Corrupt),
        legal=_KNOWN,
        otherwise=NotFound,
        retry_safe=True,
    ),
    Operation(
        "history_counts",
        "GET",
        "/history/{id}/counts",
        "how many commands and processes there are in a VM's history",
        "HistoryCountsResponse",
        errors=(InvalidInput, NotFound, TimedOut, Corrupt),
        legal=_KNOWN,
        otherwise=NotFound,
        retry_safe=True,
    ),
    Operation(
        "transcript",
        "GET",
        "/history/{id}/transcript",
        "what a VM's terminals showed",
        "TranscriptResponse",
        query="TranscriptQuery",
        errors=(InvalidInput, NotFound),
        legal=_KNOWN,
        otherwise=NotFound,
        retry_safe=True,
    ),
    Operation(
        "stats",
        "GET",
        "/stats",
        "sums over all VMs that there ever were",
        "StatsResponse",
        errors=(TimedOut, Corrupt),
        retry_safe=True,
    ),
    Operation(
        "triage",
        "GET",
        "/triage",
        "what went wrong lately on this host, and in a VM, with what to look at first",
        "TriageResponse",
        query="TriageQuery",
        errors=(InvalidInput, NotFound, TimedOut, Corrupt),
        retry_safe=True,
    ),
    Operation(
        "panics",
        "GET",
        "/panics",
        "what nobody expected: exceptions of Capsem's programs, guests whose kernels gave up",
        "PanicsResponse",
        query="PanicsQuery",
        errors=(InvalidInput,),
        retry_safe=True,
    ),
    Operation(
        "host_logs",
        "GET",
        "/host-logs/{name}",
        "the end of a log of this host: service, mcp, gateway, tray or app",
        "LogText",
        query="HostLogsQuery",
        errors=(InvalidInput,),
        gives=TEXT,
        retry_safe=True,
    ),
    Operation(
        "service_logs",
        "GET",
        "/service-logs",
        "the end of the service's log, up to 100 KB, whole lines",
        "LogText",
        gives=TEXT,
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
    Operation("presets", "GET", "/settings/presets", "named sets of settings", "PresetsResponse", retry_safe=True),
    Operation(
        "use_preset",
        "POST",
        "/settings/presets/{name}",
        "store the settings of a preset",
        "SettingsResponse",
        errors=(InvalidInput, NotFound),
        retry_safe=True,
    ),
    Operation(
        "lint_settings",
        "POST",
        "/settings/lint",
        "whether settings could be stored",
        "LintResponse",
        request="SettingsRequest",
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
        "change the corporate settings: refused",
        "SuccessResponse",
        errors=(PermissionDenied,),
        retry_safe=True,
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

OPERATIONS: Final = MappingProxyType({operation.name: operation for operation in _TABLE})
