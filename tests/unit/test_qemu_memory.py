"""A process's private mapping of a file, looked at from outside: its changed pages, and only those."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis.strategies import lists, sampled_from, tuples

from capsem.hypervisor.qemu import pagemap
from capsem.hypervisor.qemu.memory import GuestMemory, Snapshot, stream
from capsem.store.ram import PAGE

PAGES = 2048
SIZE = PAGES * PAGE

# Maps its file privately, and does as it is told: "w<page> <value>" writes, "r<page>" reads, "z<page>" zeroes, "q" ends.
CHILD = """
import mmap, sys
with open(sys.argv[1], "rb") as file:
    memory = mmap.mmap(file.fileno(), int(sys.argv[2]), flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE)
print("mapped", flush=True)
for line in sys.stdin:
    what, page, *value = line[0], *line[1:].split()
    at = int(page) * 4096
    if what == "w":
        memory[at + 7] = int(value[0])
    elif what == "z":
        memory[at : at + 4096] = bytes(4096)
    elif what == "r":
        memory[at]
    print("done", flush=True)
"""


class Child:
    """A process that stands for a VMM."""

    def __init__(self, path: Path) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", CHILD, path, str(SIZE)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self._answer() == "mapped\n"

    def _answer(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline()

    def tell(self, word: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{word}\n")
        self.process.stdin.flush()
        assert self._answer() == "done\n"

    def end(self) -> None:
        if self.process.returncode is not None:
            return
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe is not None
            pipe.close()


def ram_file(path: Path) -> Path:
    """Every other page is a hole."""
    with path.open("wb") as file:
        file.truncate(SIZE + PAGE)  # an identity behind it, which is not mapped
        for number in range(0, PAGES, 2):
            os.pwrite(file.fileno(), bytes([number % 251 + 1]) * PAGE, number * PAGE)
    return path


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return ram_file(tmp_path / "memory.ram")


@pytest.fixture
def child(path: Path) -> Iterator[Child]:
    it = Child(path)
    yield it
    it.end()


def pages(memory: GuestMemory) -> set[int]:
    return {at // PAGE for offset, length in memory.changed() for at in range(offset, offset + length, PAGE)}


def test_what_is_read_has_not_changed_and_what_is_written_has(child: Child, path: Path) -> None:
    memory = GuestMemory(child.process.pid, path, SIZE)
    assert memory.changed() == []
    for number in (0, 1, 2, 3, 100, 101):
        child.tell(f"r{number}")
    assert memory.changed() == []
    for number in (1, 2, 3, 100, PAGES - 1):
        child.tell(f"w{number} 9")
    assert memory.changed() == [(PAGE, 3 * PAGE), (100 * PAGE, PAGE), ((PAGES - 1) * PAGE, PAGE)]
    child.tell("w2 9")  # the same again
    child.tell("z100")  # now a zero page, which the file's is not
    assert pages(memory) == {1, 2, 3, 100, PAGES - 1}


Way = Callable[[], list[tuple[int, int]]]


@pytest.fixture(params=[pagemap.scan, pagemap.read])
def way(request: pytest.FixtureRequest, child: Child, path: Path) -> Iterator[Way]:
    """What the child has changed, by either of the two ways to ask the kernel."""
    file = os.open(f"/proc/{child.process.pid}/pagemap", os.O_RDONLY)
    start = GuestMemory(child.process.pid, path, SIZE)._start
    try:
        pagemap.scan(file, start, PAGE)
    except OSError as error:
        if error.errno != errno.ENOTTY:
            raise
        if request.param is pagemap.scan:
            pytest.skip("this kernel is older than 6.7: it has one way")
    yield lambda: request.param(file, start, SIZE)
    os.close(file)


def test_many_runs_are_found_either_way(way: Way, child: Child) -> None:
    """More than the kernel has room for in one go: it then says wrongly where it stopped."""
    changed = [*range(0, 1600, 2), *range(1700, 1800), PAGES - 1]
    for number in changed:
        child.tell(f"w{number} 9")
    expected = [(at * PAGE, PAGE) for at in range(0, 1600, 2)]
    assert way() == [*expected, (1700 * PAGE, 100 * PAGE), ((PAGES - 1) * PAGE, PAGE)]


def test_more_runs_than_are_taken_at_a_time(way: Way, child: Child, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pagemap, "_REGIONS", 3)
    monkeypatch.setattr(pagemap, "_READ", 64 * 8)
    for count, number in enumerate((5, 7, 9, 70, 128, 130, 400), 1):
        child.tell(f"w{number} 9")
        assert [offset // PAGE for offset, _ in way()] == [5, 7, 9, 70, 128, 130, 400][:count]


def test_of_a_process_that_has_ended_nothing_is_told(way: Way, child: Child) -> None:
    """It has not changed nothing: the scan would say so, and a checkpoint would be made of the memory before."""
    child.tell("w5 5")
    assert way() == [(5 * PAGE, PAGE)]
    child.end()
    with pytest.raises(OSError, match=r"has ended|No such process"):
        way()


def test_its_content_is_read_whole_and_the_file_stays(child: Child, path: Path) -> None:
    before = path.read_bytes()
    expected = bytearray(before[:SIZE])
    for number in range(10, 400, 3):
        child.tell(f"w{number} {number % 256}")
        expected[number * PAGE + 7] = number % 256
    child.tell("z12")
    expected[12 * PAGE : 13 * PAGE] = bytes(PAGE)
    memory = GuestMemory(child.process.pid, path, SIZE)
    snapshot = Snapshot(memory, PAGE)  # more has changed than was expected
    assert snapshot.take() == (len(range(10, 400, 3)) + 1) * PAGE
    for pieces in (snapshot.pieces(), stream(memory)):
        found = bytearray(before[:SIZE])
        for offset, data in pieces:
            found[offset : offset + len(data)] = data
            data.release()
        assert found == expected
    child.tell("w500 1")  # after the snapshot
    assert all(offset < 500 * PAGE for offset, _data in snapshot.pieces())
    assert path.read_bytes() == before


def test_a_process_that_does_not_map_the_file_or_is_gone_is_told_of(child: Child, path: Path, tmp_path: Path) -> None:
    with pytest.raises(OSError, match="does not map"):
        GuestMemory(child.process.pid, ram_file(tmp_path / "other.ram"), SIZE)
    with pytest.raises(OSError, match="does not map"):
        GuestMemory(child.process.pid, path, 2 * SIZE)
    child.tell("w5 5")
    memory = GuestMemory(child.process.pid, path, SIZE)
    child.end()
    with pytest.raises(OSError, match="No such"):
        memory.changed()
    with pytest.raises(OSError, match="cannot be read"):
        memory.read([(5 * PAGE, PAGE)], memoryview(bytearray(PAGE)))


writes = lists(tuples(sampled_from(range(PAGES)), sampled_from("wrz")), max_size=60)


@settings(max_examples=25, deadline=None)
@given(writes)
def test_any_order_of_reads_and_writes(words: list[tuple[int, str]]) -> None:
    with tempfile.TemporaryDirectory() as text:
        path = ram_file(Path(text) / "ram")
        child = Child(path)
        try:
            memory, written = GuestMemory(child.process.pid, path, SIZE), set()
            for number, what in words:
                child.tell(f"{what}{number} 3")
                written |= {number} if what in "wz" else set()
            assert pages(memory) == written
            assert [offset for offset, _ in memory.changed()] == sorted(offset for offset, _ in memory.changed())
        finally:
            child.end()
