"""The blocking client: one connection to the service's Unix socket for each call."""

from __future__ import annotations

import contextlib
import os
import select
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from types import TracebackType
from typing import Any, Final, Protocol

from capsem import tracing
from capsem.api import stream
from capsem.client import request
from capsem.client.exec_answer import BrokenOff, ExecAnswer
from capsem.client.http import Answer, BadAnswer, encode_chunk
from capsem.model.errors import CapsemError, TimedOut, Unavailable

_RECEIVE: Final = 256 * 1024
_LONGEST_ADDRESS: Final = 107  # bytes that fit a sockaddr_un
_CONNECT_WITHIN: Final = 5.0  # seconds
# A signal that comes just before a blocking call does not interrupt it: Python's handler would wait as long as that
# does. So nothing here blocks for longer than this many seconds at a time.
_TURN: Final = 0.5


class Input(Protocol):
    """Where standard input is read from, such as an unbuffered binary file."""

    def read(self, size: int, /) -> bytes:
        """What is there, up to `size` bytes; blocks until there is something; b"" at the end."""


class Client:
    """Calls the operations of `api.operations` at the socket `uds_path`.

    `start` is called once when nobody listens there, to bring the service up; it returns when that listens, or raises.
    `timeout`, in seconds, takes the place of the limits in the table. A client may be used from several threads.
    """

    def __init__(
        self, uds_path: str | os.PathLike[str], *, timeout: float | None = None, start: Callable[[], None] | None = None
    ) -> None:
        self.uds_path = os.fspath(uds_path)
        self._timeout = timeout
        self._start = start

    def call(
        self,
        operation_name: str,
        *,
        vm_id: str | None = None,
        body: Mapping[str, Any] | None = None,
        query: Mapping[str, str] | None = None,
    ) -> dict[str, Any]:
        """Do an operation and return its answer, an object. `vm_id` is what the path wants: an id, or a name. Blocks.

        Raises the CapsemError that the service answers with; Unavailable when there is no service, TimedOut when it
        does not answer in time, Interrupted when it goes away in the middle.
        """
        return request.decode_object(self.fetch(operation_name, vm_id=vm_id, body=body, query=query))

    def fetch(
        self,
        operation_name: str,
        *,
        vm_id: str | None = None,
        body: Mapping[str, Any] | None = None,
        query: Mapping[str, str] | None = None,
    ) -> bytes:
        """As `call`, for an answer that is text or a JSON array: its bytes."""
        row = request.operation(operation_name)
        data = request.encode_request(row, vm_id, body, query, _trace())
        timeout = self._timeout if self._timeout is not None else row.answer_within
        with tracing.span(operation_name), self.connect() as connection:
            connection.settimeout(timeout)
            answer, parts = Answer(), []
            # A service that refuses a large body answers and closes before it has read it: the answer is there.
            with contextlib.suppress(BrokenPipeError, ConnectionResetError), _said(timeout):
                connection.sendall(data)
            while not answer.done:
                with _said(timeout):
                    parts.append(receive(connection, answer, timeout))
        content = b"".join(parts)
        if not 200 <= answer.status < 300:
            raise request.decode_error(answer.status, answer.headers, content)
        return content

    def stream(
        self, vm_id: str, body: Mapping[str, Any], stdin: Input | None = None, *, operation: str = "exec_stream"
    ) -> ExecStream:
        """Run a command; iterate over the result for its output. `body` is an ExecRequest. Raises as `call` does, but
        an error of the service comes when iterating. With the `operation` forward, `body` is a ForwardRequest, and a
        connection takes the command's place.
        """
        row = request.operation(operation)
        connection = self.connect()
        connection.settimeout(None)
        head = request.encode_stream_head(row, vm_id, _trace())
        return ExecStream(connection, head, request.encode_body(body), stdin)

    def connect(self) -> socket.socket:
        """A connection for one request. Raises Unavailable."""
        try:
            return _connect(self.uds_path)
        except (FileNotFoundError, ConnectionRefusedError) as exc:
            if self._start is None:
                raise self._unreachable(exc) from exc
        except OSError as exc:
            raise self._unreachable(exc) from exc
        with tracing.span("start the service"):
            self._start()
        try:
            return _connect(self.uds_path)
        except OSError as exc:
            raise self._unreachable(exc) from exc

    def _unreachable(self, exc: OSError) -> Unavailable:
        reason = exc.strerror or str(exc)
        hint = "is capsem-service running?"
        if isinstance(exc, PermissionError):
            hint = "it is another user's; CAPSEM_HOME or CAPSEM_RUN_DIR names a directory of your own"
        return Unavailable(f"cannot connect to the service at {self.uds_path}: {reason}", hint=hint)


