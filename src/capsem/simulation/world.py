"""A service on a simulated host, its supervisors and machines, the calls of its clients, and what is done to them."""

from __future__ import annotations

import asyncio
import contextlib
import random
import traceback
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from capsem.api.internal import BOUND, Bootstrap, Stop
from capsem.config import NETWORK_PRESET, OFF, Settings
from capsem.hypervisor.driver import Ending
from capsem.hypervisor.sim.driver import SimDriver
from capsem.hypervisor.sim.machine import SimMachine
from capsem.hypervisor.sim.plan import Plan
from capsem.model.errors import CapsemError, NotFound, host_failed
from capsem.service.create import Maker
from capsem.service.flattening import Flattening
from capsem.service.fleet import Fleet
from capsem.service.gate import Gate
from capsem.service.handlers import Handlers
from capsem.service.launch import Launcher
from capsem.service.ledgers import Ledgers
from capsem.service.timers import Timers
from capsem.simulation.host import Host, SimChild
from capsem.simulation.process import KILLED, Process
from capsem.store.flatten import MAX_DEPTH
from capsem.store.layout import Layout, SessionDir
from capsem.store.locks import Lock, try_lock
from capsem.supervisor.owned import Names
from capsem.supervisor.supervisor import Supervisor
from capsem.wire.schema import decode_message

MOST = 1000  # VMs that may run
SETTINGS = Settings({**Settings().values, "vm.templates": OFF, NETWORK_PRESET: "off"})  # they stay when no VM is there


class Gone(Exception):
    """The service died before it answered."""


class Violation(AssertionError):
    """What must never be."""


class OneImage:
    """A catalogue with one image, of which nothing is read."""

    def __init__(self, directory: Path) -> None:
        self.image = SimpleNamespace(
            name="default",
            digest="d" * 64,
            directory=directory,
            kernel=directory / "vmlinux",
            initrd=directory / "initrd.img",
            root=directory / "root.erofs",
            volume=directory / "volume.raw",
            volume_mb=16384,
            kernel_command_line="quiet",
            manifest=SimpleNamespace(files={role: SimpleNamespace(digest="e" * 64) for role in ("kernel", "initrd")}),
        )

    def find(self, name: str = "default") -> SimpleNamespace:
        """See Catalog."""
        if name != "default":
            raise NotFound(f"no image {name}")
        return self.image

    @contextlib.contextmanager
    def taken(self, name: str, run_dir: Path) -> Iterator[SimpleNamespace]:
        """See Catalog."""
        yield self.find(name)

    def list(self) -> list[SimpleNamespace]:
        """See Catalog."""
        return [self.image]


class Service:
    """A service as a process: what `capsem.service.__main__` puts together, without its HTTP face."""

    def __init__(self, world: World, process: Process) -> None:
        self.process = process
        self.ready = asyncio.Event()
        self.calls: dict[asyncio.Future[Any], None] = {}
        self._world = world
        process.on_buried.append(self._hung_up)
        process.create_task(self._serve(), name="serve")

    async def _serve(self) -> None:
        world, system = self._world, self._world.host.system
        while (owner := try_lock(world.layout.run_dir / "owner.lock")) is None:
            await asyncio.sleep(0.05)
        self._owner: Lock = owner
        self.fleet = fleet = Fleet(system, world.layout, MOST)
        driver = world.driver()
        overlap = driver.features.transitions_overlap
        lock = None if overlap else world.gate
        launcher = Launcher(system, world.layout, {}, Path("capsem-process"), "sim", gate=lock)
        gate = Gate(system.clock, overlap=overlap, path=world.gate)
        maker = Maker(fleet, driver, world.catalog, launcher, gate)  # type: ignore[arg-type]
        ledgers = Ledgers(fleet, world.layout.run_dir.parent / "main.db")
        self.handlers = Handlers(fleet, maker, SETTINGS, {"CAPSEM_HOME": str(world.layout.run_dir.parent)}, ledgers)
        self.handlers.flattening = Flattening(fleet, driver, max_depth=world.max_depth)
        self.timers = Timers(fleet, self.handlers)
        await fleet.reconcile()
        self.handlers.flattening.begin()
        self.ready.set()

    async def end(self, how: str) -> None:
        """As on SIGTERM, with that setting of `vm.on_service_stop`."""
        self.fleet.stopping = True
        await self.timers.close()
        await self.handlers.flattening.close()
        if how == "keep":
            self.fleet.leave_all()
        else:
            await self.fleet.stop_all(self.handlers.suspend if how == "suspend" else None)
        await self.handlers.ledgers.close()
        self.process.exit(0)

    def _hung_up(self) -> None:
        calls, self.calls = self.calls, {}
        for call in calls:
            if not call.done():
                call.set_exception(Gone("the service is gone"))
        self._world.service_ended()


