"""Policies are carried out when they are due, by whichever service there is then."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from capsem.api.exec_types import ExecRequest
from capsem.api.vm_types import ProvisionRequest, VmPolicy
from capsem.model.errors import InvalidInput, Unavailable
from capsem.service.handlers import Handlers
from capsem.service.timers import Timers
from service_world import World, play, status


class Noted:
    """The real operations, but for suspending and saving: a process has no memory that could be kept."""

    def __init__(self, handlers: Handlers) -> None:
        self.handlers = handlers
        self.stop, self.delete, self.remove_checkpoint = handlers.stop, handlers.delete, handlers.remove_checkpoint
        self.done: asyncio.Queue[tuple[str, str]] = asyncio.Queue()

    async def suspend(self, vm_id: str) -> None:
        self.done.put_nowait(("suspend", vm_id))
        await self.handlers.stop(vm_id)

    async def save_automatically(self, vm_id: str) -> None:
        self.done.put_nowait(("save", vm_id))
        raise Unavailable("not now")


@contextlib.asynccontextmanager
async def timers(it: World) -> AsyncIterator[Noted]:
    noted = Noted(it.handlers)
    running = Timers(it.fleet, noted)
    try:
        yield noted
    finally:
        await running.close()


async def until(it: World, expected: dict[str, str]) -> None:
    async with asyncio.timeout(60):
        while await status(it) != expected:
            await asyncio.sleep(0.01)


def test_time_to_live(tmp_path: Path) -> None:
    async def scene(it: World) -> None:
        async with timers(it):
            policy = VmPolicy(ttl_secs=1)
            await it.handlers.provision(ProvisionRequest(name="box", persistent=True, policy=policy))
            await it.handlers.provision(ProvisionRequest(policy=policy))
            await it.handlers.provision(ProvisionRequest(name="other", persistent=True))
            await until(it, {"box": "Stopped", "other": "Running"})
            # A policy is the VM's: it counts again from the next start.
            await it.handlers.resume("box")
            assert (await it.handlers.info("box")).policy == policy
            await until(it, {"box": "Stopped", "other": "Running"})

    play(tmp_path, scene)


def test_what_is_used_is_not_idle(tmp_path: Path) -> None:
    async def scene(it: World) -> None:
        async with timers(it) as noted:
            await it.handlers.provision(ProvisionRequest(name="box", persistent=True, policy=VmPolicy(idle_secs=1)))
            running = asyncio.create_task(it.handlers.execute("box", ExecRequest(command="sleep 2.5; echo done")))
            assert (await running).stdout == "done\n"  # it would have been ended
            assert await noted.done.get() == ("suspend", "box")
            await until(it, {"box": "Stopped"})

    play(tmp_path, scene)


def test_a_running_job_whose_client_is_gone_keeps_it_awake(tmp_path: Path) -> None:
    async def scene(it: World) -> None:
        async with timers(it) as noted:
            await it.handlers.provision(ProvisionRequest(name="box", persistent=True))
            stream = it.handlers.execute_stream("box", ExecRequest(command="sleep 2; echo > ended"), None)
            async with contextlib.aclosing(stream) as items:
                await anext(items)
                await it.handlers.set_policy("box", VmPolicy(idle_secs=1))
                await it.restart()  # the client's connection went with the service; the command goes on
            async with timers(it) as noted:
                vm = it.fleet.get("box")
                vm.on_changed(vm)
                assert await noted.done.get() == ("suspend", "box")
                await until(it, {"box": "Stopped"})
                disk = it.layout.layer(it.fleet.get("box").record.layers[-1]).with_suffix(".disk")
                assert (disk / "root" / "ended").exists()

    play(tmp_path, scene)


def test_a_policy_can_be_changed_at_any_time(tmp_path: Path) -> None:
    async def scene(it: World) -> None:
        async with timers(it) as noted:
            await it.handlers.provision(ProvisionRequest(name="box", persistent=True, policy=VmPolicy(ttl_secs=3600)))
            await it.handlers.set_policy("box", VmPolicy(idle_secs=3600, checkpoint_keep=3))
            assert await it.handlers.set_policy("box", VmPolicy(ttl_secs=0)) == VmPolicy(
                idle_secs=3600, checkpoint_keep=3
            )
            await it.handlers.set_policy("box", VmPolicy(checkpoint_every_secs=1))
            assert await noted.done.get() == ("save", "box")  # and that it cannot be done ends nothing
            await it.handlers.set_policy("box", VmPolicy(checkpoint_every_secs=0, idle_secs=1))
            assert await noted.done.get() == ("suspend", "box")
            await until(it, {"box": "Stopped"})
            # Of one that does not run it is written down all the same.
            assert await it.handlers.set_policy("box", VmPolicy(idle_secs=0)) == VmPolicy(checkpoint_keep=3)
            with pytest.raises(InvalidInput):
                await it.handlers.set_policy("box", VmPolicy(idle_secs=0.1))
            with pytest.raises(InvalidInput, match="persistent"):
                await it.handlers.provision(ProvisionRequest(policy=VmPolicy(idle_secs=60)))

    play(tmp_path, scene)


def test_what_was_due_while_there_was_no_service_is_done_by_the_next(tmp_path: Path) -> None:
    async def scene(it: World) -> None:
        await it.handlers.provision(ProvisionRequest(name="box", persistent=True, policy=VmPolicy(ttl_secs=1)))
        it.fleet.leave_all()
        await asyncio.sleep(1)
        it.start()
        async with timers(it):
            await it.fleet.reconcile()
            await until(it, {"box": "Stopped"})

    play(tmp_path, scene)
