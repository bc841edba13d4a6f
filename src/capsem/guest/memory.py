"""What the agent must remember across its own death, but not across a boot: on the guest's tmpfs, hence in its RAM."""

from __future__ import annotations

import os

from capsem.wire.frames import FIRST_NONCE

_SIZE = 128  # bytes: the three of them, in words


class Memory:
    """The epoch reached, the nonce of the next one, and how often an agent was started in this boot."""

    def __init__(self, directory: str) -> None:
        """Read what an earlier agent of this boot left in `directory`, which is made when missing. Raises OSError."""
        os.makedirs(directory, 0o700, exist_ok=True)
        self.directory = directory
        self._fd = os.open(f"{directory}/memory", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        self.epoch = 0
        self.next_nonce = FIRST_NONCE
        self.starts = 0
        content = os.pread(self._fd, _SIZE, 0).split()
        if content:
            self.epoch, self.starts, self.next_nonce = (
                int(content[0]),
                int(content[1]),
                bytes.fromhex(content[2].decode()),
            )
        self.starts += 1
        self.save()

    def save(self) -> None:
        """Write it down. One write within one page: an agent that is killed has made all of it or nothing."""
        os.pwrite(self._fd, f"{self.epoch} {self.starts} {self.next_nonce.hex()}".encode().ljust(_SIZE), 0)
