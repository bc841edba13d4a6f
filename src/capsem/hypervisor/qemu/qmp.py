"""The few QMP commands that we use, typed. The only importer of `qemu.qmp`.

Reference: QEMU's docs/interop/qemu-qmp-ref (https://www.qemu.org/docs/master/interop/qemu-qmp-ref.html).

Every command has a deadline. A refusal, a broken connection and a missed deadline all become MachineFailed; what QEMU
has done of a command whose deadline it missed nobody knows, so `on_hung` is told as well. Events go to one callback, at
once and in order; nothing is queued, since a guest can provoke events without end.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from qemu.qmp import EventListener, Message, QMPClient, QMPError, Runstate

from capsem.model.errors import MachineFailed

COMMAND_LIMIT: Final = 60.0  # seconds; `stop` flushes the disks, which may be slow ones
_MIGRATION_ENDS: Final = frozenset({"completed", "failed", "cancelled"})
HINT: Final = "see the VM's process log"

# Whatever the library logs reaches us as an exception as well; its own lines would say it twice.
logging.getLogger("qemu.qmp").propagate = False


@dataclass(frozen=True, slots=True)
class Event:
    """Something QEMU tells unasked, such as SHUTDOWN, STOP, GUEST_PANICKED or BLOCK_IO_ERROR."""

    name: str
    data: Mapping[str, Any]


class _Hook(EventListener):
    """Hands each event on and accepts none: an accepted one would be kept for as long as the connection lives."""

    def __init__(self, callback: Callable[[Event], None]) -> None:
        super().__init__()
        self._callback = callback

    def accept(self, event: Message) -> bool:
        data = event.get("data")
        self._callback(Event(str(event["event"]), data if isinstance(data, dict) else {}))
        return False


class Monitor:
    """A QMP session over an already connected socket."""

    def __init__(self, on_event: Callable[[Event], None]) -> None:
        self._client = QMPClient()
        self._client.events.event_filter = lambda _event: False  # the library's own, boundless queue
        self._client.register_listener(_Hook(self._event))
        self._on_event = on_event
        self.on_hung: Callable[[str], None] = lambda _reason: None
        self._migration: asyncio.Future[str] | None = None

    def _event(self, event: Event) -> None:
        waiting, status = self._migration, str(event.data.get("status"))
        if event.name == "MIGRATION" and waiting is not None and not waiting.done() and status in _MIGRATION_ENDS:
            waiting.set_result(status)
        self._on_event(event)

    async def open(self, sock: socket.socket, limit: float) -> None:
        """Wait for QEMU's greeting and begin the session; takes `sock` over. Raises MachineFailed."""
        try:
            async with asyncio.timeout(limit):
                await self._client.connect(sock)
        except TimeoutError:
            raise MachineFailed(f"QEMU did not answer within {limit:g} s", hint=HINT) from None
        except Exception as error:  # the library lets failed assertions and decoding errors through
            await self.close()
            raise MachineFailed(f"QEMU did not begin to speak QMP: {error}", hint=HINT) from error

    @property
    def connected(self) -> bool:
        """Whether the session lives, as far as is known."""
        return self._client.runstate is Runstate.RUNNING

    @property
    def version(self) -> str:
        """QEMU's version, such as "7.2.22"."""
        greeting = self._client.greeting
        assert greeting is not None
        version: Any = greeting.QMP.version["qemu"]
        return f"{version['major']}.{version['minor']}.{version['micro']}"

    async def cont(self) -> None:
        """Let the vCPUs run. Raises MachineFailed, here and below."""
        await self.execute("cont")

    async def stop(self) -> None:
        """Stop the vCPUs and flush the disks."""
        await self.execute("stop")

    async def status(self) -> str:
        """QEMU's run state: "prelaunch" (not run yet), "running", "paused", "io-error", "guest-panicked", ..."""
        answer = await self.execute("query-status")
        assert isinstance(answer, dict)
        return str(answer["status"])

    async def save_devices(self, path: Path) -> None:
        """Write the state of all devices, without RAM, to a new file; the vCPUs must be stopped."""
        # Made for Xen, which keeps a guest's RAM itself, as we do. `live`: the disks stay open, the machine may go on.
        await self.execute("xen-save-devices-state", filename=str(path), live=True)

    async def load(self, uri: str) -> None:
        """Take in a state that `save_devices` wrote, in a QEMU that was started to wait for one."""
        waiting = self._migration = asyncio.get_running_loop().create_future()
        await self.execute("migrate-set-capabilities", capabilities=[{"capability": "events", "state": True}])
        await self.execute("migrate-incoming", uri=uri)
        gone = asyncio.ensure_future(self.closed())  # a QEMU that cannot take it in exits
        try:
            async with asyncio.timeout(COMMAND_LIMIT):
                await asyncio.wait((waiting, gone), return_when=asyncio.FIRST_COMPLETED)
        except TimeoutError:
            raise MachineFailed(f"it is not done after {COMMAND_LIMIT:g} s", hint=HINT) from None
        finally:
            gone.cancel()
        if not waiting.done() or waiting.result() != "completed":
            raise MachineFailed(f"it {waiting.result() if waiting.done() else 'has ended'}", hint=HINT)

    async def quit(self) -> None:
        """Ask QEMU to end. It may be gone before it answers: that is no error."""
        with contextlib.suppress(MachineFailed):
            await self.execute("quit")

    async def blockdev_add(self, node: Mapping[str, Any]) -> None:
        """Open a block node."""
        await self.execute("blockdev-add", **node)

    async def blockdev_del(self, node: str) -> None:
        """Close a block node that nothing uses."""
        await self.execute("blockdev-del", node_name=node)

    async def blockdev_reopen(self, node: Mapping[str, Any]) -> None:
        """Give an open block node new options; those not named go back to their defaults."""
        await self.execute("blockdev-reopen", options=[node])

    async def blockdev_snapshot(self, node: str, overlay: str) -> None:
        """Flush `node`, put `overlay` on top of it for all its users, and open `node` read-only from then on."""
        await self.execute("blockdev-snapshot", node=node, overlay=overlay)

    async def execute(self, command: str, **arguments: object) -> object:
        """Any command; a "_" in the name of an argument stands for "-"."""
        named = {name.replace("_", "-"): value for name, value in arguments.items()}
        try:
            async with asyncio.timeout(COMMAND_LIMIT):
                return await self._client.execute(command, named or None)
        except TimeoutError:
            reason = f"QEMU did not answer {command!r} within {COMMAND_LIMIT:g} s"
            self.on_hung(reason)
            raise MachineFailed(reason, hint=HINT) from None
        except (QMPError, EOFError, OSError) as error:
            raise MachineFailed(f"QEMU did not carry out {command!r}: {error}", hint=HINT) from error

    async def closed(self) -> None:
        """Return when QEMU has closed the connection and every event was handed on."""
        while self.connected:
            await self._client.runstate_changed()

    async def close(self) -> None:
        """End the session. Safe to call again."""
        # Why the session broke is raised here a second time, whatever it was; those it concerned were told.
        with contextlib.suppress(Exception):
            await self._client.disconnect()
