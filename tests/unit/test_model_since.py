"""How far back to look, in words."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from capsem.model.errors import InvalidInput
from capsem.model.since import parse_since

NOW = 1_700_000_000.0


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("30m", NOW - 1800),
        ("1h", NOW - 3600),
        ("7d", NOW - 7 * 86400),
        ("300s", NOW - 300),
        ("0s", NOW),
        ("999999999d", 0.0),
        ("2023-11-14T22:13:20Z", NOW),
        ("2023-11-14t22:13:20.5z", NOW + 0.5),
        ("2023-11-15T00:13:20+02:00", NOW),
        ("2023-11-15T00:13:20 02:00", NOW),  # a + that nobody encoded
        ("2023-11-14T22:13:20", NOW),
    ],
)
def test_what_is_understood(text: str, expected: float) -> None:
    assert parse_since(text, NOW) == expected


@pytest.mark.parametrize(
    "text", ["", "30", "m", "-5m", "1.5h", "30M", "30m\n", "yesterday", "2023-11-14", "1969-12-31T00:00:00Z"]
)
def test_what_is_not(text: str) -> None:
    with pytest.raises(InvalidInput, match="since"):
        parse_since(text, NOW)


@given(st.text())
def test_whatever_comes_there_is_one_error(text: str) -> None:
    with contextlib.suppress(InvalidInput):
        assert parse_since(text, NOW) >= 0
