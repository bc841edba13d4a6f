"""A VM is given a name, and its supervisor is killed at the n-th file that it changes: run as a program, with n.

Whatever n is: the VM is gone with all that it had, or it is persistent under its name, and has all that it had.
"""

from __future__ import annotations

import asyncio
import random
import sys
import tempfile
from pathlib import Path

from capsem.api.file_types import ReadFileRequest, WriteFileRequest
from capsem.api.vm_types import PersistRequest, ProvisionRequest, ResumeRequest
from capsem.hypervisor.sim.plan import Plan
from capsem.model import spec
from capsem.model.errors import CapsemError
from capsem.service import ledgers
from capsem.simulation.host import Host
from capsem.simulation.ledger import NoWriter
from capsem.simulation.loop import SimLoop
from capsem.simulation.process import Guard
from capsem.simulation.world import World
from capsem.supervisor import recording


async def scene(world: World, writes: int) -> str:
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


def main() -> None:
    setattr(spec, "RAM_MB", range(1, spec.RAM_MB.stop))  # noqa: B010
    for module in (recording, ledgers):
        setattr(module, "Writer", NoWriter)  # noqa: B010
    dice = random.Random(1)
    loop = SimLoop(dice)
    with tempfile.TemporaryDirectory() as text:
        host = Host(loop, Guard(), dice)
        world = World(Path(text), host, dice, Plan(seed=1, tolerant=True))
        print(loop.run_until_complete(scene(world, int(sys.argv[1]))))
        sys.stdout.flush()


if __name__ == "__main__":
    main()
