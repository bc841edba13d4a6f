"""The host under the simulated machines: what they share, and what goes wrong when they do it at the same time.

The hazard, as it was met on a real hypervisor: if a machine is saved or restored while another one is saved, restored,
booted or torn down, the guest that is restored (now, or later from what is being saved now) finds that its disk does
not take writes any more. Saves and restores are `exclusive` therefore, boots and teardowns are not.

Every process and service of the host has to see every other's operations. Each is a file in `directory` that its
process holds a flock on while it goes on, so that a process which is killed takes its operations along. An operation
that met another one is struck; that is written down by name, and stays known to whoever restores what it has saved.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from capsem.store.locks import Lock, is_locked, try_lock

SAVE, RESTORE, BOOT, TEARDOWN = "save", "restore", "boot", "teardown"
EXCLUSIVE: Final = frozenset({SAVE, RESTORE})

# What the guest's kernel says when its disk is struck: interface.md 9, row 1.
FINGERPRINT: Final = (
    "loop: Write error at byte offset {offset}, length 4096.",
    "I/O error, dev loop0, sector {sector} op 0x1:(WRITE) flags 0x800 phys_seg 1 prio class 0",
    "EXT4-fs error (device loop0): failed to convert unwritten extents to written extents -- potential data loss!",
)
STRIDE: Final = 512 << 10  # bytes between the writes that fail


class Operation:
    """One save, restore, boot or teardown, from its beginning to `end`."""

    def __init__(self, host: SimHost, name: str, kind: str, lock: Lock) -> None:
        self.name = name
        self.kind = kind
        self._host = host
        self._lock = lock

    @property
    def going_on(self) -> bool:
        """Whether it is not over."""
        return self._lock.fd >= 0

    def end(self) -> None:
        """It is over; again is no error."""
        if self._lock.fd >= 0:
            self._host.path(self.name, self.kind).unlink(missing_ok=True)
            self._lock.release()


class SimHost:
    """A directory that all simulated machines of one host share."""

    def __init__(self, directory: Path, *, hazard: bool) -> None:
        """`hazard`: whether operations that overlap do harm. Raises OSError."""
        self.hazard = hazard
        self._directory = directory
        self._struck = directory / "struck"
        self._struck.mkdir(mode=0o700, parents=True, exist_ok=True)

    def path(self, name: str, kind: str) -> Path:
        """Where an operation shows that it goes on."""
        return self._directory / f"{name}.{kind}"

    def begin(self, name: str, kind: str) -> Operation:
        """Begin an operation under a name that no other has. Raises OSError."""
        with self._alone():
            others = []
            for other in self._directory.glob("*.*"):
                if is_locked(other):
                    others.append(other)
                else:  # of a process that was killed
                    other.unlink(missing_ok=True)
            lock = try_lock(self.path(name, kind))
            assert lock is not None
            met = [other for other in others if kind in EXCLUSIVE or other.suffix[1:] in EXCLUSIVE]
            if self.hazard and met:
                for each, what in ((name, kind), *((other.stem, other.suffix[1:]) for other in met)):
                    (self._struck / each).write_text(f"{what}, as a {kind} met {' '.join(m.suffix[1:] for m in met)}")
        return Operation(self, name, kind, lock)

    def is_struck(self, name: str) -> bool:
        """Whether that operation, which may be over, met another one."""
        return self.hazard and (self._struck / name).exists()

    def strikes(self) -> list[str]:
        """What every operation that was struck met, whether anybody has noticed or not."""
        return sorted(path.read_text() for path in self._struck.iterdir())

    def count(self, name: str) -> int:
        """How often this was asked on this host for this name, this time included. Raises OSError."""
        with self._alone():
            fd = os.open(
                self._directory / f"count-{name}", os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600
            )
            try:
                os.write(fd, b".")
                return os.fstat(fd).st_size
            finally:
                os.close(fd)

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """Held for microseconds, by anybody's process."""
        fd = os.open(self._directory / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            yield
        finally:
            os.close(fd)


def complaints(number: int) -> list[str]:
    """What the kernel says of the n-th write that a struck disk refused."""
    offset = number * STRIDE
    return [line.format(offset=offset, sector=offset // 512) for line in FINGERPRINT]
