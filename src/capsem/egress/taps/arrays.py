"""The elements of a JSON array, one by one as it comes in: how Gemini streams unless it is asked for events.

Sans-IO, total, bounded. What stands between the elements is not checked: whoever decodes one finds out what it is.
"""

from __future__ import annotations

import re
from typing import Final

LIMIT: Final = 2 * 1024 * 1024  # bytes of one element
_MARK: Final = re.compile(rb'["\\{}\[\]]')
_IN_STRING: Final = re.compile(rb'["\\]')


class Elements:
    """Bytes in, every element of the outermost array that is an object out."""

    def __init__(self, limit: int = LIMIT) -> None:
        self._limit = limit
        self._depth = 0  # of brackets
        self._string = False
        self._escaped = False
        self._pieces: list[bytes] = []  # of the element that has not ended
        self._size = 0
        self._skipping = False
        self.dropped = 0  # elements that were too long

    @property
    def held(self) -> int:
        """Bytes that are kept for what is to come."""
        return self._size

    def feed(self, chunk: bytes) -> list[bytes]:
        """Every element that these bytes complete."""
        elements: list[bytes] = []
        start = place = 0  # of what belongs to the element; of what is looked at next
        if self._escaped and chunk:
            self._escaped, place = False, 1
        while mark := (_IN_STRING if self._string else _MARK).search(chunk, place):
            place, what = mark.end(), mark.group()
            if what == b"\\":
                if place == len(chunk):
                    self._escaped = True
                place += 1
            elif what == b'"':
                self._string = not self._string
            elif what in b"{[":
                self._depth += 1
                if self._depth == 2:
                    start = mark.start()
            elif self._depth:
                self._depth -= 1
                if self._depth == 1:
                    self._keep(chunk[start:place])
                    if self._pieces:
                        elements.append(b"".join(self._pieces))
                    self._pieces, self._size, self._skipping = [], 0, False
        if self._depth >= 2:
            self._keep(chunk[start:])
        return elements

    def _keep(self, piece: bytes) -> None:
        self._size += len(piece)
        if self._size > self._limit and not self._skipping:
            self._skipping = True
            self.dropped += 1
        if self._skipping:
            self._pieces, self._size = [], 0
        else:
            self._pieces.append(piece)

    def end(self) -> list[bytes]:
        """Nothing more comes; what is not whole is nothing."""
        return []
