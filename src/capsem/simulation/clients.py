"""Random clients: each asks for one thing after the other, and holds the answers against the history."""

from __future__ import annotations

import asyncio
import functools
import itertools
import random
from collections.abc import Awaitable, Callable
from typing import Any

from capsem.api.checkpoint_types import CheckpointRequest, OneCheckpointRequest, RollbackRequest
from capsem.api.exec_types import ExecRequest, RunRequest
from capsem.api.file_types import ReadFileRequest, WriteFileRequest
from capsem.api.vm_types import ForkRequest, PersistRequest, ProvisionRequest, ResumeRequest
from capsem.model.errors import (
    AlreadyExists,
    CapsemError,
    Corrupt,
    InvalidInput,
    LimitReached,
    NotFound,
    NotRunning,
    WrongState,
)
from capsem.service.handlers import Handlers
from capsem.simulation.history import Add, Mark, Own, Places, VmHistory, Write
from capsem.simulation.world import Gone, Violation, World

PAUSE = 2.0  # seconds between two requests of a client, at most
PATIENCE = 300.0  # seconds that any answer may take
VMS = 4  # that the clients would like to have
REFUSALS = (NotFound, InvalidInput, WrongState, AlreadyExists, LimitReached)  # nothing has been done

OPERATIONS = {
    "create": 3,
    "add": 14,
    "mark": 8,
    "write": 6,
    "read": 4,
    "suspend": 6,
    "resume": 9,
    "resume_cold": 1,
    "stop": 2,
    "checkpoint": 4,
    "remove_checkpoint": 2,
    "verify": 2,
    "rollback": 3,
    "fork": 2,
    "fork_live": 2,
    "delete": 1.5,
    "persist": 1,
    "run": 1,
    "look": 4,
}


