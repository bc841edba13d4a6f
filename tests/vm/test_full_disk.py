"""The host's disk is full: nothing half-made is left, a VM that writes stands still, says so, and loses nothing."""

from __future__ import annotations

import contextlib
import hashlib
import os
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from small_disk import MIB, Disk, mounted

from capsem.model.errors import CapsemError
from real_service import BIN, SMALL, Service, running_service, wait_for


class FullService(NamedTuple):
    """A service, and the disk of its run directory."""

    service: Service
    disk: Disk

    def fill(self, free: int = 0) -> None:
        self.disk.fill(free)

    def empty(self) -> None:
        self.disk.empty()


@contextlib.contextmanager
def on_small_disk(size_mb: int) -> Iterator[FullService]:
    """A service whose run directory is a file system of its own."""
    with (
        tempfile.TemporaryDirectory(prefix="capsem-vm-") as text,
        mounted(Path(text) / "run", size_mb) as disk,
        running_service(Path(text)) as service,
    ):
        yield FullService(service, disk)


@pytest.fixture(scope="module")
def disk() -> Iterator[FullService]:
    with on_small_disk(600) as it:
        it.service.client.call("provision", body={"name": "box", "persistent": True, **SMALL})
        it.service.output("box", "true")
        yield it


def warning(service: Service) -> str:
    """What the VM is said to suffer from; that there may be no room to suspend it comes before that there is none."""
    return str(service.client.call("info", vm_id="box").get("warning", ""))


def test_a_vm_that_writes_stands_still_and_goes_on(disk: FullService, tmp_path: Path) -> None:
    service, size = disk.service, 48 * MIB
    disk.fill(free=12 * MIB)
    data = os.urandom(size)
    source = tmp_path / "data"
    source.write_bytes(data)
    with (
        source.open("rb") as stdin,
        subprocess.Popen(
            [BIN / "capsem", "exec", "-i", "box", "cat >big && sync && echo written"],
            env=service.env,
            stdin=stdin,
            stdout=subprocess.PIPE,
        ) as writing,
    ):
        wait_for(lambda: "disk is full" in warning(service))
        assert writing.poll() is None
        assert "warning: the host's disk is full" in service.cli("list").stdout.decode()
        assert "disk is full" in service.cli("logs", "box").stdout.decode().partition("== warning ==")[2]
        assert service.status("box") == "Running"
        disk.empty()
        assert writing.stdout is not None
        assert writing.stdout.read() == b"written\n"
    wait_for(lambda: "disk is full" not in warning(service))
    service.output("box", "echo 3 >/proc/sys/vm/drop_caches")
    assert service.output("box", "sha256sum <big").split()[0] == hashlib.sha256(data).hexdigest()
    assert service.output("box", "dmesg | grep -ci 'i/o error' || true").strip() == "0"
    service.output("box", "rm big && sync")


def test_what_needs_room_is_refused_whole_and_what_needs_none_is_done(disk: FullService) -> None:
    service = disk.service
    disk.fill()
    before = sorted(service.run_dir.rglob("*"))
    for words in (("create", "-n", "other"), ("run", "true"), ("fork", "box", "other"), ("create", "--from", "box")):
        done = service.cli(*words)
        assert done.returncode == 1, words
        assert b"No space left" in done.stderr, words
        assert b"\nhint: " in done.stderr, words
    assert sorted(service.run_dir.rglob("*")) == before
    assert service.output("box", "echo still here") == "still here\n"
    # The record cannot be written; the VM stops all the same, and starts again when there is room.
    assert service.cli("stop", "box").returncode == 0
    assert service.status("box") == "Stopped"
    with pytest.raises(CapsemError):
        service.client.call("resume", vm_id="box")
    disk.empty()
    assert service.cli("resume", "box").stdout == b"box\n"
    assert service.output("box", "echo again") == "again\n"


def test_a_vm_can_be_deleted_to_make_room(disk: FullService) -> None:
    service = disk.service
    disk.fill()
    assert service.cli("delete", "box").returncode == 0
    assert list((service.run_dir / "store/layers").iterdir()) == []
    assert service.client.call("list")["sandboxes"] == []
