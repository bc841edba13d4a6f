"""What a restored guest says of itself: the mark that memory and volume carry, the volume's writes, the kernel's log."""

import errno
import os
from pathlib import Path

import pytest

from capsem.guest.health import Health

MARK, OTHER = "a" * 32, "b" * 32


@pytest.fixture
def volume(tmp_path: Path) -> Path:
    try:
        os.close(os.open(tmp_path / "probe", os.O_WRONLY | os.O_CREAT | os.O_DIRECT))
    except OSError:
        pytest.skip("this file system has no direct I/O")
    return tmp_path


@pytest.fixture
def health(volume: Path) -> Health:
    it = Health(str(volume))
    it.sync(MARK)
    kernel_log(it, [])  # the host's is no business of ours
    return it


def test_a_machine_with_one_mark_is_well_again_and_again(health: Health) -> None:
    assert health.examine(MARK) == ([], [])
    assert health.examine(MARK) == ([], [])


@pytest.mark.parametrize("on_disk", [OTHER, "", "a" * 31])
def test_a_volume_of_another_instant_is_found(health: Health, volume: Path, on_disk: str) -> None:
    (volume / ".capsem-mark").write_bytes(on_disk.encode().ljust(4096, b"\0"))
    (problem,), _ = health.examine(MARK)
    assert problem.startswith("memory and volume are not of one checkpoint")
    assert (on_disk[:12] or "none") in problem


def test_memory_of_another_instant_is_found(health: Health) -> None:
    (problem,), _ = health.examine(OTHER)
    assert f"expected {OTHER[:12]}, memory has {MARK[:12]}" in problem


def test_a_memory_that_never_left_a_mark_is_found(volume: Path) -> None:
    (volume / ".capsem-mark").write_bytes(MARK.encode().ljust(4096, b"\0"))
    (problem,), _ = Health(str(volume)).examine(MARK)
    assert "memory has none" in problem


def test_without_a_mark_only_the_volume_is_tried(health: Health, volume: Path) -> None:
    (volume / ".capsem-mark").write_bytes(OTHER.encode().ljust(4096, b"\0"))
    assert health.examine(None) == ([], [])


def test_a_volume_that_cannot_be_read_or_written_is_a_problem(health: Health, volume: Path) -> None:
    os.close(health._fd)
    assert "cannot be written" in health.examine(MARK)[0][0]
    assert "cannot be written" in health.examine(None)[0][0]
    (volume / ".capsem-mark").unlink()
    (volume / ".capsem-mark").mkdir()
    assert "cannot be written" in Health(str(volume)).examine(None)[0][0]
    with pytest.raises(IsADirectoryError):
        Health(str(volume)).sync(MARK)


@pytest.fixture
def full(monkeypatch: pytest.MonkeyPatch) -> None:
    def pwrite(_fd: int, _data: object, _at: int) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "pwrite", pwrite)


@pytest.mark.usefixtures("full")
def test_a_full_volume_is_flushed_without_a_mark(volume: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[bool] = []
    monkeypatch.setattr(os, "sync", lambda: synced.append(True))
    with pytest.raises(OSError, match="No space left"):
        Health(str(volume)).sync(MARK)
    assert synced


def test_a_full_volume_is_no_problem_unless_it_has_to_have_a_mark(
    health: Health, volume: Path, request: pytest.FixtureRequest
) -> None:
    request.getfixturevalue("full")
    assert health.examine(None) == ([], ["the volume is full: it could not be tried whether it can be written"])
    assert "cannot be written" in health.examine(MARK)[0][0]


def test_a_mark_that_somebody_removed_is_still_the_one(health: Health, volume: Path) -> None:
    (volume / ".capsem-mark").unlink()
    assert health.examine(MARK) == ([], [])
    health.sync(OTHER)
    assert (volume / ".capsem-mark").read_bytes().startswith(OTHER.encode())


def test_the_mark_is_on_the_disk_when_sync_returns(health: Health, volume: Path) -> None:
    health.sync(OTHER)
    assert (volume / ".capsem-mark").read_bytes() == OTHER.encode().ljust(4096, b"\0")
    assert health._read() == OTHER
    assert (volume / ".capsem-mark").stat().st_mode & 0o777 == 0o600


def kernel_log(health: Health, records: list[str]) -> None:
    """A log with these records: one each read, as /dev/kmsg gives them."""
    read, write = os.pipe2(os.O_DIRECT | os.O_NONBLOCK)
    for record in records:
        os.write(write, record.encode())
    health._log = read
    os.set_blocking(write, False)
    health._keep = write  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "line",
    [
        "I/O error, dev vda, sector 8 op 0x1:(WRITE)",
        "EXT4-fs error (device vda): ext4_find_entry:1463",
        "Aborting journal on device vda-8.",
        "virtio_blk virtio2: [vda] new size",
    ],
)
def test_the_kernel_s_complaints_about_the_volume_are_problems(health: Health, line: str) -> None:
    kernel_log(health, [f"3,100,5000,-;{line}\n SUBSYSTEM=block\n", "6,101,5001,-;EXT4-fs (vda): mounted\n"])
    assert health.examine(MARK) == ([line], [])


def test_its_other_complaints_are_told_of_and_no_obstacle(health: Health) -> None:
    kernel_log(health, ["2,1,1,-;clocksource: timekeeping watchdog\n", "4,2,2,-;a warning\n", "junk"])
    assert health.examine(MARK) == ([], ["clocksource: timekeeping watchdog"])


def test_a_log_that_could_not_be_followed_is_told_of(health: Health) -> None:
    health._log = -1
    assert health.examine(MARK) == ([], ["the kernel's log was not followed: what it complained of is not known"])


def test_there_may_be_no_volume() -> None:
    health = Health("")
    health.sync(MARK)
    health._log = -1
    assert health.examine(OTHER) == ([], [])
