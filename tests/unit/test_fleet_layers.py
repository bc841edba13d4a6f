"""Layers go when nobody needs them, and not before that is known."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest

from capsem.model.checkpoint import Checkpoint, Kind
from capsem.service.fleet import Fleet
from capsem.store.layout import Layout
from capsem.system.real import real_system

ID, LAYER, OTHER = "0123456789abcdef" * 2, "fedcba9876543210" * 2, "f" * 32


@pytest.fixture
def fleet(tmp_path: Path) -> Fleet:
    """No VM, one checkpoint of a layer, and another layer that nobody names."""
    layout = Layout(tmp_path)
    layout.create()
    for layer in (LAYER, OTHER):
        layout.layer(layer).write_bytes(bytes(8192))
    fleet = Fleet(real_system(), layout, limit=1)
    draft = fleet.checkpoints.prepare(ID)
    checkpoint = Checkpoint(
        id=ID,
        vm_id="box",
        kind=Kind.MANUAL,
        created_at=1.0,
        creator="1",
        layers=fleet.checkpoints.freeze([LAYER]),
        disk_mb=64,
        image="default",
        image_digest="ab" * 32,
        hardware=1,
        cpus=1,
        ram_mb=512,
    )
    fleet.checkpoints.commit(draft, checkpoint)
    return fleet


def left(fleet: Fleet) -> set[str]:
    return {path.stem for path in fleet.layout.layers.iterdir()}


def remove(fleet: Fleet, *layers: str) -> None:
    async def carried_out() -> None:
        fleet.remove_layers(layers)
        await fleet.cleared()

    asyncio.run(carried_out())


def test_a_layer_that_a_checkpoint_names_stays(fleet: Fleet) -> None:
    remove(fleet, LAYER, OTHER)
    assert left(fleet) == {LAYER}


@pytest.mark.parametrize("damage", ["of a newer format", "spoilt"])
def test_no_layer_goes_while_a_checkpoint_cannot_say_what_it_needs(fleet: Fleet, damage: str) -> None:
    manifest = fleet.layout.checkpoint(ID).manifest
    good = manifest.read_bytes()
    outer = json.loads(good)
    manifest.write_bytes(b"{" if damage == "spoilt" else json.dumps({**outer, "format": 2}).encode())
    asyncio.run(fleet.reconcile())
    remove(fleet, LAYER, OTHER)
    assert left(fleet) == {LAYER, OTHER}
    assert manifest.exists()
    # Once it can be read again, it names what it needs.
    manifest.write_bytes(good)
    remove(fleet, LAYER, OTHER)
    assert left(fleet) == {LAYER}
