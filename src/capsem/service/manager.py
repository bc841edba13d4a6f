"""What the HTTP application asks of the rest of the service: one method per operation of `api.operations`.

Every method raises CapsemError subclasses only; which ones, the table says. The ids that it is given are valid names.
All may be called at once and for the same VM; the implementation orders transitions.

Cancelling a call is a client that hung up. `provision`, `stop`, `resume` and `delete` are never cancelled by the
application. A cancelled `execute` or `execute_stream` ends the command in the guest; a cancelled `run` also destroys
its VM, before the cancellation is passed on.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator
from typing import TYPE_CHECKING, NamedTuple, Protocol

from capsem.api.checkpoint_types import (
    CheckpointRequest,
    CheckpointResponse,
    CheckpointsResponse,
    ImportResponse,
    OneCheckpointRequest,
    RollbackRequest,
    RollbackResponse,
    SuspendResponse,
)
from capsem.api.exec_types import (
    ExecRequest,
    ExecResponse,
    FeedJobResponse,
    ForwardRequest,
    JobsResponse,
    KillJobRequest,
    KillJobResponse,
    RunRequest,
)
from capsem.api.file_types import (
    FilesResponse,
    FileWrittenResponse,
    ReadFileRequest,
    ReadFileResponse,
    WriteFileRequest,
)
from capsem.api.usage_types import UsageResponse
from capsem.api.vm_types import (
    ForkRequest,
    ForkResponse,
    ListResponse,
    LogsResponse,
    PersistRequest,
    PersistResponse,
    PrepareRequest,
    PrepareResponse,
    ProvisionRequest,
    ProvisionResponse,
    PurgeRequest,
    PurgeResponse,
    ResumeRequest,
    SandboxInfo,
    StopResponse,
    VmPolicy,
)

if TYPE_CHECKING:
    from capsem.service.asks import AskFeed
    from capsem.service.files import Content
    from capsem.service.host import Host
    from capsem.service.network import Network
    from capsem.service.secret_desk import SecretDesk
    from capsem.service.traces import Traces
from capsem.service.observation import Observation


class Resize(NamedTuple):
    """The terminal of who follows a command has so many characters now."""

    rows: int
    columns: int


class Manager(Protocol):
    """The VMs of this user; `host` answers what is about none of them, `observation` what has happened, `network` what they
    may reach, `asks` what they want to, and `secrets` what may be lent to them."""

    host: Host
    observation: Observation
    network: Network
    asks: AskFeed
    traces: Traces
    secrets: SecretDesk

    async def provision(self, request: ProvisionRequest) -> ProvisionResponse:
        """Create and boot a VM; returns when the guest is ready or after 5 s."""

    async def prepare(self, request: PrepareRequest) -> PrepareResponse:
        """Have a template made."""

    async def list(self) -> ListResponse:
        """Every VM, and whether there is an image to boot."""

    async def df(self) -> UsageResponse:
        """What VMs and images take on disk."""

    async def info(self, vm_id: str) -> SandboxInfo:
        """One VM."""

    async def execute(self, vm_id: str, request: ExecRequest) -> ExecResponse:
        """Run a command to its end; waits up to 30 s for a VM that is still booting. A command's non-zero exit code is
        an answer, not an error; its time limit raises TimedOut.
        """

    def execute_stream(
        self, vm_id: str, request: ExecRequest, stdin: AsyncIterator[bytes | Resize] | None
    ) -> AsyncIterator[tuple[int, bytes]]:
        """Run a command, yielding (channel, bytes) of `api.stream`: STDOUT and STDERR as they come, best begun with an
        empty STDOUT as soon as the command is admitted, and at last RESULT with the JSON of an ExecResult, or ERROR.

        `stdin` is read as the command takes it; None is an empty one. A CapsemError raised instead of yielding an
        ERROR is as good; before the first item it becomes a plain HTTP error.
        """

    def forward(
        self, vm_id: str, request: ForwardRequest, stdin: AsyncIterator[bytes | Resize] | None
    ) -> AsyncIterator[tuple[int, bytes]]:
        """A connection to a port of the guest's: what comes, then the result, as of `execute_stream`."""

    async def write_file(self, vm_id: str, request: WriteFileRequest) -> None:
        """Replace a text file; it is durable when this returns."""

    async def read_file(self, vm_id: str, request: ReadFileRequest) -> ReadFileResponse:
        """The text of a file."""

    async def list_files(self, vm_id: str, path: str, depth: int, *, exact: bool = False) -> FilesResponse:
        """What is in a directory of the workspace; a path is relative to that, and `exact` or of harmless characters."""

    async def get_file(self, vm_id: str, path: str, *, whole: bool = False, exact: bool = False) -> Content:
        """A file of at most 10 MiB, or `whole` of any size; whoever takes it closes its `pieces`."""

    async def put_file(
        self, vm_id: str, path: str, body: AsyncIterator[bytes], *, mode: int = 0o644, exact: bool = False
    ) -> FileWrittenResponse:
        """Replace a file, of any size; it is durable when this returns. `body` may raise: then nothing has changed."""

    async def stop(self, vm_id: str) -> StopResponse:
        """Power off; when this returns process and sockets are gone."""

    async def resume(self, name: str, request: ResumeRequest) -> ProvisionResponse:
        """Start a VM that does not run, and wait until its guest is ready; nothing happens to one that runs."""

    async def suspend(self, vm_id: str) -> SuspendResponse:
        """Save a running VM and end its processes; durable when this returns."""

    async def checkpoint(self, vm_id: str, request: CheckpointRequest) -> CheckpointResponse:
        """Make a checkpoint of a VM that goes on running."""

    async def checkpoints(self, vm_id: str) -> CheckpointsResponse:
        """The checkpoints of a VM, oldest first."""

    async def remove_checkpoint(self, vm_id: str, request: OneCheckpointRequest) -> None:
        """Remove a checkpoint."""

    async def verify_checkpoint(self, vm_id: str, request: OneCheckpointRequest) -> None:
        """Read all of a checkpoint; raises when it is not what was written."""

    async def export_checkpoint(self, vm_id: str, checkpoint: str) -> AsyncGenerator[bytes, None]:
        """A checkpoint as one stream; whoever takes it closes it."""

    async def import_checkpoint(self, name: str, body: AsyncIterator[bytes], *, trust: bool) -> ImportResponse:
        """A new VM of such a stream; with `trust` its device state is believed, and the VM is suspended there."""

    async def rollback(self, vm_id: str, request: RollbackRequest) -> RollbackResponse:
        """Take a VM back to a checkpoint."""

    async def set_policy(self, vm_id: str, request: VmPolicy) -> VmPolicy:
        """Change what becomes of a VM as time goes by."""

    async def delete(self, vm_id: str) -> None:
        """Destroy a VM and its data; its name is free when this returns."""

    async def run(self, request: RunRequest) -> ExecResponse:
        """Run a command in a VM made for it; the VM is gone when this returns or raises."""

    async def persist(self, vm_id: str, request: PersistRequest) -> PersistResponse:
        """Keep a running ephemeral VM under another name, without a pause."""

    async def purge(self, request: PurgeRequest) -> PurgeResponse:
        """Delete all ephemeral VMs, or all."""

    async def fork(self, vm_id: str, request: ForkRequest) -> ForkResponse:
        """Make a stopped VM on a copy of this one's disk, or running ones with a copy of its memory too."""

    async def jobs(self, vm_id: str) -> JobsResponse:
        """The commands of a running VM."""

    async def kill_job(self, vm_id: str, request: KillJobRequest) -> KillJobResponse:
        """Send a signal to a command; one that has ended is no error."""

    async def feed_job(self, vm_id: str, job: str, body: AsyncIterator[bytes], *, end: bool) -> FeedJobResponse:
        """Hand a command its standard input, at its pace; with `end` that is all it gets."""

    async def logs(self, vm_id: str) -> LogsResponse:
        """The guest's console and the supervisor's log."""
