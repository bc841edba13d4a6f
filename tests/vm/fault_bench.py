"""One VM that is taken through an operation at a step of which a fault is ordered, and what must hold afterwards."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

from small_disk import Disk

from capsem import faults
from capsem.client.sync import Client
from capsem.model.errors import CapsemError
from capsem.store import records
from capsem.store.checkpoints import CheckpointStore
from capsem.store.layout import Layout
from capsem.stress.guests import Guest, LinuxGuest, SimGuest
from capsem.stress.truth import State, Truth
from outside import traces
from real_service import SMALL, Service, alive, start_process, wait_for, wait_until_it_answers

VM, TWIN, VICTIM = "hardy", "twin", "victim"
FATAL = ("kill", "kill-vmm", "stop-vmm")
HANGS = "the guest may hang"  # of a VM whose guest is silent
PATIENCE = 300.0  # seconds for a call: a VMM that hangs is given up after a minute, and restored twice
MERGED_WITHIN = 40  # checkpoints; each adds a layer


class Bench(Service):
    """A service that takes orders for faults, and a VM of it."""

    def __init__(self, home: Path, hypervisor: str) -> None:
        self.orders = home / "orders"
        self.taken = home / "orders.taken"
        self.seen = home / "orders.seen"
        self.environment = {faults.VARIABLE: str(self.orders), "CAPSEM_HYPERVISOR": hypervisor}
        if hypervisor == "sim":
            self.environment |= {"CAPSEM_SIM": f"host={home / 'host'}", "CAPSEM_GATE": str(home / "gate")}
        super().__init__(home, self.started(home))
        self.guest: Guest = SimGuest() if hypervisor == "sim" else LinuxGuest()
        self.truth = Truth()
        self.number = 0

    @property
    def client(self) -> Client:
        return Client(self.socket, timeout=PATIENCE)

    def started(self, home: Path) -> subprocess.Popen[bytes]:
        return start_process(home, **self.environment)

    def restart(self) -> None:
        self.process = self.started(self.home)
        wait_until_it_answers(self.client)

    def ask(self, operation: str, vm_id: str | None = VM, **body: Any) -> dict[str, Any]:
        return self.client.call(operation, vm_id=vm_id, body=body)

    # -- what the VM has

    def begin(self) -> None:
        self.ask("provision", None, name=VM, persistent=True, disk_mb=2048, **SMALL)
        self.output(VM, "true")
        self.check()

    def write(self) -> None:
        self.number += 1
        name, piece = f"f{self.number % 5}", (f"{self.number:016x}", 1000)
        self.output(VM, self.guest.put(name, piece, append=False))
        self.truth.wrote(name, piece, append=False)

    def check(self, vm_id: str = VM, truth: Truth | None = None) -> None:
        """All that was acknowledged is there, and nothing is wrong; the VM runs."""
        truth = truth or self.truth
        if all(state.memory is None for state in truth.states):
            self.output(vm_id, self.guest.begin(f"{self.number:x}"))
        _, out, _ = self.exec(vm_id, self.guest.look(truth.names()))
        seen = self.guest.read(out)
        assert truth.hold_against(seen, self.guest.digest, self.guest.follows) is None, (truth.states, seen)

    @property
    def state(self) -> State:
        assert self.truth.certain is not None
        return self.truth.certain

    # -- a fault

    def strike(self, step: str, kind: str) -> None:
        """Have a fault happen at a step of an operation, hold everything against what must be, and mend what is broken."""
        self.taken.unlink(missing_ok=True)
        if self.status(VM) != "Running":
            self.ask("resume")
        self.write()
        self.check()
        operation = step.partition(".")[0]
        before = getattr(self, f"_before_{operation}", lambda: None)()
        self.seen.unlink(missing_ok=True)
        self.orders.write_text(f"{step} {kind} 0.3\n")
        answer, error = None, None
        try:
            answer = getattr(self, f"_{operation}")(before)
        except CapsemError as failure:
            error = failure
        told = f"{kind} at {step}: {answer or error}"
        wait_for(self.taken.exists)
        if step in faults.SERVICE and kind == "kill":
            assert self.process.wait(30) == -signal.SIGKILL, told
            self.restart()
        elif kind == "enospc":
            assert error is None or error.code != "internal", told
        fatal = kind in FATAL and step in faults.SUPERVISOR
        if fatal:  # where the VMM died it takes a moment until everybody knows
            struck = self.struck(step)
            if kind == "stop-vmm":  # one that nobody waits for is not judged, but told of, and can be stopped
                wait_for(lambda: self.gone(struck) or HANGS in str(self.ask("info").get("reason")), limit=PATIENCE)
                if not self.gone(struck):
                    self.ask("stop")
            wait_for(lambda: self.gone(struck), limit=PATIENCE)
        self.settle()
        self.judge(step, kind, before, answer, told)
        self.tidy(told, killed=fatal)

    def gone(self, supervisor: int) -> bool:
        """Whether it has ended, and the service knows."""
        return not alive(supervisor) and self.ask("info")["pid"] != supervisor

    def struck(self, step: str) -> int:
        """The process that came to a step first, since `seen` was removed: an attempt that fails is made again."""
        lines = self.seen.read_text().splitlines()
        return next(int(pid) for name, pid in map(str.split, lines) if name == step)

    def squeeze(self, operation: str, disk: Disk, room: int) -> None:
        """Have an operation find so many bytes on its disk, and hold everything against what must be once there is room."""
        if self.status(VM) != "Running":
            self.ask("resume")
        self.write()
        self.check()
        self.orders.write_text("nothing\n")
        before = getattr(self, f"_before_{operation}", lambda: None)()
        answer, error = None, None
        disk.fill(room)
        try:
            answer = getattr(self, f"_{operation}")(before)
        except CapsemError as failure:
            error = failure
        finally:
            disk.empty()
        told = f"{operation} with {room} bytes: {answer or error}"
        assert error is None or error.code != "internal", told
        assert answer or operation != "delete", told  # it makes room
        self.settle()
        self.judge(f"{operation}.", "full", before, answer, told)
        self.tidy(told, killed=False)

    def settle(self) -> None:
        """Nothing is under way any more."""
        record = Layout(self.run_dir).session(VM, persistent=True)
        at_rest = ("created", "running", "suspended", "stopped", "failed")
        wait_for(lambda: records.read(record).state in at_rest, limit=PATIENCE)
        wait_for(lambda: (self.status(VM) == "Running") == bool(self.ask("info")["pid"]))

    def judge(self, step: str, kind: str, before: Any, answer: dict[str, Any] | None, told: str) -> None:
        """What there is of the VM is what was acknowledged."""
        operation, status = step.partition(".")[0], self.status(VM)
        told = f"{told}: {status}"
        lost = kind in FATAL and step in faults.SUPERVISOR
        if operation == "suspend" and answer is not None:
            assert status == "Suspended", told
        if operation == "rollback":
            self.truth = Truth(before[1]) if answer else Truth(self.state, before[1])
        if operation == "boot":
            self.truth.booted(None)
        if status in ("Defunct", "Stopped"):
            assert lost or operation == "boot", told
        resumed = self.ask("resume")
        if status == "Suspended":
            assert resumed["boot_kind"] == "warm", (told, resumed)
        elif resumed["boot_kind"] != "warm" and lost:
            self.truth.booted(None)
        self.check()

    def tidy(self, told: str, *, killed: bool) -> None:
        """Every VM and checkpoint can be got rid of, and nothing else is there."""
        for box in self.ask("list", None)["sandboxes"]:
            if box["id"] != VM:
                with contextlib.suppress(CapsemError):
                    self.ask("delete", box["id"])
        assert [box["id"] for box in self.ask("list", None)["sandboxes"]] == [VM], told
        for each in self.ask("checkpoints")["checkpoints"]:
            self.ask("verify_checkpoint", checkpoint=each["id"])
            with contextlib.suppress(CapsemError):  # the VM has come from it
                self.ask("remove_checkpoint", checkpoint=each["id"])
        if killed:  # what a supervisor had in the making goes when a service starts
            os.kill(self.process.pid, signal.SIGKILL)
            self.process.wait()
            self.restart()
            self.check()
        found: list[str] = []

        def in_order() -> bool:
            found[:] = self.amiss()
            return not found

        with contextlib.suppress(AssertionError):  # what is under way in the background comes to its end
            wait_for(in_order)
        assert found == [], (found, told)

    def amiss(self) -> list[str]:
        """What is there that should not be, or not there that should."""
        found = [f"{name} is left over" for name in sorted(self.left_over(Layout(self.run_dir)))]
        files, processes, locks = traces(self.run_dir)
        held = [lock.rpartition("/")[2] for lock in locks if "persistent/" in lock]
        if held not in (["claim", "vmm.lock"], ["claim"]):  # a simulated machine is in its supervisor
            found.append(f"locks: {locks}")
        found += [f"{name} is left over" for name in files if ".tmp-" in name]
        if len([line for line in processes if "capsem-process" in line and "--id" in line]) != 1:
            found.append(f"processes: {processes}")
        return found

    def left_over(self, layout: Layout) -> set[str]:
        """Files in the store that nothing names."""
        store = CheckpointStore(layout)
        named = {layer for each in store.all() for layer in each.layer_ids}
        found = set()
        for session in records.sessions(layout):
            record = records.read(session)
            named |= {*record.layers, *record.attached}
        found |= {path.name for path in layout.layers.glob("*.qcow2") if path.stem not in named}
        return found | {path.name for path in layout.sessions.iterdir()}

    # -- the operations, by the first word of their steps; `_before_...` comes before the fault is ordered

    def _before_boot(self) -> None:
        self.ask("stop")

    def _boot(self, _before: None) -> dict[str, Any]:
        return self.ask("resume")

    def _before_resume(self) -> None:
        self.ask("suspend")

    def _resume(self, _before: None) -> dict[str, Any]:
        return self.ask("resume")

    _before_start, _start = _before_resume, _resume

    def _suspend(self, _before: None) -> dict[str, Any]:
        return self.ask("suspend")

    def _checkpoint(self, _before: None) -> dict[str, Any]:
        return self.ask("checkpoint")

    def _layer(self, _before: None) -> dict[str, Any]:
        return self.ask("fork", name=TWIN)

    def _before_rollback(self) -> tuple[str, State]:
        made = str(self.ask("checkpoint")["id"]), self.state
        self.write()
        return made

    def _rollback(self, before: tuple[str, State]) -> dict[str, Any]:
        return self.ask("rollback", checkpoint=before[0])

    def _fork(self, _before: None) -> dict[str, Any]:
        if "frozen" in self.orders.read_text():
            return self.ask("fork", name=TWIN)
        answer = self.ask("fork", name=TWIN, live=True)
        self.check(TWIN, self.truth.copy())
        return answer

    def _flatten(self, _before: None) -> None:
        for _ in range(MERGED_WITHIN):
            if self.taken.exists():
                return
            made = self.ask("checkpoint")["id"]
            self.ask("remove_checkpoint", checkpoint=made)
            time.sleep(0.1)  # it is done in the background

    def _before_delete(self) -> None:
        self.ask("fork", name=VICTIM)

    def _delete(self, _before: None) -> dict[str, Any]:
        return self.ask("delete", VICTIM)


AnyBench = TypeVar("AnyBench", bound=Bench)


@contextlib.contextmanager
def bench(hypervisor: str, home: Path | None = None, kind: type[AnyBench] = Bench) -> Iterator[AnyBench]:
    with tempfile.TemporaryDirectory(prefix="capsem-vm-") as text:  # a short path: sockets have to fit
        it = kind(home or Path(text), hypervisor)
        try:
            wait_until_it_answers(it.client)
            it.begin()
            yield it
        finally:
            it.stop()
