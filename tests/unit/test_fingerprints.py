"""Known failures are recognised by their lines, and named."""

from __future__ import annotations

import pytest

from capsem.model.fingerprints import FINGERPRINTS, TROUBLES, find

EVERY = (*FINGERPRINTS, *TROUBLES)

QUIET = """[    0.000000] Linux version 6.12.0 (debian-kernel@lists.debian.org)
[    1.093211] EXT4-fs (vdb): mounted filesystem 0b2d r/w with ordered data mode. Quota mode: none.
[    1.204112] capsem: guest agent ready
[    9.000000] crng reseeded due to virtual machine fork
"""


@pytest.mark.parametrize(
    ("line", "name"),
    [
        ("loop: Write error at byte offset 524288, length 4096.", "overlay-write-failed"),
        ("I/O error, dev loop0, sector 2048 op 0x1:(WRITE) flags 0x800 phys_seg 1", "overlay-write-failed"),
        ("EXT4-fs error (device vdb): failed to convert unwritten extents", "overlay-write-failed"),
        ("EXT4-fs error (device vdb): ext4_lookup:1785: iget: checksum invalid", "stale-inodes"),
        ("EXT4-fs (vdb): Remounting filesystem read-only", "file-system-damaged"),
        ("ls: cannot open directory '.': Stale file handle", "stale-inodes"),
        ("initial handshake failed: BootReady read failed: failed to fill whole buffer", "handshake-lost"),
        ("control frame too large (0x81A08329)", "stream-out-of-step"),
        ("Kernel panic - not syncing: Attempted to kill init!", "guest-panicked"),
        ("QEMU did not answer 'stop' within 60 s, and was killed", "vmm-hung"),
        ('{"message": "x", "exception": "Traceback (most recent call last):\\n"}', "program-error"),
        ("OSError: [Errno 28] No space left on device", "host-disk-full"),
        ("[ 99.1] Out of memory: Killed process 431 (python3)", "out-of-memory"),
        ("the guest was not ready after 90 s", "boot-too-slow"),
        ("the supervisor ended by signal 9", "supervisor-lost"),
        ("sqlite3.DatabaseError: database disk image is malformed", "ledger-damaged"),
    ],
)
def test_a_line_names_its_failure(line: str, name: str) -> None:
    found = {match.fingerprint.name: match.line for match in find(f"{QUIET}{line}\n{QUIET}", EVERY)}
    assert found[name] == line


def test_a_healthy_log_has_none() -> None:
    assert list(find(QUIET, EVERY)) == []


def test_each_kind_is_told_once_and_long_lines_are_cut() -> None:
    [match] = find("x" * 9000 + "BootReady read failed" + "y" * 9000 + "\nBootReady read failed\n")
    assert "BootReady read failed" in match.line
    assert len(match.line) <= 300


def test_every_one_says_what_it_means() -> None:
    assert len({each.name for each in EVERY}) == len(EVERY)
    assert all(each.meaning and each.patterns and each.hint for each in EVERY)
