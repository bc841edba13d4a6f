"""Templates: machines that have booted and wait, as checkpoints, for new VMs to be forks of them.

The first VM of a size boots a machine of nobody's, has it run one command so that what every command needs is in its
memory, and saves it. That VM and all later ones are live forks: each gets its identity, environment, entropy and clock
in the handshake, before anybody gets in, as every fork does. A template holds no more of anybody than the image.

It is good for one image, one size, and one kind of host, all of which its manifest says; what has become useless is
removed when it is found out, and beyond a few the one that was used longest ago.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable

from capsem.api.internal import CheckpointMade, Save, Stop
from capsem.image.catalog import Image
from capsem.model.checkpoint import Checkpoint, Kind
from capsem.model.errors import HostNotReady, MachineFailed, TimedOut, Unavailable
from capsem.model.spec import VmSpec
from capsem.model.vm import HARDWARE
from capsem.service import space
from capsem.service.create import Maker
from capsem.service.fleet import Fleet
from capsem.service.gate import VISIT
from capsem.service.link import Link
from capsem.service.vm import Vm
from capsem.wire.messages import Exec

KEPT = 4  # templates; each holds about a hundred megabytes
BOOT_LIMIT = 90.0  # seconds
EXIT_LIMIT = 10.0  # seconds from the committed template to its supervisor's exit
# What a machine does behind its agent's back, image/guestfs/init-late, is done once, and not by every fork.
WARM_UP = "until [ -e /run/capsem/settled ]; do sleep 0.1; done"
WARM_UP_LIMIT = 30.0  # seconds

log = logging.getLogger("capsem_service.templates")


class Templates:
    """Those of one run directory; they are the checkpoints of kind TEMPLATE."""

    def __init__(self, fleet: Fleet, maker: Maker, wanted: Callable[[], bool]) -> None:
        """`wanted`: what the user's settings say at the moment."""
        self._fleet = fleet
        self._maker = maker
        self._wanted = wanted
        self._building: dict[tuple[object, ...], asyncio.Task[Checkpoint]] = {}
        self._preparing: set[asyncio.Task[Checkpoint | None]] = set()

    async def get(self, profile: str, spec: VmSpec) -> Checkpoint | None:
        """A template for a VM like that, made if there is none; whoever asks while it is made waits for the same one.

        None: none are wanted, or there is no room, or the machine did not come up; then the VM is to boot, which tells
        what is wrong. Raises NotFound, Corrupt (the image).
        """
        if not self._wanted():
            return None
        image = self._maker.catalog.find(profile)
        try:
            return await self._get(image, _bare(spec))
        except (HostNotReady, MachineFailed, TimedOut, Unavailable, OSError) as error:
            log.warning("no template could be made: %s", error)
            return None

    async def prepare(self, profile: str, spec: VmSpec) -> bool:
        """Whether there is a template for VMs like that; if not, it is made in the background. Raises NotFound, Corrupt."""
        image, size = self._maker.catalog.find(profile), _bare(spec)
        found = self._find(image, size)
        if found is not None and not found.differences(await self._maker.machine(image, size, HARDWARE)):
            return True
        making = asyncio.create_task(self.get(profile, spec), name="prepare")
        self._preparing.add(making)
        making.add_done_callback(self._prepared)
        return False

    def _prepared(self, making: asyncio.Task[Checkpoint | None]) -> None:
        self._preparing.discard(making)
        if not making.cancelled() and (error := making.exception()) is not None:
            log.warning("no template could be made: %s", error)

    async def _get(self, image: Image, size: VmSpec) -> Checkpoint | None:
        machine = await self._maker.machine(image, size, HARDWARE)
        found = self._find(image, size)
        if found is not None and not found.differences(machine):
            os.utime(self._fleet.layout.checkpoint(found.id).path)  # the last that was used is the last to go
            return found
        if space.free_bytes(self._fleet.layout) < (size.ram_mb << 20) + space.MARGIN:
            log.warning("no template is made: there is not enough room on the disk")
            return None
        made = await asyncio.shield(self._build_once(image, size))
        # Between its end and now another may have been made, and this one been too many.
        return made if self._fleet.checkpoints.is_committed(made.id) else None

    def _find(self, image: Image, size: VmSpec) -> Checkpoint | None:
        for each in self._all():
            if (each.image_digest, each.hardware) == (image.digest, HARDWARE) and _size(each) == size:
                return each
        return None

    def _all(self) -> list[Checkpoint]:
        """Newest first."""
        return [each for each in reversed(self._fleet.checkpoints.all()) if each.kind == Kind.TEMPLATE]

    def _build_once(self, image: Image, size: VmSpec) -> asyncio.Task[Checkpoint]:
        key = (image.digest, size.cpus, size.ram_mb, size.disk_mb)
        if key not in self._building:
            task = self._building[key] = asyncio.create_task(self._build(image, size), name="template")
            task.add_done_callback(lambda _task: self._building.pop(key))
        return self._building[key]

    async def _build(self, image: Image, size: VmSpec) -> Checkpoint:
        VISIT.set(None)  # several may wait for it, and who asked first may go away
        name = f"template-{self._fleet.system.entropy.token_bytes(6).hex()}"
        log.info("making a template of %s: %d cpus, %d MiB", image.name, size.cpus, size.ram_mb)
        vm = self._maker.make(name, size, persistent=False, profile=image.name, is_template=True)
        try:
            async with vm.turn:
                link = await self._boot(vm)
                async with self._maker.gate.change(vm, "be saved"):
                    made = await link.open(Save(kind=Kind.TEMPLATE, go_on=False)).result()
                    if not await vm.ended(EXIT_LIMIT):
                        await vm.stop(Stop(kill=True))
        finally:
            if vm.running:
                async with self._maker.gate.teardown(vm):
                    await vm.stop(Stop(kill=True))
            if not vm.deleted:  # it never ran
                self._fleet.remove(vm)
        assert isinstance(made, CheckpointMade)
        checkpoint = self._fleet.checkpoints.read(made.checkpoint)
        await self._retire(checkpoint)
        return checkpoint

    async def _boot(self, vm: Vm) -> Link:
        """Returns when the machine has what a command needs in its memory."""
        passed = await self._maker.gate.boot(vm)
        try:
            await self._maker.start(vm)
            link = await vm.ready_link(BOOT_LIMIT)
        finally:
            passed.release()
        await link.open(
            Exec(job=self._fleet.system.entropy.token_bytes(8).hex(), command=WARM_UP, timeout=WARM_UP_LIMIT)
        ).result()
        return link

    async def _retire(self, newest: Checkpoint) -> None:
        """Remove what the new one replaces, what can be used no more, and what is too many; never what a VM runs on."""
        layout, useful = self._fleet.layout, 1
        others = [each for each in self._all() if each.id != newest.id]
        others.sort(key=lambda each: layout.checkpoint(each.id).path.stat().st_mtime, reverse=True)
        for each in others:
            replaced = (each.image_digest, _size(each)) == (newest.image_digest, _size(newest))
            if useful < KEPT and not replaced and await self._is_good(each):
                useful += 1
            elif not self._fleet.is_referenced(each.id):
                self._fleet.remove_checkpoint(each)

    async def _is_good(self, template: Checkpoint) -> bool:
        """Whether this host could still fork it."""
        for image in self._maker.catalog.list():
            if image.digest == template.image_digest:
                machine = await self._maker.machine(image, _size(template), template.hardware)
                return not template.differences(machine)
        return False


def _bare(spec: VmSpec) -> VmSpec:
    """The size alone."""
    return VmSpec(cpus=spec.cpus, ram_mb=spec.ram_mb, disk_mb=spec.disk_mb)


def _size(template: Checkpoint) -> VmSpec:
    return VmSpec(cpus=template.cpus, ram_mb=template.ram_mb, disk_mb=template.disk_mb)
