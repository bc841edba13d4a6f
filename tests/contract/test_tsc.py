"""How fast this host's counter runs, measured."""

from __future__ import annotations

import platform

import pytest

from capsem.hypervisor.qemu.tsc import frequency_khz


@pytest.mark.skipif(platform.machine() != "x86_64", reason="only x86-64 has this counter")
def test_two_measurements_agree() -> None:
    first, second = frequency_khz(), frequency_khz()
    assert first is not None
    assert second is not None
    assert abs(first - second) < first / 500
