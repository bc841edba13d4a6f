"""flock-based locks: the kernel says who lives, not a pid file.

The claim is held by the one process that owns a VM. The VMM lock is taken on a descriptor that the VMM inherits: it
lives exactly as long as the VMM does, even when its supervisor is gone. Both free: safe to start. Claim free but VMM
lock held: an orphan, to be killed first; `holders` finds it.
"""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

from capsem.model.errors import Unavailable


class Lock:
    """A held flock; ends with `release`, or with the last process that has its descriptor."""

    def __init__(self, fd: int) -> None:
        self.fd = fd

    def release(self) -> None:
        """Close our descriptor; whoever inherited it keeps the lock."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


def try_lock(path: Path, *, shared: bool = False) -> Lock | None:
    """Take the lock on `path`, which is created if missing (mode 0600), alone or together with others who want it
    `shared`; None when somebody has it in a way that forbids that. Raises OSError.
    """
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(fd, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(fd)
        return None
    except BaseException:
        os.close(fd)
        raise
    return Lock(fd)


def take_lock(path: Path, what: str) -> Lock:
    """As `try_lock`, but raises Unavailable when somebody has it."""
    lock = try_lock(path)
    if lock is None:
        raise Unavailable(f"{what} is held by another process", hint="wait until it is done, then try again")
    return lock


def is_locked(path: Path) -> bool:
    """Whether somebody holds the lock; a file that is not there is not locked."""
    try:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    else:
        return False
    finally:
        os.close(fd)


def holders(path: Path) -> list[int]:
    """Processes (other than this one) that have the lock file open, hence may hold its lock."""
    try:
        target = path.stat()
    except FileNotFoundError:
        return []
    found = []
    for entry in os.scandir("/proc"):
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        try:
            descriptors = os.scandir(f"/proc/{entry.name}/fd")
            with descriptors:
                for descriptor in descriptors:
                    info = descriptor.stat()
                    if (info.st_dev, info.st_ino) == (target.st_dev, target.st_ino):
                        found.append(int(entry.name))
                        break
        except OSError:  # it ended meanwhile, or is another user's
            continue
    return found
