"""How the command line's text looks."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from capsem.cli.terminal import duration, memory, printable, table
from capsem.client import request


@pytest.mark.parametrize(
    ("seconds", "text"), [(-3, "0s"), (0, "0s"), (59, "59s"), (60, "1m00s"), (7265, "2h01m"), (90000, "1d01h")]
)
def test_duration(seconds: int, text: str) -> None:
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("mib", "text"), [(256, "256M"), (1024, "1G"), (1536, "1.5G"), (16384, "16G"), (1500, "1.465G")]
)
def test_memory(mib: int, text: str) -> None:
    assert memory(mib) == text


def test_table() -> None:
    assert table(("A", "LONG"), [("xyz", "1"), ("", "2")]) == ["A    LONG", "xyz  1", "     2"]


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a\tb\nc", "a\tb\nc"),
        ("\x1b[1;31mred\x1b[0m", "red"),
        ("\x1b]0;title\x07x\x1b]8;;u\x1b\\y", "xy"),
        ("\x1b(B\x1b7", ""),
        ("a\r\x00\x7f\x9b2Jb", "a2Jb"),
    ],
)
def test_printable(text: str, shown: str) -> None:
    assert printable(text) == shown


@given(st.text())
def test_printable_leaves_no_control_character(text: str) -> None:
    assert not any((ord(sign) < 32 and sign not in "\n\t") or 0x7F <= ord(sign) < 0xA0 for sign in printable(text))


@given(st.text(st.characters(codec="utf-8")))
def test_percent_encoding(text: str) -> None:
    from urllib.parse import quote

    assert request.quote(text) == quote(text, safe="")
