"""Keeps the chain of a volume's frozen layers short: which of them to merge into one, and when.

Each checkpoint adds a layer, and each layer costs every read that falls through it, an open file and a table cache. But
merging everything each time would copy the whole disk again and again. The rule:

    A chain may be `max_depth` layers deep. When it is deeper, every layer is to be larger than all above it together;
    the lowest one that is not is merged with all above it (or, if there is none, as few of the newest as will do).

So a byte is copied once when it is new, and after that only into a layer at least twice as large as the one it lay in:
log2(n) times for n checkpoints of about one size, while old, big layers lie still. Where all layers obey the rule
already, sizes double from layer to layer, and the newest ones are tiny beside the disk: copying them each time is cheap.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Final, Protocol

from capsem.store import durable
from capsem.store.layout import Layout

MAX_DEPTH: Final = 8  # frozen layers above the base


class Merge(Protocol):
    """What a driver's `merge_layers` does."""

    async def __call__(self, sources: Sequence[Path], target: Path, *, vm_id: str, layer_id: str) -> object:
        """Write the new layer `target`, equivalent to `sources`, lowest first; durable on return."""


def plan(sizes: Sequence[int], max_depth: int = MAX_DEPTH) -> range | None:
    """Which adjacent layers to merge into one, as places in the chain, or None while it is not too deep.

    `sizes` are bytes, lowest layer first, without the base and without the layer that is being written to. The range
    always reaches to the newest layer, and once it is one layer there are at most `max_depth` (at least 1) of them.
    """
    if max_depth < 1:
        raise ValueError(f"a chain of {max_depth} layers")
    if len(sizes) <= max_depth:
        return None
    start = max_depth - 1
    above = sum(sizes)
    for place in range(start):
        above -= sizes[place]
        if sizes[place] <= above:
            return range(place, len(sizes))
    return range(start, len(sizes))


async def flatten(
    layers: Sequence[str], layout: Layout, merge: Merge, *, vm_id: str, layer_id: str, max_depth: int = MAX_DEPTH
) -> tuple[str, ...] | None:
    """Merge what the plan says of a chain's frozen `layers`, lowest first, into the new layer `layer_id`.

    Returns the chain that is equivalent, which nobody names yet: until a record does, the new file is a sweep's to remove,
    and the layers that it replaces must stay. None when there was nothing to do. Raises what `merge` raises.
    """
    paths = [layout.layer(layer) for layer in layers]
    places = plan([durable.allocated_bytes(path) for path in paths], max_depth)
    if places is None:
        return None
    sources = paths[places.start : places.stop]
    await merge(sources, layout.layer(layer_id), vm_id=vm_id, layer_id=layer_id)
    return (*layers[: places.start], layer_id, *layers[places.stop :])
