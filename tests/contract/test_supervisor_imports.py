"""A supervisor does not take memory for what its VM may never need: there is one for each VM."""

from __future__ import annotations

import subprocess
import sys

# What carries connections, of which most of the memory is somebody else's: see supervisor.carrying.
CARRIES = {"capsem.supervisor.carrying", "capsem.egress.core", "capsem.egress.taps", "cryptography", "h2", "msgspec"}


def test_what_carries_connections_waits_for_the_first() -> None:
    code = (
        "import sys, capsem.supervisor.__main__; from capsem.hypervisor import registry; registry.load('qemu'); "
        "print(*sys.modules)"
    )
    loaded = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.split()
    assert not CARRIES & set(loaded)
