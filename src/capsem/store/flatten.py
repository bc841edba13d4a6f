"""Keeps the chain of a volume's frozen layers short: which of them to merge into one.

Each checkpoint adds a layer, and each layer costs every read that falls through it, an open file and a table cache. But
merging everything each time would copy the whole disk again and again. The rule:

    A chain may be `max_depth` layers deep. When it is deeper, every layer is to be larger than all above it together;
    the lowest one that is not is merged with all above it (or, if there is none, as few of the newest as will do).

So a byte is copied once when it is new, and after that only into a layer at least twice as large as the one it lay in:
log2(n) times for n checkpoints of about one size, while old, big layers lie still. Where all layers obey the rule
already, sizes double from layer to layer, and the newest ones are tiny beside the disk: copying them each time is cheap.

Layers that others name too stay when they are merged, and then take their place on disk twice: the forks of one deep
chain would each make a copy of all of it. So the rule is applied to what lies above them, as long as that leaves it half
of the depth: with less, little would be copied very often. Failing that, a chain may be twice as deep before it is merged
with no regard for others.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

MAX_DEPTH: Final = 8  # frozen layers above the base


def plan(sizes: Sequence[int], max_depth: int = MAX_DEPTH, shared: int = 0) -> range | None:
    """Which adjacent layers to merge into one, as places in the chain, or None while it is not too deep.

    `sizes` are bytes, lowest layer first, without the base and without the layer that is being written to; of the
    `shared` lowest, somebody else names each or one above it. The range always reaches to the newest layer, and once it
    is one layer there are at most `max_depth` (at least 1) of them. Without a range there are at most twice as many.
    """
    if max_depth < 1:
        raise ValueError(f"a chain of {max_depth} layers")
    if len(sizes) <= max_depth:
        return None
    if 0 < shared <= max_depth // 2:
        places = plan(sizes[shared:], max_depth - shared)
        assert places is not None
        return range(places.start + shared, places.stop + shared)
    if shared and len(sizes) <= 2 * max_depth:
        return None
    start = max_depth - 1
    above = sum(sizes)
    for place in range(start):
        above -= sizes[place]
        if sizes[place] <= above:
            return range(place, len(sizes))
    return range(start, len(sizes))


def replaced(layers: Sequence[str], old: Sequence[str], new: str) -> tuple[str, ...] | None:
    """A chain with the layer `new` in place of the adjacent ones `old`, or None when it does not hold those (any more)."""
    for place in range(len(layers) - len(old) + 1):
        if old and tuple(layers[place : place + len(old)]) == tuple(old):
            return (*layers[:place], new, *layers[place + len(old) :])
    return None
