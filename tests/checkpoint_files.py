"""Whole checkpoints made of small files, for tests of what becomes of them."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from types import MappingProxyType

from capsem.model.checkpoint import Checkpoint, GuestState, Kind, Memory
from capsem.store.checkpoints import CheckpointStore, Draft, describe
from capsem.store.layout import Layout
from capsem.store.ram import PAGE, RamIdentity, RamWriter

SIZE = 8 * PAGE
MACHINE = {"hypervisor": "qemu 1.2.3", "hardware": 1, "cpus": 1, "kernel": "k" * 64}


def layout(root: Path) -> Layout:
    made = Layout(root / "run")
    made.create()
    return made


def new_id(number: int) -> str:
    return f"{number:032x}"


def add_layer(where: Layout, layer: str) -> str:
    where.layer(layer).write_bytes(b"layer " + layer.encode() + os.urandom(8192))
    return layer


def fill(
    store: CheckpointStore, draft: Draft, *, vm_id: str = "box", layers: tuple[str, ...] = (), owner: str | None = None
) -> Checkpoint:
    """Make the parts of a draft durable; returns its manifest. `owner` is whom its memory says it belongs to."""
    writer = RamWriter(draft.files.memory, draft.files.sums, SIZE)
    runs, written = writer.patch([(PAGE, memoryview(os.urandom(2 * PAGE)))], compare=False)
    digest = writer.finish(RamIdentity(owner or vm_id, draft.id, SIZE))
    writer.close()
    draft.files.devices.write_bytes(os.urandom(3000))
    return Checkpoint(
        id=draft.id,
        vm_id=vm_id,
        kind=Kind.MANUAL,
        created_at=1e9 + 0.5,
        creator="1.2.3",
        layers=store.freeze(layers),
        disk_mb=2048,
        image="default",
        image_digest="d" * 64,
        hardware=1,
        cpus=1,
        ram_mb=512,
        machine=MappingProxyType(MACHINE),
        memory=Memory(SIZE, digest, tuple((offset // PAGE, length // PAGE) for offset, length in runs), written),
        devices=describe(draft.files.devices),
        guest=GuestState("boot", 3, "ab" * 16, "token", synced=True),
        pause=0.0123,
    )


def make(store: CheckpointStore, checkpoint_id: str, layers: tuple[str, ...] = (), **changes: object) -> Checkpoint:
    """A committed checkpoint."""
    draft = store.prepare(checkpoint_id)
    vm_id = str(changes.get("vm_id", "box"))
    checkpoint = dataclasses.replace(fill(store, draft, vm_id=vm_id, layers=layers), **changes)  # type: ignore[arg-type]
    store.commit(draft, checkpoint)
    return checkpoint
