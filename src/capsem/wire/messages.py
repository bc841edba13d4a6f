"""Every message on the control channel, once; schema.py has what a message is.

Call order of an epoch (handshake.py holds both ends to it):

    guest  Ready           after the epoch's nonce
    host   BootConfig, SetEnv*, BootConfigDone
    guest  BootReady       from here on streams may be opened, and either end may send Ping

A stream is opened by a request, carries data on its channels, and is closed by the request's result or by `Failed`.
Which requests open streams, who may open them and what closes them is in `STREAMS`.
"""

from __future__ import annotations

from capsem.wire.frames import MAX_DATA, ONE_WRITE
from capsem.wire.schema import Message

PROTOCOL_VERSION = 2
# A host also speaks to agents of the version before: a VM stays with the image that it was made of, and a restored one
# with the agent that its memory holds.
OLDEST_PROTOCOL = 1

STDIN, STDOUT, STDERR = 0, 1, 2  # channels of a stream; file contents travel on STDIN towards and STDOUT from the guest


def largest_data(protocol: int) -> int:
    """How many bytes of data in a frame a peer of `protocol` takes."""
    return MAX_DATA if protocol >= 2 else ONE_WRITE


class Ready(Message, tag="ready"):
    """Guest: the agent runs. `epoch`: the last one completed, 0 after a cold boot. `restarts`: how often the agent died."""

    protocol: int
    agent: str
    boot_id: str
    epoch: int = 0
    restarts: int = 0


class BootConfig(Message, tag="boot-config"):
    """Host: who this VM is and what time it is. `next_nonce` (hex) begins the epoch after this one.

    `resumed`: the machine was restored from a checkpoint since the last epoch. Its agent then shows that it is well
    before it answers; `mark` is what the last `Sync` before the checkpoint left in its memory and on its volume, None
    if that is not known. `entropy` (hex) is for the kernel's random generator. `machine_id` and `token` are this VM's
    and this boot's own; a fork gets others than its source.
    `network`: connections of programs are carried; `authority` (PEM): whose certificates they are shown then.
    """

    protocol: int
    vm_id: str
    hostname: str
    epoch: int
    time: float
    next_nonce: str
    timezone: str | None = None
    machine_id: str | None = None
    token: str | None = None
    resumed: bool = False
    mark: str | None = None
    entropy: str | None = None
    network: bool = False
    authority: str | None = None


class SetEnv(Message, tag="set-env"):
    """Host: one variable for every command. The set is complete at BootConfigDone and replaces the last epoch's."""

    name: str
    value: str


class BootConfigDone(Message, tag="boot-config-done"):
    """Host: that was all."""


class BootReady(Message, tag="boot-ready"):
    """Guest: identity, clock and environment are in place. Times in seconds since the kernel started. `written`: the files
    that the agent wrote for that, with their sizes.

    After a resume: `problems` say why the machine must not be used, `warnings` are what else its kernel complained of;
    `reseeded`: the kernel took the entropy; `held`: no process of a command ran before all that was in place.

    `captures`: this agent carries connections; `reset`: how many of the epoch before it has ended.
    """

    epoch: int
    clock_step: float
    timings: dict[str, float] = {}
    problems: list[str] = []
    warnings: list[str] = []
    reseeded: bool = False
    held: bool = False
    written: dict[str, float] = {}
    captures: bool = False
    reset: int = 0


class Ping(Message, tag="ping"):
    """Either end: are you there? The host's carries its time, in seconds since 1970, and the guest follows it."""

    id: int
    time: float | None = None


class Pong(Message, tag="pong"):
    """The answer to Ping."""

    id: int


class PowerOff(Message, tag="power-off"):
    """Host: end all processes (SIGTERM, then SIGKILL after `grace` seconds), flush, switch the machine off."""

    grace: float = 2.0


class ShutdownRequest(Message, tag="shutdown-request"):
    """Guest: somebody in the VM asked for it to be stopped."""


class SuspendRequest(Message, tag="suspend-request"):
    """Guest: somebody in the VM asked for it to be suspended."""


class Failed(Message, tag="failed"):
    """Closes a stream whose request could not be done. `code` is one of capsem.model.errors; `job` is what goes on."""

    code: str
    message: str
    hint: str | None = None
    job: str | None = None


