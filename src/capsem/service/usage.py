"""What VMs, checkpoints and images take on disk: blocks really allocated, a hole takes none."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

from capsem.api.usage_types import CheckpointUsage, ImageUsage, UsageResponse, VmUsage
from capsem.image.catalog import Image
from capsem.model.checkpoint import Checkpoint
from capsem.service import space
from capsem.store import durable
from capsem.store.layout import CheckpointDir, Layout


class Named(NamedTuple):
    """What a VM names; `pid` is its supervisor's."""

    id: str
    session: Path
    layers: Sequence[str]
    image_digest: str
    pid: int = 0
    kept: Collection[str] = ()


class Found(NamedTuple):
    """All that names something, and layers in the making, which nothing names yet."""

    vms: Sequence[Named]
    checkpoints: Sequence[Checkpoint] = ()
    spare: Collection[str] = ()

    @property
    def naming(self) -> list[Named | Checkpoint]:
        """All that name layers."""
        return [*self.vms, *self.checkpoints]


class Images(Protocol):
    """What of a catalog is wanted here."""

    def list(self) -> Iterable[Image]:
        """All images."""


def usage(layout: Layout, found: Found, images: Images) -> UsageResponse:
    """Look at every file. Blocks; what vanishes meanwhile counts for nothing."""
    sizes = {path.stem: durable.allocated_bytes(path) for path in layout.layers.glob("*.qcow2")}
    vms, checkpoints = _vms(layout, found, sizes), _checkpoints(layout, found, sizes)
    listed = [
        ImageUsage(
            name=image.name,
            digest=image.digest,
            size_bytes=durable.allocated_bytes(image.directory),
            vms=sorted(vm.id for vm in found.vms if vm.image_digest == image.digest),
        )
        for image in images.list()
    ]
    named = {layer for each in found.naming for layer in _layers(each)}
    drafts = [path for path in layout.checkpoints.iterdir() if not CheckpointDir(path).manifest.exists()]
    failed = sum(durable.allocated_bytes(path) for path in layout.sessions.glob("*-failed-*"))
    # Layers, empty volumes, checkpoints and memory files lie below one directory.
    total = durable.allocated_bytes(layout.layers.parent) + failed
    total += sum(vm.session_bytes for vm in vms) + sum(image.size_bytes for image in listed)
    return UsageResponse(
        vms=vms,
        images=listed,
        checkpoints=checkpoints,
        layers_bytes=sum(sizes.values()),
        unreferenced_bytes=sum(size for layer, size in sizes.items() if layer not in {*named, *found.spare}),
        failed_bytes=failed,
        memory_bytes=sum(each.memory_bytes for each in checkpoints),
        draft_bytes=sum(map(durable.allocated_bytes, drafts)) + sum(sizes.get(layer, 0) for layer in found.spare),
        total_bytes=total,
        free_bytes=space.free_bytes(layout),
    )


def _layers(each: Named | Checkpoint) -> set[str]:
    return set(each.layers if isinstance(each, Named) else each.layer_ids)


def _vms(layout: Layout, found: Found, sizes: dict[str, int]) -> list[VmUsage]:
    """A checkpoint goes with its VM, so what it names is its VM's own."""
    owners: defaultdict[str, set[str]] = defaultdict(set)
    for each in found.naming:
        for layer in _layers(each):
            owners[layer].add(each.id if isinstance(each, Named) else each.vm_id)
    return [
        VmUsage(
            id=vm.id,
            own_bytes=sum(sizes.get(layer, 0) for layer, its in owners.items() if its == {vm.id}),
            shared_bytes=sum(sizes.get(layer, 0) for layer, its in owners.items() if vm.id in its and len(its) > 1),
            session_bytes=durable.allocated_bytes(vm.session),
            memory_bytes=sum(
                durable.allocated_bytes(layout.checkpoint(each.id).path)
                for each in found.checkpoints
                if each.vm_id == vm.id
            ),
            draft_bytes=space.draft_bytes(layout, vm.pid) if vm.pid else 0,
        )
        for vm in found.vms
    ]


def _checkpoints(layout: Layout, found: Found, sizes: dict[str, int]) -> list[CheckpointUsage]:
    names = Counter(layer for each in found.naming for layer in _layers(each))
    kept = {vm.id: vm.kept for vm in found.vms}
    return [
        CheckpointUsage(
            id=each.id,
            vm=each.vm_id,
            kind=each.kind,
            memory_bytes=durable.allocated_bytes(layout.checkpoint(each.id).path),
            own_bytes=sum(sizes.get(layer, 0) for layer in _layers(each) if names[layer] == 1),
            shared_bytes=sum(sizes.get(layer, 0) for layer in _layers(each) if names[layer] > 1),
            hidden=not each.visible(kept.get(each.vm_id, ())),
        )
        for each in found.checkpoints
    ]
