"""Server-sent events of the service, as they come."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

from capsem.client import request
from capsem.client.exec_answer import BrokenOff
from capsem.client.http import Answer
from capsem.client.sync import Client, receive


class Decoder:
    """Makes events of the bytes of such a stream, however they are cut. Comments are passed over."""

    def __init__(self) -> None:
        self._text = b""

    def feed(self, data: bytes) -> list[tuple[str, dict[str, Any]]]:
        """The events that are whole by now: their names, and their data, JSON objects. Raises Interrupted."""
        *whole, self._text = (self._text + data).split(b"\n\n")
        return [event for block in whole if (event := _event(block)) is not None]


def _event(block: bytes) -> tuple[str, dict[str, Any]] | None:
    fields = dict(line.split(b": ", 1) for line in block.split(b"\n") if b": " in line and not line.startswith(b":"))
    if b"data" not in fields:
        return None
    return fields.get(b"event", b"message").decode(), request.decode_object(fields[b"data"])


def follow(client: Client, operation: str, query: Mapping[str, str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The events of an operation until the service ends them, which raises BrokenOff. Closing it hangs up. Blocks.

    Raises the CapsemError that the service answers with, Unavailable.
    """
    row = request.operation(operation)
    answer, decoder, refusal = Answer(), Decoder(), b""
    with client.connect() as connection:
        connection.settimeout(None)
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            connection.sendall(request.encode_request(row, None, None, query))
        while not answer.done:
            data = receive(connection, answer, None)
            if answer.status == 200:
                yield from decoder.feed(data)
            else:
                refusal += data
    if answer.status != 200:
        raise request.decode_error(answer.status, answer.headers, refusal)
    raise BrokenOff("the service has hung up", hint="try again when it is back")
