"""kill -9 of the service and of supervisors, real processes with simulated guests, at every step that there is."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from fault_bench import Bench, bench

from capsem import faults

CASES = [
    *((step, "kill") for step in (*faults.SUPERVISOR, *faults.SERVICE)),
    *((step, "enospc") for step in sorted(faults.WRITES)),
]


@pytest.fixture(scope="module")
def it() -> Iterator[Bench]:
    with bench("sim") as it:
        yield it


@pytest.mark.parametrize(("step", "kind"), CASES)
def test_whatever_happens_nothing_acknowledged_is_lost(it: Bench, step: str, kind: str) -> None:
    it.strike(step, kind)
