"""Reading volumes that e2fsprogs made, with journals that it wrote, and what is left of them after damage."""

from __future__ import annotations

import os
import random
import struct
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from capsem.image.volume import format_volume
from capsem.model.errors import CapsemError, Corrupt, NotFound, PermissionDenied
from capsem.model.spec import DISK_MB
from capsem.offline.ext4 import FileSystem
from capsem.offline.journal import MAGIC
from capsem.offline.workspace import Workspace

BLOCK = 4096


def debugfs(volume: Path, *commands: str) -> str:
    text = "\n".join((*commands, "quit")) + "\n"
    done = subprocess.run(
        ["/usr/sbin/debugfs", "-w", "-f", "-", str(volume)], input=text, capture_output=True, text=True, check=True
    )
    assert "while" not in done.stderr, done.stderr
    return done.stdout


def reader(volume: Path) -> Callable[[int, int], bytes]:
    def read(offset: int, size: int) -> bytes:
        with volume.open("rb") as file:
            return os.pread(file.fileno(), size, offset).ljust(size, b"\0")

    return read


def content(volume: Path, path: str) -> bytes:
    file = Workspace(reader(volume)).open(path)
    data = b"".join(file.content)
    assert len(data) == file.size
    return data


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("volume")
    volume = directory / "volume.raw"
    format_volume(volume, DISK_MB.start)
    holes = directory / "holes"
    with holes.open("wb") as file:  # more extents than an inode holds
        for n in range(40):
            file.seek(n * 3 * BLOCK)
            file.write(bytes([n + 1]) * BLOCK)
        file.truncate(40 * 3 * BLOCK + 5)
    (directory / "one").write_bytes(b"1" * BLOCK)
    debugfs(
        volume,
        "cd workspace",
        f"write {directory}/holes holes",
        f"write {directory}/one one",
        "mkdir sub",
        *(f"write {directory}/one sub/{'n' * 200}{n}" for n in range(60)),
        "symlink inside sub",
        "symlink absolute /root/sub",
        "symlink outside /rooted/sub",
        "symlink upwards sub/../../upper",
        f"symlink long {'x/../' * 30}sub",
        "symlink last one",
    )
    return volume


@pytest.fixture
def volume(made: Path, tmp_path: Path) -> Path:
    subprocess.run(["cp", "--sparse=always", made, tmp_path / "v"], check=True)
    return tmp_path / "v"


def test_content_with_holes(volume: Path) -> None:
    expected = b"".join(bytes([n + 1]) * BLOCK + bytes(2 * BLOCK) for n in range(40)) + bytes(5)
    assert content(volume, "holes") == expected


def test_listing(volume: Path) -> None:
    entries, truncated = Workspace(reader(volume)).list("", 2)
    assert not truncated
    assert {path for path, *_ in entries if "/" not in path} == {"holes", "one", "sub"}
    assert {path for path, *_ in entries if "/" in path} == {f"sub/{'n' * 200}{n}" for n in range(60)}
    assert all(kind == "file" and size == BLOCK for path, kind, size, _ in entries if path.startswith("sub/"))


@pytest.mark.parametrize("link", ["inside", "absolute"])
def test_links_that_stay_inside_are_followed(volume: Path, link: str) -> None:
    assert content(volume, f"{link}/{'n' * 200}7") == b"1" * BLOCK


@pytest.mark.parametrize("path", ["outside/x", "upwards/x", "last", "inside"])
def test_links_that_lead_out_and_last_links_are_not(volume: Path, path: str) -> None:
    with pytest.raises(PermissionDenied):
        Workspace(reader(volume)).open(path)


def test_what_a_link_passes_has_to_exist(volume: Path) -> None:
    with pytest.raises(NotFound):
        Workspace(reader(volume)).open(f"long/{'n' * 200}7")


def journaled(volume: Path, tmp_path: Path, *writes: tuple[int, bytes], then: tuple[str, ...] = ()) -> None:
    commands = []
    for number, (block, data) in enumerate(writes):
        (tmp_path / f"w{number}").write_bytes(data)
        commands.append(f"jw -b {block} {tmp_path}/w{number}")
    debugfs(volume, "jo -c", *commands, *then, "jc")


