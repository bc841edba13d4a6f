"""Checkpoints that leave this host as one stream, and VMs that are made of such streams (store/archive.py).

What comes in is believed in nothing. The manifest decides which parts may follow, and how large they are. The layers are
never shown to a VMM: their clusters are merged into a new layer of our own making, so that of their headers, tables and
backing names nothing is left. RAM is held against the manifest's checksums as it is written. The state of the devices
alone cannot be judged, and QEMU's parser of it is not made for enemies: without `trust` it is not even kept, and the VM
starts cold from the disk.

Everything is received into the draft of a checkpoint: whatever ends an import, the draft goes, or the next service
sweeps it. The VM's record is the last thing written.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from dataclasses import replace
from pathlib import Path

from capsem.api.checkpoint_types import ImportResponse
from capsem.model.checkpoint import Checkpoint
from capsem.model.errors import AlreadyExists, host_failed
from capsem.model.lifecycle import Status
from capsem.model.spec import VmSpec
from capsem.model.vm import VmRecord
from capsem.service.arrival import Arrival
from capsem.service.forks import Forks
from capsem.store.archive import DEVICES, JOBS, MANIFEST, MEMORY, Decoder, Source, encode, layer_name


class Transfer(Forks):
    """See service.manager.Manager."""

    async def export_checkpoint(self, vm_id: str, checkpoint: str) -> AsyncGenerator[bytes, None]:
        """One stream. Raises NotFound, Corrupt, at once; the checkpoint is kept until the stream is closed."""
        vm = self._vm("export_checkpoint", vm_id)
        found, _files = self._store.open(self._store.find(vm.record, checkpoint).id)
        return self._export(found)

    async def _export(self, checkpoint: Checkpoint) -> AsyncGenerator[bytes, None]:
        with self._fleet.pinned(checkpoint.id), contextlib.ExitStack() as files:
            pieces = encode(self._parts(checkpoint, files))
            while data := await asyncio.to_thread(next, pieces, b""):
                yield data

    def _parts(self, checkpoint: Checkpoint, files: contextlib.ExitStack) -> Iterator[Source]:
        """The manifest first; all files are opened before anything is sent."""
        layout, memory = self._fleet.layout, checkpoint.memory
        directory = layout.checkpoint(checkpoint.id)
        sent = replace(checkpoint, parent=None, names=None, memory=replace(memory, runs=()) if memory else None)
        manifest = os.memfd_create("manifest")
        files.callback(os.close, manifest)
        os.write(manifest, sent.to_json())
        parts = [Source(MANIFEST, manifest, os.fstat(manifest).st_size)]

        def add(name: str, path: Path, size: int | None = None) -> None:
            fd = files.enter_context(path.open("rb", buffering=0)).fileno()
            parts.append(Source(name, fd, os.fstat(fd).st_size if size is None else size))

        if memory is not None:
            add(DEVICES, directory.devices)
            if directory.jobs.exists():
                add(JOBS, directory.jobs)
            add(MEMORY, directory.memory, memory.size)
        for place, layer in enumerate(checkpoint.layer_ids):
            add(layer_name(place), layout.layer(layer))
        return iter(parts)

    async def import_checkpoint(self, name: str, body: AsyncIterator[bytes], *, trust: bool) -> ImportResponse:
        """A persistent VM of its own. Raises what is wrong with the stream, the name or this host; then nothing is left."""
        self._fleet.take_name(name)
        try:
            arrival = Arrival(self._store, trust=trust)
            try:
                return await self._import(name, arrival, body)
            except OSError as error:
                raise host_failed("the checkpoint could not be imported", error) from error
            finally:
                arrival.close()
        finally:
            self._fleet.release(name)

    async def _import(self, name: str, arrival: Arrival, body: AsyncIterator[bytes]) -> ImportResponse:
        decoder = Decoder()
        async for data in body:
            for event in decoder.feed(data):
                if await asyncio.to_thread(arrival.take, event):
                    await self._admit(arrival)
        decoder.finish()
        checkpoint, warm = arrival.checkpoint, arrival.warm
        assert checkpoint is not None
        layer = self._fleet.system.entropy.token_bytes(16).hex()
        self._fleet.spare.add(layer)
        try:
            await self._maker.driver.merge_layers(
                arrival.layers,
                self._fleet.layout.layer(layer),
                vm_id=name,
                layer_id=layer,
                size_mb=checkpoint.disk_mb,
            )
            source = _source(checkpoint)
            with self._fleet.pinned(checkpoint.id):
                if warm:
                    await asyncio.to_thread(arrival.commit, self._store.freeze([layer]))
                self._maker.make_child(
                    name,
                    source,
                    (layer,),
                    checkpoint.message,
                    spec=source.spec,
                    checkpoint=checkpoint.id if warm else None,
                    network=await self.network.document(None),  # what a stranger allowed is not allowed here
                )
        finally:
            self._fleet.spare.discard(layer)
            self._fleet.remove_layers((layer,))  # unless the VM names it
            self._fleet.collect()
        return ImportResponse(
            id=name, status=Status.SUSPENDED if warm else Status.STOPPED, checkpoint=checkpoint.id if warm else None
        )

    async def _admit(self, arrival: Arrival) -> None:
        """May this checkpoint come here? Raises what is in the way, before gigabytes have been sent for nothing."""
        checkpoint, draft = arrival.checkpoint, self._fleet.system.entropy.token_bytes(16).hex()
        assert checkpoint is not None
        source = _source(checkpoint)
        self._maker.image_of(source)
        if arrival.warm:
            draft = checkpoint.id
            if self._store.is_committed(checkpoint.id):
                raise AlreadyExists(
                    f"checkpoint {checkpoint.id[:12]} is on this host already",
                    hint="fork it where it is (`capsem fork --at`), or import its disk alone, without --trust",
                )
            await self._maker.check_restorable(source, checkpoint)
        arrival.prepare(draft)


def _source(checkpoint: Checkpoint) -> VmRecord:
    """A record of the VM that was exported, as far as a copy needs it. Raises InvalidInput."""
    return VmRecord(
        id=checkpoint.vm_id,
        persistent=True,
        spec=VmSpec(checkpoint.cpus, checkpoint.ram_mb, checkpoint.disk_mb),
        image=checkpoint.image,
        image_digest=checkpoint.image_digest,
        layers=(),
        created_at=checkpoint.created_at,
        hardware=checkpoint.hardware,
    )
