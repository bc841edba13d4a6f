"""Files of VMs that do not run, read from their volumes without starting them.

The VM's turn is held while its volume is read, so that nobody starts it meanwhile: a machine writes to the layer that
is being read. A file is therefore copied to an unnamed temporary file under the turn, which goes with the service
whatever happens to that, and sent from there: a client that is slow to take it keeps nobody waiting.
"""

from __future__ import annotations

import asyncio
import contextlib
import tempfile
from collections.abc import AsyncGenerator, Callable
from typing import IO, Final, TypeVar

from capsem.api.operation import unknown_vm
from capsem.model.errors import MachineFailed, PayloadTooLarge
from capsem.offline.workspace import File, Workspace
from capsem.service.create import Maker
from capsem.service.vm import Vm

T = TypeVar("T")

_PIECE: Final = 256 * 1024


class Offline:
    """Reads of VMs that do not run. Every method raises what `Workspace` does; None means that the VM runs after all."""

    def __init__(self, maker: Maker) -> None:
        self._maker = maker

    async def list_files(self, vm: Vm, path: str, depth: int) -> tuple[list[tuple[str, str, int, int]], bool] | None:
        """See Workspace.list."""
        return await self._read(vm, lambda workspace: workspace.list(path, depth))

    async def get_file(self, vm: Vm, path: str, limit: int) -> tuple[File, IO[bytes]] | None:
        """A file, and a copy of its content to read and close. Raises PayloadTooLarge when it has more than `limit` bytes."""

        def copy(workspace: Workspace) -> tuple[File, IO[bytes]]:
            file = workspace.open(path)
            if file.size > limit:
                raise PayloadTooLarge(f"{path}: {file.size} bytes, more than {limit}", hint="copy it with `capsem cp`")
            with contextlib.ExitStack() as undo:
                target = undo.enter_context(tempfile.TemporaryFile(dir=self._maker.fleet.layout.layers.parent))
                for piece in file.content:
                    target.write(piece)
                target.seek(0)
                undo.pop_all()
            return file, target

        return await self._read(vm, copy)

    async def _read(self, vm: Vm, work: Callable[[Workspace], T]) -> T | None:
        """Do `work` on a thread, with the VM's turn taken until that has ended, even if the caller has gone."""
        async with vm.turn:
            if vm.deleted:
                raise unknown_vm(vm.id)
            if vm.running:
                return None
            with contextlib.closing(await self._maker.open_volume(vm.record)) as volume:
                task = asyncio.ensure_future(asyncio.to_thread(lambda: work(Workspace(volume.read))))
                try:
                    return await asyncio.shield(task)
                except asyncio.CancelledError:
                    await asyncio.wait({task})
                    if not task.cancelled() and task.exception() is None:
                        _let_go(task.result())
                    raise
                except OSError as error:
                    raise MachineFailed(f"the volume of {vm.id} cannot be read: {error}") from error


def _let_go(result: object) -> None:
    if isinstance(result, tuple) and hasattr(result[1], "close"):
        result[1].close()


async def pieces_of(copy: IO[bytes]) -> AsyncGenerator[bytes, None]:
    """A copy's content; it is closed at the end."""
    with copy:
        while data := copy.read(_PIECE):
            yield data
