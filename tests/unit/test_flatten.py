"""A chain with a merged layer in it; which to merge is in tests/property, that it is done in tests/contract."""

from __future__ import annotations

import pytest

from capsem.store.flatten import plan, replaced


@pytest.mark.parametrize(
    ("layers", "old", "expected"),
    [
        ("abcd", "ab", "Xcd"),
        ("abcd", "bc", "aXd"),
        ("abcd", "cd", "abX"),
        ("abcd", "abcd", "X"),
        ("abcd", "ac", None),
        ("abcd", "ba", None),
        ("abcd", "de", None),
        ("ab", "abc", None),
        ("ab", "", None),
        ("", "a", None),
    ],
)
def test_adjacent_layers_alone_are_replaced(layers: str, old: str, expected: str | None) -> None:
    assert replaced(tuple(layers), tuple(old), "X") == (None if expected is None else tuple(expected))


def test_a_depth_of_none_is_no_chain() -> None:
    with pytest.raises(ValueError, match="0 layers"):
        plan([1, 2], 0)


def test_what_others_name_is_left_alone_unless_the_depth_demands_it() -> None:
    assert plan([1] * 9, 8, shared=4) == range(4, 9)
    assert plan([1] * 9, 8, shared=5) is None
    assert plan([1] * 17, 8, shared=5) == range(17)
