"""Holding all writes to the volume for the moment in which the host freezes its top layer.

The file system frozen is the volume's own ext4: freezing "/" (an overlay) does nothing (interface.md 9, row 2). While it
is frozen a write blocks whoever makes it, this agent's loop included; so a thread of its own does both, the freezing
and, at the latest when the time is over, the thawing.
"""

from __future__ import annotations

import fcntl
import os
import select
import time

from capsem.guest.files import refusal
from capsem.guest.loop import Loop
from capsem.guest.servant import Servant
from capsem.wire.messages import Frozen, Thaw, Thawed
from capsem.wire.schema import Message

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from capsem.wire.streams import Mux

# linux/fs.h: _IOWR('X', 119, int), _IOWR('X', 120, int)
_FIFREEZE, _FITHAW = 0xC0045877, 0xC0045878


class Freezer(Servant):
    """Serves a Freeze request; `mount` "" (no volume of our own) only flushes."""

    def __init__(
        self, loop: Loop, mux: Mux, stream: int, limit: float, mount: str, done: Callable[[int], None]
    ) -> None:
        self._loop = loop
        self._mux = mux
        self._stream = stream
        self._limit = limit
        self._mount = mount
        self._done = done
        self._thaw = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._frozen = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        loop.watch(self._frozen, select.EPOLLIN, self._say_frozen)
        loop.offload(self._hold, self._held)

    def _hold(self) -> tuple[float, bool]:
        """On the thread: freeze, wait, thaw. Returns how long it was, and whether nobody asked for the thaw."""
        began = time.monotonic()
        fd = os.open(self._mount, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC) if self._mount else -1
        try:
            if fd >= 0:
                fcntl.ioctl(fd, _FIFREEZE, 0)
            else:
                os.sync()
            try:
                os.eventfd_write(self._frozen, 1)
                asked, _, _ = select.select([self._thaw], [], [], self._limit)
            finally:
                if fd >= 0:
                    fcntl.ioctl(fd, _FITHAW, 0)
        finally:
            if fd >= 0:
                os.close(fd)
        return time.monotonic() - began, not asked

    def _say_frozen(self, _events: int) -> None:
        self._loop.unwatch(self._frozen)
        self._mux.message(self._stream, Frozen())

    def _held(self, result: tuple[float, bool] | BaseException) -> None:
        self._loop.unwatch(self._frozen)
        os.close(self._frozen)
        os.close(self._thaw)
        self._thaw = -1
        if isinstance(result, BaseException):
            self._mux.close(self._stream, refusal(result, self._mount))
        else:
            self._mux.close(self._stream, Thawed(duration=result[0], expired=result[1]))
        self._done(self._stream)

    def message(self, message: Message) -> None:
        """The host is done."""
        if isinstance(message, Thaw):
            self.cancelled()

    def cancelled(self) -> None:
        """Thaw now."""
        if self._thaw >= 0:
            os.eventfd_write(self._thaw, 1)
