"""Flattening a chain of layers with a real merge; the policy is in tests/property."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path

import pytest

from capsem.hypervisor.qemu.merge import merge
from capsem.store.flatten import flatten, plan
from capsem.store.layout import Layout
from layer_files import read_layer, write_layer

IDS = [f"{number:032x}" for number in range(6)]
NEW = "f" * 32


async def merge_layers(sources: Sequence[Path], target: Path, *, vm_id: str, layer_id: str) -> object:
    return merge(sources, target, vm_id=vm_id, layer_id=layer_id)


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    layout = Layout(tmp_path / "run")
    layout.create()
    write_layer(layout.layer(IDS[0]), dict.fromkeys(range(100), 1), size_mb=16, layer_id=IDS[0])
    for place, layer in enumerate(IDS[1:], 2):
        write_layer(layout.layer(layer), {0: place, place: place}, size_mb=16, layer_id=layer)
    return layout


def test_the_newest_layers_are_merged_and_the_big_old_one_lies_still(layout: Layout) -> None:
    chain = asyncio.run(flatten(IDS, layout, merge_layers, vm_id="box", layer_id=NEW, max_depth=3))
    assert chain == (IDS[0], NEW)
    assert read_layer(layout.layer(NEW)) == {0: 6, 2: 2, 3: 3, 4: 4, 5: 5, 6: 6}
    assert all(layout.layer(layer).exists() for layer in IDS)


def test_a_chain_that_is_short_enough_is_left_alone(layout: Layout) -> None:
    assert asyncio.run(flatten(IDS, layout, merge_layers, vm_id="box", layer_id=NEW, max_depth=6)) is None
    assert not layout.layer(NEW).exists()


def test_a_depth_of_none_is_no_chain() -> None:
    with pytest.raises(ValueError, match="0 layers"):
        plan([1, 2], 0)
