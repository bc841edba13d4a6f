"""The protocol between service and supervisor: the wire's frames and streams, with these messages.

Bootstrap: the service starts `capsem-process --id ID --session-dir DIR` and writes one `Bootstrap` (JSON) to its
standard input. The supervisor answers with one line on its standard output when its socket is bound (`BOUND`), or ends
with an error in its log. From then on the service, or one that comes after it, speaks over the socket:

1. Both ends send `Hello`. A supervisor also sends `State`, at once and whenever it changes.
2. The service opens streams: a command (`Exec`, `Start`), what becomes of it (`Attach`, `Feed`, `Kill`), a file
   (`ReadFile`, `WriteFile`), the end (`Stop`). Streams are independent and may be opened at any time; what the state
   does not allow is refused.
3. A stream that the service resets is given up: its command is killed. A connection that is lost is not: commands go
   on, and what they write is kept for an `Attach`, as far as `RETAINED` goes.
4. When the VM has been suspended, every stream of a command ends with `Failed`: interrupted, with the job's id. The
   supervisor of the resumed machine knows the job again.

`PROTOCOL` counts up with every change that an older peer would misunderstand. A service speaks to supervisors of N and
N-1, and of N+1 in its own words, which those understand: so VMs go on through an upgrade and through the way back.
A VM of any other is listed with the reason, and can be stopped, by signal. A request that a peer does not know is
refused on its stream (`Unsupported`), and the connection goes on.
"""

from __future__ import annotations

from capsem.api.network_messages import NETWORK_MESSAGES, NETWORK_REQUESTS
from capsem.api.secret_messages import SECRET_MESSAGES, SECRET_REQUESTS
from capsem.wire.messages import (
    DirListed,
    Exec,
    Exited,
    Failed,
    FileFound,
    FileRead,
    FileWritten,
    Forward,
    Forwarded,
    ListDir,
    ReadFile,
    Resize,
    Signal,
    Terminal,
    WriteFile,
)
from capsem.wire.schema import Message

PROTOCOL = 2  # since 2, data frames may be as long as the wire's largest_data says
OLDEST_PROTOCOL = 1
BOUND = b"bound\n"
RETAINED = 10 * 1024 * 1024  # bytes kept of each output of a command


def speaks(protocol: int) -> bool:
    """Whether this end and a peer of `protocol` understand each other."""
    return OLDEST_PROTOCOL <= protocol <= PROTOCOL + 1


class Bootstrap(Message, tag="bootstrap"):
    """Everything a supervisor needs beside the VM's record. Paths are absolute.

    `vm_id` and `session_dir` are for a spare supervisor, which was started without knowing them. `restore`: from the
    record's checkpoint, whose memory is `ram_file`; `layer` is a new one to put on the volume's top before anything
    runs. `assets` are digests of what the machine boots from. `boot_kind` and `boot_note` are recorded. `ledger`:
    commands, files and traffic are recorded, too. `network`: the layers of its policy (egress.compose.Layers), but for its
    own. `secrets`: what it is lent (egress.grants). `gate`: the host-wide lock (store.gate) to wait for when the VM ends
    without the service having asked, "" where there is none. `trace`: what is done goes into this file, see TraceTo.
    `faults` is for tests, see capsem.faults.
    """

    protocol: int
    run_dir: str
    socket: str
    ready_file: str
    kernel: str
    initrd: str
    root: str
    volume: str
    ram_file: str
    kernel_command_line: str
    accelerator: str
    hypervisor: str
    vm_id: str = ""
    session_dir: str = ""
    assets: dict[str, str] = {}
    restore: bool = False
    layer: str | None = None
    boot_kind: str = "cold"
    boot_note: str | None = None
    parent_pid: int | None = None
    log_level: str = "info"
    ledger: bool = True
    network: str = ""
    secrets: str = ""
    gate: str = ""
    trace: str = ""
    faults: str | None = None


class Hello(Message, tag="hello"):
    """First word of both ends."""

    protocol: int
    version: str
    pid: int


