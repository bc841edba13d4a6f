"""Making a VM on disk, and starting its supervisor: the two halves of every boot."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from capsem import __version__, faults
from capsem.hypervisor.driver import Driver, Layer, Volume
from capsem.image.catalog import Catalog, Image
from capsem.image.volume import format_volume
from capsem.model.checkpoint import Checkpoint
from capsem.model.errors import CapsemError, HostNotReady, MachineFailed, NotFound
from capsem.model.lifecycle import State
from capsem.model.policy import OFF, Policy
from capsem.model.spec import VmSpec
from capsem.model.vm import VmRecord
from capsem.service.fleet import Fleet
from capsem.service.gate import Gate
from capsem.service.launch import Boot, Launcher, assets
from capsem.service.vm import Vm
from capsem.store import durable, records
from capsem.tracing import span

COLD = Boot()
NO_NETWORK: Mapping[str, Any] = MappingProxyType({})
NO_SECRETS: Mapping[str, tuple[str, ...]] = MappingProxyType({})

log = logging.getLogger("capsem_service.create")


@dataclass(frozen=True, slots=True)
class Maker:
    """Makes VMs out of images and starts them."""

    fleet: Fleet
    driver: Driver
    catalog: Catalog
    launcher: Launcher
    gate: Gate
    formatting: asyncio.Lock = field(default_factory=asyncio.Lock)  # of volumes: each is made once, whoever needs it

    def make(
        self,
        name: str,
        spec: VmSpec,
        *,
        persistent: bool,
        profile: str,
        policy: Policy = OFF,
        network: Mapping[str, Any] = NO_NETWORK,
        secrets: Mapping[str, tuple[str, ...]] = NO_SECRETS,
        template: Checkpoint | None = None,
        is_template: bool = False,
        pooled: bool = False,
    ) -> Vm:
        """Volume, session directory and record of a new VM; what was begun is removed when it fails.

        With a `template` it is suspended there, and its first start makes it a machine of its own. `is_template`: it is
        to become one. `pooled`: it is to wait for somebody.

        Raises NotFound (no image), OSError (disk full).
        """
        with self.catalog.taken(profile, self.fleet.layout.run_dir) as image:
            record = VmRecord(
                id=name,
                persistent=persistent,
                spec=spec,
                image=image.name,
                image_digest=image.digest,
                layers=template.layer_ids if template else (),
                created_at=self.fleet.system.clock.time(),
                version=__version__,
                checkpoint=template.id if template else None,
                state=State.SUSPENDED if template else State.CREATED,
                policy=policy,
                network=network,
                secrets=secrets,
                template=is_template,
                pooled=pooled,
            )
            return self._write(record)

    def make_child(
        self,
        name: str,
        source: VmRecord,
        frozen: tuple[str, ...],
        description: str | None,
        *,
        spec: VmSpec | None = None,
        persistent: bool = True,
        checkpoint: str | None = None,
        policy: Policy = OFF,
        network: Mapping[str, Any] | None = None,
        secrets: Mapping[str, tuple[str, ...]] = NO_SECRETS,
    ) -> Vm:
        """A new VM on top of another's frozen layers; it has the source's size, and neither its environment nor its
        policy of times.

        With `checkpoint` it is suspended there. `network` is its own network policy, the source's unless given;
        `secrets` are what it is lent, and nothing of the source's unless given.

        Raises OSError (disk full).
        """
        record = VmRecord(
            id=name,
            persistent=persistent,
            spec=spec or replace(source.spec, env=MappingProxyType({})),
            image=source.image,
            image_digest=source.image_digest,
            layers=frozen,
            created_at=self.fleet.system.clock.time(),
            version=__version__,
            hardware=source.hardware,
            forked_from=source.id,
            description=description,
            checkpoint=checkpoint,
            current=checkpoint,
            state=State.SUSPENDED if checkpoint else State.CREATED,
            policy=policy,
            network=source.network if network is None else network,
            secrets=secrets,
        )
        return self._write(record)

    def new_layer(self, record: VmRecord, *, sync: bool = True) -> str:
        """Make an empty layer for a VM; returns its id. It is durable, unless its supervisor is to `sync` it.

        Raises OSError; then nothing is left of it.
        """
        layer = self.fleet.system.entropy.token_bytes(16).hex()
        path = self.fleet.layout.layer(layer)
        try:
            self.driver.create_layer(path, size_mb=record.spec.disk_mb, vm_id=record.id, layer_id=layer, sync=sync)
        except BaseException:
            path.unlink(missing_ok=True)
            raise
        return layer

    def _write(self, record: VmRecord) -> Vm:
        """Make the VM's own layer, unless it is suspended, and directory; the record makes it a VM."""
        own = () if record.state == State.SUSPENDED else (self.new_layer(record),)
        session = self.fleet.layout.session(record.id, persistent=record.persistent)
        try:
            session.path.mkdir(mode=0o700)
            record = replace(record, layers=(*record.layers, *own))
            records.write(session, record)
            durable.sync_directory(session.path.parent)
        except BaseException:
            durable.remove_tree(session.path)
            for layer in own:
                self.fleet.layout.layer(layer).unlink(missing_ok=True)
            raise
        return self.fleet.add(session, record)

    def image_of(self, record: VmRecord) -> Image:
        """The very image that a VM was made from. Raises NotFound with the way out."""
        for image in self.catalog.list():
            if image.digest == record.image_digest:
                return image
        raise NotFound(
            f"the image {record.image} ({record.image_digest[:12]}) of {record.id} is not on this host",
            hint="put it back where it was; a VM's volume lies on top of its image and cannot move to another",
        )

    async def _volume(self, image: Image, size_mb: int) -> Path:
        """The empty volume below a VM's layers; of another size than the image's it is formatted when first needed."""
        if size_mb == image.volume_mb:
            return image.volume
        path = self.fleet.layout.volume(size_mb)
        async with self.formatting:
            if not path.exists():
                temporary = path.with_name(f"{durable.TEMPORARY}{path.name}.{os.getpid()}")
                await asyncio.to_thread(format_volume, temporary, size_mb)
                durable.rename(temporary, path)
        return path

    async def open_volume(self, record: VmRecord) -> Volume:
        """The volume of a VM that does not run, to read from; the caller holds the VM's turn, and closes it.

        Raises NotFound (image gone), Corrupt, OSError.
        """
        base = await self._volume(self.image_of(record), record.spec.disk_mb)
        layers = (Layer(self.fleet.layout.layer(each), "qcow2") for each in record.layers)
        return self.driver.open_volume((Layer(base, "raw"), *layers))

    async def check_restorable(self, record: VmRecord, checkpoint: Checkpoint) -> None:
        """Would this host restore the checkpoint's memory? Raises WrongState telling what differs; see `image_of`."""
        checkpoint.require(await self.machine(self.image_of(record), record.spec, record.hardware))

    async def machine(self, image: Image, spec: VmSpec, hardware: int) -> dict[str, Any]:
        """What this host would restore a machine of that size on; see Checkpoint.machine. Raises HostNotReady."""
        machine = self.driver.fingerprint(
            await self.driver.version(),
            hardware=hardware,
            accelerator=await self.driver.accelerator(),
            cpus=spec.cpus,
            ram_mb=spec.ram_mb,
            command_line=image.kernel_command_line,
        )
        return {**machine, **assets(image)}

    async def start(self, vm: Vm, boot: Boot = COLD) -> None:
        """Start a VM's supervisor; the caller holds the VM's turn. Returns when the machine is about to run.

        A volume whose top layer belongs to a checkpoint gets a new one: that of a suspended VM, or of one whose disk was
        kept for a rollback that was cut off.

        Raises NotFound (image gone), HostNotReady, MachineFailed.
        """
        image = self.image_of(vm.record)
        accelerator = await self.driver.accelerator()
        volume = await self._volume(image, vm.record.spec.disk_mb)
        if self.fleet.stopping:
            raise HostNotReady("the service is stopping", hint="try again when it is back")
        if vm.record.state == State.SUSPENDED or self.fleet.is_frozen(vm.record.layers[-1]):
            with span("make a layer"):
                boot = replace(boot, layer=self.new_layer(vm.record, sync=False))
        layers = await self.fleet.network_layers(vm.record.network)
        granted = self.fleet.granted(vm.record.secrets)
        boot = replace(boot, ledger=self.fleet.ledger and not vm.record.nobodys, network=layers, secrets=granted)
        faults.at("start.layered")
        try:
            child, link = await self.launcher.start(vm.record, vm.session, image, volume, accelerator, boot)
        except (CapsemError, OSError) as error:
            vm.settle()
            if boot.layer is not None and boot.layer not in vm.record.layers:
                self.fleet.layout.layer(boot.layer).unlink(missing_ok=True)
            if vm.record.failure is None:
                raise
            # The supervisor came up, and ended before we could speak to it: its record says why.
            raise MachineFailed(
                f"{vm.id} did not start: {vm.record.failure}", hint=f"`capsem logs {vm.id}` shows more"
            ) from error
        vm.begin(child, link)
