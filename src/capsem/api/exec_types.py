"""What travels between clients and the service about commands in VMs, and connections to their ports.

The rules are those of `types`.
"""

from __future__ import annotations

from typing import Annotated

import msgspec

from capsem.api.network_types import NetworkRequest
from capsem.api.types import Body, Cpus, DiskMb, Env, Name, RamMb, Seconds, Text, no_nul
from capsem.model.errors import InvalidInput
from capsem.model.ids import check_name
from capsem.model.spec import DEFAULT_DISK_MB, check_env


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
        no_nul("command", self.command or "")
        no_nul("cwd", self.cwd or "")
        check_env(self.env or {})
        if self.job is not None:
            check_name(self.job)
        if self.offsets is None and self.keep:
            raise InvalidInput("`keep` is for following a job", hint="give its id and offsets")
        if self.stdin and (self.wait or self.offsets is not None):
            raise InvalidInput(
                "`stdin` is for a new command in the background", hint='add "wait": false, or stream its input'
            )


class RunRequest(Body, frozen=True):
    """Run `command` in a VM made for it and destroyed after it; `profile` names the image, `default` unless given;
    `network` is what it may reach, and `secrets` what it is lent, as when one is created; `cold`: boot it.
    """

    command: Text
    timeout_secs: Seconds | None = None
    ram_mb: RamMb | None = None
    cpus: Cpus | None = None
    disk_mb: DiskMb = DEFAULT_DISK_MB
    env: Env | None = None
    profile: Name | None = None
    network: str | NetworkRequest | None = None
    secrets: list[str] | None = None
    cold: bool = False

    def __post_init__(self) -> None:
        no_nul("command", self.command)
        if self.profile is not None:
            check_name(self.profile)


class ForwardRequest(Body, frozen=True):
    """Connect to a TCP port in a VM."""

    port: Annotated[int, msgspec.Meta(ge=1, le=65535)]


class KillJobRequest(Body, frozen=True):
    """Send a signal, SIGKILL unless given, to all processes of the command `job`."""

    job: Name
    signal: Annotated[int, msgspec.Meta(ge=1, le=64)] = 9

    def __post_init__(self) -> None:
        check_name(self.job)


class FeedJobQuery(Body, frozen=True):
    """Which command takes the body as its standard input; `end`: it is the end of that."""

    job: Name
    end: bool = False

    def __post_init__(self) -> None:
        check_name(self.job)


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


class JobInfo(Body, frozen=True):
    """One command; `command` is how it begins. One that has ended has an exit code, or the error that ended it.

    `followed`: somebody waits for its output, as a terminal does.
    """

    id: str
    command: str
    running: bool
    followed: bool = False
    exit_code: int | None = None
    error: str | None = None


class JobsResponse(Body, frozen=True):
    """Commands of a running VM by id, oldest first, those of them that still run, and what is known of each."""

    jobs: list[str]
    running: list[str]
    details: list[JobInfo]


class KillJobResponse(Body, frozen=True):
    """`running`: the command had not ended, and gets the signal; its end is told to those who follow it."""

    success: bool
    running: bool


class FeedJobResponse(Body, frozen=True):
    """So many bytes are on their way to the command; one that does not read lets the request wait."""

    success: bool
    size: int
