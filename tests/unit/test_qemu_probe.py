"""The acceleration probe, but for running its guest (tests/vm)."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace
from pathlib import Path

import pytest

from capsem.hypervisor.driver import Accelerator
from capsem.hypervisor.qemu import probe, probe_guest
from capsem.hypervisor.qemu.probe import Trial, Verdict, judge

PASSED = Trial(passed=True, timed_out=False, stage="leaving", seconds=0.06, stderr="")


@pytest.mark.parametrize(
    ("trial", "accelerator", "words"),
    [
        (PASSED, Accelerator.KVM, "60 ms"),
        (
            replace(PASSED, passed=False, timed_out=True, stage="counting in long mode"),
            Accelerator.TCG,
            "counting in long mode",
        ),
        (
            replace(PASSED, passed=False, stderr="qemu-system-x86_64: error: failed to set MSR 0x10a"),
            Accelerator.TCG,
            "MSR 0x10a",
        ),
        (replace(PASSED, passed=False, stage="entering long mode"), Accelerator.TCG, "entering long mode"),
        (
            replace(PASSED, stderr="warning: host doesn't support requested feature: CPUID.07H:EBX.avx2 [bit 5]"),
            Accelerator.TCG,
            "lacks avx2",
        ),
    ],
)
def test_judgement(trial: Trial, accelerator: Accelerator, words: str) -> None:
    chosen, reason = judge(trial)
    assert chosen is accelerator
    assert words in reason


def test_the_listing_is_consistent() -> None:
    offset = 0
    for line in probe_guest.LISTING.splitlines():
        if line[:4].strip():
            place, data = line.split()[:2]
            assert int(place, 16) == offset
            offset += len(bytes.fromhex(data))
    image = probe_guest.rom()
    assert len(image) == probe_guest.ROM_BYTES
    assert image.startswith(probe_guest.code())
    assert image[-16:].startswith(probe_guest.RESET)


class Host:
    """A host whose QEMU and KVM are plain files; counts how often it is really probed."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.binary, self.kvm, self.cache = root / "qemu", root / "kvm", root / "deep" / "cache.json"
        self.binary.write_text("1")
        self.kvm.write_text("")
        self.trials = 0
        monkeypatch.setattr(probe, "run_guest", self._run_guest)
        monkeypatch.setattr(probe, "query_version", self._query_version)

    async def _run_guest(self, _binary: Path, _accelerator: Accelerator) -> Trial:
        self.trials += 1
        return PASSED

    async def _query_version(self, _binary: Path) -> str:
        return "7.2.22"

    def verdict(self) -> Verdict:
        return asyncio.run(probe.probe(self.binary, self.cache, kvm=self.kvm))


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Host:
    return Host(tmp_path, monkeypatch)


def test_the_verdict_is_cached(host: Host) -> None:
    first = host.verdict()
    assert first == host.verdict() == Verdict(Accelerator.KVM, "KVM ran a test guest in 60 ms", "7.2.22")
    assert host.trials == 1


def test_another_qemu_is_probed_anew(host: Host) -> None:
    host.verdict()
    host.binary.write_text("22")
    host.verdict()
    assert host.trials == 2


def test_another_boot_is_probed_anew(host: Host, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    host.verdict()
    (tmp_path / "boot_id").write_text("another\n")
    monkeypatch.setattr(probe, "BOOT_ID", tmp_path / "boot_id")
    host.verdict()
    assert host.trials == 2


def test_without_kvm_nothing_is_run(host: Host) -> None:
    host.kvm.unlink()
    assert host.verdict().accelerator is Accelerator.TCG
    assert host.trials == 0


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b'{"format": 1}', b"\xff\xfe", b"[" * 100_000])
def test_a_broken_cache_costs_a_probe(host: Host, content: bytes) -> None:
    host.verdict()
    host.cache.write_bytes(content)
    assert host.verdict().accelerator is Accelerator.KVM
    assert host.trials == 2


def test_a_cache_with_a_strange_verdict(host: Host) -> None:
    host.verdict()
    known = json.loads(host.cache.read_bytes())
    known["verdict"]["accelerator"] = "steam"
    host.cache.write_text(json.dumps(known))
    host.verdict()
    assert host.trials == 2


def test_a_cache_that_cannot_be_written(host: Host) -> None:
    host.cache.parent.write_text("a file where the directory should be")
    assert host.verdict().accelerator is Accelerator.KVM
