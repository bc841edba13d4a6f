"""The guest's name server: every question goes to the host, and its answer back to whoever asked, over UDP and TCP."""

from __future__ import annotations

import _socket
from functools import partial

from capsem.guest.loop import READ, WRITE, Loop
from capsem.guest.servant import Servant
from capsem.guest.system import accept
from capsem.wire.messages import Resolve, Resolved
from capsem.wire.schema import Message

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from capsem.guest.owner import Owners
    from capsem.guest.system import Bystander
    from capsem.wire.streams import Mux

MAX_PENDING = 128  # questions that wait for the host; more fail at once
_HEADER = 12
_LARGEST = 4096  # bytes of a question
_PER_TURN = 16
_MAX_CONNECTIONS = 32  # that ask over TCP
_IDLE = 10.0  # seconds until one that asks nothing is closed
_RESPONSE, _SERVER_FAILURE = 0x80, 2


def failure(query: bytes) -> bytes:
    """The answer that says that the server has failed: the question again, with that in its head."""
    return query[:2] + bytes((query[2] | _RESPONSE, query[3] & 0x70 | _SERVER_FAILURE)) + query[4:]


class _Question(Servant):
    """A question under way."""

    def __init__(self, questions: Questions, query: bytes, reply: Callable[[bytes], None]) -> None:
        self._questions = questions
        self._query = query
        self._reply = reply

    def closed(self, result: Message) -> None:
        """The host has answered."""
        answer = b""
        if isinstance(result, Resolved):
            try:
                answer = bytes.fromhex(result.answer)
            except ValueError:
                pass
        self._end(answer)

    def cancelled(self) -> None:
        """Nobody will answer."""
        self._end(b"")

    def _end(self, answer: bytes) -> None:
        self._questions.pending -= 1
        self._reply(answer or failure(self._query))


class Questions:
    """Serves a UDP socket and a TCP listener."""

    def __init__(
        self,
        loop: Loop,
        mux: Mux,
        udp: _socket.socket,
        tcp: _socket.socket,
        system: Bystander,
        opened: Callable[[int, Servant], None],
        owners: Owners,
    ) -> None:
        """`opened` is told of each stream, and what serves it."""
        self.pending = 0
        self._loop = loop
        self._mux = mux
        self._udp = udp
        self._tcp = tcp
        self._system = system
        self._opened = opened
        self._owners = owners
        self._connections: set[_Connection] = set()

    def accept(self, *, on: bool) -> None:
        """Take questions, or let them wait."""
        for sock, ready in ((self._udp, self._receive), (self._tcp, self._accept)):
            if on:
                self._loop.watch(sock.fileno(), READ, ready)
            else:
                self._loop.unwatch(sock.fileno())

    def close(self) -> None:
        """Serve nobody any more."""
        for sock in (self._udp, self._tcp):
            self._loop.unwatch(sock.fileno())
            sock.close()
        for connection in tuple(self._connections):
            connection.close()

    def ask(self, query: bytes, reply: Callable[[bytes], None], process: str | None = None) -> None:
        """Have a question of a program's answered, or failed; what is none is not answered at all."""
        if len(query) < _HEADER or query[2] & _RESPONSE:
            return
        if self.pending >= MAX_PENDING:
            reply(failure(query))
            return
        self.pending += 1
        self._opened(self._mux.open(Resolve(query=query.hex(), process=process)), _Question(self, query, reply))

    def _receive(self, _events: int) -> None:
        for _ in range(_PER_TURN):
            try:
                query, asker = self._udp.recvfrom(_LARGEST)
            except BlockingIOError:
                return
            except OSError:  # an earlier answer found nobody
                continue
            self.ask(query, partial(self._send, asker), self._owners.of_question(asker))

    def _send(self, asker: tuple[str, int], answer: bytes) -> None:
        try:
            self._udp.sendto(answer, asker)
        except OSError:  # closed meanwhile, or its buffer is full: like any answer that is lost on its way
            pass

    def _accept(self, _events: int) -> None:
        sock = accept(self._tcp)
        if sock is None:
            return
        if len(self._connections) >= _MAX_CONNECTIONS:
            sock.close()
            return
        address, port = self._system.destination(sock)
        process = self._owners.of_connection(sock, (address, port) if port else sock.getsockname())
        self._connections.add(_Connection(self._loop, self, sock, process, self._connections.discard))


class _Connection:
    """Someone who asks over TCP: questions and answers with their length before each."""

    def __init__(
        self,
        loop: Loop,
        questions: Questions,
        sock: _socket.socket,
        process: str | None,
        over: Callable[[_Connection], None],
    ) -> None:
        self._loop = loop
        self._questions = questions
        self._socket = sock
        self._process = process  # that asks
        self._over = over
        self._in = bytearray()
        self._out = bytearray()
        self._ended = False
        self._waiting = False  # for an answer; one at a time
        self._turning = False
        self._open = True
        self._idle = loop.after(_IDLE, self.close)
        self._watch()

    def _watch(self) -> None:
        # As much as was answered may be asked: the rest waits in the socket.
        reads = not self._ended and not self._waiting and not self._out
        events = (READ if reads else 0) | (WRITE if self._out else 0)
        if self._open and events:
            self._loop.watch(self._socket.fileno(), events, self._ready)
        elif self._open:
            self._loop.unwatch(self._socket.fileno())

    def _ready(self, events: int) -> None:
        try:
            if events & WRITE:
                del self._out[: self._socket.send(self._out)]
            elif not (data := self._socket.recv(_LARGEST)):
                self._ended = True
            else:
                self._in += data
        except BlockingIOError:
            pass
        except OSError:
            self.close()
            return
        self._turn()

    def _turn(self) -> None:
        """Ask what has come, one question after the other; an answer may come at once."""
        if self._turning:
            return
        self._turning = True
        while self._open and not self._waiting and (query := self._next()) is not None:
            if len(query) < _HEADER or query[2] & _RESPONSE:
                self.close()
                break
            self._waiting = True
            self._questions.ask(query, self._answered, self._process)
        self._turning = False
        if self._ended and not self._waiting and not self._out:
            self.close()
        self._watch()

    def _next(self) -> bytes | None:
        size = int.from_bytes(self._in[:2], "big")
        if len(self._in) < 2 + size or len(self._in) < 2:
            return None
        query = bytes(self._in[2 : 2 + size])
        del self._in[: 2 + size]
        return query

    def _answered(self, answer: bytes) -> None:
        self._waiting = False
        if self._open:
            self._out += len(answer).to_bytes(2, "big") + answer
            self._idle.cancel()
            self._idle = self._loop.after(_IDLE, self.close)
            self._turn()

    def close(self) -> None:
        """Hang up."""
        if self._open:
            self._open = False
            self._idle.cancel()
            self._loop.unwatch(self._socket.fileno())
            self._socket.close()
            self._over(self)
