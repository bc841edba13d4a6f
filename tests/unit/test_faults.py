"""Faults happen where they are ordered, once; and every step of the table is there."""

from __future__ import annotations

import errno
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import capsem
from capsem import faults

STEPS = {**faults.SUPERVISOR, **faults.SERVICE}


@pytest.fixture
def orders(tmp_path: Path) -> Iterator[Path]:
    faults.load(str(tmp_path / "orders"))
    yield tmp_path / "orders"
    faults.load(None)


def test_without_orders_nothing_happens(tmp_path: Path) -> None:
    faults.load(None)
    faults.at("suspend.saved")
    assert list(tmp_path.iterdir()) == []


def test_an_order_is_carried_out_once_and_where_it_says(orders: Path) -> None:
    orders.write_text("suspend.saved enospc\n")
    faults.at("suspend.held")
    with pytest.raises(OSError, match="No space") as caught:
        faults.at("suspend.saved")
    assert caught.value.errno == errno.ENOSPC
    faults.at("suspend.saved")
    assert not orders.exists()
    assert orders.with_name("orders.taken").exists()
    seen = [line.split() for line in orders.with_name("orders.seen").read_text().splitlines()]
    assert seen == [[step, str(os.getpid())] for step in ("suspend.held", "suspend.saved", "suspend.saved")]


@pytest.mark.parametrize(("kind", "status"), [("kill-vmm", -signal.SIGKILL), ("stop-vmm", None)])
def test_a_vmm_is_told_by_its_pid(orders: Path, kind: str, status: int | None) -> None:
    with subprocess.Popen(["sleep", "60"]) as child:
        try:
            orders.write_text(f"resume.running {kind}")
            faults.at("resume.running", child.pid)
            if status is None:
                _, state = os.waitpid(child.pid, os.WUNTRACED)
                assert os.WIFSTOPPED(state)
            else:
                assert child.wait(10) == status
        finally:
            child.kill()


def test_a_process_can_be_made_to_die(tmp_path: Path) -> None:
    file = tmp_path / "orders"
    file.write_text("boot.begun kill")
    program = f"from capsem import faults; faults.load({str(file)!r}); faults.at('boot.begun'); print('lives')"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True)
    assert (done.returncode, done.stdout) == (-signal.SIGKILL, b"")


def test_half_an_order_is_none(orders: Path) -> None:
    orders.write_text("boot.begun")
    faults.at("boot.begun")
    assert orders.exists()


def test_the_tables_and_the_code_have_the_same_steps() -> None:
    found = set()
    for path in Path(capsem.__file__).parent.rglob("*.py"):
        for prefix, what, step in re.findall(r'(faults|self)\._?at\(\s*f?"(?:([\w{}()]+)\.)?(\w+)"', path.read_text()):
            whats = {"{what}": ("suspend", "checkpoint"), "{_what(order)}": ("suspend", "checkpoint")}.get(
                what, (what,)
            )
            found |= {f"{each}.{step}" for each in (("boot", "resume") if prefix == "self" else whats)}
    assert found == set(STEPS)
    assert set(STEPS) >= faults.WRITES
