"""`capsem stress` on real VMs: a short one here, a long one by `make soak`; and Ctrl-C."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from real_service import BIN, wait_for


@pytest.fixture
def place() -> Iterator[Path]:
    # A short path: sockets have to fit.
    with tempfile.TemporaryDirectory(prefix="capsem-vm-") as text:
        yield Path(text)


def started(place: Path, *options: str) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "TMPDIR": str(place)}
    return subprocess.Popen(
        [BIN / "capsem", "stress", "--json", *options], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def processes(place: Path) -> list[str]:
    """Whatever has a file in there among its arguments."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            with contextlib.suppress(OSError):
                found.append((entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace"))
    return [line for line in found if f"{place}/" in line]


@pytest.mark.parametrize(
    "options",
    [
        ("--vms", "2", "--cycles", "6", "--clients", "4", "--seed", "7"),
        ("--vms", "3", "--cycles", "34", "--clients", "3", "--light"),
        pytest.param(("--vms", "3", "--cycles", "1000", "--clients", "3", "--light"), marks=pytest.mark.soak),
        pytest.param(("--vms", "3", "--duration", "20m", "--clients", "6", "--faults"), marks=pytest.mark.soak),
    ],
)
def test_nothing_is_lost(place: Path, options: tuple[str, ...]) -> None:
    with started(place, *options) as process:
        out, err = process.communicate()
    report = json.loads(out)
    assert (process.returncode, report["anomalies"]) == (0, []), (err, report["anomalies"])
    assert report["clean"]
    assert report["totals"]["checks"] > 0
    assert list(place.iterdir()) == []
    assert processes(place) == []


@pytest.mark.parametrize("services", ["1", "3"])
def test_the_gate_is_what_keeps_simulated_vms_whole(place: Path, services: str) -> None:
    sim = ("--hypervisor", "sim", "--services", services, "--vms", "3" if services == "1" else "1", "--cycles", "8")
    with started(place, *sim) as process:
        out, err = process.communicate()
    assert process.returncode == 0, err
    assert json.loads(out)["clean"]
    with started(place, *sim, "--cycles", "1000", "--no-gate") as process:
        out, err = process.communicate()
    report = json.loads(out)
    assert process.returncode == 1, err
    assert any("overlay-write-failed" in each["fingerprints"] for each in report["anomalies"])
    assert all(Path(each["evidence"]).is_dir() for each in report["anomalies"])
    assert b"WITHOUT THE GATE" in err
    assert processes(place) == []


def test_an_interrupt_ends_it_with_the_report_so_far(place: Path) -> None:
    with started(place, "--vms", "1", "--clients", "1") as process:
        wait_for(lambda: any("qemu-system" in line for line in processes(place)))
        process.send_signal(signal.SIGINT)
        out, err = process.communicate()
    report = json.loads(out)
    assert report["interrupted"], err
    assert report["anomalies"] == [], err
    assert process.returncode == 130
    assert list(place.iterdir()) == []
    assert processes(place) == []
