"""What travels between clients and the service about checkpoints; the rules are those of `types`."""

from __future__ import annotations

from capsem.api.types import Body, Name
from capsem.model.errors import InvalidInput
from capsem.model.ids import check_name
from capsem.model.lifecycle import Status

MESSAGE_LIMIT = 1000  # characters


class CheckpointRequest(Body, frozen=True):
    """Make a checkpoint of a running VM."""

    message: str | None = None

    def __post_init__(self) -> None:
        if len(self.message or "") > MESSAGE_LIMIT:
            raise InvalidInput("message: too long", hint=f"at most {MESSAGE_LIMIT} characters")


class OneCheckpointRequest(Body, frozen=True):
    """Which checkpoint of the VM: its id, or its first digits."""

    checkpoint: str


class RollbackRequest(Body, frozen=True):
    """Go back to a checkpoint; the present is kept as another one unless `save` is false."""

    checkpoint: str
    save: bool = True


class SuspendResponse(Body, frozen=True):
    """Suspended, durably: `checkpoint` is where. `bytes` of memory were written, `pause_ms` is from the guest's last
    instruction to its state being in our hands; `synced`: the guest had flushed its file systems before, `frozen`: and held
    its processes still; `warning`: there may be no room for the next one; `waited_ms`: see ProvisionResponse; `lost`: how many
    `streams`, connections of its programs, will not be there when it is resumed."""

    success: bool
    checkpoint: str
    bytes: int
    pause_ms: float
    synced: bool
    frozen: bool = False
    warning: str | None = None
    waited_ms: float | None = None
    lost: dict[str, int] | None = None


class ExportQuery(Body, frozen=True):
    """Which checkpoint: its id, or its first digits."""

    checkpoint: str


class ImportQuery(Body, frozen=True):
    """What the new VM is called; `trust`: its memory is taken too, as something that its maker could break out with."""

    name: Name
    trust: bool = False

    def __post_init__(self) -> None:
        check_name(self.name)


class CheckpointInfo(Body, frozen=True):
    """One checkpoint. `kind` is manual, automatic, rollback, or, hidden, suspend or fork. `memory_bytes` are its RAM's
    alone (0: of a VM that did not run), `disk_bytes` those of layers that no VM and no other checkpoint names."""

    id: str
    kind: str
    created_at: float
    memory_bytes: int
    disk_bytes: int
    shared_bytes: int
    warm: bool
    current: bool
    parent: str | None = None
    message: str | None = None
    pause_ms: float | None = None
    hidden: bool = False


class CheckpointsResponse(Body, frozen=True):
    """The checkpoints of a VM, oldest first."""

    checkpoints: list[CheckpointInfo]


class CheckpointResponse(Body, frozen=True):
    """A new checkpoint; see SuspendResponse."""

    id: str
    bytes: int
    pause_ms: float
    synced: bool
    frozen: bool = False
    warning: str | None = None
    waited_ms: float | None = None


class CheckpointContent(Body, frozen=True):
    """Not JSON: the answer is the file that docs/checkpoint-export.md specifies."""


class ImportResponse(Body, frozen=True):
    """A new VM: Suspended in `checkpoint`, with the memory that came, or Stopped on its disk."""

    id: str
    status: Status
    checkpoint: str | None = None


class RollbackResponse(Body, frozen=True):
    """The VM is at `checkpoint`; `saved` is where the present was kept. It runs if it ran before.
    `waited_ms`: see ProvisionResponse."""

    success: bool
    checkpoint: str
    saved: str | None = None
    running: bool = False
    boot_kind: str | None = None
    boot_note: str | None = None
    waited_ms: float | None = None
