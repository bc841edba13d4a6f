"""A checkpoint's manifest: what was saved, of which VM, on which machine, and how to tell that it is still that.

A checkpoint holds a VM at one instant: the volume as a list of frozen layers, and, unless it is of a VM that did not
run, RAM and the state of the devices. It is never changed once its manifest is there. docs/checkpoint-format.md is the
specification.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field, replace
from enum import StrEnum
from types import MappingProxyType
from typing import Any, Final

from capsem.model.errors import Corrupt, WrongState
from capsem.model.ids import check_name, check_object_id
from capsem.model.vm import THIS_HOST, VmRecord

FORMAT: Final = 1


class Kind(StrEnum):
    """Why a checkpoint was made. Hidden ones are an operation's own and go with it."""

    SUSPEND = "suspend"  # hidden: a suspended VM
    FORK = "fork"  # hidden: what live forks were started from
    TEMPLATE = "template"  # hidden, and no VM's: a machine that is ready, which new VMs are forks of
    MANUAL = "manual"
    AUTOMATIC = "automatic"
    ROLLBACK = "rollback"  # the present, before a rollback left it


HIDDEN: Final = frozenset({Kind.SUSPEND, Kind.FORK, Kind.TEMPLATE})
FORKED: Final = frozenset({Kind.FORK, Kind.TEMPLATE})  # those that other machines than its own go on from


@dataclass(frozen=True, slots=True)
class FrozenLayer:
    """A layer of the volume: its id, and the SHA-256 of its first 4 KiB, which hold its header and identity."""

    id: str
    head: str


@dataclass(frozen=True, slots=True)
class Memory:
    """RAM: its size in bytes, the SHA-256 of the table of page checksums, and what differs from the RAM that it began with:
    that of the checkpoint that the machine came from, or, after a cold start, an empty one, whatever `parent` says.

    `runs` are (first page, count), pages of 4 KiB; `written` is how many bytes of them were not zero.
    """

    size: int
    digest: str
    runs: tuple[tuple[int, int], ...]
    written: int


@dataclass(frozen=True, slots=True)
class Part:
    """A file of the checkpoint: length in bytes and SHA-256."""

    size: int
    digest: str


