"""Clients of a stress test: threads that use all VMs at once.

Whoever gets hold of a VM (a lock on our side) writes, saves, goes back, forks, and checks all of it; whoever does not
get in the way of that: suspends, resumes, checkpoints and forks it meanwhile, which must change nothing. What a service
refuses because it is not the moment is no anomaly; what it loses, or fails to do, is.
"""

from __future__ import annotations

import itertools
import random
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final, NoReturn

from capsem.model.errors import CapsemError, NotFound, TimedOut
from capsem.stress.guests import Guest
from capsem.stress.hosts import Service
from capsem.stress.options import DISK_MB, RAM_MB, Options
from capsem.stress.report import Report
from capsem.stress.truth import State, Truth

# What clients are told when somebody else was there first: they may try again, and nothing has happened.
REFUSED: Final = frozenset({"not_running", "wrong_state", "interrupted", "unavailable"})
TRIES: Final = 60  # looks at a VM that others suspend all the time
KEPT: Final = 3  # checkpoints of a VM, to go back to
FILES: Final = 12  # of a VM
ENOUGH: Final = 8  # anomalies: what comes then is more of the same
_BREATH: Final = 1.0  # seconds between attempts to get in the way


class Failed(Exception):
    """An anomaly was reported, and what was being done is given up."""


@dataclass
class Vm:
    """A VM; `lock` is for who writes to it."""

    service: Service
    name: str
    lock: threading.Lock = field(default_factory=threading.Lock)
    truth: Truth = field(default_factory=Truth)
    checkpoints: dict[str, State] = field(default_factory=dict)
    faults: int = 0  # that had happened to its service when it was last looked at


