"""The agent's end of the control channel: a virtio-serial port, or in tests a socket, driven by the loop.

Facts about virtio ports that shape this (drivers/char/virtio_console.c): a read hands out at most one 4 KiB buffer, so
reads go into one kept buffer, and what is there is gathered before anybody looks at it; a write takes at most 32 KiB;
with the host end closed, poll reports POLLIN|POLLHUP for ever and read returns nothing, which would spin.
"""

from __future__ import annotations

import os
import time

from capsem.guest.loop import READ, WRITE, Loop

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

NAME = "org.capsem.control"
_READ_SIZE = 256 * 1024  # a stream's window: what the host sends before it waits
_ABSENT_PAUSE = 0.05
# The VMM hands over 4 KiB at a time, and a guest that looked at each as it came would do little else. When more than
# this is known to be on its way, it sleeps a moment instead (in seconds), and finds a dozen buffers filled.
_WORTH_WAITING = 8 * 1024
_WAIT = 0.0003


def find_port(name: str = NAME) -> str:
    """The device of the virtio port that the host named so. Raises FileNotFoundError."""
    base = "/sys/class/virtio-ports"
    for port in sorted(os.listdir(base)):
        with open(f"{base}/{port}/name", encoding="ascii", errors="replace") as file:
            if file.read().strip() == name:
                return f"/dev/{port}"
    raise FileNotFoundError(f"no virtio port is named {name}")


class Port:
    """Non-blocking reads to `receive`, writes from `output` (which returns b"" when there is nothing to send)."""

    def __init__(
        self,
        loop: Loop,
        fd: int,
        receive: Callable[[memoryview], None],
        output: Callable[[], bytes],
        *,
        missing: Callable[[], int],
        ends: bool,
    ) -> None:
        """`missing` tells how many bytes of a frame that has begun are still to come."""
        self._loop = loop
        self._fd = fd
        self._receive = receive
        self._output = output
        self._missing = missing
        self._ends = ends  # an end of file is final (a socket), not a host that went away for a while (a port)
        self._buffer = memoryview(bytearray(_READ_SIZE))
        self._unsent = memoryview(b"")
        self._events = 0
        self._away = False  # the host end is closed: until the pause is over there is nothing to be tried
        os.set_blocking(fd, False)
        self._watch(READ)

    def flush(self) -> None:
        """Write as much as the host takes now; the loop calls this before it waits."""
        while not self._away:
            if not self._unsent:
                self._unsent = memoryview(self._output())
                if not self._unsent:
                    self._watch(self._events & ~WRITE)
                    return
            try:
                self._unsent = self._unsent[os.write(self._fd, self._unsent) :]
            except BlockingIOError:
                self._watch(self._events | WRITE)
                return
            except (BrokenPipeError, ConnectionResetError):
                self._absent()
                return

    def _watch(self, events: int) -> None:
        if events != self._events:
            self._events = events
            self._loop.watch(self._fd, events, self._ready)

    def _ready(self, events: int) -> None:
        if events & ~WRITE:
            size, more = self._gather(0)
            if more and self._missing() > size + _WORTH_WAITING:
                time.sleep(_WAIT)
                size, more = self._gather(size)
            if size:
                self._receive(self._buffer[:size])
            if not more:
                self._absent()

    def _gather(self, size: int) -> tuple[int, bool]:
        """Read what is there behind the first `size` bytes of the buffer, until it is full; returns how many bytes it
        holds then, and False when the host end is closed.
        """
        fd, buffer = self._fd, self._buffer
        try:
            while size < _READ_SIZE:
                got = os.readv(fd, [buffer[size:]])
                if not got:
                    return size, False
                size += got
        except BlockingIOError:
            pass
        except ConnectionResetError:
            return size, False
        return size, True

    def _absent(self) -> None:
        """The host end is closed: come back in a while."""
        if self._ends:
            self._loop.exit(0)
            return
        if not self._away:
            self._away = True
            self._loop.unwatch(self._fd)
            self._events = 0
            self._loop.after(_ABSENT_PAUSE, self._look_again)

    def _look_again(self) -> None:
        self._away = False
        self._watch(READ)
