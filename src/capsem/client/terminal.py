"""A terminal here joined to one in a VM: what is typed goes there, what is shown there comes here."""

from __future__ import annotations

import os
import select
from collections.abc import Mapping
from typing import Any, Final, Protocol

from capsem.api import stream
from capsem.client import request
from capsem.client.exec_answer import BrokenOff, ExecAnswer
from capsem.client.http import BadAnswer, encode_chunk
from capsem.client.sync import Client

_PIECE: Final = 4096
_RECEIVE: Final = 64 * 1024


class Console(Protocol):
    """The terminal here. `keys` is a descriptor to read what is typed, `resized` one that is readable when the size has
    changed."""

    keys: int
    resized: int

    def size(self) -> tuple[int, int]:
        """Rows and columns now; nothing is left to read on `resized`."""

    def show(self, data: bytes) -> None:
        """Show it, as it is."""


class Escape:
    """Looks, in what is typed, for `~.` at the beginning of a line, as ssh does: the wish to leave. `~~` there is one `~`."""

    def __init__(self) -> None:
        self._fresh = True  # at the beginning of a line
        self._tilde = False  # that was typed and not sent

    def feed(self, data: bytes) -> tuple[bytes, bool]:
        """What is to be sent of it, and whether to leave then."""
        out = bytearray()
        for byte in data:
            if self._tilde:
                self._tilde = False
                if byte == ord("."):
                    return bytes(out), True
                if byte != ord("~"):
                    out += b"~"
            elif byte == ord("~") and self._fresh:
                self._tilde = True
                continue
            out.append(byte)
            self._fresh = byte in b"\r\n"
        return bytes(out), False


class Joined:
    """One stream; `seen` counts the bytes that were shown, through all streams of a command."""

    def __init__(self, client: Client, console: Console, escape: Escape, seen: int = 0) -> None:
        self.seen = seen
        self._client = client
        self._console = console
        self._escape = escape

    def run(self, vm_id: str, body: Mapping[str, Any], typed: bytes = b"") -> dict[str, Any] | None:
        """Go on until the command has ended (an ExecResult), or its user wants to leave (None). `body` is an ExecRequest;
        `typed`, at most a WINDOW, was typed before.

        Raises the CapsemError that the service answers with, BrokenOff when it goes away.
        """
        head = request.encode_stream_head(request.operation("exec_stream"), vm_id)
        first = stream.encode(stream.REQUEST, request.encode_body(body))
        heard, credit = ExecAnswer(), stream.WINDOW
        answer = heard.answer
        leaving = False
        with self._client.connect() as connection:
            connection.settimeout(None)
            connection.sendall(head + encode_chunk(first))
            if typed:
                connection.sendall(encode_chunk(stream.encode(stream.STDIN, typed)))
                credit -= len(typed)
            poll = select.poll()
            poll.register(connection, select.POLLIN)
            poll.register(self._console.resized, select.POLLIN)
            # Who leaves does so when the last key before that has arrived.
            while not leaving or credit < stream.WINDOW:
                if credit > 0 and not leaving:
                    poll.register(self._console.keys, select.POLLIN)
                ready = {fd for fd, _ in poll.poll()}
                if self._console.resized in ready:
                    connection.sendall(encode_chunk(stream.encode_resize(*self._console.size())))
                if self._console.keys in ready:
                    keys = os.read(self._console.keys, min(_PIECE, credit))
                    wanted, leaving = self._escape.feed(keys)
                    leaving = leaving or not keys  # the terminal here is gone
                    if wanted:
                        connection.sendall(encode_chunk(stream.encode(stream.STDIN, wanted)))
                        credit -= len(wanted)
                    if credit <= 0 or leaving:
                        poll.unregister(self._console.keys)
                if connection.fileno() not in ready:
                    continue
                try:
                    data = connection.recv(_RECEIVE)
                    came = answer.feed(data) if data else b""
                    if not data:
                        answer.eof()
                except (BadAnswer, ConnectionError) as error:
                    raise BrokenOff(f"the service went away: {error}") from error
                for _, shown in heard.take(came):
                    self._console.show(shown)
                    self.seen += len(shown)
                credit += heard.new_credit()
                if heard.ended is not None or answer.done:
                    return heard.outcome()
        return None
