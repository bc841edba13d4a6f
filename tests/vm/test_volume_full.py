"""The VM's own disk is full, by what its owner put there: told of, nothing half-made is left, and the VM lives on."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from capsem.model.errors import GuestFailed, NotFound
from real_service import SMALL, Service

FILL = "cd /root && { head -c 1G /dev/zero >filler 2>/dev/null; true; } && sync && df --output=avail . | tail -1"


@pytest.fixture
def full(service: Service) -> Iterator[Service]:
    service.client.call("provision", body={"name": "full", "persistent": True, "disk_mb": 512, **SMALL})
    service.output("full", "echo old >keep")
    assert service.output("full", FILL).strip() == "0"
    yield service
    for each in ("full", "child"):
        with contextlib.suppress(NotFound):
            service.client.call("delete", vm_id=each)


def test_writes_are_refused_whole_and_the_vm_goes_on(full: Service, tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    (tree / "inner").mkdir(parents=True)
    (tree / "a").write_bytes(bytes(5_000_000))
    for content in ("new", "n" * 200_000):
        with pytest.raises(GuestFailed, match="No space left") as caught:
            full.client.call("write_file", vm_id="full", body={"path": "keep", "content": content})
        assert "full" in (caught.value.hint or "")
    for source, stdin in ((str(tree / "a"), b""), ("-", b"x"), (str(tree), b"")):
        done = full.cli("cp", source, "full:target", stdin=stdin)
        assert done.returncode == 1, done
        assert b"No space left" in done.stderr, done
        assert b"\nhint: the VM's own disk is full" in done.stderr, done
    # There is room again, but not for all of the tree.
    full.output("full", "truncate -s -3M filler && sync")
    assert full.cli("cp", str(tree), "full:target").returncode == 1
    assert full.output("full", "ls -A; cat keep") == "filler\nkeep\nold\n"
    full.output("full", "rm filler")
    assert full.cli("cp", str(tree), "full:target").returncode == 0
    full.client.call("write_file", vm_id="full", body={"path": "keep", "content": "new"})
    assert full.output("full", "cat keep; find target | sort") == "newtarget\ntarget/a\ntarget/inner\n"


def test_memory_is_not_given_up_for_it(full: Service) -> None:
    """Suspended, resumed and forked it is what it was, and so it is after a stop."""
    full.output("full", "echo in memory >/dev/shm/word")
    full.client.call("suspend", vm_id="full")
    assert full.client.call("resume", vm_id="full")["boot_kind"] == "warm"
    assert full.output("full", "cat /dev/shm/word keep; stat -c %n filler") == "in memory\nold\nfiller\n"
    full.client.call("fork", vm_id="full", body={"name": "child", "live": True})
    assert full.output("child", "cat /dev/shm/word keep; hostname") == "in memory\nold\nchild\n"
    full.client.call("stop", vm_id="full")
    full.client.call("resume", vm_id="full")
    assert full.output("full", "cat keep; rm filler; echo more >keep; cat keep") == "old\nmore\n"