class Exec(Message, tag="exec"):
    """Run `command` with bash. Data: STDIN in, STDOUT and STDERR out. `timeout` in seconds of guest time.

    `job` identifies the run: the same job is never started twice. With `told`, `Started` comes first on the stream.
    """

    job: str
    command: str
    env: dict[str, str] = {}
    cwd: str | None = None
    timeout: float | None = None
    stdin: bool = False
    told: bool = False


class Started(Message, tag="started"):
    """On an Exec or Terminal stream, from the guest: what was started. `argv` is without its last word, the command."""

    pid: int
    ppid: int
    uid: int
    exe: str
    argv: list[str]
    cwd: str


class Terminal(Message, tag="terminal"):
    """Run `command` with bash on a terminal of its own. Data: STDIN in, all that it shows out on STDOUT. `job` as of Exec.

    Its input stays open when an epoch takes the stream away: a Reattach goes on in both directions.
    """

    job: str
    command: str
    rows: int
    columns: int
    env: dict[str, str] = {}
    cwd: str | None = None
    told: bool = False


class Resize(Message, tag="resize"):
    """On a Terminal or Reattach stream, from the host: the terminal has another size, in characters."""

    rows: int
    columns: int


class Signal(Message, tag="signal"):
    """On an Exec or Reattach stream, from the host: send `number` to the command's whole process group."""

    number: int


class Exited(Message, tag="exited"):
    """Closes an Exec or Reattach stream. `exit_code` is the command's own; ended by `signal`, it is 1 as the contract has it."""

    exit_code: int
    signal: int | None = None
    timed_out: bool = False
    duration: float = 0.0


class Reattach(Message, tag="reattach"):
    """Go on with a command whose stream an epoch took away, from these offsets of its outputs; closed by Exited.

    Also for one that has ended meanwhile. `Reattached` says from where it really goes on; there is no input any more,
    unless it has a terminal.
    """

    job: str
    stdout: int = 0
    stderr: int = 0


class Reattached(Message, tag="reattached"):
    """On a Reattach stream, from the guest, before any data: the offsets of the first bytes; earlier ones are lost."""

    stdout: int
    stderr: int
    terminal: bool = False


class Forget(Message, tag="forget"):
    """All of a command that has ended has arrived: the guest need not keep it any longer."""

    job: str


class Forgotten(Message, tag="forgotten"):
    """Closes a Forget stream."""


class ReadFile(Message, tag="read-file"):
    """Read a regular file inside the workspace; its bytes come on STDOUT. More than `limit` bytes: refused.

    With `announce`, FileFound comes before the first byte, and exactly as many follow as it says, or Failed.
    """

    path: str
    limit: int | None = None
    announce: bool = False


class FileFound(Message, tag="file-found"):
    """On a ReadFile stream, from the guest: what the file is when it is opened."""

    size: int
    mode: int


class FileRead(Message, tag="file-read"):
    """Closes a ReadFile stream."""

    size: int
    mode: int


class WriteFile(Message, tag="write-file"):
    """Write a file inside the workspace from the bytes on STDIN; parents are made, old content stays until the end."""

    path: str
    mode: int = 0o644


class FileWritten(Message, tag="file-written"):
    """Closes a WriteFile stream: the file is durable in the guest's file system. `created`: there was none of that name."""

    size: int
    created: bool | None = None


class ListDir(Message, tag="list-dir"):
    """What is in a directory of the workspace, `depth` levels deep; JSON comes on STDOUT: a list of
    [path relative to the directory, "file" or "directory", size in bytes, mtime in seconds] in no certain order.
    Links and other special files are left out.
    """

    path: str
    depth: int = 1


class DirListed(Message, tag="dir-listed"):
    """Closes a ListDir stream. `truncated`: there were more entries than the agent lists."""

    entries: int
    truncated: bool = False


class Forward(Message, tag="forward"):
    """Connect to a TCP port of the guest's own. Data: STDIN to it, STDOUT from it, the end of each handed on."""

    port: int


class Forwarded(Message, tag="forwarded"):
    """Closes a Forward stream: nothing more will come from the port."""


