"""Server-sent events (the event stream of the HTML standard), as far as data is concerned. Sans-IO, total, bounded."""

from __future__ import annotations

from typing import Final

LIMIT: Final = 2 * 1024 * 1024  # bytes of one event
_BOM: Final = b"\xef\xbb\xbf"


class Events:
    """Bytes in, the data of each event out."""

    def __init__(self, limit: int = LIMIT) -> None:
        self._limit = limit
        self._line: list[bytes] = []  # of the line that has not ended
        self._data: list[bytes] = []  # lines of the event that has not ended
        self._size = 0  # of both
        self._skipping = False  # what is left of an event that is too long
        self._after_cr = False  # a line feed would belong to the carriage return before it
        self._begun = False
        self.dropped = 0  # events that were too long

    @property
    def held(self) -> int:
        """Bytes that are kept for what is to come."""
        return self._size

    def feed(self, chunk: bytes) -> list[bytes]:
        """The data of every event that these bytes complete."""
        if self._after_cr and chunk:
            self._after_cr = False
            chunk = chunk.removeprefix(b"\n")
        events: list[bytes] = []
        lines = chunk.splitlines(keepends=True)
        for line in lines:
            ended = line.endswith((b"\n", b"\r"))
            self._take(line)
            if ended:
                self._end_line(events)
        self._after_cr = chunk.endswith(b"\r")
        return events

    def _take(self, piece: bytes) -> None:
        self._size += len(piece)
        if self._size > self._limit:
            if not self._skipping:
                self.dropped += 1
            self._skipping = True
            # Whether the line is empty is all that matters of it from here on.
            self._data, self._line, self._size = [], [b"x"], 0
        else:
            self._line.append(piece)

    def _end_line(self, events: list[bytes]) -> None:
        line = b"".join(self._line).rstrip(b"\r\n")
        self._line = []
        if not self._begun:
            self._begun, line = True, line.removeprefix(_BOM)
        if not line:
            if self._data and not self._skipping:
                events.append(b"\n".join(self._data))
            self._data, self._size, self._skipping = [], 0, False
        elif line.startswith(b"data:") and not self._skipping:
            self._data.append(line[5:].removeprefix(b" "))
        elif line == b"data" and not self._skipping:
            self._data.append(b"")
        else:
            self._size -= min(self._size, len(line) + 1)  # a comment or another field is not kept

    def end(self) -> list[bytes]:
        """Nothing more comes. An event that lacks its empty line is taken for whole: not every server writes the last one."""
        events: list[bytes] = []
        if self._line:
            self._end_line(events)
        if self._data:
            self._end_line(events)
        return events
