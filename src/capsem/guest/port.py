"""The agent's end of the control channel: a virtio-serial port, or in tests a socket, driven by the loop.

Facts about virtio ports that shape this (drivers/char/virtio_console.c): a read hands out at most one buffer of 4 KiB,
and the kernel goes on with the next part of a readv if that was filled, so reads go into one kept buffer in parts of
that size; a write takes at most 32 KiB, and the next part of
a writev is another; with the host end closed, poll reports POLLIN|POLLHUP for ever and read returns nothing, which would
spin.
"""

from __future__ import annotations

import os
import time

from capsem.guest.loop import READ, WRITE, Loop

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

NAME = "org.capsem.control"
_READ_SIZE = 256 * 1024
_READ, _WRITE = 4 * 1024, 32 * 1024  # the largest parts
_ABSENT_PAUSE = 0.05
# The VMM hands over 4 KiB at a time, and a guest that looked at each as it came would do little else. When more than
# this is known to be on its way, it sleeps a moment instead (in seconds), and finds dozens of buffers filled.
_WORTH_WAITING = 64 * 1024
_WAIT = 0.0007


def find_port(name: str = NAME) -> str:
    """The device of the virtio port that the host named so. Raises FileNotFoundError."""
    base = "/sys/class/virtio-ports"
    for port in sorted(os.listdir(base)):
        with open(f"{base}/{port}/name", encoding="ascii", errors="replace") as file:
            if file.read().strip() == name:
                return f"/dev/{port}"
    raise FileNotFoundError(f"no virtio port is named {name}")


class Port:
    """Non-blocking reads to `receive`, which is given a buffer and how much of it counts, and is done with it when it
    returns; writes from `output`, which returns what is to be written one after the other.
    """

    def __init__(
        self,
        loop: Loop,
        fd: int,
        receive: Callable[[bytearray, int], None],
        output: Callable[[], list[bytes | memoryview]],
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
        self._buffer = bytearray(_READ_SIZE)
        self._parts = [memoryview(self._buffer)[at : at + _READ] for at in range(0, _READ_SIZE, _READ)]
        self._unsent: list[memoryview] = []
        self._events = 0
        self._away = False  # the host end is closed: until the pause is over there is nothing to be tried
        os.set_blocking(fd, False)
        self._watch(READ)

    def flush(self) -> None:
        """Write as much as the host takes now; the loop calls this before it waits."""
        while not self._away:
            if not self._unsent:
                self._unsent = _cut(self._output())
                if not self._unsent:
                    self._watch(self._events & ~WRITE)
                    return
            try:
                self._sent(os.writev(self._fd, self._unsent))
            except BlockingIOError:
                self._watch(self._events | WRITE)
                return
            except (BrokenPipeError, ConnectionResetError):
                self._absent()
                return

    def _sent(self, size: int) -> None:
        for number, part in enumerate(self._unsent):
            if size < len(part):
                self._unsent[: number + 1] = [part[size:]]
                return
            size -= len(part)
        self._unsent = []

    def _watch(self, events: int) -> None:
        if events != self._events:
            self._events = events
            self._loop.watch(self._fd, events, self._ready)

    def _ready(self, events: int) -> None:
        if events & ~WRITE:
            if self._missing() > _WORTH_WAITING:
                time.sleep(_WAIT)
            try:
                size = os.readv(self._fd, self._parts)
            except BlockingIOError:
                return
            except ConnectionResetError:
                size = 0
            if size:
                self._receive(self._buffer, size)
            else:
                self._absent()

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


def _cut(pieces: list[bytes | memoryview]) -> list[memoryview]:
    """The same bytes in parts of which each is one write."""
    parts = []
    for piece in pieces:
        view = memoryview(piece)
        parts += [view[at : at + _WRITE] for at in range(0, len(view), _WRITE)]
    return parts