def block_of(volume: Path, path: str) -> int:
    return int(debugfs(volume, f"blocks {path}").split("\n")[1].split()[0])


def test_a_journal_is_replayed_in_memory_as_e2fsck_would(volume: Path, tmp_path: Path) -> None:
    block = block_of(volume, "/workspace/one")
    masked = struct.pack(">I", MAGIC) + b"3" * (BLOCK - 4)
    journaled(volume, tmp_path, (block, b"2" * BLOCK), (block, masked))
    assert reader(volume)(block * BLOCK, BLOCK) == b"1" * BLOCK
    assert content(volume, "one") == masked
    assert reader(volume)(block * BLOCK, BLOCK) == b"1" * BLOCK
    subprocess.run(["/usr/sbin/e2fsck", "-fy", volume], capture_output=True, check=False)
    assert reader(volume)(block * BLOCK, BLOCK) == masked
    assert content(volume, "one") == masked


def test_a_revoked_block_is_what_the_disk_says(volume: Path, tmp_path: Path) -> None:
    block = block_of(volume, "/workspace/one")
    journaled(volume, tmp_path, (block, b"2" * BLOCK), then=(f"jw -r {block}",))
    assert content(volume, "one") == b"1" * BLOCK


def test_a_transaction_without_its_commit_does_not_count(volume: Path, tmp_path: Path) -> None:
    block = block_of(volume, "/workspace/one")
    journaled(volume, tmp_path, (block, b"2" * BLOCK), (block, b"3" * BLOCK))
    with volume.open("r+b") as file:  # the second commit block is the last one of the journal
        text = os.pread(file.fileno(), 64 << 20, 0)
        commits = []
        at = text.find(struct.pack(">II", MAGIC, 2))
        while at >= 0:
            if at % BLOCK == 0:
                commits.append(at)
            at = text.find(struct.pack(">II", MAGIC, 2), at + 1)
        assert len(commits) == 2
        os.pwrite(file.fileno(), bytes(BLOCK), commits[-1])
    assert content(volume, "one") == b"2" * BLOCK


def test_damage_is_said_and_nothing_else_happens(volume: Path, tmp_path: Path) -> None:
    """Whatever the bytes: an answer or one of our errors, in bounded time."""
    journaled(volume, tmp_path, (block_of(volume, "/workspace/one"), b"2" * BLOCK))
    read = reader(volume)
    touched: set[int] = set()

    def remember(offset: int, size: int) -> bytes:
        touched.update(range(offset // 64, (offset + size) // 64))
        return read(offset, size)

    def look(read: Callable[[int, int], bytes]) -> None:
        workspace = Workspace(read)
        for path, kind, size, _ in workspace.list("", 6)[0]:
            if kind == "file" and size < 1 << 24:
                for _ in workspace.open(path).content:
                    pass

    look(remember)
    spots, dice = sorted(touched), random.Random(4711)
    failed = 0
    for _ in range(120):
        at = dice.choice(spots) * 64 + dice.randrange(64)
        value = dice.choice((b"\0", b"\xff", bytes([dice.randrange(256)])))

        def damaged(offset: int, size: int, at: int = at, value: bytes = value) -> bytes:
            data = read(offset, size)
            return data[: at - offset] + value + data[at - offset + 1 :] if offset <= at < offset + size else data

        try:
            look(damaged)
        except CapsemError:
            failed += 1
    assert failed


def test_other_file_systems_are_refused(tmp_path: Path) -> None:
    with pytest.raises(Corrupt, match="no ext4"):
        FileSystem(lambda _offset, size: bytes(size))
    other = tmp_path / "inline"
    other.touch()
    os.truncate(other, 16 << 20)
    subprocess.run(["/usr/sbin/mke2fs", "-q", "-t", "ext4", "-O", "inline_data", other], check=True)
    with pytest.raises(Corrupt, match="features"):
        FileSystem(reader(other))
