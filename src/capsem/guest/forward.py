"""A connection to a TCP port of the guest's own, joined to a stream, with the flow control of both.

`socket` would cost a boot under emulation tens of milliseconds to import; the module below it is built in.
"""

from __future__ import annotations

import _socket
import errno
import os

from capsem.guest.files import Refused
from capsem.guest.loop import READ, WRITE, Loop
from capsem.guest.servant import Servant
from capsem.wire.messages import STDIN, STDOUT, Forward, Forwarded

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from capsem.wire.streams import Mux

_PIECE = 32 * 1024


class Forwarder(Servant):
    """One connection. Raises Refused when nobody listens at the port."""

    def __init__(self, loop: Loop, mux: Mux, stream: int, request: Forward, finished: Callable[[int], None]) -> None:
        if not 0 < request.port < 65536:
            raise Refused("invalid_input", f"{request.port} is no TCP port")
        self._loop = loop
        self._mux = mux
        self._stream = stream
        self._finished = finished
        self._queue: list[memoryview] = []
        self._feed_ended = False
        self._open = True
        self._socket = _socket.socket(_socket.AF_INET, _socket.SOCK_STREAM)
        try:
            # To the same machine: it answers at once, whatever it answers.
            self._socket.connect(("127.0.0.1", request.port))
        except OSError as error:
            self._socket.close()
            if error.errno == errno.ECONNREFUSED:
                raise Refused("not_found", f"nobody listens at port {request.port} in the VM") from None
            raise
        self._socket.setblocking(False)
        self._fd = self._socket.fileno()
        self._watch()

    def _watch(self) -> None:
        events = (READ if self._mux.room(self._stream, STDOUT) else 0) | (WRITE if self._queue else 0)
        if self._open and events:
            self._loop.watch(self._fd, events, self._ready)
        else:
            self._loop.unwatch(self._fd)

    def _ready(self, events: int) -> None:
        try:
            if events & WRITE:
                self._push()
            if events & ~WRITE:  # also an error, which reading tells
                self._pull()
        except BlockingIOError:
            pass
        except OSError:  # reset: what it had to say is said
            self._end()
        self._watch()

    def _pull(self) -> None:
        room = self._mux.room(self._stream, STDOUT)
        if not room:
            return
        data = os.read(self._fd, min(room, _PIECE))
        if data:
            self._mux.send(self._stream, STDOUT, data)
        else:
            self._end()

    def _push(self) -> None:
        while self._queue:
            head = self._queue[0]
            size = os.write(self._fd, head)
            self._mux.consumed(self._stream, STDIN, size)
            if size < len(head):
                self._queue[0] = head[size:]
            else:
                self._queue.pop(0)
        if self._feed_ended:
            self._socket.shutdown(_socket.SHUT_WR)

    def feed(self, data: bytes | memoryview) -> None:
        """Bytes for the port."""
        if self._open:
            self._queue.append(memoryview(bytes(data)))
            self._watch()

    def feed_end(self) -> None:
        """No more of them."""
        self._feed_ended = True
        if self._open and not self._queue:
            try:
                self._socket.shutdown(_socket.SHUT_WR)
            except OSError:  # reset meanwhile: reading will tell
                pass

    def credit(self, channel: int) -> None:
        """The host takes more."""
        self._watch()

    def cancelled(self) -> None:
        """The host has hung up."""
        self._close()

    def _end(self) -> None:
        """Nothing more will come from the port."""
        if self._open:
            self._close()
            self._mux.end(self._stream, STDOUT)
            self._mux.close(self._stream, Forwarded())
            self._finished(self._stream)

    def _close(self) -> None:
        if self._open:
            self._open = False
            self._loop.unwatch(self._fd)
            self._socket.close()
