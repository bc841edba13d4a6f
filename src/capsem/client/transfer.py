"""Whole files over the files API, of any size, in constant memory."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final

from capsem.api.operation import Operation
from capsem.client import request
from capsem.client.http import Answer, encode_head
from capsem.client.sync import Client, receive
from capsem.model.errors import CapsemError, Interrupted, TimedOut

_PIECE: Final = 1024 * 1024


class Limit:
    """Hangs up a connection when its time is over, wherever a thread waits for it then; `cancel` it."""

    def __init__(self, connection: socket.socket, seconds: float | None) -> None:
        """None: there is no limit."""
        self._connection = connection
        self._seconds = seconds
        self._over = False
        self._timer: threading.Timer | None = None
        if seconds is not None:
            self._timer = threading.Timer(seconds, self._end)
            self._timer.daemon = True
            self._timer.start()

    def _end(self) -> None:
        self._over = True
        with contextlib.suppress(OSError):  # it is closed already
            self._connection.shutdown(socket.SHUT_RDWR)

    @contextlib.contextmanager
    def told(self) -> Iterator[None]:
        """What breaks off inside because the time is over raises TimedOut."""
        try:
            yield
        except (CapsemError, OSError) as error:
            if not self._over:
                raise
            late: CapsemError = TimedOut(
                f"the copy was not done within {self._seconds:g} s", hint="what was there before is as it was"
            )
            raise late from error

    def cancel(self) -> None:
        """It was in time."""
        if self._timer is not None:
            self._timer.cancel()


class Incoming:
    """The bytes with which an operation answers, as they come."""

    def __init__(
        self, client: Client, operation: str, vm_id: str, query: Mapping[str, str], timeout: float | None = None
    ) -> None:
        """Ask for it; close it. Raises the CapsemError that the service answers with, and what `Client.call` does;
        TimedOut, from here or from iterating, when not all has come within `timeout` seconds.
        """
        row = request.operation(operation)
        self._answer = Answer()
        self._first = b""
        self._connection = client.connect()
        self._limit = Limit(self._connection, timeout)
        try:
            with self._limit.told():
                self._connection.settimeout(None)
                self._connection.sendall(_head(row, vm_id, query, {}))
                while not self._answer.status:
                    self._first += receive(self._connection, self._answer, None)
            if self._answer.status != 200:
                raise request.decode_error(self._answer.status, self._answer.headers, b"".join(self))
        except BaseException:
            self.close()
            raise

    def __iter__(self) -> Iterator[bytes]:
        """The bytes. Raises Interrupted when they end too early."""
        if self._first:
            yield self._first
        while not self._answer.done:
            with self._limit.told():
                data = receive(self._connection, self._answer, None)
            if data:
                yield data

    def close(self) -> None:
        """Hang up, or let go of what is done."""
        self._limit.cancel()
        self._connection.close()


class Download(Incoming):
    """A file of a VM's workspace, whether that runs or not; `size` and `mode` are None where they are not known."""

    def __init__(self, client: Client, vm_id: str, path: str, timeout: float | None = None) -> None:
        """See Incoming."""
        super().__init__(client, "get_file", vm_id, {"path": path, "whole": "1", "exact": "1"}, timeout)
        length, mode = self._answer.headers.get("content-length", ""), self._answer.headers.get("x-capsem-mode", "")
        self.size = int(length) if length.isdecimal() else None
        self.mode = int(mode, 8) & 0o777 if mode.isdecimal() and not set(mode) & set("89") else None


def upload(
    client: Client,
    vm_id: str,
    path: str,
    fd: int,
    size: int,
    mode: int,
    sent: Callable[[int], None] = lambda _n: None,
    timeout: float | None = None,
) -> None:
    """Write a file of a running VM's workspace from the first `size` bytes of the local file `fd`; durable on return.

    `sent` is told how many bytes more have gone. Raises the CapsemError that the service answers with; Interrupted
    when the local file is shorter; TimedOut after `timeout` seconds: an old file in the VM stays.
    """
    query = {"path": path, "mode": f"{mode & 0o777:03o}", "exact": "1"}
    send_file(client, "put_file", vm_id, query, fd, size, sent, timeout)


def send_file(
    client: Client,
    operation: str,
    vm_id: str | None,
    query: Mapping[str, str],
    fd: int,
    size: int,
    sent: Callable[[int], None] = lambda _n: None,
    timeout: float | None = None,
) -> dict[str, Any]:
    """Do an operation whose body is the first `size` bytes of a file; returns its answer. Raises as `upload` does."""
    head = _head(request.operation(operation), vm_id, query, {"Content-Length": str(size)})
    with client.connect() as connection:
        connection.settimeout(None)
        limit = Limit(connection, timeout)
        answer, parts = Answer(), []
        try:
            with limit.told():
                # A service that refuses answers and closes before it has read everything: the answer is there.
                with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                    connection.sendall(head)
                    _send(connection, fd, size, sent)
                while not answer.done:
                    parts.append(receive(connection, answer, None))
        finally:
            limit.cancel()
    return request.decode_answer(answer.status, answer.headers, b"".join(parts))


def _send(connection: socket.socket, fd: int, size: int, sent: Callable[[int], None]) -> None:
    at = 0
    while at < size:
        step = os.sendfile(connection.fileno(), fd, at, min(size - at, _PIECE))
        if not step:
            raise Interrupted("the file became shorter while it was sent", hint="copy it again")
        at += step
        sent(step)


def _head(row: Operation, vm_id: str | None, query: Mapping[str, str], headers: Mapping[str, str]) -> bytes:
    return encode_head(row.method, request.path_of(row, vm_id, query), headers)
