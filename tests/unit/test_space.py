"""When to say that the disk may be too full for the next suspend."""

from __future__ import annotations

import mmap
import os
from pathlib import Path

import pytest

from capsem.service import space
from capsem.store.layout import Layout
from capsem.store.locks import take_lock

MIB = 1 << 20


@pytest.mark.parametrize(
    ("changed", "base", "prepared", "expected"),
    [
        (50, 0, 0, 50),  # booted cold
        (50, 300, 0, 350),  # resumed just now: all of its memory is yet to be copied
        (50, 300, 300, 50),  # copied
        (50, 300, 400, 50),
        (500, 300, 0, 512),  # never more than all of its RAM
    ],
)
def test_what_a_suspend_may_need(changed: int, base: int, prepared: int, expected: int) -> None:
    found = space.needed(512 * MIB, changed * MIB, base * MIB, prepared * MIB)
    assert found == expected * MIB + space.MARGIN


def test_a_warning_begins_where_room_ends() -> None:
    assert space.warning("box", 100 * MIB, 100 * MIB) is None
    said = space.warning("box", 100 * MIB, 99 * MIB)
    assert said is not None
    assert "99 MiB are free, the next suspend of box may need 100 MiB" in said


def test_private_pages_that_were_written_count_and_those_of_a_file_do_not(tmp_path: Path) -> None:
    file = tmp_path / "ram"
    file.touch()
    os.truncate(file, 256 * MIB)
    before = space.changed_bytes(os.getpid())
    with file.open("r+b") as opened, mmap.mmap(opened.fileno(), 0, flags=mmap.MAP_PRIVATE) as memory:
        assert sum(memory[at] for at in range(0, 128 * MIB, 4096)) == 0
        read = space.changed_bytes(os.getpid())
        for at in range(0, 64 * MIB, 4096):
            memory[at] = 1
        written = space.changed_bytes(os.getpid())
    assert read - before < 8 * MIB
    assert 60 * MIB < written - read < 80 * MIB
    assert space.changed_bytes(2**22 + 1) == 0


def test_a_draft_is_its_makers(tmp_path: Path) -> None:
    layout = Layout(tmp_path)
    layout.create()
    files = layout.checkpoint("a" * 32)
    files.path.mkdir()
    files.memory.write_bytes(b"x" * MIB)
    assert space.draft_bytes(layout, os.getpid()) == 0
    lock = take_lock(files.draft, "it")
    try:
        assert space.draft_bytes(layout, os.getpid()) == MIB
        assert space.draft_bytes(layout, 1) == 0
    finally:
        lock.release()
