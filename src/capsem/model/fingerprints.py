"""What known failures look like in logs: of guests' kernels and consoles, of supervisors, of the service.

Each row was met for real, here or by those who built such a system before: a line that matches says what happened
better than the operation that failed because of it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Final, NamedTuple


class Fingerprint(NamedTuple):
    """A kind of failure: its name, any of the `patterns` (regular expressions) in a line, and what it means."""

    name: str
    meaning: str
    patterns: tuple[str, ...]


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
LINE_SHOWN: Final = 300  # characters


class Match(NamedTuple):
    """A line of a log, and what it is a sign of."""

    fingerprint: Fingerprint
    line: str


def find(text: str) -> Iterator[Match]:
    """The first line of `text` for each fingerprint that is in it."""
    for fingerprint in FINGERPRINTS:
        found = re.search("|".join(fingerprint.patterns), text)
        if found is not None:
            begin = text.rfind("\n", 0, found.start()) + 1
            line = text[begin:].split("\n", 1)[0]
            start = max(0, found.start() - begin - LINE_SHOWN // 2)
            yield Match(fingerprint, line[start : start + LINE_SHOWN].strip())
