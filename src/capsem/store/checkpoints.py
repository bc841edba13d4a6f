"""Checkpoints on disk: prepare -> commit -> open -> remove.

A checkpoint is a directory named by its id. Whoever makes one holds the lock on its `draft` file, fills in the parts,
makes each durable, and writes the manifest last; from then on nothing in it changes. A directory without a manifest
whose lock nobody holds is what a crash left: `sweep` removes it. Removing goes the other way round: the manifest first.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import threading
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from capsem.model.checkpoint import Checkpoint, FrozenLayer, Part, checkpoint_from_json
from capsem.model.errors import CapsemError, Corrupt, InvalidInput, NotFound
from capsem.model.ids import check_object_id
from capsem.model.vm import VmRecord
from capsem.store import durable, layer_sums, ram
from capsem.store.layout import CheckpointDir, Layout
from capsem.store.locks import Lock, try_lock

HEAD: Final = 4096  # bytes of a layer that its `head` digest covers
SIZE_LIMIT: Final = 256 * 1024 * 1024  # of a manifest; RAM in single pages makes long lists of runs
_COLD: Final = "the VM can be resumed cold"


@dataclass(frozen=True, slots=True)
class Draft:
    """A checkpoint in the making."""

    files: CheckpointDir
    lock: Lock

    @property
    def id(self) -> str:
        """The checkpoint's id."""
        return self.files.id


