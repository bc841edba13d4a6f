"""Ways to break the product, each of which the simulation has to notice: tests of the test."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from capsem.api.exec_types import ExecRequest, ExecResponse
from capsem.api.internal import CheckpointMade, Save
from capsem.model.checkpoint import Checkpoint, Kind
from capsem.model.errors import CapsemError, Interrupted
from capsem.model.lifecycle import State
from capsem.model.vm import VmRecord
from capsem.service.checkpoints import Checkpoints
from capsem.service.commands import Commands
from capsem.service.gate import Gate
from capsem.service.vm import Vm
from capsem.store.checkpoints import CheckpointStore
from capsem.supervisor.changes import Changes
from capsem.supervisor.owned import Owned
from capsem.system import Clock


def _retry_without_dedup() -> None:
    """A command whose connection broke is run again."""
    once = Commands.execute

    async def execute(self: Commands, vm_id: str, request: ExecRequest) -> ExecResponse:
        try:
            return await once(self, vm_id, request)
        except Interrupted:
            for _ in range(20):
                await asyncio.sleep(1)
                with contextlib.suppress(CapsemError):
                    return await once(self, vm_id, request)
            raise

    Commands.execute = execute  # type: ignore[method-assign]


def _ack_before_exit() -> None:
    """A suspend is acknowledged while its supervisor still lives."""

    async def suspend(self: Checkpoints, vm: Vm, kind: Kind) -> CheckpointMade:
        with self._fleet.saving(vm.id):
            return await self._save("suspend", vm, Save(kind=kind, go_on=False))

    Checkpoints._suspend = suspend  # type: ignore[method-assign]  # noqa: SLF001


def _ack_before_commit() -> None:
    """A checkpoint is acknowledged, and its manifest written a while later."""
    publish = CheckpointStore.publish

    def later(self: CheckpointStore, *args: Any) -> None:
        asyncio.get_running_loop().call_later(0.5, lambda: publish(self, *args))

    CheckpointStore.publish = later  # type: ignore[method-assign, assignment]


def _goes_on_in_a_frozen_layer() -> None:
    """A machine that was checkpointed is recorded without the layer that it goes on in."""
    note = Changes._note_current  # noqa: SLF001

    def forget(self: Changes, checkpoint: Checkpoint) -> None:
        note(self, checkpoint)
        self._rewrite(layers=checkpoint.layer_ids)

    Changes._note_current = forget  # type: ignore[method-assign]  # noqa: SLF001


def _gate_off() -> None:
    """Saves and restores of a hypervisor that does not tolerate it overlap with whatever others do."""
    init = Gate.__init__

    def without(self: Gate, clock: Clock, *, overlap: bool, path: Path | None) -> None:
        init(self, clock, overlap=overlap, path=None)

    async def not_at_work(self: Owned, *, shared: bool) -> None:
        """Nobody else learns of it."""

    Gate.__init__ = without  # type: ignore[method-assign, assignment]
    Owned._at_work = not_at_work  # type: ignore[method-assign]  # noqa: SLF001


def _merges_what_is_written() -> None:
    """A layer counts as frozen once the record names another one, though the guest's last flush still goes into it."""

    def frozen(self: VmRecord) -> tuple[str, ...]:
        return self.layers if self.state == State.SUSPENDED else self.layers[:-1]

    VmRecord.frozen = property(frozen)  # type: ignore[method-assign, assignment]


MUTANTS: Final[dict[str, Callable[[], None]]] = {
    "gate-off": _gate_off,
    "retry-without-dedup": _retry_without_dedup,
    "ack-before-exit": _ack_before_exit,
    "ack-before-commit": _ack_before_commit,
    "goes-on-in-a-frozen-layer": _goes_on_in_a_frozen_layer,
    "merges-what-is-written": _merges_what_is_written,
}
