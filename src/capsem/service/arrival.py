"""The parts of an exported checkpoint as they come in: each is checked, and put into a draft. All methods block."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from capsem.model.checkpoint import Checkpoint, FrozenLayer, Kind, checkpoint_from_json
from capsem.model.errors import CapsemError, Corrupt, MachineFailed
from capsem.model.spec import VmSpec
from capsem.store.archive import DEVICES, JOBS, MANIFEST, MEMORY, Event, layer_name
from capsem.store.checkpoints import CheckpointStore, Draft, describe
from capsem.store.ram import PAGE, RamIdentity, RamWriter

MANIFEST_LIMIT: Final = 1 << 20  # bytes; an exported one lists no runs of pages
STATE_LIMIT: Final = 64 << 20  # bytes of a device state, or of what commands had written
LAYERS: Final = 256  # of an exported chain
SLACK: Final = 1 << 30  # bytes by which a layer may be longer than twice its disk
RESERVE: Final = 64 << 20  # bytes left free on the disk

Write = Callable[[int, bytes], object]  # offset, data


def refuse(what: str) -> Corrupt:
    """The error for what no export of ours holds."""
    return Corrupt(f"this file cannot be imported: {what}", hint="export the checkpoint again; nothing was kept of it")


class Arrival:
    """Takes the events of a stream, in order. Every method raises Corrupt, MachineFailed (no room), OSError."""

    def __init__(self, store: CheckpointStore, *, trust: bool) -> None:
        """`trust`: keep RAM and the state of the devices, not the disk alone."""
        self._store = store
        self._trust = trust
        self._checkpoint: Checkpoint | None = None
        self._text = bytearray()
        self._draft: Draft | None = None
        self._ram: RamWriter | None = None
        self._expected = [MANIFEST]
        self._part = ""
        self._write: Write = self._drop
        self._fd = -1
        self.layers: list[Path] = []

    @property
    def checkpoint(self) -> Checkpoint | None:
        """The manifest, once it has come."""
        return self._checkpoint

    @property
    def warm(self) -> bool:
        """Whether a checkpoint, with RAM, is to be kept of it."""
        return self._trust and self._checkpoint is not None and self._checkpoint.warm

    def prepare(self, draft_id: str) -> None:
        """The manifest was agreed to: make room for what follows."""
        assert self._checkpoint is not None
        self._draft = self._store.prepare(draft_id)

    def take(self, event: Event) -> bool:
        """The next event; returns whether it was the end of the manifest."""
        if event.kind == b"P":
            self._begin(event.data.decode("ascii", "replace"), event.number)
        elif event.kind == b"D":
            self._write(event.number, event.data)
        elif event.kind == b"E":
            self._end()
            return self._part == MANIFEST
        elif self._expected not in ([], [JOBS]):
            raise refuse(f"it ends without {self._expected[0]}")
        return False

    def _begin(self, name: str, size: int) -> None:
        if self._expected[:1] == [JOBS] and name != JOBS:
            del self._expected[0]  # not every checkpoint has it
        if not self._expected or name != self._expected.pop(0):
            raise refuse(f"it holds {name!r} where no such part can come")
        self._part, checkpoint = name, self._checkpoint
        if checkpoint is None:
            limit = MANIFEST_LIMIT
        elif name == MEMORY:
            limit = checkpoint.ram_mb << 20
        elif name in (DEVICES, JOBS):
            limit = STATE_LIMIT
        else:
            limit = 2 * (checkpoint.disk_mb << 20) + SLACK
        if size > limit or (name == MEMORY and size != limit):
            raise refuse(f"{name} has {size} bytes")
        if checkpoint is None:
            self._write = self._write_text
        elif name in (DEVICES, JOBS, MEMORY) and not self.warm:
            self._write = self._drop
        elif name == MEMORY:
            self._write = self._write_page
        else:
            self._open(name, size)

    def _open(self, name: str, size: int) -> None:
        """Begin a file of the draft; the name is one of ours."""
        assert self._draft is not None
        path = self._draft.files.path / name
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        os.ftruncate(self._fd, size)
        self._write = self._write_file
        if name not in (DEVICES, JOBS):
            self.layers.append(path)

    def _drop(self, _offset: int, _data: bytes) -> None:
        pass

    def _write_text(self, _offset: int, data: bytes) -> None:
        self._text += data

    def _write_file(self, offset: int, data: bytes) -> None:
        self._need_room()
        view = memoryview(data)
        while view:
            done = os.pwrite(self._fd, view, offset)
            view, offset = view[done:], offset + done

    def _write_page(self, offset: int, data: bytes) -> None:
        if offset % PAGE or len(data) % PAGE:
            raise refuse("its memory is not in whole pages")
        self._need_room()
        if self._ram is None:
            assert self._draft is not None
            assert self._checkpoint is not None
            files = self._draft.files
            self._ram = RamWriter(files.memory, files.sums, self._checkpoint.ram_mb << 20)
        self._ram.patch([(offset, memoryview(data))], compare=False)

    def _need_room(self) -> None:
        assert self._draft is not None
        disk = os.statvfs(self._draft.files.path)
        if disk.f_bavail * disk.f_frsize < RESERVE:
            raise MachineFailed(
                "there is no room for this checkpoint", hint="make room: `capsem df` shows what VMs take"
            )

    def _end(self) -> None:
        if self._fd >= 0:
            if self._part in (DEVICES, JOBS):
                os.fsync(self._fd)
            os.close(self._fd)
            self._fd = -1
        checkpoint = self._checkpoint
        if checkpoint is None:
            self._checkpoint = checkpoint = read_manifest(bytes(self._text))
            warm = [DEVICES, JOBS, MEMORY] if checkpoint.warm else []
            self._expected = [*warm, *(layer_name(place) for place in range(len(checkpoint.layers)))]
        elif self._part == DEVICES and self.warm:
            assert self._draft is not None
            if describe(self._draft.files.devices) != checkpoint.devices:
                raise refuse("the state of its devices is not what the manifest says")
        elif self._part == MEMORY and self.warm:
            self._finish_memory(checkpoint)

    def _finish_memory(self, checkpoint: Checkpoint) -> None:
        if self._ram is None or checkpoint.memory is None:
            raise refuse("its memory is empty")
        identity = RamIdentity(checkpoint.vm_id, checkpoint.id, checkpoint.memory.size)
        if self._ram.finish(identity) != checkpoint.memory.digest:
            raise refuse("its memory is not what the manifest says")

    def commit(self, layers: tuple[FrozenLayer, ...]) -> None:
        """Make it a checkpoint of this host, on other layers that hold what came; its id stays, the guest knows it."""
        assert self._draft is not None
        assert self._checkpoint is not None
        for path in self.layers:
            path.unlink()
        checkpoint = replace(self._checkpoint, kind=Kind.FORK, layers=layers, parent=None, network=None, names=None)
        self._store.commit(self._draft, checkpoint)
        self._draft = None

    def close(self) -> None:
        """Let go of everything; what is not committed goes."""
        if self._fd >= 0:
            os.close(self._fd)
        if self._ram is not None:
            self._ram.close()
        if self._draft is not None:
            self._store.discard(self._draft)
            self._draft = None


def read_manifest(data: bytes) -> Checkpoint:
    """A manifest that somebody else may have written. Raises Corrupt."""
    checkpoint = checkpoint_from_json(data, source="its manifest")
    memory, devices, guest = checkpoint.memory, checkpoint.devices, checkpoint.guest
    kinds: list[tuple[Any, type | tuple[type, ...]]] = [
        *((each, int) for each in (checkpoint.cpus, checkpoint.ram_mb, checkpoint.disk_mb, checkpoint.hardware)),
        *((each, str) for each in (checkpoint.creator, checkpoint.image, checkpoint.image_digest)),
        *((each, str) for each in checkpoint.machine),
        (checkpoint.message or "", str),
        (checkpoint.created_at, (int, float)),
        (checkpoint.pause or 0, (int, float)),
    ]
    if checkpoint.machine_id is not None:
        kinds.append((checkpoint.machine_id, str))
    if memory is not None:
        kinds += [(memory.size, int), (memory.written, int), (memory.digest, str)]
    if devices is not None:
        kinds += [(devices.size, int), (devices.digest, str)]
    if guest is not None:
        kinds += [(each, str) for each in (guest.boot_id, guest.next_nonce, guest.token)]
        kinds += [(guest.epoch, int), (guest.synced, bool)]
    if any(not isinstance(value, kind) or (kind is int and isinstance(value, bool)) for value, kind in kinds):
        raise refuse("its manifest does not say what a manifest says")
    try:
        VmSpec(checkpoint.cpus, checkpoint.ram_mb, checkpoint.disk_mb)
    except CapsemError as error:
        raise refuse(error.message) from error
    if len({memory is None, devices is None, guest is None}) > 1:
        raise refuse("its manifest tells of one half of a running machine")
    if memory is not None and (memory.size != checkpoint.ram_mb << 20 or memory.runs):
        raise refuse("its manifest tells of another memory than the VM has")
    if guest is not None and (len(guest.next_nonce) != 32 or set(guest.next_nonce) - set("0123456789abcdef")):
        raise refuse("its manifest has no nonce for the guest")
    if not 0 < len(checkpoint.layers) <= LAYERS:
        raise refuse(f"it has {len(checkpoint.layers)} layers")
    return checkpoint
