"""A supervisor in reserve that is killed, with or without its VM, costs nobody a start."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from capsem.api.vm_types import ProvisionRequest
from capsem.model.errors import MachineFailed
from capsem.service.spares import Spares
from capsem.system.real import RealProcesses
from service_world import World, play, status

# Each reads what VM it is to supervise, and then ends.
KILLED = "cat >/dev/null; kill -KILL $$"
FAILED = "cat >/dev/null; exit 1"


async def keep_spare(it: World, script: str) -> int:
    """Have one such process in reserve; returns its pid."""
    it.spares = spares = Spares(
        it.processes.system, ["sh", "-c", script], "process", dict(os.environ), Path(os.devnull)
    )
    spares._child = await RealProcesses().spawn(["sh", "-c", script], env=os.environ, stdin=None, log=Path(os.devnull))
    it.start()
    return spares._child.pid


@pytest.mark.parametrize("when", ["before it is taken", "when it has its VM"])
def test_a_spare_that_was_killed(tmp_path: Path, when: str) -> None:
    async def scene(it: World) -> None:
        pid = await keep_spare(it, KILLED)
        if when == "before it is taken":
            os.kill(pid, signal.SIGKILL)
        await it.handlers.provision(ProvisionRequest(name="box", persistent=True))
        assert await status(it) == {"box": "Running"}
        assert it.spares is not None
        await it.spares.close()

    play(tmp_path, scene)


def test_a_spare_that_fails(tmp_path: Path) -> None:
    """Another one would fail likewise: its reason is told."""

    async def scene(it: World) -> None:
        await keep_spare(it, FAILED)
        with pytest.raises(MachineFailed, match="ended at once"):
            await it.handlers.provision(ProvisionRequest(name="box", persistent=True))
        assert it.spares is not None
        await it.spares.close()

    play(tmp_path, scene)
