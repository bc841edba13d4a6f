"""Resumes that are cold: they say why, and begin with nothing that cannot work."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from sim_world import sim_world

from capsem.api.vm_types import ResumeRequest
from capsem.model.errors import Corrupt
from capsem.model.lifecycle import State
from capsem.model.vm import Exit


def test_a_vm_whose_run_was_lost_says_what_had_happened(tmp_path: Path) -> None:
    async def run() -> None:
        async with sim_world(tmp_path) as world:
            await world.create("box")
            vm = world.fleet.get("box")
            await world.handlers.stop("box")
            vm.rewrite(state=State.FAILED, last_exit=Exit("failed", "the supervisor ended by signal 9"))
            resumed = await world.handlers.resume("box")
            assert resumed.boot_kind == "cold"
            assert resumed.boot_note == "its last run failed: the supervisor ended by signal 9"
            await world.handlers.stop("box")
            assert (await world.handlers.resume("box")).boot_note is None, "that is what was asked for"

    asyncio.run(run())


def test_memory_is_not_given_up_for_a_disk_that_is_damaged(tmp_path: Path) -> None:
    async def run() -> None:
        async with sim_world(tmp_path) as world:
            await world.create("box")
            await world.handlers.suspend("box")
            layer = world.layout.layer(world.fleet.get("box").record.layers[-1])
            content = layer.read_bytes()
            layer.write_bytes(bytes([content[0] ^ 1]) + content[1:])
            with pytest.raises(Corrupt, match="not the one that was frozen"):
                await world.handlers.resume("box", ResumeRequest(cold=True))
            assert world.fleet.get("box").record.state == State.SUSPENDED
            layer.write_bytes(content)
            assert (await world.handlers.resume("box")).boot_kind == "warm"

    asyncio.run(run())
