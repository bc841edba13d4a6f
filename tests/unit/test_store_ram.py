"""RAM files: what is written is read, zero pages take no room, and any flipped byte is found."""

import contextlib
import os
import zlib
from pathlib import Path

import pytest

from capsem.model.errors import Corrupt
from capsem.store import ram
from capsem.store.ram import PAGE, TRAILER, RamFile, RamIdentity, RamWriter, read_identity, verify

PAGES = 16
SIZE = PAGES * PAGE
IDENTITY = RamIdentity("box", "a" * 32, SIZE)


def page(value: int) -> bytes:
    return bytes([value]) * PAGE


def pieces(content: dict[int, bytes]) -> list[tuple[int, memoryview]]:
    """One piece for each page, in ascending order."""
    return [(number * PAGE, memoryview(content[number])) for number in sorted(content)]


class Files:
    def __init__(self, root: Path, name: str) -> None:
        self.ram, self.sums = root / f"{name}.ram", root / f"{name}.sums"
        self.digest = ""

    def make(self, content: dict[int, bytes], base: "Files | None" = None, *, compare: bool = False) -> "Files":
        writer = RamWriter(self.ram, self.sums, SIZE)
        if base is not None:
            source = RamFile(base.ram, base.sums)
            assert writer.copy(source)
            source.close()
        self.runs, self.written = writer.patch(pieces(content), compare=compare)
        self.digest = writer.finish(IDENTITY)
        writer.close()
        return self

    @property
    def content(self) -> bytes:
        return self.ram.read_bytes()[:SIZE]

    def verify(self) -> None:
        verify(self.ram, self.sums, SIZE, self.digest)


def test_what_is_written_is_read_and_the_sums_are_those_of_the_pages(tmp_path: Path) -> None:
    made = Files(tmp_path, "one").make({0: page(1), 1: page(2), 5: page(0), 15: page(3)})
    assert made.runs == [(0, 2 * PAGE), (5 * PAGE, PAGE), (15 * PAGE, PAGE)]
    assert made.written == 3 * PAGE
    assert made.content == page(1) + page(2) + bytes(13 * PAGE) + page(3)
    zero = zlib.crc32(bytes(PAGE))
    expected = [zlib.crc32(made.content[at : at + PAGE]) ^ zero for at in range(0, SIZE, PAGE)]
    found = made.sums.read_bytes()
    assert [int.from_bytes(found[at : at + 4], "little") for at in range(0, len(found), 4)] == expected
    made.verify()
    assert read_identity(made.ram, SIZE) == IDENTITY
    for path in (made.ram, made.sums):
        assert path.stat().st_mode & 0o777 == 0o600


def test_a_generation_begins_with_the_one_before_which_is_not_touched(tmp_path: Path) -> None:
    one = Files(tmp_path, "one").make({3: page(1), 4: page(2)})
    before = one.ram.read_bytes(), one.sums.read_bytes()
    two = Files(tmp_path, "two").make({4: page(9)}, one)
    assert two.content == bytes(3 * PAGE) + page(1) + page(9) + bytes(11 * PAGE)
    two.verify()
    assert (one.ram.read_bytes(), one.sums.read_bytes()) == before
    one.verify()


def test_what_is_there_already_is_not_written_again(tmp_path: Path) -> None:
    one = Files(tmp_path, "one").make({3: page(1), 4: page(2), 5: page(3)})
    two = Files(tmp_path, "two").make({2: page(0), 3: page(1), 4: page(9), 5: page(3)}, one, compare=True)
    assert (two.runs, two.written) == ([(4 * PAGE, PAGE)], PAGE)
    two.verify()


def extents(path: Path) -> list[tuple[int, int]]:
    with path.open("rb") as file:
        return list(ram.data_extents(file.fileno(), SIZE))


def test_pages_that_became_zero_are_holes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ram, "WORTH_A_HOLE", PAGE)
    one = Files(tmp_path, "one").make({number: page(7) for number in range(PAGES)})
    two = Files(tmp_path, "two").make({number: page(0) for number in range(4, 12)}, one, compare=True)
    assert two.written == 0
    assert extents(two.ram) == [(0, 4 * PAGE), (12 * PAGE, SIZE)]
    two.verify()
    three = Files(tmp_path, "three").make({}, two)
    assert extents(three.ram) == extents(two.ram)
    assert three.content == two.content


def test_few_pages_that_became_zero_keep_their_place(tmp_path: Path) -> None:
    one = Files(tmp_path, "one").make({number: page(7) for number in range(4, 12)})
    two = Files(tmp_path, "two").make({number: page(0) for number in range(2, 8)}, one, compare=True)
    assert two.content == bytes(8 * PAGE) + page(7) * 4 + bytes(4 * PAGE)
    assert extents(two.ram) == [(4 * PAGE, 12 * PAGE)], "and what was a hole is one"
    assert two.written == 0
    two.verify()


def test_a_file_system_without_holes_gets_zeroes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class NoHoles:
        def fallocate(self, *_arguments: object) -> int:
            ram.ctypes.set_errno(95)  # EOPNOTSUPP
            return -1

    one = Files(tmp_path, "one").make({2: page(7), 3: page(8)})
    monkeypatch.setattr(ram, "_libc", NoHoles())
    monkeypatch.setattr(ram, "WORTH_A_HOLE", PAGE)
    two = Files(tmp_path, "two").make({2: page(0)}, one)
    assert two.content == bytes(3 * PAGE) + page(8) + bytes(12 * PAGE)
    two.verify()


