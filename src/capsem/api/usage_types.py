"""What VMs, checkpoints and images take, as clients are told; the rules are those of `types`."""

from __future__ import annotations

from capsem.api.types import Body


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


class PoolUsage(Body, frozen=True):
    """VMs that run and wait for somebody to create them: how many there are to be, and how many are ready, with what they
    and their supervisors take of the host's memory. `short`: the host has too little of it, so there are none."""

    wanted: int
    ready: int
    memory_bytes: int
    short: bool = False


class UsageResponse(Body, frozen=True):
    """Disk space, holes not counted. A layer counts once in `layers_bytes`, however many VMs name it.

    `unreferenced_bytes` are layers that nothing names; `failed_bytes` the kept logs of ephemeral VMs that failed;
    `checkpoints` are all, hidden ones too, `memory_bytes` their RAM; `draft_bytes` checkpoints and layers in the making;
    `total_bytes` is all of it, with everything else in the run directory's store, and `free_bytes` are left. `pool` is
    there when there is one.
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
    pool: PoolUsage | None = None
