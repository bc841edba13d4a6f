"""The policy of merging layers: how deep a chain gets, and how much is copied in a long life."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from capsem.store.flatten import MAX_DEPTH, plan

depths = st.integers(1, 12)
chains = st.lists(st.integers(0, 1 << 40), max_size=40)


@given(sizes=chains, max_depth=depths, shared=st.integers(0, 40))
def test_a_chain_is_left_alone_or_comes_under_its_bound(sizes: list[int], max_depth: int, shared: int) -> None:
    shared = min(shared, len(sizes))
    places = plan(sizes, max_depth, shared)
    if len(sizes) <= (2 * max_depth if shared > max_depth // 2 else max_depth):
        assert places is None
        return
    assert places is not None
    assert places.step == 1
    assert places.start >= 0
    assert places.stop == len(sizes)
    assert len(places) >= 2
    assert len(sizes) - len(places) + 1 <= max_depth
    if shared <= max_depth // 2:
        assert places.start >= shared


@given(sizes=st.lists(st.integers(1, 1 << 40), max_size=40), max_depth=depths)
def test_what_lies_still_is_larger_than_all_above_it(sizes: list[int], max_depth: int) -> None:
    places = plan(sizes, max_depth)
    if places is not None:
        for place in range(places.start):
            assert sizes[place] > sum(sizes[place + 1 :])


def live(sizes: Iterable[int], max_depth: int, merged: Callable[[list[int]], int] = sum) -> tuple[int, int]:
    """Freeze a layer of each size in turn: bytes written by the VM, bytes copied by merging."""
    chain: list[int] = []
    written = copied = 0
    for size in sizes:
        written += size
        chain.append(size)
        if (places := plan(chain, max_depth)) is not None:
            result = merged(chain[places.start :])
            copied += result
            chain[places.start :] = [result]
        assert len(chain) <= max_depth
    return written, copied


def bound(written: int, count: int, max_depth: int) -> float:
    """See the module: once when new, once for each doubling; and each time those that are tiny, when sizes double."""
    return written * (1 + math.log2(max(count, 1)) + count / 2 ** (max_depth - 2))


GIB, MIB = 1 << 30, 1 << 20


@given(sizes=st.lists(st.integers(1, 1000) | st.integers(1, 1 << 40), max_size=400), max_depth=depths)
@example(sizes=[GIB] * 7 + [MIB] * 300, max_depth=8)  # merging the newest alone would copy a gigabyte each time
@example(sizes=[GIB >> place for place in range(7)] + [1] * 300, max_depth=8)
def test_what_is_copied_grows_with_the_logarithm_of_a_lifes_length(sizes: list[int], max_depth: int) -> None:
    written, copied = live(sizes, max_depth)
    assert copied <= bound(written, len(sizes), max_depth)


LIVES: dict[str, Callable[[int], int]] = {
    "always the same": lambda _: 50 * MIB,
    "one big installation": lambda place: 5 * GIB if place == 0 else 20 * MIB,
    "several big installations": lambda place: GIB if place < 7 else MIB,
    "one each week": lambda place: GIB if place % 50 < 3 else 5 * MIB,
    "less and less": lambda place: (1000 - place) * MIB,
    "more and more": lambda place: (1 + place) * MIB,
    "anything": lambda place: int(random.Random(place).paretovariate(1.1) * MIB),
}


@pytest.mark.parametrize("life", LIVES)
def test_a_life_of_a_thousand_checkpoints_copies_each_byte_a_few_times(life: str) -> None:
    written, copied = live(map(LIVES[life], range(1000)), MAX_DEPTH)
    assert copied <= 6 * written


def test_writing_the_same_place_again_and_again_copies_less_than_is_written() -> None:
    written, copied = live([100 * MIB] * 1000, MAX_DEPTH, merged=lambda _: 100 * MIB)
    assert copied < written / 7
