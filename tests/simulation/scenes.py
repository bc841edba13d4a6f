"""Scenes on a simulated host, each run as a program of its own: `python scenes.py persist|resume N`.

persist   a VM is given a name, and its supervisor is killed at the n-th file that it changes: the VM is gone with all that
          it had, or it is persistent under its name, and has all that it had
resume    a service is killed some milliseconds after it was told to resume a VM, and the next one is there at once: the VM
          can be resumed, and keeps what is written then; N is the seed, and N modulo 100 are the milliseconds
"""

from __future__ import annotations

import asyncio
import gc
import os
import random
import sys
import tempfile
import traceback
from pathlib import Path

from capsem.api.file_types import ReadFileRequest, WriteFileRequest
from capsem.api.vm_types import PersistRequest, ProvisionRequest, ResumeRequest
from capsem.hypervisor.sim.plan import Plan
from capsem.model import spec
from capsem.model.errors import CapsemError
from capsem.service import ledgers
from capsem.simulation.__main__ import fixed
from capsem.simulation.host import Host
from capsem.simulation.ledger import NoWriter
from capsem.simulation.loop import SimLoop
from capsem.simulation.process import Guard
from capsem.simulation.world import World
from capsem.supervisor import recording


async def persist(world: World, writes: int) -> str:
    await world.call(lambda on: on.provision(ProvisionRequest(name="old", persistent=False, ram_mb=1, cpus=1)))
    await world.call(lambda on: on.write_file("old", WriteFileRequest(path="/root/f", content="kept")))
    [(_, process, _)] = world.supervisors.values()
    process.writes_left = writes
    try:
        await world.call(lambda on: on.persist("old", PersistRequest(name="new")))
        process.writes_left = None
        said = "persisted"
    except CapsemError as error:
        said = type(error).__name__
    await asyncio.sleep(5)
    names = [each.id for each in (await world.call(lambda on: on.list())).sandboxes]
    if names:
        assert names == ["new"], names
        await world.call(lambda on: on.resume("new", ResumeRequest()))
        answer = await world.call(lambda on: on.read_file("new", ReadFileRequest(path="/root/f")))
        assert answer.content == "kept"
        await world.call(lambda on: on.delete("new"))
    await asyncio.sleep(5)
    assert [*world.layout.layers.iterdir(), *world.layout.persistent.iterdir()] == []
    return f"{said} {'new' if names else 'gone'}"


async def resume(world: World, number: int) -> str:
    def at_once() -> None:
        world.service = world._start()

    world.service_ended = at_once  # type: ignore[method-assign]
    await world.call(lambda on: on.provision(ProvisionRequest(name="box", persistent=True, ram_mb=1, cpus=1)))
    await world.call(lambda on: on.suspend("box"))
    for name in "abcd":  # which the next service has to find out about first
        await world.call(lambda on, name=name: on.provision(ProvisionRequest(name=name, ram_mb=1, cpus=1)))
    resuming = asyncio.create_task(world.call(lambda on: on.resume("box", ResumeRequest())))
    await asyncio.sleep(number % 100 / 1000)
    world.service.process.kill()
    await asyncio.gather(resuming, return_exceptions=True)
    await asyncio.sleep(5)
    await world.call(lambda on: on.resume("box", ResumeRequest()))
    await world.call(lambda on: on.write_file("box", WriteFileRequest(path="/root/f", content="kept")))
    await world.call(lambda on: on.stop("box"))
    await world.call(lambda on: on.resume("box", ResumeRequest()))
    answer = await world.call(lambda on: on.read_file("box", ReadFileRequest(path="/root/f")))
    assert answer.content == "kept"
    return "kept"


def main() -> int:
    fixed()
    gc.disable()
    setattr(spec, "RAM_MB", range(1, spec.RAM_MB.stop))  # noqa: B010
    for module in (recording, ledgers):
        setattr(module, "Writer", NoWriter)  # noqa: B010
    name, number = sys.argv[1], int(sys.argv[2])
    dice = random.Random(number)
    loop = SimLoop(dice)
    with tempfile.TemporaryDirectory() as text:
        host = Host(loop, Guard(), dice)
        world = World(Path(text), host, dice, Plan(seed=1, tolerant=True))
        try:
            print(loop.run_until_complete(SCENES[name](world, number)), flush=True)
        except Exception:  # noqa: BLE001 - shown, and told by the exit status
            traceback.print_exc()
            return 1
    return 0


SCENES = {"persist": persist, "resume": resume}

if __name__ == "__main__":
    os._exit(main())  # what the dead have left must not be taken apart: it would run
