"""Layers that are there before a record names them: nobody sweeps one that is about to be named, nor names one that is gone."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from sim_world import sim_world

from capsem.api.checkpoint_types import CheckpointRequest
from capsem.api.internal import AddLayer, ReplaceLayers
from capsem.api.vm_types import ForkRequest, ProvisionRequest
from capsem.model.errors import Unavailable
from capsem.store import records
from capsem.store.naming import take_naming
from service_world import World, play

LAYER = "f" * 32


async def box(it: World) -> None:
    await it.handlers.provision(ProvisionRequest(name="box", persistent=True))


def test_a_sweep_waits_for_who_is_about_to_name_a_layer(tmp_path: Path) -> None:
    async def scene(it: World) -> None:
        await box(it)
        naming = await take_naming(it.layout, shared=True)
        it.layout.layer(LAYER).touch()
        restarting = asyncio.create_task(it.restart())
        await asyncio.wait((restarting,), timeout=0.3)
        swept = restarting.done() or not it.layout.layer(LAYER).exists()
        # Now it is named, as the supervisor of a machine that is being saved does it: it speaks with no service.
        session = it.layout.session("box", persistent=True)
        record = records.read(session)
        records.write(session, replace(record, layers=(*record.layers, LAYER)))
        naming.release()
        await restarting
        assert not swept
        assert it.layout.layer(LAYER).exists()

    play(tmp_path, scene)


def test_what_nobody_is_about_to_name_is_swept(tmp_path: Path) -> None:
    async def scene(it: World) -> None:
        await box(it)
        it.layout.layer(LAYER).touch()
        await it.restart()
        assert not it.layout.layer(LAYER).exists()

    play(tmp_path, scene)


@pytest.mark.parametrize("what", ["fork", "checkpoint", "suspend", "create"])
def test_nobody_names_a_layer_during_a_sweep(tmp_path: Path, what: str) -> None:
    async def scene() -> None:
        async with sim_world(tmp_path) as it:
            await it.create("box")
            session = it.fleet.get("box").session
            before = records.read(session).layers
            sweeping = await take_naming(it.layout, shared=False)
            asked: dict[str, Callable[[], Coroutine[Any, Any, Any]]] = {
                "fork": lambda: it.handlers.fork("box", ForkRequest(name="child")),
                "checkpoint": lambda: it.handlers.checkpoint("box", CheckpointRequest()),
                "suspend": lambda: it.handlers.suspend("box"),
                "create": lambda: it.create("other"),
            }
            naming = asyncio.create_task(asked[what]())
            await asyncio.wait((naming,), timeout=0.3)
            waited, meanwhile = not naming.done(), records.read(session).layers
            sweeping.release()
            await naming
            assert waited
            assert meanwhile == before

    asyncio.run(scene())


@pytest.mark.parametrize("what", ["add", "replace"])
def test_a_layer_that_was_swept_is_not_named(tmp_path: Path, what: str) -> None:
    """Its maker, a service, was killed when it had asked for that; the next one came first."""

    async def scene(it: World) -> None:
        await box(it)
        await it.handlers.fork("box", ForkRequest(name="child"))
        vm = it.fleet.get("box")
        before = vm.record.layers
        order = AddLayer(layer=LAYER) if what == "add" else ReplaceLayers(old=list(before[:-1]), new=LAYER)
        assert vm.link is not None
        with pytest.raises(Unavailable, match="has ended"):
            await vm.link.open(order).result()
        assert records.read(vm.session).layers == before
        assert all(it.layout.layer(layer).exists() for layer in before)

    play(tmp_path, scene)