@dataclass(frozen=True, slots=True)
class GuestState:
    """What a host must know to speak with the guest again: its kernel's boot id, the epoch reached, the nonce (hex)
    that begins the next one; `token` names this boot (forks have their own), `synced` is whether the guest had flushed
    its file systems, `frozen` whether it had held the processes of its commands still."""

    boot_id: str
    epoch: int
    next_nonce: str
    token: str
    synced: bool
    frozen: bool = False


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """The manifest. `machine` is everything that must be the same on a host that is to restore the RAM."""

    id: str
    vm_id: str
    kind: Kind
    created_at: float  # seconds since 1970
    creator: str  # version of the Capsem that made it
    layers: tuple[FrozenLayer, ...]  # bottom first; below them lies the image's volume
    disk_mb: int
    image: str
    image_digest: str
    hardware: int
    cpus: int
    ram_mb: int
    parent: str | None = None
    message: str | None = None
    machine: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    memory: Memory | None = None
    devices: Part | None = None
    jobs: Part | None = None
    names: Part | None = None
    guest: GuestState | None = None
    pause: float | None = None  # seconds that the vCPUs stood still
    # The VM's own network policy at that time, for forks; None: made by a Capsem that knew none.
    network: Mapping[str, Any] | None = None
    owner_epoch: int = THIS_HOST
    machine_id: str | None = None  # of the VM, which tells it from an earlier one of its name; None: it had none yet

    @classmethod
    def of(cls, record: VmRecord, **facts: Any) -> Checkpoint:
        """A checkpoint of this VM as its record has it; `facts` are the other fields."""
        return cls(
            vm_id=record.id,
            disk_mb=record.spec.disk_mb,
            image=record.image,
            image_digest=record.image_digest,
            hardware=record.hardware,
            cpus=record.spec.cpus,
            ram_mb=record.spec.ram_mb,
            parent=record.current,
            owner_epoch=record.owner_epoch,
            network=record.network,
            machine_id=record.machine_id or None,
            **facts,
        )

    @property
    def warm(self) -> bool:
        """Whether it holds RAM."""
        return self.memory is not None

    @property
    def hidden(self) -> bool:
        """Whether people see it only when they ask for everything."""
        return self.kind in HIDDEN

    def is_of(self, record: VmRecord) -> bool:
        """Whether it is this VM's, and not of an earlier one of its name, whose forks may still need it."""
        known = bool(self.machine_id and record.machine_id)
        return self.vm_id == record.id and (not known or self.machine_id == record.machine_id)

    def visible(self, kept: Collection[str] = ()) -> bool:
        """Whether people see it; `kept` are hidden ones that its VM's owner wants to see."""
        return not self.hidden or self.id in kept

    def place(self, kept: Collection[str] = ()) -> str | None:
        """Where a VM is in the tree that people see, when this is where it is: here, or, if they do not see this one, which
        may soon be gone, where it had come from."""
        return self.id if self.visible(kept) else self.parent

    @property
    def layer_ids(self) -> tuple[str, ...]:
        """The volume."""
        return tuple(layer.id for layer in self.layers)

    def differences(self, machine: Mapping[str, Any]) -> list[str]:
        """How a host's machine differs from the one that was saved, for people; empty: RAM can be restored there."""
        names = sorted({*self.machine, *machine})
        return [
            f"{name} is {_short(machine.get(name))}, was {_short(self.machine.get(name))}"
            for name in names
            if self.machine.get(name) != machine.get(name)
        ]

    def require(self, machine: Mapping[str, Any]) -> None:
        """Refuse to restore RAM on a host that differs. Raises WrongState with the way out."""
        if not self.warm:
            raise WrongState(
                f"checkpoint {self.id[:12]} holds no memory",
                hint=f"`capsem fork --cold --at {self.id[:12]}` makes a VM of its disk, `capsem rollback` goes back to that",
            )
        if differences := self.differences(machine):
            raise WrongState(
                f"checkpoint {self.id[:12]} cannot be restored on this host: {'; '.join(differences)}",
                hint="its disk is intact: `capsem resume --cold`, `capsem fork --cold --at`; or put back what was changed",
            )

    def to_json(self) -> bytes:
        """The file's content: the body, and its own digest."""
        network = None if self.network is None else dict(self.network)
        plain = asdict(replace(self, machine=dict(self.machine), network=network))
        body = {name: value for name, value in plain.items() if value is not None}
        return json.dumps({"format": FORMAT, "digest": _digest(body), "body": body}, indent=1).encode() + b"\n"


def _short(value: object) -> str:
    text = "unknown" if value is None else str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _digest(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def checkpoint_from_json(data: bytes, *, source: str) -> Checkpoint:
    """Read a manifest. Raises Corrupt naming `source` when it is of another format, or not what was written."""
    try:
        outer = json.loads(data)
        if outer["format"] != FORMAT:
            raise Corrupt(
                f"{source} has format {str(outer['format'])[:20]}, this version of Capsem reads {FORMAT}",
                hint="use the Capsem that made it, or start the VM cold",
            )
        body = outer["body"]
        if _digest(body) != outer["digest"]:
            raise Corrupt(f"{source} is not what was written: its digest is wrong", hint="the VM can be resumed cold")
        return _from_body(body)
    except Corrupt:
        raise
    except Exception as error:
        raise Corrupt(f"{source} is no checkpoint manifest: {error!r}", hint="the VM can be resumed cold") from error


def _from_body(body: dict[str, Any]) -> Checkpoint:
    known = {name: body[name] for name in Checkpoint.__dataclass_fields__ if name in body}
    memory, guest = (known.pop(name, None) for name in ("memory", "guest"))
    parts = {name: Part(**known.pop(name)) if known.get(name) else None for name in ("devices", "jobs", "names")}
    return Checkpoint(
        **{
            **known,
            "id": check_object_id(known["id"]),
            "vm_id": check_name(known["vm_id"]),
            "kind": Kind(known["kind"]),
            "layers": tuple(FrozenLayer(check_object_id(each["id"]), each["head"]) for each in known["layers"]),
            "parent": check_object_id(known["parent"]) if known.get("parent") else None,
            "machine": MappingProxyType(dict(known["machine"])),
            "network": MappingProxyType(dict(known["network"])) if known.get("network") is not None else None,
            "memory": Memory(**{**memory, "runs": tuple((at, count) for at, count in memory["runs"])})
            if memory
            else None,
            **parts,
            "guest": GuestState(**guest) if guest else None,
        }
    )
