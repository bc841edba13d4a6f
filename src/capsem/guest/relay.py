"""A connection that a program in the guest made, joined to a stream to the host, with the flow control of both.

Every byte of a download passes here in emulated code, so there is little of it for each: what comes is written to the
socket at once, and kept only when the socket takes no more; what is read is one frame.
"""

from __future__ import annotations

import _socket
import os

from capsem.guest.loop import READ, WRITE, Loop
from capsem.guest.servant import Servant
from capsem.wire.frames import ONE_WRITE
from capsem.wire.messages import STDIN, STDOUT
from capsem.wire.schema import Message

TYPE_CHECKING = False
if TYPE_CHECKING:
    from capsem.guest.capture import Capture
    from capsem.guest.loop import Timer
    from capsem.wire.streams import Mux

_FRAMES_PER_TURN = 4  # then others get their turn
_LINGER = 2.0  # seconds for a program to take notice of the end, before what it still sends is answered by a reset
_RESET_AT_CLOSE = b"\1\0\0\0\0\0\0\0"  # struct linger: on, for no time


class Relay(Servant):
    """One connection, for as long as its socket is open."""

    def __init__(self, loop: Loop, mux: Mux, capture: Capture, stream: int, sock: _socket.socket) -> None:
        self.stream = stream
        self._loop = loop
        self._mux = mux
        self._capture = capture
        self._socket = sock
        self._fd = sock.fileno()
        self._queue: list[memoryview] = []  # for the program, which takes no more now
        self._reads = True  # the program may still send something
        self._ending = False  # it will be sent nothing more than what is queued
        self._closed = False  # the host has closed the stream
        self._lingering: Timer | None = None
        self._events = 0
        self._watch()

    def _watch(self) -> None:
        events = WRITE if self._queue else 0
        if self._reads and (self._closed or self._capture.may_read(self)):
            events |= READ
        if events != self._events:
            self._events = events
            if events:
                self._loop.watch(self._fd, events, self._ready)
            else:
                self._loop.unwatch(self._fd)

    def go_on(self) -> None:
        """There may be room again for what the program sends."""
        self._watch()

    def _ready(self, events: int) -> None:
        try:
            if events & WRITE:
                self._push()
            if events & ~WRITE:  # also an error, which reading tells
                self._pull()
        except BlockingIOError:
            pass
        except OSError:
            self._broken()
            return
        self._watch()

    # -- from the program

    def _pull(self) -> None:
        for _ in range(_FRAMES_PER_TURN):
            room = ONE_WRITE if self._closed else min(self._capture.may_read(self), ONE_WRITE)
            if not room or not self._reads:
                return
            data = os.read(self._fd, room)
            if not data:
                self._reads = False
                self._mux.end(self.stream, STDOUT)
                self._finish()
                return
            self._mux.send(self.stream, STDOUT, data)  # nobody's any more once the stream is closed
            if len(data) < room:
                return

    def credit(self, channel: int) -> None:
        """The host takes more."""
        self._watch()

    # -- to the program

    def feed(self, data: bytes | memoryview) -> None:
        """Bytes for the program."""
        size = 0
        if not self._queue:
            try:
                size = os.write(self._fd, data)
            except BlockingIOError:
                pass
            except OSError:
                self._broken()
                return
            self._mux.consumed(self.stream, STDIN, size)
            if size == len(data):
                return
        self._queue.append(memoryview(bytes(data[size:])))
        self._watch()

    def _push(self) -> None:
        while self._queue:
            head = self._queue[0]
            size = os.write(self._fd, head)
            self._mux.consumed(self.stream, STDIN, size)
            if size < len(head):
                self._queue[0] = head[size:]
            else:
                del self._queue[0]
        self._finish()

    def feed_end(self) -> None:
        """That was all; what the program says may go on."""
        self._ending = True
        self._finish()

    # -- the end

    def closed(self, result: Message) -> None:
        """The host has closed the stream."""
        self._ending = self._closed = True
        self._finish()

    def _finish(self) -> None:
        """Hand on the end, once all before it is through."""
        if self._fd < 0:
            return
        if self._ending and not self._queue:
            try:
                self._socket.shutdown(_socket.SHUT_WR)
            except OSError:
                self._broken()
                return
            if self._closed and not self._reads:
                self._close()
                return
            if self._closed and self._lingering is None:
                # One who is still sending would be reset by a close now, and lose what it was sent but did not read.
                self._lingering = self._loop.after(_LINGER, self.abort)
        self._watch()

    def _broken(self) -> None:
        """The program has reset the connection."""
        self._mux.reset(self.stream)
        self.abort()

    def cancelled(self) -> None:
        """The host has reset the stream, or a new epoch has."""
        self.abort()

    def abort(self) -> None:
        """Reset the connection."""
        if self._fd >= 0:
            self._socket.setsockopt(_socket.SOL_SOCKET, _socket.SO_LINGER, _RESET_AT_CLOSE)
            self._close()

    def _close(self) -> None:
        if self._lingering is not None:
            self._lingering.cancel()
        self._loop.unwatch(self._fd)
        self._socket.close()
        self._fd = -1
        self._queue.clear()
        self._capture.over(self)
