"""Chains of layers are kept short in the background, whatever happens meanwhile. The merged bytes are real in tests/vm."""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Sequence
from pathlib import Path

import pytest
from sim_world import sim_world

from capsem.api.checkpoint_types import CheckpointRequest, OneCheckpointRequest
from capsem.api.exec_types import ExecRequest
from capsem.api.vm_types import ForkRequest, ProvisionRequest, ResumeRequest
from capsem.hypervisor.driver import Merged
from capsem.service.flattening import Flattening
from capsem.service.vm import Vm
from capsem.store.flatten import MAX_DEPTH
from service_world import World, play

FORKS = MAX_DEPTH + 3


class Held:
    """Merges that begin, and end when they are let."""

    def __init__(self, it: World) -> None:
        self.began = asyncio.Event()
        self.go_on = asyncio.Event()
        self._merge = it.driver.merge_layers
        it.driver.merge_layers = self  # type: ignore[method-assign, assignment]

    async def __call__(self, sources: Sequence[Path], target: Path, *, vm_id: str, layer_id: str) -> Merged:
        self.began.set()
        await self.go_on.wait()
        return await self._merge(sources, target, vm_id=vm_id, layer_id=layer_id)


async def box(it: World) -> None:
    await it.handlers.provision(ProvisionRequest(name="box", persistent=True))
    it.handlers.flattening.begin()


async def fork(it: World, count: int = FORKS) -> None:
    """Each fork is one layer more; the children go, so that nobody else names any."""
    for number in range(count):
        await it.handlers.fork("box", ForkRequest(name=f"child-{number}"))
        await it.handlers.delete(f"child-{number}")


async def settled(flattening: Flattening) -> None:
    while flattening.busy:
        await asyncio.sleep(0.01)


async def changes(vm: Vm) -> None:
    """Its supervisor has something to say all the time, for which the service reads the record."""
    while True:
        vm.reload()
        vm.on_changed(vm)
        await asyncio.sleep(0)


def depth(it: World) -> int:
    return len(it.fleet.get("box").record.layers) - 1


async def layers_on_disk(it: World) -> set[str]:
    await it.fleet.cleared()
    return {path.stem for path in it.layout.layers.glob("*.qcow2")}


def test_a_running_vm_keeps_what_its_machine_reads_until_it_ends(tmp_path: Path) -> None:
    async def scene(it: World) -> None:
        await box(it)
        await fork(it)
        await settled(it.handlers.flattening)
        vm = it.fleet.get("box")
        assert depth(it) <= MAX_DEPTH
        assert vm.record.attached
        assert not set(vm.record.attached) & set(vm.record.layers)
        assert await layers_on_disk(it) == {*vm.record.layers, *vm.record.attached}
        # What the next service finds is the same.
        await it.handlers.flattening.close()
        await it.restart()
        vm = it.fleet.get("box")
        assert vm.record.attached
        assert await layers_on_disk(it) == {*vm.record.layers, *vm.record.attached}
        await it.handlers.stop("box")
        assert await layers_on_disk(it) == set(it.fleet.get("box").record.layers)
        await it.handlers.resume("box", ResumeRequest())
        assert (await it.handlers.execute("box", ExecRequest(command="echo one"))).stdout == "one\n"
        assert not it.fleet.get("box").record.attached

    play(tmp_path, scene)


def test_a_vm_at_rest_is_flattened_too(tmp_path: Path) -> None:
    async def scene(it: World) -> None:
        await box(it)
        await it.handlers.stop("box")
        await fork(it)
        await settled(it.handlers.flattening)
        assert depth(it) <= MAX_DEPTH
        assert await layers_on_disk(it) == set(it.fleet.get("box").record.layers)

    play(tmp_path, scene)


def test_layers_that_a_copy_needs_stay(tmp_path: Path) -> None:
    async def scene(it: World) -> None:
        await box(it)
        await it.handlers.stop("box")
        for number in range(2 * FORKS):
            await it.handlers.fork("box", ForkRequest(name=f"child-{number}"))
        await settled(it.handlers.flattening)
        assert depth(it) <= 2 * MAX_DEPTH
        for vm in it.fleet.all():
            assert len(vm.record.layers) - 1 <= 2 * MAX_DEPTH, vm.id
            assert all(it.layout.layer(layer).exists() for layer in vm.record.layers), vm.id
        for vm in it.fleet.all():
            await it.handlers.delete(vm.id)
        assert not await layers_on_disk(it)

    play(tmp_path, scene)