class State(Message, tag="state"):
    """Where the VM is: `state` of model.lifecycle, and whether its guest may be spoken to now. `warning` is for people:
    what keeps a VM that runs from getting on. `lost_streams`: connections of the guest that its restore has ended.
    """

    state: str
    ready: bool
    vmm_pid: int = 0
    boot_kind: str | None = None
    reason: str | None = None
    warning: str | None = None
    lost_streams: int = 0


class ShutdownAsked(Message, tag="shutdown-asked"):
    """Somebody in the guest asked for the VM to be stopped or suspended: the service decides."""

    action: str


class Attach(Message, tag="attach"):
    """Follow a job of this VM from these offsets of its outputs; what is no longer kept is skipped and counted.

    With `stdin`, data is typed on its terminal; one that has none gets nothing.

    Without `wait` only as far as it has come. With `keep` the command goes on when the stream is given up.
    """

    job: str
    stdout: int = 0
    stderr: int = 0
    wait: bool = True
    keep: bool = False
    stdin: bool = False


class Start(Message, tag="start"):
    """Run a command as `Exec` does, with nobody to follow it. With `stdin` its input is open for `Feed`s."""

    job: str
    command: str
    env: dict[str, str] = {}
    cwd: str | None = None
    timeout: float | None = None
    stdin: bool = False


class JobStarted(Message, tag="started"):
    """Closes a Start stream: the guest has been asked, and whatever comes of it is the job's."""

    job: str


class Feed(Message, tag="feed"):
    """Hand a job the bytes on STDIN as its standard input; with `end` these are the last ones."""

    job: str
    end: bool = False


class Fed(Message, tag="fed"):
    """Closes a Feed stream: so many bytes are on their way to the command, which may have left the last few unread."""

    size: int


class Kill(Message, tag="kill"):
    """Send a signal to a job's process group, as soon as the guest can be spoken to."""

    job: str
    signal: int


class Killed(Message, tag="killed"):
    """Closes a Kill stream. `running`: there was something to send it to."""

    running: bool


class JobEnded(Message, tag="job-ended"):
    """Closes an Exec or Attach stream. `dropped`: bytes of output that were not kept. `running`: it has not ended."""

    job: str
    exit_code: int
    running: bool = False
    signal: int | None = None
    timed_out: bool = False
    duration: float = 0.0
    dropped: int = 0


class Jobs(Message, tag="jobs"):
    """Which commands run or ran in this VM?"""


class JobList(Message, tag="job-list"):
    """Closes a Jobs stream: the ids, oldest first, then those that still run, and those that somebody follows.

    By id: the (beginning of the) command, the exit codes of those that ended, and what else became of some. `idle`: for
    how many seconds no command ran and nobody followed one or moved files; None: that was not watched.
    """

    jobs: list[str]
    running: list[str]
    followed: list[str] = []
    commands: dict[str, str] = {}
    exit_codes: dict[str, float] = {}
    errors: dict[str, str] = {}
    idle: float | None = None


class SetPolicy(Message, tag="set-policy"):
    """The VM has another policy from here on: what is on, see model.policy."""

    policy: dict[str, float]


class PolicySet(Message, tag="policy-set"):
    """Closes a SetPolicy stream: it is in the record, durably."""


class Stop(Message, tag="stop"):
    """End the machine: power off with `grace` seconds for the guest's processes, or kill it at once if `kill`.

    `wait`: seconds for the gate, before anything is done; a service that asks has passed it. `discard`: the VM is to be
    deleted, so that nothing which is said about its end need outlive the host's.
    """

    grace: float = 2.0
    kill: bool = False
    wait: float = 0.0
    discard: bool = False


class Stopping(Message, tag="stopping"):
    """Closes a Stop stream: it is under way; the supervisor's exit is the end."""


class Persist(Message, tag="persist"):
    """Become persistent under another name while running: the session directory moves, the socket gets another path."""

    name: str
    session_dir: str
    socket: str
    ready_file: str


class Persisted(Message, tag="persisted"):
    """Closes a Persist stream: record and directory are durable under the new name, the new socket is bound."""


