"""The empty volume. e2fsprogs needs neither root nor a network; where it is missing these tests are passed over."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from capsem.guest import health
from capsem.image.host import Host
from capsem.image.manifest import describe
from capsem.image.volume import format_volume
from capsem.model.errors import HostNotReady, InvalidInput, MachineFailed

SBIN = "/usr/sbin:/sbin:/usr/bin:/bin"
needs_e2fsprogs = pytest.mark.skipif(shutil.which("mke2fs", path=SBIN) is None, reason="e2fsprogs is not installed")


def ask(tool: str, *arguments: str) -> str:
    done = subprocess.run(
        [shutil.which(tool, path=SBIN) or tool, *arguments], capture_output=True, check=False, text=True
    )
    return done.stdout


@needs_e2fsprogs
class TestMade:
    def test_is_sparse_and_the_same_every_time(self, tmp_path: Path) -> None:
        for name in ("a", "b"):
            format_volume(tmp_path / name, 16 * 1024)
        assert (tmp_path / "a").stat().st_size == 16 << 30
        assert (tmp_path / "a").stat().st_blocks * 512 < 8 << 20
        digests = {describe(tmp_path / name, sparse=True).digest for name in ("a", "b")}
        assert len(digests) == 1

    def test_holds_the_directories_the_guest_mounts_from(self, tmp_path: Path) -> None:
        format_volume(tmp_path / "v", 512)
        modes = {
            line.split()[-1]: line.split()[1]
            for line in ask("debugfs", "-R", "ls -l /", str(tmp_path / "v")).splitlines()
            if line
        }
        assert modes["upper"] == "40755"  # becomes the guest's /
        assert modes["work"] == modes["workspace"] == "40700"

    def test_holds_a_mark_that_is_rewritten_without_taking_room(self, tmp_path: Path) -> None:
        format_volume(tmp_path / "v", 512)
        said = ask("debugfs", "-R", f"stat {health.MARK}", str(tmp_path / "v"))
        assert "Mode:  0600" in said
        assert f"Size: {health.BLOCK}" in said
        assert "Blockcount: 8" in said

    def test_gives_the_guest_nothing_to_initialise(self, tmp_path: Path) -> None:
        format_volume(tmp_path / "v", 1024)
        groups = [
            line
            for line in ask("dumpe2fs", str(tmp_path / "v")).splitlines()
            if line[:6] == "Group " and line[6].isdigit()
        ]
        assert groups
        assert all("ITABLE_ZEROED" in line for line in groups)

    @pytest.mark.parametrize("size", [512, 1024 * 1024])
    def test_is_clean_at_any_size(self, tmp_path: Path, size: int) -> None:
        format_volume(tmp_path / "v", size)
        assert "non-contiguous" in ask("e2fsck", "-fn", str(tmp_path / "v"))  # the summary of a clean check


@pytest.mark.parametrize("size", [0, 511, -1, 1024 * 1024 + 1])
def test_sizes_out_of_range_are_refused(tmp_path: Path, size: int) -> None:
    with pytest.raises(InvalidInput):
        format_volume(tmp_path / "v", size)
    assert list(tmp_path.iterdir()) == []


class Broken(Host):
    def __init__(self, error: Exception, tool: str) -> None:
        self.error, self.tool = error, tool

    def require(self, *tools: str) -> None:
        if self.tool in tools and isinstance(self.error, HostNotReady):
            raise self.error

    def run(self, argv, **_keywords):  # type: ignore[no-untyped-def, override]
        if argv[0] == self.tool:
            raise self.error
        return b""


@pytest.mark.parametrize("tool", ["mke2fs", "debugfs"])
@pytest.mark.parametrize("error", [MachineFailed("no"), HostNotReady("no"), KeyboardInterrupt()])
def test_a_failure_leaves_nothing(tmp_path: Path, tool: str, error: Exception) -> None:
    with pytest.raises(type(error)):
        format_volume(tmp_path / "v", 512, host=Broken(error, tool))
    assert list(tmp_path.iterdir()) == []


def test_an_existing_file_is_never_formatted(tmp_path: Path) -> None:
    (tmp_path / "v").write_bytes(b"somebody's data")
    with pytest.raises(FileExistsError):
        format_volume(tmp_path / "v", 512, host=Broken(MachineFailed("no"), ""))
    assert (tmp_path / "v").read_bytes() == b"somebody's data"