def test_a_copy_that_is_cancelled_says_so_and_can_be_made_again(tmp_path: Path) -> None:
    one = Files(tmp_path, "one").make({2: page(7), 9: page(8)})
    source, writer = RamFile(one.ram, one.sums), RamWriter(tmp_path / "r", tmp_path / "s", SIZE)
    told = iter([False, True])
    if not writer.copy(source, lambda: next(told)):  # a file system that shares extents cannot be interrupted
        assert writer.copy(source)
    assert writer.patch([], compare=False) == ([], 0)
    verify(tmp_path / "r", tmp_path / "s", SIZE, writer.finish(IDENTITY))
    assert (tmp_path / "r").read_bytes() == one.ram.read_bytes()


def test_who_gives_a_copy_up_never_waits_for_the_disk_for_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For no more than a part of it is ever on its way to the disk."""
    size = 40 << 20
    one = Files(tmp_path, "one").make({2: page(7)})
    source, writer = RamFile(one.ram, one.sums), RamWriter(tmp_path / "r", tmp_path / "s", size)
    os.truncate(one.ram, 0)
    with one.ram.open("r+b") as file:
        file.write(b"x" * size)
    on_its_way, most, real_copy, real_sync = 0, 0, os.copy_file_range, os.fsync

    def copy(*arguments: int) -> int:
        nonlocal on_its_way, most
        done = real_copy(*arguments)
        on_its_way += done
        most = max(most, on_its_way)
        return done

    def sync(fd: int) -> None:
        nonlocal on_its_way
        on_its_way = 0
        real_sync(fd)

    monkeypatch.setattr(ram.fcntl, "ioctl", refuse)  # as on a file system that does not share extents
    monkeypatch.setattr(os, "copy_file_range", copy)
    monkeypatch.setattr(os, "fsync", sync)
    monkeypatch.setattr(ram, "_COPY", 1 << 20)
    assert writer.copy(source)
    assert 0 < most <= 16 << 20
    assert on_its_way == 0


def refuse(*_: object) -> int:
    raise OSError(95, "Operation not supported")


def test_a_base_whose_checkpoint_was_removed_can_still_be_copied(tmp_path: Path) -> None:
    one = Files(tmp_path, "one").make({2: page(7)})
    content, source = one.content, RamFile(one.ram, one.sums)
    one.ram.unlink()
    one.sums.unlink()
    writer = RamWriter(tmp_path / "r", tmp_path / "s", SIZE)
    assert writer.copy(source)
    assert (tmp_path / "r").read_bytes()[:SIZE] == content


def test_neither_file_may_exist_and_a_failure_leaves_no_descriptor(tmp_path: Path) -> None:
    (tmp_path / "sums").touch()
    before = len(os.listdir("/proc/self/fd"))
    for names in (("sums", "new"), ("new", "sums")):
        with pytest.raises(FileExistsError):
            RamWriter(*(tmp_path / name for name in names), SIZE)
        (tmp_path / "new").unlink(missing_ok=True)
    assert len(os.listdir("/proc/self/fd")) == before


def flip(path: Path, at: int) -> None:
    with path.open("r+b", buffering=0) as file:
        (byte,) = os.pread(file.fileno(), 1, at)
        os.pwrite(file.fileno(), bytes([byte ^ 1 << at % 8]), at)


@pytest.mark.parametrize("at", [*range(0, SIZE, 1009), SIZE - 1])
def test_a_flipped_bit_of_ram_is_found(tmp_path: Path, at: int) -> None:
    """In pages with data, in holes, at the edges."""
    made = Files(tmp_path, "one").make({0: page(1), 1: os.urandom(PAGE), 15: page(3)})
    flip(made.ram, at)
    with pytest.raises(Corrupt, match=f"page {at // PAGE} has changed") as caught:
        made.verify()
    assert "cold" in (caught.value.hint or "")


@pytest.mark.parametrize("at", range(PAGES * 4))
def test_a_flipped_bit_of_the_sums_is_found(tmp_path: Path, at: int) -> None:
    made = Files(tmp_path, "one").make({0: page(1), 15: page(3)})
    flip(made.sums, at)
    with pytest.raises(Corrupt, match="not what was written"):
        made.verify()


@pytest.mark.parametrize("at", [*range(SIZE, SIZE + 120), SIZE + 2000, SIZE + TRAILER - 1])
def test_a_flipped_bit_of_the_identity_is_found(tmp_path: Path, at: int) -> None:
    made = Files(tmp_path, "one").make({0: page(1)})
    flip(made.ram, at)
    with contextlib.suppress(Corrupt):
        assert read_identity(made.ram, SIZE) != IDENTITY


@pytest.mark.parametrize("size", [0, 1, SIZE, SIZE + TRAILER - 1, SIZE + TRAILER + 1, 2 * SIZE + TRAILER])
def test_a_file_of_another_size_is_refused(tmp_path: Path, size: int) -> None:
    made = Files(tmp_path, "one").make({0: page(1)})
    os.truncate(made.ram, size)
    with pytest.raises(Corrupt, match="size"):
        read_identity(made.ram, SIZE)


def test_no_trailer_makes_anything_else_than_corrupt(tmp_path: Path) -> None:
    path = tmp_path / "ram"
    for body in (b"", b"[]", b"1", b"{}", b'{"format":2}', b'{"format":1}', b'{"format":1,"x":1}', b"\xff" * TRAILER):
        path.write_bytes(bytes(SIZE) + body.ljust(TRAILER, b"\0"))
        with pytest.raises(Corrupt):
            read_identity(path, SIZE)
