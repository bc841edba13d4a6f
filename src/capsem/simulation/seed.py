"""One seed: a world, clients, trouble, and the check at the end."""

from __future__ import annotations

import asyncio
import gc
import json
import logging
import os
import random
import shutil
import tempfile
import traceback
from dataclasses import dataclass, field
from pathlib import Path

from capsem.hypervisor.sim.plan import Plan
from capsem.model import spec
from capsem.model.lifecycle import State
from capsem.service import ledgers
from capsem.simulation.check import settle
from capsem.simulation.clients import Population
from capsem.simulation.host import Host
from capsem.simulation.ledger import NoWriter
from capsem.simulation.loop import SimLoop, current
from capsem.simulation.mutants import MUTANTS
from capsem.simulation.process import Guard, Process
from capsem.simulation.trouble import KINDS, Trouble
from capsem.simulation.world import World
from capsem.supervisor import recording

OPERATIONS = 100
CLIENTS = 4
MEMORY = Path("/dev/shm")  # noqa: S108 - the files of a simulated host need not survive this one


@dataclass
class Outcome:
    """What a seed came to. `violation` is None when all was well."""

    seed: int
    violation: str | None = None
    details: str = ""
    steps: int = 0
    seconds: float = 0.0  # of virtual time
    operations: int = 0
    counts: dict[str, int] = field(default_factory=dict)
    trouble: dict[str, int] = field(default_factory=dict)
    refused: dict[str, int] = field(default_factory=dict)
    trace: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Order:
    """What is to be played."""

    seed: int
    operations: int = OPERATIONS
    clients: int = CLIENTS
    kinds: tuple[str, ...] = KINDS  # of trouble
    mutant: str | None = None  # how the product is broken first
    trace: bool = False


def _prefix(pid: int) -> str:
    return f"capsem-sim-{pid:08x}-"  # as long as any other: names of files are in what a seed writes


def _place() -> Path:
    return MEMORY if MEMORY.is_dir() else Path(tempfile.gettempdir())


def directories(pid: int) -> list[Path]:
    """Where a process that plays a seed has the files of its simulated host."""
    return list(_place().glob(f"{_prefix(pid)}*"))


def sweep(pid: int) -> None:
    """Remove what a process that was killed had there."""
    for directory in directories(pid):
        shutil.rmtree(directory, ignore_errors=True)


def play(order: Order) -> Outcome:
    """Play one seed, in a process that is good for nothing else afterwards (see `Guard`, and `SimLoop.remains`)."""
    gc.disable()
    setattr(spec, "RAM_MB", range(1, spec.RAM_MB.stop))  # noqa: B010 - guests that are quick to save
    for module in (recording, ledgers):
        setattr(module, "Writer", NoWriter)  # noqa: B010 - not what it is for
    if order.mutant is not None:
        MUTANTS[order.mutant]()
    dice = random.Random(order.seed)  # noqa: S311 - to be repeated, not to be secret
    outcome = Outcome(order.seed)
    loop = SimLoop(dice)
    tempfile.tempdir = str(_place())
    directory = Path(tempfile.mkdtemp(prefix=_prefix(os.getpid())))
    try:
        host = Host(loop, Guard(), dice)
        loop.run_until_complete(_play(outcome, order, host, directory))
    except BaseException as error:  # noqa: BLE001 - whatever it is, it is the outcome
        outcome.violation = f"{error}" if isinstance(error, AssertionError) else repr(error)
        outcome.details = traceback.format_exc()
    finally:
        outcome.steps, outcome.seconds = loop.steps, loop.time()
        shutil.rmtree(directory, ignore_errors=True)
    return outcome


async def _play(outcome: Outcome, order: Order, host: Host, directory: Path) -> None:
    dice = host.dice
    world = World(directory, host, dice, Plan(seed=order.seed, tolerant=order.seed % 2 == 0))
    people = Population(world, dice, budget=order.operations, troubled=lambda: trouble.so_far())  # noqa: PLW0108 - it is not there yet
    trouble = Trouble(world, dice, people.vms, order.kinds)
    outcome.counts, outcome.trouble = people.counts, trouble.counts
    outcome.refused, outcome.trace = people.refused, people.trace

    def lost(vm_id: str) -> None:
        vm = people.vms.get(vm_id)
        record = world.layout.session(vm_id, persistent=True).record
        if vm is not None and not (record.exists() and json.loads(record.read_bytes())["state"] == State.SUSPENDED):
            vm.may_lose_memory()

    world.on_lost = lost
    if order.trace and not logging.root.manager.disable:
        logging.getLogger().addHandler(_Notes(people))
    making = asyncio.create_task(trouble.make())
    await people.run(order.clients)
    making.cancel()
    await asyncio.gather(making, return_exceptions=True)
    host.guard.full = False
    for process in host.living():
        process.writes_left = None
        host.loop.continue_process(process)
    outcome.operations = order.operations
    await settle(people)


class _Notes(logging.Handler):
    def __init__(self, people: Population) -> None:
        super().__init__()
        self._people = people

    def emit(self, record: logging.LogRecord) -> None:
        """A line in the trace."""
        process = current.get()
        name = f"{process.name} {process.pid}" if isinstance(process, Process) else "host"
        self._people.note(f"    {name}: {record.getMessage()}")
        if record.exc_info:
            self._people.note("".join(traceback.format_exception(*record.exc_info)))