class Assign(Message, tag="assign"):
    """A VM of the pool is somebody's from here on: it gets a name, an environment, a policy, and one of what it may reach
    (`network` and `layers`, as in SetNetwork) and secrets (as in Bootstrap), and may be persistent.

    The session directory moves, the socket gets another path. `ledger`: commands and files are recorded from here on;
    `parent_pid` is what a supervisor is told in its Bootstrap otherwise: one of the pool follows its service.
    """

    name: str
    persistent: bool
    session_dir: str
    socket: str
    ready_file: str
    env: dict[str, str] = {}
    policy: dict[str, float] = {}
    network: str = ""
    layers: str = ""
    secrets: str = ""
    ledger: bool = True
    parent_pid: int | None = None


class Assigned(Message, tag="assigned"):
    """Closes an Assign stream: the guest has taken its new identity; record and directory are durable, as with Persist."""


class TraceTo(Message, tag="trace-to"):
    """Append what is done from here on to a file (capsem.tracing); "": to none."""

    file: str


class TraceGoes(Message, tag="trace-goes"):
    """Closes a TraceTo stream: it does."""


class FlushLedger(Message, tag="flush-ledger"):
    """Somebody is about to read the VM's ledger."""


class LedgerFlushed(Message, tag="ledger-flushed"):
    """Closes a FlushLedger stream: what had happened before is in the file."""


class AddLayer(Message, tag="add-layer"):
    """Freeze the volume's top layer for others to build on, and go on in the new, empty layer `layer`."""

    layer: str


class LayerAdded(Message, tag="layer-added"):
    """Closes an AddLayer stream. `quiesced`: the guest's file system was flushed and held still at that instant."""

    quiesced: bool
    pause: float


class ReplaceLayers(Message, tag="replace-layers"):
    """Name the layer `new` in the VM's record, in place of the frozen ones `old`, from which it was merged. The machine
    goes on reading those until it ends."""

    old: list[str]
    new: str


class LayersReplaced(Message, tag="layers-replaced"):
    """Closes a ReplaceLayers stream: the record says so, durably."""


class Save(Message, tag="save"):
    """Make a checkpoint of the machine, and let it go on (`go_on`), or end it: then the VM is suspended."""

    kind: str
    go_on: bool
    message: str | None = None


class CheckpointMade(Message, tag="checkpoint-made"):
    """Closes a Save stream: the checkpoint is durable. Without `go_on` the supervisor's exit follows.

    `pause` is how many seconds the vCPUs stood still, `written` how many bytes of RAM went to disk; `synced`, `frozen`:
    the guest had flushed its file systems and held its processes still. `streams`: connections that were under way, which
    whoever is restored from it has lost.
    """

    checkpoint: str
    pause: float
    written: int
    synced: bool
    frozen: bool = False
    streams: int = 0


# request -> what closes its stream
REQUESTS: dict[type[Message], type[Message]] = {
    Exec: JobEnded,
    Terminal: JobEnded,
    Forward: Forwarded,
    Attach: JobEnded,
    Start: JobStarted,
    Feed: Fed,
    Kill: Killed,
    Jobs: JobList,
    ReadFile: FileRead,
    WriteFile: FileWritten,
    ListDir: DirListed,
    Stop: Stopping,
    Persist: Persisted,
    Assign: Assigned,
    TraceTo: TraceGoes,
    AddLayer: LayerAdded,
    ReplaceLayers: LayersReplaced,
    SetPolicy: PolicySet,
    Save: CheckpointMade,
    FlushLedger: LedgerFlushed,
    **NETWORK_REQUESTS,
    **SECRET_REQUESTS,
}
_ALL: tuple[type[Message], ...] = (
    Hello,
    State,
    ShutdownAsked,
    Signal,
    Resize,
    FileFound,
    Failed,
    Exited,
    *NETWORK_MESSAGES,
    *SECRET_MESSAGES,
    *REQUESTS,
    *REQUESTS.values(),
)
MESSAGES: dict[str, type[Message]] = {cls.tag: cls for cls in _ALL}
