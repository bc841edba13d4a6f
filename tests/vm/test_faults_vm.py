"""Faults at named steps of real VMs: a few here, all of them by `make soak`."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from fault_bench import Bench, bench

from capsem import faults

# One for each way in which a VM can be struck; test_faults_sim has every step.
CHOSEN = [
    ("resume.running", "kill-vmm"),
    ("suspend.held", "kill-vmm"),
    ("suspend.committed", "kill"),
]
MACHINE = [step for step in faults.SUPERVISOR if not step.endswith((".claimed", ".begun"))]
CASES = [
    *((step, "kill") for step in (*faults.SUPERVISOR, *faults.SERVICE)),
    *((step, "enospc") for step in sorted(faults.WRITES)),
    *((step, kind) for step in MACHINE for kind in ("kill-vmm", "stop-vmm")),
]


@pytest.fixture(scope="module")
def it() -> Iterator[Bench]:
    with bench("qemu") as it:
        yield it


@pytest.mark.parametrize(
    ("step", "kind"), [*CHOSEN, *(pytest.param(*each, marks=pytest.mark.soak) for each in CASES if each not in CHOSEN)]
)
def test_whatever_happens_nothing_acknowledged_is_lost(it: Bench, step: str, kind: str) -> None:
    it.strike(step, kind)
