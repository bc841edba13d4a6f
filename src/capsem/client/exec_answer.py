"""What the service says on an exec or forward stream, without any I/O: the one reader of it for every client of ours."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from capsem.api import stream
from capsem.client import request
from capsem.client.http import Answer
from capsem.model.errors import Interrupted, from_dict


class BrokenOff(Interrupted):
    """The service went away in the middle of a stream; what it followed may well go on."""


class ExecAnswer:
    """`answer` takes the bytes of the connection, `take` those that it gives of its body, `outcome` tells the end.

    Who sends input begins with credit for stream.WINDOW bytes, and gets more by `new_credit`.
    """

    def __init__(self) -> None:
        self.answer = Answer()
        self.ended: dict[str, Any] | None = None  # an ExecResult or ForwardResult, once it is there
        self._decoder = stream.Decoder()
        self._refusal = bytearray()
        self._credit = 0

    def take(self, body: bytes) -> Iterator[tuple[int, bytes]]:
        """Bytes of the answer's body; yields the output in them as (STDOUT or STDERR, bytes), empty where it only says that
        the command has begun. To be iterated to its end. Raises the CapsemError that ended the command, after the
        output before it.
        """
        if self.answer.status != 200:
            self._refusal += body
            return
        for channel, payload in self._decoder.feed(body):
            if channel in (stream.STDOUT, stream.STDERR):
                yield channel, payload
            elif channel == stream.CREDIT:
                self._credit += stream.decode_credit(payload)
            elif channel == stream.RESULT:
                self.ended = request.decode_object(payload)
            elif channel == stream.ERROR:
                raise from_dict(request.decode_object(payload))

    def new_credit(self) -> int:
        """How many bytes more may be sent than when this was last asked."""
        size, self._credit = self._credit, 0
        return size

    def outcome(self) -> dict[str, Any]:
        """How it ended, once the answer is done. Raises what the service refused it with, or BrokenOff."""
        if self.answer.status != 200:
            raise request.decode_error(self.answer.status, self.answer.headers, bytes(self._refusal))
        if self.ended is None:
            raise BrokenOff("the service broke off before it said how the command ended")
        return self.ended