class World:
    """See the module. Everything random comes from `dice`."""

    def __init__(self, directory: Path, host: Host, dice: random.Random, plan: Plan) -> None:
        self.host = host
        self.dice = dice
        self.layout = Layout(directory / "run")
        self.layout.create()
        self.catalog = OneImage(directory / "image")
        self.gate: Path | None = directory / "gate"
        # Of chains of layers; few VMs here live long enough for the last.
        self.max_depth = dice.choice((1, 2, MAX_DEPTH))
        self.supervisors: dict[int, tuple[str, Process, SimDriver]] = {}
        self.violations: list[str] = []
        self.on_lost: Callable[[str], None] = lambda _vm_id: None  # a supervisor ended, and its VM is not suspended
        self._plan = replace(plan, host=directory / "host")
        host.spawning.program = self._supervise
        host.loop.set_exception_handler(self._unhandled)
        self.service = self._start()

    # -- processes

    def driver(self) -> SimDriver:
        """One for the process that asks."""
        return SimDriver(self.host.system, self._plan, pair=self.host.network.pair)

    def _start(self) -> Service:
        return Service(self, self.host.process("service"))

    def service_ended(self) -> None:
        """Somebody starts it again, in a while."""

        def again() -> None:
            self.service = self._start()

        self.host.loop.call_later(self.dice.random() * 2, again)

    def _supervise(self, process: Process, child: SimChild, argv: Sequence[str], stdin: bytes) -> None:
        vm_id, session = argv[2], SessionDir(Path(argv[4]))
        bootstrap = decode_message(stdin, {Bootstrap.tag: Bootstrap})
        assert isinstance(bootstrap, Bootstrap)
        driver = self.driver()
        self.supervisors[process.pid] = vm_id, process, driver

        async def run() -> None:
            await asyncio.sleep(self.dice.random() * 0.1)
            names = Names(session, Layout(Path(bootstrap.run_dir)), Path(bootstrap.socket), Path(bootstrap.ready_file))
            supervisor = Supervisor(self.host.system, driver, names, bootstrap, lambda: child.lines.put_nowait(BOUND))
            self.host.on_term[process.pid] = lambda: supervisor.stop(Stop(grace=1.0))
            try:
                status = await supervisor.run()
            except (CapsemError, OSError):
                status = 1
            except Exception as error:  # noqa: BLE001 - as the interpreter would
                self.violations.append(
                    f"the supervisor of {vm_id} ended with a traceback: {error!r}\n{traceback.format_exc()}"
                )
                status = 1
            process.exit(status)

        def die() -> None:
            del self.supervisors[process.pid]
            for machine in driver.machines:
                machine.vanish(Ending(clean=False, reason="killed"))
            self.on_lost(vm_id)

        process.on_buried.append(die)
        self.host.on_term[process.pid] = process.kill
        process.create_task(run(), name="supervisor")

    def _unhandled(self, _loop: object, context: dict[str, Any]) -> None:
        error = context.get("exception")
        message = f"{context.get('message')}: {error!r}"
        if "was never retrieved" in message or "Dead()" in message:
            return
        self.violations.append(message)

    def machines(self) -> list[tuple[str, Process, SimMachine]]:
        """Those that have not ended."""
        return [
            (vm_id, process, machine)
            for vm_id, process, driver in self.supervisors.values()
            for machine in driver.machines
            if not machine.gone
        ]

    # -- calls

    async def call(self, ask: Callable[[Handlers], Awaitable[Any]]) -> Any:
        """What a client is answered. Raises CapsemError, Gone."""
        service = self.service
        while not service.ready.is_set() or service.process.dead:
            await asyncio.sleep(0.1)
            service = self.service
        answer = self.host.loop.create_future()
        service.calls[answer] = None

        async def serve() -> None:
            try:
                result = await ask(service.handlers)
            except CapsemError as error:
                if not answer.done():
                    answer.set_exception(error)
            except OSError as error:  # as the application has it
                if not answer.done():
                    answer.set_exception(host_failed("the operation failed", error))
            except Exception as error:  # noqa: BLE001 - whatever it is, it is wrong
                if not answer.done():
                    answer.set_exception(
                        Violation(f"the service answered with a traceback: {error!r}\n{traceback.format_exc()}")
                    )
            else:
                if not answer.done():
                    answer.set_result(result)

        task = service.process.create_task(serve(), name="call")
        try:
            return await answer
        except asyncio.CancelledError:
            if not service.process.dead:
                self.host.loop.call_soon(task.cancel, context=service.process.context())
            raise
        finally:
            service.calls.pop(answer, None)

    # -- what is done to it

    def reboot(self) -> None:
        """The host loses power; what was on disk is there."""
        for process in self.host.living():
            process.kill()
        self.host.clock.boots += 1

    def kill_machine(self, process: Process, machine: SimMachine) -> None:
        """SIGKILL to a VMM."""
        ending = Ending(clean=False, reason=f"killed by signal {-KILLED}")
        self.host.loop.call_soon(machine.vanish, ending, context=process.context())

    # -- what always holds

    def check_now(self) -> None:
        """Raises Violation: two machines write to one layer, or one writes to a layer that a checkpoint holds."""
        if self.violations:
            raise Violation(self.violations[0])
        tops: dict[Path, str] = {}
        for vm_id, _, machine in self.machines():
            top = machine.top_layer.path
            if top in tops:
                raise Violation(f"{vm_id} and {tops[top]} write to one layer, {top.name}")
            tops[top] = vm_id
