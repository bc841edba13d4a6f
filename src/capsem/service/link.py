"""The service's connection to one supervisor."""

from __future__ import annotations

import asyncio
import functools
import logging
from collections.abc import Callable
from pathlib import Path

from capsem import __version__, tracing
from capsem.api.internal import MESSAGES, PROTOCOL, REQUESTS, Hello, ShutdownAsked, State, TraceTo, speaks
from capsem.control.channel import Channel, Stream
from capsem.model.errors import Interrupted, TimedOut, Unsupported
from capsem.system import System
from capsem.wire.decoder import FrameDecoder
from capsem.wire.frames import ProtocolError
from capsem.wire.messages import largest_data
from capsem.wire.schema import Message
from capsem.wire.streams import Mux

HELLO_LIMIT = 5.0  # seconds

log = logging.getLogger("capsem_service.link")


class Link:
    """Speaks with a supervisor; knows where its VM is as of its last word."""

    def __init__(self) -> None:
        self.pid = 0
        self.state: State | None = None
        self.lost = asyncio.Event()
        self.on_state: Callable[[State], None] = lambda _state: None
        self.on_shutdown_asked: Callable[[str], None] = lambda _action: None
        self._changed = asyncio.Event()
        self._refused: Unsupported | None = None
        self._traced: tracing.Trace | None = None
        self.channel = Channel(Mux(FrameDecoder(hunting=False), initiator=True, messages=MESSAGES, requests=REQUESTS))
        self.channel.on_control = self._control
        self.channel.on_lost = self._lost
        self.channel.on_garbage = self._garbage

    async def connect(self, system: System, path: Path) -> None:
        """Connect and exchange hellos. Raises OSError, Unsupported (another protocol), Interrupted, TimedOut."""
        await system.network.connect(path, lambda: self.channel)
        self.channel.control(Hello(protocol=PROTOCOL, version=__version__, pid=system.processes.own_pid()))
        try:
            async with asyncio.timeout(HELLO_LIMIT):
                while self.state is None or self._refused is not None:
                    if self._refused is not None:
                        self.channel.hang_up()
                        raise self._refused
                    if self.lost.is_set():
                        raise Interrupted("the supervisor hung up")
                    await self._changed.wait()
        except TimeoutError:
            self.channel.hang_up()
            raise TimedOut(f"the supervisor at {path} did not say hello within {HELLO_LIMIT:.0f} s") from None

    def _notify(self) -> None:
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    def _garbage(self, error: ProtocolError) -> None:
        log.error("the supervisor does not speak the protocol, hanging up: %s", error)
        self._refused = self._refused or _unsupported(f"its supervisor does not speak this service's protocol: {error}")
        self.channel.hang_up()

    def _lost(self) -> None:
        self.lost.set()
        self._notify()

    def _control(self, message: Message) -> None:
        if isinstance(message, Hello):
            self.pid = message.pid
            self.channel.mux.largest = largest_data(message.protocol)
            if not speaks(message.protocol):
                self._refused = _unsupported(
                    f"its supervisor (Capsem {message.version}) speaks protocol {message.protocol}, "
                    f"this service (Capsem {__version__}) speaks {PROTOCOL}"
                )
        elif isinstance(message, State):
            self.state = message
            self.on_state(message)
        elif isinstance(message, ShutdownAsked):
            self.on_shutdown_asked(message.action)
        else:
            raise ProtocolError(f"unexpected {message.tag}")
        self._notify()

    @property
    def ready(self) -> bool:
        """Whether the guest may be spoken to."""
        return self.state is not None and self.state.ready and not self.lost.is_set()

    async def wait_ready(self, limit: float) -> bool:
        """Wait until the guest is ready; False when `limit` seconds were not enough. Raises Interrupted: it ended."""
        try:
            async with asyncio.timeout(limit):
                while not self.ready:
                    if self.lost.is_set():
                        raise Interrupted("the VM ended before its guest was ready")
                    await self._changed.wait()
        except TimeoutError:
            return False
        return True

    def open(self, request: Message) -> Stream:
        """Open a stream. Raises Interrupted when the supervisor is gone."""
        if (trace := tracing.active()) is not self._traced:
            self._trace(trace)
        return self.channel.open(request)

    def _trace(self, trace: tracing.Trace | None) -> None:
        """What the supervisor does from here on belongs to this trace, until that is closed."""
        self._traced = trace
        self.channel.open(TraceTo(file=trace.name if trace is not None else ""))
        if trace is not None:
            trace.on_close.append(functools.partial(self._untrace, trace))

    def _untrace(self, trace: tracing.Trace) -> None:
        if self._traced is trace and not self.lost.is_set():
            self._trace(None)


def _unsupported(message: str) -> Unsupported:
    return Unsupported(message, hint="stop the VM and resume it: then a supervisor of this version runs it")
