"""What has to hold once it is quiet: nothing acknowledged is lost, nothing is left that nobody needs, all can go."""

from __future__ import annotations

import asyncio
from pathlib import Path

from capsem.api.exec_types import ExecRequest
from capsem.model.checkpoint import Kind
from capsem.model.errors import CapsemError
from capsem.model.lifecycle import Status
from capsem.simulation.clients import Population
from capsem.simulation.history import VmHistory
from capsem.simulation.world import Violation
from capsem.store import durable
from capsem.store.locks import is_locked

REST = 90.0  # seconds in which whatever was under way comes to its end


async def settle(people: Population) -> None:
    """Raises Violation. No VM is left."""
    world = people.world
    await asyncio.sleep(REST)
    world.check_now()
    people.note("-- a new service looks at what there is")
    world.service.process.kill()
    listed = {each.id: each for each in (await people.ask(lambda on: on.list())).sandboxes}
    await asyncio.sleep(REST)
    missing = [vm.name for vm in people.vms.values() if vm.sure and vm.name not in listed]
    if missing:
        raise Violation(f"{', '.join(missing)}: made, never deleted, and not there")
    unknown = set(listed) - set(people.vms)
    for name in sorted(unknown):
        if people.world.layout.session(name, persistent=True).path.exists():
            raise Violation(f"{name} is there, and nobody has made it, or it was deleted")
    _what_is_said_is_so(people)
    _nothing_superfluous(people)
    for name in sorted(listed):
        vm = people.vms.get(name)
        if vm is not None:
            await _comes_back(people, vm)
        await _goes(people, name)
    await asyncio.sleep(REST)
    world.check_now()
    _nothing_left(people)


async def _comes_back(people: Population, vm: VmHistory) -> None:
    """Its checkpoints are whole, it can be resumed, and it knows what it was told."""
    try:
        info = await people.ask(lambda on: on.info(vm.name))
        made = {each.id for each in (await people.ask(lambda on: on.checkpoints(vm.name))).checkpoints}
        if vm.sure and set(vm.checkpoints) - made:
            raise Violation(f"{vm.name}: acknowledged checkpoints are not there: {set(vm.checkpoints) - made}")
        await people._verify("check", vm)  # noqa: SLF001 - one of us
        if info.status == Status.SUSPENDED and not info.can_resume:
            raise Violation(f"{vm.name} is suspended, and cannot be resumed: {info.resume_blocked_reason}")
        if vm.persistent:
            await people._resume("check", vm)  # noqa: SLF001
        elif info.status != Status.RUNNING:
            return
        for client in sorted(vm.places):
            vm.places[client] = vm.get(client)
            await people._read(client, vm)  # noqa: SLF001
            if not vm.too_much_pending(client):
                await people._add(client, vm)  # noqa: SLF001
                await people._mark(client, vm)  # noqa: SLF001
        await people.ask(lambda on: on.execute(vm.name, ExecRequest(command="true")))
    except CapsemError as error:
        raise Violation(f"{vm.name}, when all was quiet: {type(error).__name__}: {error}") from error


async def _goes(people: Population, name: str) -> None:
    try:
        await people.ask(lambda on: on.delete(name))
    except CapsemError as error:
        raise Violation(f"{name} cannot be deleted: {error}") from error


def _what_is_said_is_so(people: Population) -> None:
    """The service's word, the processes and the locks agree."""
    world = people.world
    supervised = {vm_id for vm_id, process, _ in world.supervisors.values() if not process.dead}
    vms = {vm.id: vm for vm in world.service.fleet.known()}
    for name, vm in vms.items():
        locked = is_locked(vm.session.claim)
        if vm.running != locked:
            raise Violation(f"{name} is said to be {vm.state}, and its claim is {'held' if locked else 'free'}")
        if vm.running and vm.status == Status.DEFUNCT:
            raise Violation(f"{name} is Defunct, and runs")
    if len(supervised) > sum(vm.running for vm in vms.values()):
        raise Violation(f"supervisors without a VM: {sorted(supervised)}, known: {sorted(vms)}")


def _nothing_superfluous(people: Population) -> None:
    """Every layer and checkpoint is somebody's, and every draft is being made."""
    world, fleet = people.world, people.world.service.fleet
    used = fleet._used_layers()  # noqa: SLF001 - held against the files
    for path in world.layout.layers.iterdir():
        if path.stem not in used:
            raise Violation(f"nobody names the layer {path.name}")
    for layer in used:
        if not world.layout.layer(layer).exists():
            raise Violation(f"the layer {layer} is named, and not there")
    vms = {vm.id: vm for vm in fleet.known()}
    for path in world.layout.checkpoints.iterdir():
        files = world.layout.checkpoint(path.name)
        if not files.manifest.exists():
            if not is_locked(files.draft):
                raise Violation(f"a draft that nobody makes: {path.name}")
            continue
        checkpoint = fleet.checkpoints.read(path.name)
        owner = vms.get(checkpoint.vm_id)
        wanted = owner is not None and checkpoint.visible(owner.record.kept)
        if not wanted and not fleet.is_referenced(path.name):
            raise Violation(f"nobody needs the checkpoint {path.name} ({Kind(checkpoint.kind)} of {checkpoint.vm_id})")


def _nothing_left(people: Population) -> None:
    """No VM is there, and no trace of one but the logs of those that failed."""
    world = people.world
    layout = world.layout
    left: list[Path] = []
    for directory in (layout.persistent, layout.layers, layout.checkpoints, layout.instances):
        left += directory.iterdir()
    left += [path for path in layout.sessions.iterdir() if "-failed-" not in path.name]
    left += layout.run_dir.rglob(f"{durable.TEMPORARY}*")
    if left:
        raise Violation(f"left behind: {', '.join(str(path.relative_to(layout.run_dir)) for path in sorted(left))}")
    struck = world.driver().host.strikes()
    if struck:  # whether or not the guest that it would have harmed was restored in the end
        raise Violation(f"operations met that must not: {'; '.join(struck)}")
    if world.supervisors:
        raise Violation(f"supervisors live on: {[vm_id for vm_id, _, _ in world.supervisors.values()]}")