class Population:
    """The clients and what they know together."""

    def __init__(self, world: World, dice: random.Random, *, budget: int, troubled: Callable[[], int]) -> None:
        """`budget`: operations in all; `troubled` counts what was done to the world so far."""
        self.world = world
        self.dice = dice
        self.vms: dict[str, VmHistory] = {}
        self.left = budget
        self.counts: dict[str, int] = {}
        self.refused: dict[str, int] = {}
        self.trace: list[str] = []
        self._troubled = troubled
        self._ids = itertools.count(1)

    async def run(self, clients: int) -> None:
        """Until the budget is spent. Raises Violation."""
        await asyncio.gather(*(self._client(f"c{number}") for number in range(clients)))

    async def _client(self, client: str) -> None:
        names, weights = list(OPERATIONS), list(OPERATIONS.values())
        while self.left > 0:
            self.left -= 1
            (name,) = self.dice.choices(names, weights)
            known = [vm for vm in self.vms.values() if vm.sure or not vm.missed]
            if len(known) < VMS and self.dice.random() < 0.3:
                name = "create"
            vm = self.dice.choice(known) if known else None
            if vm is None and name not in ("create", "run"):
                name = "create"
            self.counts[name] = self.counts.get(name, 0) + 1
            self.note(f"{client} {name} {vm.name if vm else ''}")
            try:
                await getattr(self, f"_{name}")(client, vm)
            except (CapsemError, Gone, TimeoutError) as error:
                kind = f"{name} {type(error).__name__}"
                self.refused[kind] = self.refused.get(kind, 0) + 1
                self.note(f"{client} {name}: {type(error).__name__} {error}")
                if isinstance(error, NotFound) and not isinstance(error, NotRunning) and vm is not None:
                    vm.missed = vm.missed or "no VM is called" in error.message
                if isinstance(error, Corrupt):
                    raise Violation(f"{name} {vm.name if vm else ''}: {error}") from error
                if isinstance(error, TimeoutError):
                    raise Violation(f"{name} {vm.name if vm else ''} was not answered in {PATIENCE:.0f} s") from error
                if type(error) is CapsemError:
                    raise Violation(f"{name} {vm.name if vm else ''}: {error}") from error
            self.world.check_now()
            if self.dice.random() < 0.5:
                await asyncio.sleep(self.dice.random() * PAUSE)

    def note(self, line: str) -> None:
        """For whoever replays this."""
        self.trace.append(f"{self.world.host.loop.time():9.3f} {line}")

    async def ask(self, what: Callable[[Handlers], Awaitable[Any]]) -> Any:
        """Raises CapsemError, Gone, TimeoutError."""
        async with asyncio.timeout(PATIENCE):
            return await self.world.call(what)

    # -- what concerns a client's place

    async def _ask_for(self, client: str, vm: VmHistory, what: Own, ask: Callable[[Handlers], Awaitable[Any]]) -> Any:
        """Ask for a client's own operation; one that was refused has not happened."""
        vm.begin(client, what)
        try:
            return await self.ask(ask)
        except REFUSALS:
            vm.refused(client, what)
            raise

    async def _add(self, client: str, vm: VmHistory) -> None:
        if vm.too_much_pending(client):
            return
        what = Add(next(self._ids))
        pause = self.dice.choice(("", "", "sleep 0.2; ", "sleep 2; "))
        command = f"tally {client}; {pause}count /root/{client}.count; sync"
        answer = await self._ask_for(client, vm, what, lambda on: on.execute(vm.name, ExecRequest(command=command)))
        try:
            tally, count = map(int, answer.stdout.split())
        except ValueError:
            raise Violation(f"{command} in {vm.name}: {answer}") from None
        if answer.exit_code:
            return  # it could not flush
        before = vm.get(client)
        if not vm.added(client, what, tally, count):
            raise Violation(
                f"{client} in {vm.name}: tally {tally} and count {count}, which is none of {_shown(before)}"
            )

    async def _mark(self, client: str, vm: VmHistory) -> None:
        if vm.too_much_pending(client):
            return
        what, command = Mark(next(self._ids)), f"count /root/{client}.marks"
        answer = await self._ask_for(client, vm, what, lambda on: on.execute(vm.name, ExecRequest(command=command)))
        before = vm.get(client)
        if not vm.marked(client, what, int(answer.stdout)):
            raise Violation(f"{client} in {vm.name}: {answer.stdout.strip()} marks, which is none of {_shown(before)}")

    async def _write(self, client: str, vm: VmHistory) -> None:
        if vm.too_much_pending(client):
            return
        number = next(self._ids)
        what = Write(number, f"text {number}")
        request = WriteFileRequest(path=f"/root/{client}.text", content=what.text)
        await self._ask_for(client, vm, what, lambda on: on.write_file(vm.name, request))
        vm.written(client, what)

    async def _read(self, client: str, vm: VmHistory) -> None:
        text: str | None = None
        try:
            answer = await self.ask(lambda on: on.read_file(vm.name, ReadFileRequest(path=f"/root/{client}.text")))
            text = answer.content
        except NotFound as error:
            if "no such file" not in error.message.lower():
                raise
        before = vm.get(client)
        if not vm.seen(client, text):
            raise Violation(f"{client} in {vm.name} reads {text!r}, which is none of {_shown(before)}")

    # -- what concerns all of a VM

    async def _change(
        self, vm: VmHistory, what: Callable[[Handlers], Awaitable[Any]], *, loses: bool = False, keeps: bool = False
    ) -> tuple[Any, bool]:
        """Ask for a change of a VM as a whole; the answer, and whether nothing else was done to it meanwhile."""
        vm.changes += not keeps
        vm.under_way += not keeps
        changes, trouble, alone = vm.changes, self._troubled(), vm.under_way == 1
        if not keeps:
            vm.suspended = False
        if loses:
            vm.may_lose_memory()
            changes = vm.changes
        try:
            answer = await self.ask(what)
        finally:
            vm.under_way -= not keeps
            if loses:
                vm.may_lose_memory()
                vm.changes -= 1
        return answer, alone and vm.changes == changes and self._troubled() == trouble

    async def _create(self, client: str, _vm: VmHistory | None) -> None:
        vm = VmHistory(f"v{next(self._ids)}", self.dice.random() < 0.8, sure=False)
        self.vms[vm.name] = vm
        request = ProvisionRequest(name=vm.name, persistent=vm.persistent, ram_mb=1, cpus=1)
        await self._change(vm, lambda on: on.provision(request))
        vm.sure = vm.persistent and not vm.doomed

    async def _suspend(self, client: str, vm: VmHistory) -> None:
        if self.dice.random() < 0.5:
            await self._mark(client, vm)  # what only the page cache knows is the suspend's to keep
        _, undisturbed = await self._change(vm, lambda on: on.suspend(vm.name))
        vm.suspended = undisturbed
        if self.dice.random() < 0.3:
            await self._resume(client, vm)  # at once

    async def _resume(self, client: str, vm: VmHistory) -> None:
        was_suspended, trouble, changes = vm.suspended, self._troubled(), vm.changes + 1
        alone = vm.under_way == 0
        try:
            answer, undisturbed = await self._change(vm, lambda on: on.resume(vm.name, ResumeRequest()))
        except CapsemError as error:
            if was_suspended and alone and vm.changes == changes and self._troubled() == trouble:
                raise Violation(f"{vm.name} was suspended, and cannot be resumed: {error}") from error
            vm.may_lose_memory()
            raise
        self._came_back(vm, answer, must_be_warm=was_suspended and undisturbed)

    def _came_back(self, vm: VmHistory, answer: Any, *, must_be_warm: bool) -> None:
        if answer.boot_kind not in ("warm", "forked"):
            if must_be_warm:
                raise Violation(f"{vm.name} was suspended, and came back {answer.boot_kind}: {answer.boot_note}")
            vm.may_lose_memory()

    async def _resume_cold(self, client: str, vm: VmHistory) -> None:
        await self._change(vm, lambda on: on.resume(vm.name, ResumeRequest(cold=True)), loses=True)

    async def _stop(self, client: str, vm: VmHistory) -> None:
        if not vm.persistent:
            vm.sure = False
        await self._change(vm, lambda on: on.stop(vm.name), loses=True)

    async def _checkpoint(self, client: str, vm: VmHistory) -> None:
        copy = vm.watch()
        try:
            answer, _ = await self._change(vm, lambda on: on.checkpoint(vm.name, CheckpointRequest()), keeps=True)
            vm.checkpoints[answer.id] = copy
        finally:
            vm.unwatch(copy)

    def _any_checkpoint(self, vm: VmHistory) -> tuple[str, Places] | None:
        return self.dice.choice(list(vm.checkpoints.items())) if vm.checkpoints else None

    async def _remove_checkpoint(self, client: str, vm: VmHistory) -> None:
        if (found := self._any_checkpoint(vm)) is not None:
            which, places = found
            del vm.checkpoints[which]
            try:
                await self.ask(lambda on: on.remove_checkpoint(vm.name, OneCheckpointRequest(checkpoint=which)))
            except (WrongState, InvalidInput):
                vm.checkpoints[which] = places  # it is in use
                raise

    async def _verify(self, client: str, vm: VmHistory) -> None:
        listed = await self.ask(lambda on: on.checkpoints(vm.name))
        for each in listed.checkpoints:
            request = OneCheckpointRequest(checkpoint=each.id)
            try:
                await self.ask(functools.partial(Handlers.verify_checkpoint, vm_id=vm.name, request=request))
            except NotFound:
                continue  # somebody has removed it

    async def _rollback(self, client: str, vm: VmHistory) -> None:
        found = self._any_checkpoint(vm)
        if found is None:
            return
        which, places = found
        save = self.dice.random() < 0.7
        there = vm.taken_to(places)
        vm.may_lose_memory()
        present = vm.watch()
        try:
            answer, undisturbed = await self._change(
                vm, lambda on: on.rollback(vm.name, RollbackRequest(checkpoint=which, save=save)), loses=True
            )
        finally:
            vm.unwatch(there)
            vm.unwatch(present)
            vm.may_be(there)  # what was under way may have been acknowledged before it was taken back
        if answer.saved is not None:
            vm.checkpoints[answer.saved] = present
        if undisturbed:
            vm.places = there
            if answer.boot_kind not in (None, "warm", "forked"):
                vm.may_lose_memory()

    async def _fork(self, client: str, vm: VmHistory, *, live: bool = False) -> None:
        if not vm.persistent:
            return
        found = self._any_checkpoint(vm) if self.dice.random() < 0.3 else None
        child = VmHistory(f"v{next(self._ids)}", sure=False)
        copy = vm.watch() if found is None else dict(found[1])
        self.vms[child.name] = child
        child.places = copy
        request = ForkRequest(name=child.name, live=live, checkpoint=None if found is None else found[0])
        trouble, warm = self._troubled(), False
        try:
            await self.ask(lambda on: on.fork(vm.name, request))
            child.sure, warm = not child.doomed, live and self._troubled() == trouble
        finally:
            vm.unwatch(copy)
            if not warm:
                child.may_lose_memory()

    async def _fork_live(self, client: str, vm: VmHistory) -> None:
        await self._fork(client, vm, live=True)

    async def _delete(self, client: str, vm: VmHistory) -> None:
        vm.sure, vm.doomed = False, True
        checkpoints, vm.checkpoints = vm.checkpoints, {}
        try:
            await self._change(vm, lambda on: on.delete(vm.name), loses=True)
        except (NotFound, WrongState):
            vm.checkpoints = checkpoints if vm.sure else {}
            raise
        self.vms.pop(vm.name, None)

    async def _persist(self, client: str, vm: VmHistory) -> None:
        if vm.persistent:
            return
        kept = VmHistory(f"v{next(self._ids)}", sure=False)
        kept.places = vm.watch()
        self.vms[kept.name] = kept
        try:
            await self._change(vm, lambda on: on.persist(vm.name, PersistRequest(name=kept.name)))
            kept.sure = not kept.doomed
            self.vms.pop(vm.name, None)
        finally:
            vm.sure = False
            vm.unwatch(kept.places)

    async def _run(self, client: str, _vm: VmHistory | None) -> None:
        request = RunRequest(command="tally it; count /root/it", ram_mb=1, cpus=1, timeout_secs=60)
        answer = await self.ask(lambda on: on.run(request))
        if answer.stdout != "1\n1\n":
            raise Violation(f"a VM that was made for one command says {answer}")

    async def _look(self, client: str, _vm: VmHistory) -> None:
        before = {name: vm.changes for name, vm in self.vms.items() if vm.sure}
        answer = await self.ask(lambda on: on.list())
        missing = set(before) - {each.id for each in answer.sandboxes}
        gone = [name for name in missing if name in self.vms and self.vms[name].sure]
        if gone:
            raise Violation(f"{', '.join(sorted(gone))}: made, never deleted, and not there")


def _shown(states: Any) -> str:
    return "; ".join(str(tuple(state)) for state in sorted(states, key=str)[:8])