class CheckpointStore:
    """The checkpoints of one run directory."""

    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        self._known: dict[str, Checkpoint] = {}
        self.unreadable: dict[str, CapsemError] = {}  # checkpoints that `all` left out, and why
        self._summing = threading.Lock()

    # -- making

    def prepare(self, checkpoint_id: str, owner: str = "") -> Draft:
        """A new, empty draft; `owner` is what `sweep` may be told, such as a VM. Raises OSError, among others when a sweep
        took it for a remnant before it was locked.
        """
        files = self._layout.checkpoint(checkpoint_id)
        files.path.mkdir(mode=0o700)
        lock = None
        try:
            lock = try_lock(files.draft)
            if lock is None or not os.path.samestat(files.draft.stat(), os.fstat(lock.fd)):
                raise OSError(errno.EAGAIN, "the draft was swept away; try again", str(files.path))
            os.write(lock.fd, owner.encode())
        except BaseException:
            if lock is not None:
                lock.release()
            durable.remove_tree(files.path)
            raise
        return Draft(files, lock)

    def freeze(self, layers: Collection[str]) -> tuple[FrozenLayer, ...]:
        """What a manifest says of these layers, to which nothing writes any more. Raises OSError."""
        return tuple(FrozenLayer(layer, self._head(layer)) for layer in layers)

    def _head(self, layer: str) -> str:
        with self._layout.layer(layer).open("rb", buffering=0) as file:
            return hashlib.sha256(file.read(HEAD)).hexdigest()

    def enter(self, draft: Draft) -> None:
        """Make it durable that the parts of a draft are there. Raises OSError."""
        durable.sync_directory(draft.files.path)
        durable.sync_directory(self._layout.checkpoints)

    def stage(self, draft: Draft, checkpoint: Checkpoint) -> durable.Staged:
        """The manifest, durable and not there yet. Raises OSError."""
        assert checkpoint.id == draft.id
        return durable.Staged(draft.files.manifest, checkpoint.to_json())

    def publish(self, draft: Draft, manifest: durable.Staged) -> None:
        """Make a draft a checkpoint: one that was entered, and whose parts are durable. Raises OSError; then it is still a
        draft.

        The draft's lock is let go of.
        """
        try:
            manifest.place()
        except BaseException:
            draft.files.manifest.unlink(missing_ok=True)
            raise
        with contextlib.suppress(OSError):  # it is a checkpoint, with this file or without
            draft.files.draft.unlink(missing_ok=True)
        draft.lock.release()

    def commit(self, draft: Draft, checkpoint: Checkpoint) -> None:
        """Make a draft, whose parts are durable, a checkpoint: all that there is to it, one thing after the other. Raises
        OSError; then it is still a draft.
        """
        self.enter(draft)
        self.publish(draft, self.stage(draft, checkpoint))

    def discard(self, draft: Draft) -> None:
        """Remove a draft. The manifest goes first, should there be one: `commit` may have failed after it was there."""
        try:
            draft.files.manifest.unlink(missing_ok=True)
            durable.remove_tree(draft.files.path)
        finally:
            draft.lock.release()

    def abandon(self, draft: Draft) -> None:
        """Leave a draft to the next `sweep`: to remove one takes a file system up to a second."""
        draft.lock.release()

    # -- reading

    def is_committed(self, checkpoint_id: str) -> bool:
        """Whether there is a checkpoint of that id."""
        return self._layout.checkpoint(checkpoint_id).manifest.exists()

    def read(self, checkpoint_id: str) -> Checkpoint:
        """The manifest alone. Raises NotFound, Corrupt."""
        files = self._layout.checkpoint(check_object_id(checkpoint_id))
        try:
            if files.manifest.stat().st_size > SIZE_LIMIT:
                raise Corrupt(f"{files.manifest} is too large for a manifest", hint=_COLD)
            checkpoint = checkpoint_from_json(files.manifest.read_bytes(), source=str(files.manifest))
        except FileNotFoundError:
            raise NotFound(
                f"there is no checkpoint {checkpoint_id[:12]}", hint="capsem checkpoints shows them"
            ) from None
        except OSError as error:
            raise Corrupt(f"{files.manifest} cannot be read: {error.strerror}", hint=_COLD) from error
        if checkpoint.id != checkpoint_id:
            raise Corrupt(f"{files.path} holds checkpoint {checkpoint.id[:12]}: it was exchanged", hint=_COLD)
        return checkpoint

    def peek(self, checkpoint_id: str) -> Checkpoint:
        """As `read`, but from memory where it was read before: a manifest does not change. Raises NotFound, Corrupt."""
        known = self._known.get(checkpoint_id) if self.is_committed(checkpoint_id) else None
        if known is None:
            known = self._known[checkpoint_id] = self.read(checkpoint_id)
        return known

    def open(self, checkpoint_id: str) -> tuple[Checkpoint, CheckpointDir]:
        """A checkpoint that is about to be used: identity of every part, digests of all that is small.

        What is not read are the pages of RAM and the data of layers; `verify` does that. Raises NotFound, Corrupt.
        """
        checkpoint = self.read(checkpoint_id)
        files = self._layout.checkpoint(checkpoint_id)
        self.check_layers(checkpoint)
        try:
            if checkpoint.memory is not None:
                identity = ram.read_identity(files.memory, checkpoint.memory.size)
                if identity != ram.RamIdentity(checkpoint.vm_id, checkpoint.id, checkpoint.memory.size):
                    raise Corrupt(
                        f"{files.memory} is the memory of {identity.vm_id} in checkpoint {identity.checkpoint_id[:12]}, "
                        f"not of {checkpoint.vm_id} in {checkpoint.id[:12]}",
                        hint=_COLD,
                    )
                if files.sums.stat().st_size != ram.sums_size(checkpoint.memory.size):
                    raise Corrupt(f"{files.sums} has not the size that it should have", hint=_COLD)
            for part, path in (
                (checkpoint.devices, files.devices),
                (checkpoint.jobs, files.jobs),
                (checkpoint.names, files.names),
            ):
                if part is not None and describe(path) != part:
                    raise Corrupt(f"{path} is not what was written: its digest is wrong", hint=_COLD)
        except OSError as error:
            raise Corrupt(f"checkpoint {checkpoint.id[:12]} lacks a part: {error}", hint=_COLD) from error
        return checkpoint, files

    def check_layers(self, checkpoint: Checkpoint) -> None:
        """Are the layers those that were frozen, as far as their headers tell? Raises Corrupt."""
        for layer in checkpoint.layers:
            try:
                head = self._head(layer.id)
            except OSError as error:
                raise Corrupt(
                    f"layer {layer.id[:12]} of checkpoint {checkpoint.id[:12]} is gone: {error}",
                    hint="restore it from a backup",
                ) from error
            if head != layer.head:
                raise Corrupt(
                    f"layer {layer.id[:12]} of checkpoint {checkpoint.id[:12]} is not the one that was frozen",
                    hint="it was damaged or exchanged; restore it from a backup",
                )

    def verify(self, checkpoint_id: str) -> Checkpoint:
        """Read all of a checkpoint; a layer that has no checksum yet gets one. Raises NotFound, Corrupt, OSError."""
        checkpoint, files = self.open(checkpoint_id)
        if checkpoint.memory is not None:
            ram.verify(files.memory, files.sums, checkpoint.memory.size, checkpoint.memory.digest)
        for layer in checkpoint.layer_ids:
            with self._summing:
                path, target = self._layout.layer(layer), self._layout.layer_sum(layer)
                (layer_sums.check if target.exists() else layer_sums.write)(path, target)
        return checkpoint

    def sum_layers(self, cancelled: Callable[[], bool]) -> None:
        """Make the checksums that layers of checkpoints do not have yet. Takes its time. Raises OSError."""
        for layer in {layer for checkpoint in self.all() for layer in checkpoint.layer_ids}:
            path, target = self._layout.layer(layer), self._layout.layer_sum(layer)
            with self._summing, contextlib.suppress(FileNotFoundError):
                if not target.exists() and not layer_sums.write(path, target, cancelled):
                    return

    def all(self) -> list[Checkpoint]:
        """Every checkpoint whose manifest can be read, oldest first. One that was read before is not read again."""
        found: dict[str, Checkpoint] = {}
        unreadable: dict[str, CapsemError] = {}
        for path in self._layout.checkpoints.iterdir():
            with contextlib.suppress(NotFound, InvalidInput):  # a draft, or none of ours
                try:
                    known = self._known.get(path.name) if self.is_committed(path.name) else None
                    found[path.name] = known or self.read(path.name)
                except Corrupt as error:
                    unreadable[path.name] = error
        self._known, self.unreadable = found, unreadable
        return sorted(found.values(), key=lambda each: (each.created_at, each.id))

    def find(self, owner: VmRecord, prefix: str) -> Checkpoint:
        """The one checkpoint of a VM whose id begins so. Raises NotFound, InvalidInput (several do)."""
        found = [each for each in self.all() if each.is_of(owner) and each.id.startswith(prefix.lower())]
        if not found or not prefix:
            raise NotFound(f"{owner.id} has no checkpoint {prefix[:40]!r}", hint=f"capsem checkpoints {owner.id}")
        if len(found) > 1:
            raise InvalidInput(
                f"{len(found)} checkpoints of {owner.id} begin with {prefix}", hint="give more of the id"
            )
        return found[0]

    # -- removing

    def withdraw(self, checkpoint_id: str) -> None:
        """From here on there is no such checkpoint, whatever happens; its files are left for `clear`, or `sweep`."""
        files = self._layout.checkpoint(check_object_id(checkpoint_id))
        files.manifest.unlink(missing_ok=True)
        if files.path.exists():
            durable.sync_directory(files.path)

    def clear(self, checkpoint_id: str) -> None:
        """Remove the files of a checkpoint that was withdrawn. Gigabytes take their time."""
        durable.remove_tree(self._layout.checkpoint(check_object_id(checkpoint_id)).path)

    def remove(self, checkpoint_id: str) -> None:
        """Remove a checkpoint; one that is not there is no error. Its layers stay: others may name them."""
        self.withdraw(checkpoint_id)
        self.clear(checkpoint_id)

    def abandoned(self, owner: str | None = None) -> list[Draft]:
        """Drafts that nobody works on, which are the caller's from here on, to `discard`. With `owner` only theirs: then
        drafts of others may be begun meanwhile.

        First the lock, then the look: a draft that is committed in between has a manifest by the time that its lock
        can be had.
        """
        found = []
        for path in self._layout.checkpoints.iterdir():
            files = CheckpointDir(path)
            if files.manifest.exists():
                continue
            try:
                if owner is not None and files.draft.read_text(errors="replace") != owner:
                    continue
                lock = try_lock(files.draft)
            except OSError:  # no directory, or none any more
                lock = None
            if lock is None:
                continue
            if files.manifest.exists():
                files.draft.unlink(missing_ok=True)  # we made it again
                lock.release()
            else:
                found.append(Draft(files, lock))
        return found

    def sweep(self, owner: str | None = None) -> list[str]:
        """Remove what `abandoned` finds; returns their ids. Takes its time. Raises OSError."""
        drafts = self.abandoned(owner)
        for draft in drafts:
            self.discard(draft)
        return [draft.id for draft in drafts]


def describe(path: Path) -> Part:
    """Length and digest of a file. Raises OSError."""
    with path.open("rb", buffering=0) as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return Part(file.tell(), digest)
