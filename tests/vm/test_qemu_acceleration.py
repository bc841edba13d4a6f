"""The acceleration probe, with its guest."""

from __future__ import annotations

import asyncio
import re
import stat
from pathlib import Path

import pytest
from qemu_bench import our_children

from capsem.hypervisor.driver import Accelerator
from capsem.hypervisor.qemu import probe, probe_guest
from capsem.hypervisor.qemu.driver import QemuDriver
from capsem.hypervisor.qemu.process import find_qemu

pytestmark = pytest.mark.vm


def test_the_probes_guest_passes_under_emulation() -> None:
    before = our_children()
    trial = asyncio.run(probe.run_guest(find_qemu(), Accelerator.TCG))
    assert trial.passed, trial
    assert trial.stage == "leaving"
    assert our_children() == before


def test_a_guest_that_hangs_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe_guest, "rom", lambda: b"\xeb\xfe" * 0x8000)  # jmp to itself, wherever one enters
    before = our_children()
    trial = asyncio.run(probe.run_guest(find_qemu(), Accelerator.TCG))
    assert trial.timed_out
    assert trial.stage == "at its first instruction"
    assert our_children() == before


def test_the_probe_of_this_host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the verdict here: it has a reason, and the second time it comes from the cache."""
    before = our_children()

    async def never(*_: object) -> None:
        pytest.fail("the cached verdict was not used")

    async def twice() -> None:
        first = await QemuDriver(tmp_path / "cache").verdict()
        assert first.reason
        assert re.fullmatch(r"\d+\.\d+\.\d+", first.qemu_version)
        monkeypatch.setattr(probe, "run_guest", never)
        monkeypatch.setattr(probe, "query_version", never)
        again = QemuDriver(tmp_path / "cache")
        assert await again.verdict() == first
        assert await again.accelerator() is first.accelerator

    asyncio.run(twice())
    assert our_children() == before
    assert stat.S_IMODE((tmp_path / "cache" / "accelerator.json").stat().st_mode) == 0o600
