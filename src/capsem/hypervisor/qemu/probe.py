"""Which accelerator works on this host: found out by running a tiny guest, not by looking at /dev/kvm.

The verdict holds for one boot of the host, one QEMU binary, one state of /dev/kvm and one version of the probe itself;
it is cached in a file under that key. The file is only a cache: broken, foreign or missing, it costs a second.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import os
import socket
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from capsem.hypervisor.driver import Accelerator
from capsem.hypervisor.qemu import probe_guest
from capsem.hypervisor.qemu.command import ACCELERATORS, SANDBOX
from capsem.hypervisor.qemu.hardware import HARDWARE
from capsem.hypervisor.qemu.process import Process, complaint, lacking_features, query_version, spawn
from capsem.model.errors import HostNotReady, MachineFailed
from capsem.store import durable

KVM: Final = Path("/dev/kvm")
BOOT_ID: Final = Path("/proc/sys/kernel/random/boot_id")
LIMIT: Final = 1.0  # seconds for the test guest, QEMU's start included: a working KVM needs a tenth of that
PATIENCE: Final = 2.0  # seconds more if the guest has had less than half of LIMIT of a processor: the host is just busy
CACHE_FORMAT: Final = 1
CURRENT: Final = HARDWARE[max(HARDWARE)]


@dataclass(frozen=True, slots=True)
class Verdict:
    """What to run guests with. `reason` is for people: `capsem doctor` and the log show it."""

    accelerator: Accelerator
    reason: str
    qemu_version: str


@dataclass(frozen=True, slots=True)
class Trial:
    """How the test guest fared. `stage` is what it was doing when it was last heard of."""

    passed: bool
    timed_out: bool
    stage: str
    seconds: float
    stderr: str


async def probe(binary: Path, cache: Path, *, kvm: Path = KVM) -> Verdict:
    """The verdict for this host, from `cache` if it still holds. Raises HostNotReady (no usable QEMU)."""
    key = _key(binary, kvm)
    known = _read(cache, key)
    if known is not None:
        return known
    version = await query_version(binary)
    accelerator, reason = await _choose(binary, kvm)
    verdict = Verdict(accelerator, reason, version)
    _write(cache, key, verdict)
    return verdict


async def _choose(binary: Path, kvm: Path) -> tuple[Accelerator, str]:
    if not kvm.exists():
        return Accelerator.TCG, f"this host has no {kvm}"
    if not os.access(kvm, os.R_OK | os.W_OK):
        return Accelerator.TCG, f"{kvm} may not be opened by this user (usually: join the group kvm)"
    try:
        trial = await run_guest(binary, Accelerator.KVM)
    except (MachineFailed, HostNotReady) as error:
        return Accelerator.TCG, f"KVM could not be tried: {error}"
    return judge(trial)


def judge(trial: Trial) -> tuple[Accelerator, str]:
    """What a trial of KVM means."""
    if trial.timed_out:
        return Accelerator.TCG, f"KVM opens, but a test guest did not end within {LIMIT:g} s (it was {trial.stage})"
    if not trial.passed:
        why = complaint(trial.stderr) or f"it ended while {trial.stage}"
        return Accelerator.TCG, f"KVM opens, but a test guest failed: {why}"
    if lacking := lacking_features(trial.stderr):
        return Accelerator.TCG, f"KVM works, but this host's CPU lacks {', '.join(lacking)} (x86-64-v3 is needed)"
    return Accelerator.KVM, f"KVM ran a test guest in {trial.seconds * 1000:.0f} ms"


async def run_guest(binary: Path, accelerator: Accelerator) -> Trial:
    """Run the test guest once. No QEMU survives the call, whatever happens. Raises HostNotReady, MachineFailed."""
    began = time.monotonic()
    with contextlib.ExitStack() as stack:
        rom = stack.enter_context(_memory_file(probe_guest.rom()))
        report, theirs = socket.socketpair()
        stack.enter_context(report)
        with theirs:
            line = _argv(binary, accelerator, rom=rom, report=theirs.fileno())
            process = spawn(line, keep=(rom, theirs.fileno()))
        timed_out = False
        try:
            status = await _wait(process)
        except TimeoutError:
            timed_out = True
        finally:
            # Gone for sure, or held up in the kernel: then waiting longer would help nobody.
            with contextlib.suppress(MachineFailed):
                status = await process.end()
        return Trial(
            passed=not timed_out and status == probe_guest.PASSED,
            timed_out=timed_out,
            stage=_last_stage(report),
            seconds=time.monotonic() - began,
            stderr=process.stderr(),
        )


async def _wait(process: Process) -> int:
    """The exit status. Raises TimeoutError."""
    try:
        async with asyncio.timeout(LIMIT):
            return await process.wait()
    except TimeoutError:
        if process.cpu_seconds() >= LIMIT / 2:
            raise
    async with asyncio.timeout(PATIENCE):
        return await process.wait()


def _argv(binary: Path, accelerator: Accelerator, *, rom: int, report: int) -> list[str]:
    return [
        *(str(binary), "-name", "capsem-probe"),
        *("-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"),
        *("-sandbox", SANDBOX),
        *("-machine", CURRENT.machine, "-accel", ACCELERATORS[accelerator], "-m", "16M"),
        *("-cpu", CURRENT.cpu),  # not enforced: what the host lacks is named on standard error, and the test goes on
        *("-bios", f"/proc/self/fd/{rom}"),
        *("-device", f"isa-debug-exit,iobase={probe_guest.EXIT_PORT:#x},iosize=0x4"),
        *("-chardev", f"socket,id=report,fd={report}"),
        *("-device", f"isa-debugcon,iobase={probe_guest.REPORT_PORT:#x},chardev=report"),
    ]


@contextlib.contextmanager
def _memory_file(data: bytes) -> Iterator[int]:
    """A descriptor of an anonymous file with that content."""
    fd = os.memfd_create("capsem-probe", os.MFD_CLOEXEC)
    try:
        os.write(fd, data)
        yield fd
    finally:
        os.close(fd)


def _last_stage(report: socket.socket) -> str:
    report.setblocking(False)
    try:
        letters = report.recv(64).decode("ascii", errors="replace")
    except OSError:
        letters = ""
    return probe_guest.STAGES.get(letters[-1:], "beyond its code")


def _key(binary: Path, kvm: Path) -> dict[str, Any]:
    """What the verdict depends on."""
    info = binary.stat()
    device: list[int] | None = None
    with contextlib.suppress(OSError):
        node = kvm.stat()
        device = [node.st_rdev, node.st_ino, node.st_mode, node.st_uid, node.st_gid, os.access(kvm, os.R_OK | os.W_OK)]
    return {
        "boot_id": BOOT_ID.read_text(encoding="ascii").strip(),
        "qemu": [str(binary), info.st_mtime_ns, info.st_size],
        "kvm": device,
        "user": os.geteuid(),
        "probe": hashlib.sha256(repr((CURRENT.machine, CURRENT.cpu)).encode() + probe_guest.code()).hexdigest(),
    }


def _read(cache: Path, key: dict[str, Any]) -> Verdict | None:
    try:
        known = json.loads(cache.read_bytes())
        if known["format"] != CACHE_FORMAT or known["key"] != key:
            return None
        fields = known["verdict"]
        return Verdict(Accelerator(fields["accelerator"]), str(fields["reason"]), str(fields["qemu_version"]))
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return None


def _write(cache: Path, key: dict[str, Any], verdict: Verdict) -> None:
    """A cache that cannot be written is no reason to fail."""
    data = json.dumps({"format": CACHE_FORMAT, "key": key, "verdict": asdict(verdict)}, indent=1)
    with contextlib.suppress(OSError):
        cache.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        durable.write(cache, data.encode())