def test_what_a_machine_may_still_write_to_is_not_merged(tmp_path: Path) -> None:
    """A record names a new layer before the machine goes on in it: while it is saved or forked the one below is not frozen."""

    async def scene() -> None:
        async with sim_world(tmp_path) as it:
            merge, safe = it.driver.merge_layers, []

            async def watched(sources: Sequence[Path], target: Path, *, vm_id: str, layer_id: str) -> Merged:
                written = {machine.top_layer.path for machine in it.driver.machines if not machine.gone}
                safe.append(not written & set(sources))
                return await merge(sources, target, vm_id=vm_id, layer_id=layer_id)

            it.driver.merge_layers = watched  # type: ignore[method-assign, assignment]
            await it.create("box")
            flattening = it.handlers.flattening
            flattening.begin()
            words = asyncio.create_task(changes(it.fleet.get("box")))
            for number in range(3 * MAX_DEPTH):
                match number % 3:
                    case 0:
                        await it.handlers.suspend("box")
                        await it.handlers.resume("box", ResumeRequest())
                    case 1:
                        made = await it.handlers.checkpoint("box", CheckpointRequest())
                        await it.handlers.remove_checkpoint("box", OneCheckpointRequest(made.id))
                    case 2:
                        await it.handlers.fork("box", ForkRequest(name="child"))
                        await it.handlers.delete("child")
            words.cancel()
            while flattening.busy:
                await asyncio.sleep(0.01)
            await flattening.close()
            assert safe
            assert all(safe)

    asyncio.run(scene())


def test_nothing_waits_for_a_merge_and_a_vm_that_goes_takes_it_along(tmp_path: Path) -> None:
    async def scene(it: World) -> None:
        held = Held(it)
        await box(it)
        await fork(it)
        await held.began.wait()
        await it.handlers.stop("box")
        await it.handlers.resume("box", ResumeRequest())
        assert (await it.handlers.execute("box", ExecRequest(command="echo one"))).stdout == "one\n"
        await it.handlers.delete("box")
        await settled(it.handlers.flattening)
        held.go_on.set()
        await asyncio.sleep(0)
        assert not await layers_on_disk(it)
        assert not it.fleet.spare

    play(tmp_path, scene)


def test_a_merge_takes_its_place_below_what_was_added_meanwhile(tmp_path: Path) -> None:
    async def scene(it: World) -> None:
        held = Held(it)
        await box(it)
        await fork(it, MAX_DEPTH + 1)
        await held.began.wait()
        before = it.fleet.get("box").record.layers
        await fork(it, 2)
        added = it.fleet.get("box").record.layers[len(before) :]
        held.go_on.set()
        await settled(it.handlers.flattening)
        record = it.fleet.get("box").record
        assert record.layers[-len(added) - 1 :] == (before[-1], *added)
        assert depth(it) <= MAX_DEPTH

    play(tmp_path, scene)


@pytest.mark.parametrize("killed", [False, True])
def test_a_service_that_ends_in_the_middle_leaves_nothing(tmp_path: Path, killed: bool) -> None:
    async def scene(it: World) -> None:
        held = Held(it)
        await box(it)
        await fork(it)
        await held.began.wait()
        if killed:
            it.layout.layer("f" * 32).write_bytes(b"half a layer")
        await it.handlers.flattening.close()
        await it.restart()
        vm = it.fleet.get("box")
        assert await layers_on_disk(it) == set(vm.record.layers)
        held.go_on.set()
        it.handlers.flattening.begin()
        await settled(it.handlers.flattening)
        assert depth(it) <= MAX_DEPTH

    play(tmp_path, scene)


def test_a_full_disk_puts_it_off(tmp_path: Path) -> None:
    async def scene(it: World) -> None:
        merge, tries = it.driver.merge_layers, 0

        async def full(*_args: object, **_named: object) -> Merged:
            nonlocal tries
            tries += 1
            raise OSError(errno.ENOSPC, "No space left on device")

        it.driver.merge_layers = full  # type: ignore[method-assign, assignment]
        await box(it)
        await it.handlers.stop("box")
        await fork(it, MAX_DEPTH + 2)
        await settled(it.handlers.flattening)
        assert depth(it) == MAX_DEPTH + 2
        assert 1 <= tries <= 2  # once for each chain, not again and again
        it.driver.merge_layers = merge  # type: ignore[method-assign]
        await fork(it, 1)
        await settled(it.handlers.flattening)
        assert depth(it) <= MAX_DEPTH

    play(tmp_path, scene)


def test_what_a_supervisor_refuses_is_thrown_away(tmp_path: Path) -> None:
    """One of an older version, for example."""

    async def scene(it: World) -> None:
        from capsem.model.errors import Unsupported
        from capsem.supervisor.supervisor import Supervisor

        async def refuse(_self: object, _request: object) -> None:
            raise Unsupported("replace-layers is not served here")

        original = Supervisor.replace_layers
        Supervisor.replace_layers = refuse  # type: ignore[method-assign, assignment]
        try:
            await box(it)
            await fork(it, MAX_DEPTH + 1)
            await settled(it.handlers.flattening)
            assert await layers_on_disk(it) == set(it.fleet.get("box").record.layers)
            assert depth(it) == MAX_DEPTH + 1
        finally:
            Supervisor.replace_layers = original  # type: ignore[method-assign]

    play(tmp_path, scene)