class ExecStream:
    """A running command. Iterating yields (channel, bytes), STDOUT or STDERR, as they come; then `result` is there.

    The first piece is usually empty, and says that the command has begun.

    Leaving it (`with`) before the end hangs up, which ends the command. Standard input is sent by a thread of its own,
    at most WINDOW bytes ahead of the command.
    """

    def __init__(self, connection: socket.socket, head: bytes, body: bytes, stdin: Input | None) -> None:
        self.result: dict[str, Any] = {}
        self._work = tracing.span("stream")
        self._work.__enter__()
        self._connection = connection
        self._heard = ExecAnswer()
        self._credit = _Credit()
        first = head + encode_chunk(stream.encode(stream.REQUEST, body))
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            connection.sendall(first if stdin is not None else first + encode_chunk(b""))
        if stdin is not None:
            # A daemon: nothing can wake a thread that reads from a terminal.
            threading.Thread(target=self._send_input, args=(stdin,), name="stdin", daemon=True).start()

    def __enter__(self) -> ExecStream:
        return self

    def __exit__(
        self, _kind: type[BaseException] | None, _error: BaseException | None, _traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Hang up; a command that still runs is ended."""
        self.hang_up()
        self._connection.close()
        self._work.__exit__(None)

    def hang_up(self) -> None:
        """End a command that still runs; whoever iterates, in another thread, gets Interrupted."""
        self._credit.end()
        with contextlib.suppress(OSError):
            self._connection.shutdown(socket.SHUT_RDWR)  # a thread that is sending notices this, not a close

    def __iter__(self) -> Iterator[tuple[int, bytes]]:
        """Yields output until the command has ended. Raises the CapsemError that ended it, or BrokenOff."""
        answer = self._heard.answer
        while not answer.done:
            for piece in self._heard.take(receive(self._connection, answer, None)):
                self._credit.add(self._heard.new_credit())
                yield piece
            self._credit.add(self._heard.new_credit())
        self._credit.end()
        self.result = self._heard.outcome()

    def _send_input(self, stdin: Input) -> None:
        with contextlib.suppress(OSError, ValueError):  # the command ended, or the input was closed
            while self._credit.take(stream.CHUNK):
                data = stdin.read(stream.CHUNK)
                self._credit.add(stream.CHUNK - len(data))
                if not data:
                    break
                self._connection.sendall(encode_chunk(stream.encode(stream.STDIN, data)))
            self._connection.sendall(encode_chunk(stream.encode(stream.STDIN)) + encode_chunk(b""))


class _Credit:
    """How much input may still be sent."""

    def __init__(self) -> None:
        self._left = stream.WINDOW
        self._ended = False
        self._changed = threading.Condition()

    def take(self, size: int) -> bool:
        """Wait for, and use, `size` bytes of credit; False when the stream has ended."""
        with self._changed:
            self._changed.wait_for(lambda: self._ended or self._left >= size)
            self._left -= size
            return not self._ended

    def add(self, size: int) -> None:
        """Give credit back."""
        with self._changed:
            self._left += size
            self._changed.notify_all()

    def end(self) -> None:
        """Nothing more is to be sent."""
        with self._changed:
            self._ended = True
            self._changed.notify_all()


def _trace() -> dict[str, str]:
    """The header that makes a request part of the trace of which this process's is one."""
    trace = tracing.active()
    return {} if trace is None else {tracing.HEADER: trace.name}


def _connect(path: str) -> socket.socket:
    """A connection to a Unix socket, by whatever path. Raises OSError."""
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        connection.settimeout(_CONNECT_WITHIN)
        address = os.fsencode(path)
        if len(address) <= _LONGEST_ADDRESS:
            connection.connect(address)
        else:
            # Too long for an address, but not for the kernel: reach it from its directory.
            directory, name = os.path.split(path)
            fd = os.open(directory, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                connection.connect(f"/proc/self/fd/{fd}/{name}")
            finally:
                os.close(fd)
    except BaseException:
        connection.close()
        raise
    return connection


def receive(connection: socket.socket, answer: Answer, timeout: float | None) -> bytes:
    """Wait for bytes and return those of the answer's body. Raises Interrupted, and TimeoutError after `timeout` seconds."""
    poll = select.poll()
    poll.register(connection, select.POLLIN)
    deadline = None if timeout is None else time.monotonic() + timeout
    while not poll.poll(1000 * (_TURN if deadline is None else max(0.0, min(_TURN, deadline - time.monotonic())))):
        if deadline is not None and time.monotonic() >= deadline:
            raise TimeoutError
    try:
        data = connection.recv(_RECEIVE)
        if data:
            return answer.feed(data)
        answer.eof()
    except (BadAnswer, ConnectionError) as exc:
        raise BrokenOff(
            f"the service went away, or broke its answer off: {exc}", hint="`capsem list` shows whether the VM runs"
        ) from exc
    return b""


@contextlib.contextmanager
def _said(timeout: float | None) -> Iterator[None]:
    """Says it in our words when the service does not answer."""
    try:
        yield
    except TimeoutError as exc:
        hint = "it may be done all the same: capsem list shows how things stand"
        error: CapsemError = TimedOut(f"the service did not answer within {timeout:g} s", hint=hint)
        raise error from exc
