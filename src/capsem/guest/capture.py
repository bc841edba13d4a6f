"""Connections of programs in the guest, and their questions for addresses, on their way to the host.

The guest's packet filter (image/guestfs/network.nft) redirects every connection to ports of ours. It is a convenience for
programs, not what keeps them in: there is no network card, and what comes to the host is judged there. So nothing that is
said here about a connection is more than a label.
"""

from __future__ import annotations

import _socket
from functools import partial

from capsem.guest.loop import READ, Loop
from capsem.guest.owner import Owners
from capsem.guest.questions import Questions
from capsem.guest.relay import Relay
from capsem.guest.system import accept
from capsem.wire.messages import STDOUT, Egress

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from capsem.guest.servant import Servant
    from capsem.guest.system import Bystander
    from capsem.wire.streams import Mux

MAX_CONNECTIONS = 512  # at once; more wait to be accepted
MAX_BACKLOG = 1024 * 1024  # bytes that wait for the host, of all connections together: then programs wait
PROXY_PORT = 3128  # where a program asks for the proxy by itself
_LOCAL = "127.0.0.1"


class Capture:
    """Carries connections while it is open; closed, they are refused."""

    def __init__(
        self,
        loop: Loop,
        mux: Mux,
        system: Bystander,
        opened: Callable[[int, Servant], None],
        left: Callable[[int], None],
    ) -> None:
        """`opened` is told of each stream and what serves it, `left` when that is no more."""
        self._loop = loop
        self._mux = mux
        self._system = system
        self._opened = opened
        self._left = left
        self._listeners: list[tuple[_socket.socket, Callable[[int], None]]] = []  # and what takes who connects
        self._owners = Owners()
        self._questions: Questions | None = None
        self._admits = False  # the epoch's handshake is done
        self._relays: set[Relay] = set()
        self._held_back: set[Relay] = set()  # they wait for the backlog to shrink

    def set_open(self, on: bool) -> None:
        """Carry connections from here on; or end those there are, and refuse others."""
        self._admits = True
        if on and not self._listeners:
            transparent, proxy, udp, tcp = self._system.listen()
            self._listeners = [
                *((each, partial(self._accept_redirected, each)) for each in transparent),
                (proxy, partial(self._accept_explicit, proxy)),
            ]
            self._questions = Questions(self._loop, self._mux, udp, tcp, self._system, self._opened, self._owners)
        elif not on and self._listeners:
            for listener, _ in self._listeners:
                self._loop.unwatch(listener.fileno())
                listener.close()
            self._listeners.clear()
            assert self._questions is not None
            self._questions.close()
            self._questions = None
            for relay in tuple(self._relays):
                self._mux.reset(relay.stream)
                relay.abort()
        self._watch()

    def abandon(self) -> int:
        """The streams are gone with their epoch: every connection is reset, and new ones wait for `set_open`. Returns how
        many there were."""
        self._admits = False
        self._watch()
        count = len(self._relays)
        for relay in tuple(self._relays):
            relay.abort()
        return count

    # -- for relays

    def may_read(self, relay: Relay) -> int:
        """How many bytes it may read for the host now; if it is the others that have queued too much, it is told later."""
        if self._mux.backlog >= MAX_BACKLOG:
            self._held_back.add(relay)
            return 0
        return self._mux.room(relay.stream, STDOUT)

    def over(self, relay: Relay) -> None:
        """It is closed."""
        self._left(relay.stream)
        self._relays.discard(relay)
        self._held_back.discard(relay)
        if len(self._relays) == MAX_CONNECTIONS - 1:
            self._watch()

    def turn(self) -> None:
        """What is queued for the host has gone out as far as it takes it."""
        if self._held_back and self._mux.backlog < MAX_BACKLOG // 2:
            held_back, self._held_back = self._held_back, set()
            for relay in held_back:
                relay.go_on()

    # -- programs connect

    def _watch(self) -> None:
        if self._questions is not None:
            self._questions.accept(on=self._admits)
        for listener, ready in self._listeners:
            if self._admits and len(self._relays) < MAX_CONNECTIONS:
                self._loop.watch(listener.fileno(), READ, ready)
            else:
                self._loop.unwatch(listener.fileno())

    def _accept_redirected(self, listener: _socket.socket, _events: int = 0) -> None:
        while (sock := self._next(listener)) is not None:
            address, port = self._system.destination(sock)
            if port:
                process = self._owners.of_connection(sock, (address, port))
                self._carry(sock, Egress(address=address, port=port, process=process))
            else:
                sock.close()  # nobody redirected it: somebody has called us by our own port

    def _accept_explicit(self, listener: _socket.socket, _events: int = 0) -> None:
        while (sock := self._next(listener)) is not None:
            process = self._owners.of_connection(sock, sock.getsockname())
            self._carry(sock, Egress(address=_LOCAL, port=PROXY_PORT, explicit=True, process=process))

    def _next(self, listener: _socket.socket) -> _socket.socket | None:
        if len(self._relays) >= MAX_CONNECTIONS:
            self._watch()
            return None
        return accept(listener)

    def _carry(self, sock: _socket.socket, request: Egress) -> None:
        stream = self._mux.open(request)
        relay = Relay(self._loop, self._mux, self, stream, sock)
        self._relays.add(relay)
        self._opened(stream, relay)
