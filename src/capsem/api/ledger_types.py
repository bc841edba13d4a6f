"""What travels between clients and the service about what happened: ledgers, logs, what is wrong.

Lists that the contract describes key by key have every key in every row, null where there is nothing to say.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec

from capsem.api.types import Body, Name

MAIN_ID = "_main"  # in the place of a VM's id: the index of all VMs

_FAR = 1 << 53
Count = Annotated[int, msgspec.Meta(ge=0, le=_FAR)]
Limit = Annotated[int, msgspec.Meta(ge=1, le=_FAR)]


class InspectRequest(Body, frozen=True):
    """One SELECT on a VM's ledger (docs/ledger.md has the tables), or on the index of all VMs, id `_main`."""

    sql: str


class InspectResponse(Body, frozen=True):
    """Its rows, at most 10000; blobs are base64. `truncated`: there were more."""

    columns: list[str]
    rows: list[list[Any]]
    truncated: bool = False


class TimelineQuery(Body, frozen=True):
    """The newest `limit` events, at most 2000, of these `layers`: exec, mcp, net, fs, model unless given; lifecycle too
    when it is named. `since`: 30m, 1h, 7d, 300s, or an instant as RFC 3339 has it."""

    trace_id: str | None = None
    since: str | None = None
    limit: Limit = 200
    layers: str | None = None


class TimelineResponse(Body, frozen=True):
    """Events, oldest first."""

    columns: list[str]
    rows: list[list[Any]]


class HistoryQuery(Body, frozen=True):
    """Which commands: those that hold `search`, at most 2000 at once."""

    limit: Limit = 500
    offset: Count = 0
    search: str = ""
    layer: Literal["all", "exec", "audit"] = "all"


class HistoryCommand(Body, frozen=True):
    """A command (layer exec), or a process that was started for one (layer audit). `exit_code` is null while it runs, and
    when nobody learnt how it ended: `details` then has an `error`. Previews are the beginning of what was written."""

    timestamp: str
    layer: str
    command: str
    exit_code: int | None
    duration_ms: float | None
    stdout_preview: str | None
    stderr_preview: str | None
    details: dict[str, Any]


class HistoryResponse(Body, frozen=True):
    """Commands, newest first; `total` is how many match in all."""

    commands: list[HistoryCommand]
    total: int
    has_more: bool


class ProcessInfo(Body, frozen=True):
    """A program, and how often it was started for a command."""

    exe: str
    command_count: int
    first_seen: str
    last_seen: str


class ProcessesResponse(Body, frozen=True):
    """The programs that were started, the most frequent first."""

    processes: list[ProcessInfo]


class HistoryCountsResponse(Body, frozen=True):
    """How many commands, and how many processes that were started for them."""

    exec_count: int
    audit_count: int


class TranscriptQuery(Body, frozen=True):
    """Only the last lines, if so wanted."""

    tail_lines: Count | None = None


class TranscriptResponse(Body, frozen=True):
    """What the VM's terminals showed, base64, and how many bytes that are; of a long one the end."""

    content: str
    bytes: int


class Totals(Body, frozen=True):
    """Sums over all VMs that there ever were. The cost is in US dollars, of those calls of models whose price is known;
    `total_unpriced_calls` are the others."""

    total_sessions: int
    total_input_tokens: int
    total_output_tokens: int
    total_estimated_cost: float
    total_tool_calls: int
    total_mcp_calls: int
    total_file_events: int
    total_requests: int
    total_allowed: int
    total_denied: int
    total_model_calls: int = 0
    total_unpriced_calls: int = 0


class SessionStats(Body, frozen=True):
    """A VM of the index, with what it has done so far."""

    id: str
    status: str
    persistent: bool
    created_at: str
    ended_at: str | None
    exec_count: int
    total_file_events: int
    total_tool_calls: int
    total_mcp_calls: int
    total_requests: int
    total_input_tokens: int
    total_output_tokens: int
    total_estimated_cost: float
    total_unpriced_calls: int = 0


class ProviderStats(Body, frozen=True):
    """Whose models were called, and how often."""

    provider: str
    call_count: int
    input_tokens: int
    output_tokens: int
    estimated_cost: float


class ToolStats(Body, frozen=True):
    """A tool that models asked for, and how often."""

    tool_name: str
    call_count: int


class StatsResponse(Body, frozen=True):
    """Sums, the newest 100 VMs, the 20 providers and tools of most calls. Tools of MCP servers are not counted yet."""

    global_: Totals = msgspec.field(name="global")
    sessions: list[SessionStats]
    top_providers: list[ProviderStats]
    top_tools: list[ToolStats]
    top_mcp_tools: list[Any]


class HostLogsQuery(Body, frozen=True):
    """The last `max_bytes` of the log, at most 5 MiB; of those the lines that hold `grep`, whatever their case; of those
    the last `tail`."""

    grep: str = ""
    tail: Count | None = None
    max_bytes: Limit = 100 * 1024


class PanicsQuery(Body, frozen=True):
    """How far back, as for a timeline; at most 200."""

    since: str = "7d"
    limit: Limit = 20


class TriageQuery(Body, frozen=True):
    """How far back, as for a timeline; at most 200 of each kind. `id`: that VM, too."""

    since: str = "30m"
    limit: Limit = 20
    id: Name | None = None


class Finding(Body, frozen=True):
    """Something in a log. `source` is the file; `fingerprint`, `cause` and `hint` are there for what has been seen before."""

    timestamp: str
    source: str
    message: str
    target: str | None = None
    vm: str | None = None
    duration_ms: float | None = None
    exception: str | None = None
    fingerprint: str | None = None
    cause: str | None = None
    hint: str | None = None


class PanicsResponse(Body, frozen=True):
    """What nobody expected, newest first: exceptions of Capsem's own programs, and guests whose kernels gave up."""

    panics: list[Finding]


class HostTriage(Body, frozen=True):
    """What the logs hold, newest first; `slow_ops` took a second or longer."""

    panics: list[Finding]
    errors: list[Finding]
    slow_ops: list[Finding]


class FailedCommand(Body, frozen=True):
    """A command that did not end with 0."""

    timestamp: str
    command: str
    exit_code: int | None
    error: str | None
    stderr_preview: str | None


class SessionTriage(Body, frozen=True):
    """One VM: how it is, what its log says, which commands failed."""

    id: str
    status: str
    failed_commands: list[FailedCommand]
    errors: list[Finding]
    reason: str | None = None
    warning: str | None = None


class Suspect(Body, frozen=True):
    """A group of findings that are alike; the higher the score, the sooner it is worth a look."""

    score: int
    kind: str
    count: int
    summary: str
    fingerprint: str | None = None
    hint: str | None = None


class TriageResponse(Body, frozen=True):
    """What went wrong since then, and what to look at first."""

    since: str
    session_id: str | None
    host: HostTriage
    session: SessionTriage | None
    rank: list[Suspect]
