"""The simulated guest's memory: all that a save keeps, as plain data in the first pages of its RAM.

    0 .. 16   magic and the length of what follows
    16 ..     JSON

What is not in here, timers and streams, a restored guest does not have; nor would a real one.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

from capsem.hypervisor.sim.shell import Step
from capsem.hypervisor.sim.volume import Files, decode, encode
from capsem.model.errors import Corrupt
from capsem.store.ram import PAGE
from capsem.wire.frames import FIRST_NONCE

MAGIC: Final = b"capsemSM"
_HEAD: Final = 16
LIMIT: Final = 128 << 20  # bytes


@dataclass(slots=True)
class Job:
    """A command. Offsets count from its first byte; `output` holds what the host has not confirmed, by channel."""

    id: str
    steps: list[Step]
    env: dict[str, str] = field(default_factory=dict)
    status: int = 0
    exited: dict[str, Any] | None = None  # how it ended, as `Exited` has it
    began: float = 0.0  # seconds of guest time, as the next two
    wakes: float | None = None  # it sleeps until then
    expires: float | None = None
    output: dict[str, str] = field(default_factory=lambda: {"1": "", "2": ""})  # latin-1
    start: dict[str, int] = field(default_factory=lambda: {"1": 0, "2": 0})  # offset of the first byte kept

    def end(self, channel: int) -> int:
        """How much it has written."""
        return self.start[str(channel)] + len(self.output[str(channel)])


@dataclass(slots=True)
class Memory:
    """See the module."""

    boot_id: str
    uptime: float = 0.0  # seconds
    wall: float = 0.0  # what the guest's clock says, less `uptime`
    epoch: int = 0
    next_nonce: str = FIRST_NONCE.hex()
    restarts: int = 0
    env: dict[str, str] = field(default_factory=dict)
    hostname: str = ""
    machine_id: str = ""
    token: str = ""
    mark: str = ""
    held: bool = False
    dirty: Files = field(default_factory=dict)  # the page cache
    tallies: dict[str, int] = field(default_factory=dict)
    log: list[str] = field(default_factory=list)  # the kernel's
    followed: int = 0  # how much of it was there at the last sync
    refused: int = 0  # writes that a struck disk did not take
    jobs: dict[str, Job] = field(default_factory=dict)
    started: list[str] = field(default_factory=list)

    def to_pages(self) -> bytes:
        """Whole pages of RAM."""
        fields = asdict(self) | {"dirty": encode(self.dirty)}
        data = json.dumps(fields, separators=(",", ":")).encode()
        data = MAGIC + len(data).to_bytes(_HEAD - len(MAGIC), "little") + data
        return data + bytes(-len(data) % PAGE)

    @classmethod
    def from_ram(cls, path: Path) -> Memory:
        """The inverse; of a RAM file no more is read than it has to be. Raises Corrupt, OSError."""
        with path.open("rb") as file:
            head = file.read(_HEAD)
            length = int.from_bytes(head[len(MAGIC) :], "little")
            data = file.read(length) if head.startswith(MAGIC) and length <= LIMIT else b""
        try:
            body = json.loads(data)
            jobs = {name: Job(**job) for name, job in body.pop("jobs").items()}
            dirty = decode(body.pop("dirty"))
            return cls(**body, dirty=dirty, jobs=jobs)
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise Corrupt(
                f"{path} is not the memory of a simulated guest: {error}", hint="the VM can be resumed cold"
            ) from error
