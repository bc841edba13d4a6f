"""What VMs and images take on disk: blocks really allocated, a hole takes none."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

from capsem.api.types import ImageUsage, UsageResponse, VmUsage
from capsem.image.catalog import Image
from capsem.store import durable
from capsem.store.layout import Layout


class Named(NamedTuple):
    """What a VM names."""

    id: str
    session: Path
    layers: Sequence[str]
    image_digest: str


class Images(Protocol):
    """What of a catalog is wanted here."""

    def list(self) -> Iterable[Image]:
        """All images."""


def usage(layout: Layout, vms: Sequence[Named], images: Images) -> UsageResponse:
    """Look at every file. Blocks; what vanishes meanwhile counts for nothing."""
    sizes = {path.stem: durable.allocated_bytes(path) for path in layout.layers.glob("*.qcow2")}
    named = Counter(layer for vm in vms for layer in set(vm.layers))
    listed = [
        VmUsage(
            id=vm.id,
            own_bytes=sum(sizes.get(layer, 0) for layer in set(vm.layers) if named[layer] == 1),
            shared_bytes=sum(sizes.get(layer, 0) for layer in set(vm.layers) if named[layer] > 1),
            session_bytes=durable.allocated_bytes(vm.session),
        )
        for vm in vms
    ]
    found = [
        ImageUsage(
            name=image.name,
            digest=image.digest,
            size_bytes=durable.allocated_bytes(image.directory),
            vms=sorted(vm.id for vm in vms if vm.image_digest == image.digest),
        )
        for image in images.list()
    ]
    failed = sum(durable.allocated_bytes(path) for path in layout.sessions.glob("*-failed-*"))
    sessions = sum(vm.session_bytes for vm in listed)
    # Layers, empty volumes and memory files lie below one directory.
    store = durable.allocated_bytes(layout.layers.parent)
    return UsageResponse(
        vms=listed,
        images=found,
        layers_bytes=sum(sizes.values()),
        unreferenced_bytes=sum(size for layer, size in sizes.items() if layer not in named),
        failed_bytes=failed,
        total_bytes=store + sessions + failed + sum(image.size_bytes for image in found),
    )