class Clients:
    """All of them; `run` each in a thread, until `done`."""

    def __init__(self, options: Options, guest: Guest, vms: list[Vm], report: Report) -> None:
        self._options = options
        self._guest = guest
        self._vms = vms
        self._report = report
        self._numbers = itertools.count(1)
        self.stop = threading.Event()

    @property
    def done(self) -> bool:
        """Whether it is time to end."""
        options, report = self._options, self._report
        return (
            self.stop.is_set()
            or (options.cycles is not None and report.totals.cycles >= options.cycles)
            or (options.duration is not None and report.seconds >= options.duration)
            or len(report.anomalies) >= ENOUGH
        )

    def run(self, number: int) -> None:
        """One client."""
        chance = random.Random(f"{self._options.seed} {number}")
        vms = self._vms[number :: self._options.clients] if self._options.light else self._vms
        while vms and not self.done:
            vm = chance.choice(vms)
            try:
                if vm.lock.acquire(blocking=False):
                    try:
                        self._use(vm, chance)
                    finally:
                        vm.lock.release()
                else:
                    self._disturb(vm, chance)
                    self.stop.wait(chance.uniform(0, _BREATH))
            except Failed:
                continue
            except Exception as error:  # noqa: BLE001  a client that ends unseen would make a report look clean
                self._report.anomaly(
                    "failed", vm.service, vm.name, f"the client broke: {type(error).__name__}: {error}"
                )

    # -- calls

    def _call(self, vm: Vm, operation: str, *, gone_ok: bool = False, **body: Any) -> dict[str, Any]:
        """Do an operation; with `gone_ok` there may be no such VM.

        Raises CapsemError when it was refused, or a fault may have struck it; Failed otherwise.
        """
        try:
            with self._report.timed(operation):
                return vm.service.client.call(
                    operation, vm_id=None if operation == "provision" else vm.name, body=body or None
                )
        except CapsemError as error:
            if self._options.faults and not isinstance(error, TimedOut):
                if vm.service.revive():
                    self._report.count(restarts=1)
                raise
            if error.code in REFUSED or (error.code == NotFound.code and gone_ok):
                raise
            self._failed(vm, f"{operation}: {error.code}: {error.message}")

    def _failed(self, vm: Vm, what: str, kind: str = "failed", log: str = "") -> NoReturn:
        """Raises Failed."""
        self._report.anomaly(kind, vm.service, vm.name, what, log)
        raise Failed

    def _exec(self, vm: Vm, command: str, *, gone_ok: bool = False) -> Mapping[str, Any]:
        return self._call(vm, "exec", gone_ok=gone_ok, command=command)

    # -- who holds the VM

    def _use(self, vm: Vm, chance: random.Random) -> None:
        """One cycle: write, do something to the VM, suspend, resume, check."""
        try:
            self._churn(vm, chance)
            try:
                if not self._options.light:
                    self._change(vm, chance)
                self._call(vm, "suspend")
                suspended = 1
            except CapsemError:  # somebody else was there first
                suspended = 0
            self.check(vm)
            self._report.count(cycles=suspended)
        except Failed:
            self.renew(vm)

    def _churn(self, vm: Vm, chance: random.Random) -> None:
        for _ in range(1 if self._options.light else chance.randint(1, 4)):
            names = vm.truth.names()
            odds = (4 if len(names) < FILES else 0, 2 if names else 0, 1 if len(names) > 3 else 0)
            kind = chance.choices(("new", "append", "remove"), odds)[0]
            name = f"f{next(self._numbers)}" if kind == "new" else chance.choice(names)
            piece = (f"{chance.getrandbits(64):016x}", chance.randint(1, self._guest.largest))
            append = kind == "append"
            command = self._guest.remove(name) if kind == "remove" else self._guest.put(name, piece, append=append)
            try:
                answer = self._exec(vm, command)
            except CapsemError:
                vm.truth.removed(name)  # it may have happened, or may still
                continue
            if answer["exit_code"]:
                vm.truth.removed(name)
                said = f"{answer['stdout']}{answer['stderr']}"
                self._failed(vm, f"a write failed with {answer['exit_code']}: {said[-200:]}", "lost", said)
            if kind == "remove":
                vm.truth.removed(name)
            else:
                vm.truth.wrote(name, piece, append=append)
            self._report.count(writes=1)

    def _change(self, vm: Vm, chance: random.Random) -> None:
        """Something beside a suspend. Raises CapsemError."""
        kind = chance.choices(("nothing", "checkpoint", "rollback", "fork", "stop", "renew"), (4, 3, 3, 2, 1, 0.5))[0]
        if kind == "checkpoint":
            self._checkpoint(vm)
        elif kind == "rollback" and vm.checkpoints:
            self._roll_back(vm, chance.choice(list(vm.checkpoints)), save=chance.random() < 0.3)
        elif kind == "fork":
            self._fork(vm)
        elif kind == "stop":
            vm.truth.maybe(*[State(state.files) for state in vm.truth.states])
            self._call(vm, "stop")
            vm.truth.booted(None)
        elif kind == "renew":
            self.renew(vm)

    def _checkpoint(self, vm: Vm) -> None:
        certain = vm.truth.certain
        made = self._call(vm, "checkpoint", message="stress")
        if certain is not None:
            vm.checkpoints[made["id"]] = certain
        while len(vm.checkpoints) > KEPT:
            oldest = next(iter(vm.checkpoints))
            del vm.checkpoints[oldest]
            self._call(vm, "remove_checkpoint", checkpoint=oldest)

    def _roll_back(self, vm: Vm, checkpoint: str, *, save: bool) -> None:
        target, before = vm.checkpoints[checkpoint], vm.truth.certain
        vm.truth.maybe(target)
        answer = self._call(vm, "rollback", checkpoint=checkpoint, save=save)
        vm.truth = Truth(target)
        if answer.get("saved") and before is not None:
            vm.checkpoints[answer["saved"]] = before

    def _fork(self, vm: Vm) -> None:
        """A live fork has all that its source has; it goes again."""
        name = f"{vm.name}-fork{next(self._numbers)}"
        truth = vm.truth.copy()
        self._call(vm, "fork", name=name, live=True)
        child = Vm(vm.service, name, truth=truth, faults=vm.faults)
        try:
            self.check(child)
        finally:
            self._delete(child)

    def check(self, vm: Vm) -> None:
        """Resume a VM, and hold what it has against what it must have. Raises Failed."""
        for _ in range(TRIES):
            if self.stop.is_set():
                return
            try:
                resumed = self._call(vm, "resume")
                if resumed.get("boot_kind") == "cold-after-failure" and not self._options.faults:
                    self._failed(vm, f"it could not be restored: {resumed.get('boot_note')}", "lost")
                vm.truth.unsure += 1
                begun = all(state.memory is None for state in vm.truth.states)
                command = self._guest.look(vm.truth.names())
                if begun:
                    self._exec(vm, self._guest.begin(f"{next(self._numbers):x}"))
                answer = self._exec(vm, command)
                vm.truth.unsure -= 1
            except CapsemError:
                time.sleep(_BREATH / 10)
                continue
            try:
                seen = self._guest.read(answer["stdout"])
            except ValueError:
                self._failed(vm, f"it does not tell what it has: {answer}", "lost")
            wrong = vm.truth.hold_against(seen, self._guest.digest, self._guest.follows)
            if wrong is not None and vm.faults < vm.service.faults_happened:
                # Its VMM may have been killed: then memory is lost, and nobody had said that it would not be.
                wrong = vm.truth.hold_against(seen, self._guest.digest, self._guest.follows, memory=False)
                vm.truth.booted(None)
            vm.faults = vm.service.faults_happened
            if wrong is not None:
                self._failed(vm, wrong, "lost", seen.log)
            self._report.count(checks=1)
            return
        self._failed(vm, f"it could not be looked at in {TRIES} attempts")

    # -- who does not

    def _disturb(self, vm: Vm, chance: random.Random) -> None:
        """Something that must not change what the VM has."""
        kind = chance.choice(("suspend", "resume", "resume", "checkpoint", "fork", "list", "info", "exec"))
        try:
            if kind == "checkpoint":
                made = self._call(vm, "checkpoint", gone_ok=True, message="in between")
                self._call(vm, "remove_checkpoint", gone_ok=True, checkpoint=made["id"])
            elif kind == "fork":
                name = f"{vm.name}-copy{next(self._numbers)}"
                self._call(vm, "fork", gone_ok=True, name=name)
                self._delete(Vm(vm.service, name))
            elif kind == "exec":
                self._exec(vm, "true", gone_ok=True)
            elif kind == "list":
                vm.service.client.call("list")
            else:
                self._call(vm, kind, gone_ok=True)
        except CapsemError:
            pass  # it was not the moment, or the VM is just being made anew

    # -- coming and going

    def create(self, vm: Vm) -> None:
        """Make a VM of that name. Raises Failed, CapsemError."""
        vm.truth, vm.checkpoints = Truth(), {}
        self._call(vm, "provision", name=vm.name, persistent=True, ram_mb=RAM_MB, cpus=1, disk_mb=DISK_MB)
        self.check(vm)

    def _delete(self, vm: Vm) -> None:
        """Delete a VM, faults or not. Raises Failed."""
        for _ in range(TRIES):
            try:
                self._call(vm, "delete", gone_ok=True)
            except CapsemError as error:
                if error.code == NotFound.code:
                    return
                time.sleep(_BREATH / 10)
            else:
                return
        self._failed(vm, "it cannot be deleted")

    def renew(self, vm: Vm) -> None:
        """Delete a VM and make it again. Raises Failed."""
        self._delete(vm)
        for _ in range(TRIES):
            try:
                self.create(vm)
            except CapsemError:
                self._delete(vm)
            else:
                return
        self._failed(vm, "it cannot be made")
