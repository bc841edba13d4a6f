"""What known failures look like in logs: of guests' kernels and consoles, of supervisors, of the service.

Each row was met for real, here or by those who built such a system before: a line that matches says what happened
better than the operation that failed because of it. FINGERPRINTS must never be seen: they are somebody's mistake.
TROUBLES can come over any host.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Final, NamedTuple


class Fingerprint(NamedTuple):
    """A kind of failure: its name, any of the `patterns` (regular expressions) in a line, what it means, what to do."""

    name: str
    meaning: str
    patterns: tuple[str, ...]
    hint: str = "keep the logs (`capsem support-bundle`) and report it; `capsem rollback` goes back to a checkpoint"


FINGERPRINTS: Final = (
    Fingerprint(
        "overlay-write-failed",
        "the restored guest's disk takes no writes: transitions of two machines overlapped on a hypervisor that does not "
        "tolerate that, or the disk was not saved at the same instant as memory",
        (
            r"loop: Write error at byte offset",
            r"I/O error, dev \w+, sector \d+ op 0x1:\(WRITE\)",
            r"failed to convert unwritten extents",
        ),
    ),
    Fingerprint(
        "file-system-damaged",
        "the guest's file system found itself inconsistent, or gave up writing",
        (r"EXT4-fs error", r"Remounting filesystem read-only", r"Aborting journal on device"),
    ),
    Fingerprint(
        "stale-inodes",
        "what the guest reads of its disk is older than what it knows of it",
        (r"cannot open directory '\.'", r"iget: checksum invalid"),
    ),
    Fingerprint(
        "memory-and-disk-differ",
        "a machine was restored with memory and a volume that are not of one instant",
        (r"memory and volume are not of one checkpoint",),
    ),
    Fingerprint(
        "handshake-lost", "the guest went away before it had said that it is ready", (r"BootReady read failed",)
    ),
    Fingerprint(
        "stream-out-of-step",
        "the control channel was read from the middle of a frame",
        (r"control frame too large",),
    ),
    Fingerprint("guest-panicked", "the guest's kernel gave up", (r"Kernel panic - not syncing", r"kernel panicked")),
    Fingerprint("vmm-hung", "QEMU did not answer any more, and was killed", (r"did not answer .* and was killed",)),
    Fingerprint(
        "program-error", "a mistake in Capsem itself: please report it", (r"Traceback \(most recent call last\)",)
    ),
)
TROUBLES: Final = (
    Fingerprint(
        "host-disk-full",
        "the host's disk is full",
        (r"No space left on device", r"Disk quota exceeded", r"the host's disk is full"),
        "make room: `capsem df` shows what VMs, checkpoints and images take",
    ),
    Fingerprint(
        "out-of-memory",
        "memory ran out, in the guest or on the host",
        (r"Out of memory: Killed process", r"oom-kill", r"Cannot allocate memory", r"MemoryError"),
        "give the VM more memory (`capsem create --ram`), or run fewer VMs",
    ),
    Fingerprint(
        "boot-too-slow",
        "the guest did not say in time that it is ready",
        (r"was not ready after", r"the handshake hangs"),
        "`capsem logs` shows how far it came; a busy host without KVM may be too slow for so many VMs",
    ),
    Fingerprint(
        "supervisor-lost",
        "a VM's supervisor died, and the VM with it; its disk is whole",
        (r"the supervisor ended (by|without)", r"killing orphaned VMM"),
        "`capsem resume` starts it again; look for what killed it in the host's own log",
    ),
    Fingerprint(
        "version-skew",
        "two parts of Capsem are of different versions",
        (r"speaks protocol \d+", r"rebuild the image"),
        "restart the service and the VM; `capsem image build` brings the image up to date",
    ),
    Fingerprint(
        "image-missing",
        "there is no guest image to boot, or not the one that a VM was made from",
        (r"no image \w+", r"the image \S+ \(\w+\) of \S+ is not on this host"),
        "`capsem image list` shows those there are, `capsem image build` makes one",
    ),
    Fingerprint(
        "ledger-damaged",
        "a ledger is no sound database any more; the VM is not affected",
        (r"database disk image is malformed", r"file is not a database", r"is damaged, and begun anew"),
        "the old one lies beside it, as session.db.damaged",
    ),
)
LINE_SHOWN: Final = 300  # characters


class Match(NamedTuple):
    """A line of a log, and what it is a sign of."""

    fingerprint: Fingerprint
    line: str


def find(text: str, among: tuple[Fingerprint, ...] = FINGERPRINTS) -> Iterator[Match]:
    """The first line of `text` for each fingerprint that is in it."""
    for fingerprint in among:
        found = re.search("|".join(fingerprint.patterns), text)
        if found is not None:
            begin = text.rfind("\n", 0, found.start()) + 1
            line = text[begin:].split("\n", 1)[0]
            start = max(0, found.start() - begin - LINE_SHOWN // 2)
            yield Match(fingerprint, line[start : start + LINE_SHOWN].strip())
