"""What the agent must remember across its own death, but not across a boot: on the guest's tmpfs, hence in its RAM."""

from __future__ import annotations

import json
import os

from capsem.wire.frames import FIRST_NONCE


class Memory:
    """The epoch reached, the nonce of the next one, and how often an agent was started in this boot."""

    def __init__(self, directory: str) -> None:
        """Read what an earlier agent of this boot left in `directory`, which is made when missing."""
        self._path = f"{directory}/memory.json"
        os.makedirs(directory, 0o700, exist_ok=True)
        self.epoch = 0
        self.next_nonce = FIRST_NONCE
        self.starts = 0
        try:
            with open(self._path, encoding="ascii") as file:
                content = json.load(file)
            self.epoch, self.starts = content["epoch"], content["starts"]
            self.next_nonce = bytes.fromhex(content["next_nonce"])
        except FileNotFoundError:
            pass
        self.starts += 1
        self.save()

    def save(self) -> None:
        """Write it down; a reader sees the old content or the new."""
        temporary = f"{self._path}.new"
        content = json.dumps({"epoch": self.epoch, "starts": self.starts, "next_nonce": self.next_nonce.hex()})
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        try:
            os.write(fd, content.encode("ascii"))
        finally:
            os.close(fd)
        os.rename(temporary, self._path)
