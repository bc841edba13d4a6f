"""The host's wall clock is set, by an hour, by days, back and forth, whatever is under way: nothing is lost or left over.

Service and supervisors are the real processes; set_clock.py stands in for the kernel's clock.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from fault_bench import VM, Bench, bench
from set_clock import program

from real_service import environment, wait_for

HOUR, DAY = 3600.0, 86400.0
ABOUT = 60.0  # seconds that a busy machine may take to answer
STEPS = ("boot.running", "suspend.saved", "resume.running", "checkpoint.held", "rollback.kept")


class Elsewhen(Bench):
    """A bench on a host whose clock can be set."""

    def started(self, home: Path) -> subprocess.Popen[bytes]:
        self.clock = home / "clock"
        if not self.clock.exists():
            self.set(0)
        service, supervisor = home / "capsem-service", home / "capsem-process"
        program(service, "capsem.service.__main__", self.clock)
        program(supervisor, "capsem.supervisor.__main__", self.clock)
        return subprocess.Popen(
            [service, "--foreground", "--process-binary", supervisor], env=environment(home) | self.environment
        )

    def set(self, off: float) -> None:
        new = self.clock.with_name("clock.new")
        new.write_text(str(off))
        new.rename(self.clock)
        self.off = off

    def agrees(self) -> bool:
        """Whether the guest's clock is the host's."""
        return abs(float(self.output(VM, "date +%s")) - time.time() - self.off) < ABOUT

    def strike_and_set(self, step: str, off: float) -> None:
        """Set the clock while somebody is at a step."""
        self.taken.unlink(missing_ok=True)
        with ThreadPoolExecutor(1) as pool:
            setting = pool.submit(lambda: (wait_for(self.taken.exists), self.set(off)))
            self.strike(step, "delay")
            setting.result()


def cases(every: Sequence[object]) -> list[object]:
    """With simulated guests, and with a real VM by `make soak`."""
    return [*(("sim", each) for each in every), *(pytest.param("qemu", each, marks=pytest.mark.soak) for each in every)]


@pytest.fixture(scope="module")
def sim() -> Iterator[Elsewhen]:
    with bench("sim", kind=Elsewhen) as it:
        yield it


@pytest.fixture(scope="module")
def qemu() -> Iterator[Elsewhen]:
    with bench("qemu", kind=Elsewhen) as it:
        yield it


@pytest.mark.parametrize(("hypervisor", "off"), cases([3 * DAY, -40 * DAY, HOUR, 0.0]))
def test_a_vm_lives_through_it(request: pytest.FixtureRequest, hypervisor: str, off: float) -> None:
    it: Elsewhen = request.getfixturevalue(hypervisor)
    linux = hypervisor == "qemu"
    it.write()
    made, then = it.ask("checkpoint")["id"], it.state
    with ThreadPoolExecutor(1) as pool:
        under_way = pool.submit(it.exec, VM, "sleep 2 && echo through" if linux else "true", timeout_secs=HOUR)
        it.set(off)
        assert under_way.result()[0] == 0
    if linux:
        wait_for(it.agrees)
    it.write()
    it.check()
    it.ask("suspend")
    it.set(off + HOUR)
    assert it.ask("resume")["boot_kind"] == "warm"
    assert not linux or it.agrees()  # at once
    it.check()
    os.kill(it.process.pid, signal.SIGKILL)
    it.process.wait()
    it.set(off)
    it.restart()
    it.check()
    it.ask("rollback", checkpoint=made)
    it.truth = type(it.truth)(then)
    it.check()
    it.tidy(f"the clock was set by {off} s", killed=False)


@pytest.mark.parametrize(("hypervisor", "step"), cases(STEPS))
def test_it_is_set_in_the_middle_of_something(request: pytest.FixtureRequest, hypervisor: str, step: str) -> None:
    it: Elsewhen = request.getfixturevalue(hypervisor)
    it.strike_and_set(step, -3 * DAY if it.off >= 0 else 3 * DAY)