class Egress(Message, tag="egress"):
    """Guest: a program has connected to `address` and `port`, or (`explicit`) to the proxy's port, which is then what they
    say. Data: STDOUT what the program sends, STDIN what it is sent, the end of each handed on. A reset of the stream is a
    reset of the connection, either way. `process` is its name, as far as it was found.
    """

    address: str
    port: int
    explicit: bool = False
    process: str | None = None


class EgressEnded(Message, tag="egress-ended"):
    """Closes an Egress stream, from the host: the connection ends once the program has all that it was sent."""


class Resolve(Message, tag="resolve"):
    """Guest: a program's question to the name server, a DNS message in hexadecimal. `process` as of Egress."""

    query: str
    process: str | None = None


class Resolved(Message, tag="resolved"):
    """Closes a Resolve stream, from the host: the answer, a DNS message in hexadecimal. Whatever else closes it is for the
    program a failure of the server.
    """

    answer: str


class Sync(Message, tag="sync"):
    """Flush all file systems of the guest; before that, leave `mark` on its volume and keep it in memory. With `hold`, do
    after that as for a Hold of so many seconds, unless the stream was given up meanwhile."""

    mark: str | None = None
    hold: float | None = None


class Synced(Message, tag="synced"):
    """Closes a Sync stream. `frozen`: see Held; None where nothing was to be held, and from agents that know no such thing."""

    duration: float
    frozen: bool | None = None


class Hold(Message, tag="hold"):
    """Hold every process of a command still: until GoOn, the end of the next handshake, or `limit` seconds of guest time."""

    limit: float


class Held(Message, tag="held"):
    """Closes a Hold stream. `frozen`: none of them runs any more; else they soon will not, but for one that waits for a
    disk, and that runs no further either."""

    frozen: bool


class Freeze(Message, tag="freeze"):
    """Flush the volume and hold all writes to it. `Frozen` on the stream says that they are held, `Thaw` ends it.

    After `limit` seconds the guest thaws by itself.
    """

    limit: float = 2.0


class Frozen(Message, tag="frozen"):
    """On a Freeze stream, from the guest: nothing reaches the volume now."""


class Thaw(Message, tag="thaw"):
    """On a Freeze stream, from the host: go on."""


class Thawed(Message, tag="thawed"):
    """Closes a Freeze stream. `expired`: the guest did not wait any longer; what was done meanwhile may be torn."""

    duration: float
    expired: bool = False


class GoOn(Message, tag="go-on"):
    """Host: the machine is saved, or will not be; what Hold holds still goes on."""


class Network(Message, tag="network"):
    """Host: connections of programs are to be carried from here on (`on`), or refused. Only for a guest whose `BootReady`
    says that it can."""

    on: bool


class Rename(Message, tag="rename"):
    """Host: the VM has another name from here on."""

    vm_id: str
    hostname: str


def _by_tag(*classes: type[Message]) -> dict[str, type[Message]]:
    return {cls.tag: cls for cls in classes}


CONTROL_MESSAGES = _by_tag(
    Ready,
    BootConfig,
    SetEnv,
    BootConfigDone,
    BootReady,
    Ping,
    Pong,
    PowerOff,
    Rename,
    Network,
    GoOn,
    ShutdownRequest,
    SuspendRequest,
)
# request -> what closes its stream when all goes well; every stream may also be closed by Failed
STREAMS: dict[type[Message], type[Message]] = {
    Exec: Exited,
    Terminal: Exited,
    Reattach: Exited,
    Forget: Forgotten,
    ReadFile: FileRead,
    WriteFile: FileWritten,
    ListDir: DirListed,
    Forward: Forwarded,
    Sync: Synced,
    Hold: Held,
    Freeze: Thawed,
    Egress: EgressEnded,
    Resolve: Resolved,
}
GUEST_STREAMS = (Egress, Resolve)  # opened by the guest; all others by the host
# Tags that later versions will use to open streams, so that nothing else takes them.
RESERVED_STREAMS = ("bulk-in", "bulk-out", "watch")
MESSAGES = {
    **CONTROL_MESSAGES,
    **_by_tag(*STREAMS, *STREAMS.values(), Signal, Resize, Started, Reattached, FileFound, Frozen, Thaw, Failed),
}
