"""What one output of a command has written and the host has not confirmed, by absolute offset."""

from __future__ import annotations

LIMIT = 10 * 1024 * 1024  # bytes of one output that are kept while nobody takes them; the oldest go


class Kept:
    """The newest bytes of an output."""

    __slots__ = ("_data", "start")

    def __init__(self) -> None:
        self._data = bytearray()
        self.start = 0  # offset of the first byte still kept

    @property
    def end(self) -> int:
        """Offset after the last byte: how much was written."""
        return self.start + len(self._data)

    def __len__(self) -> int:
        return len(self._data)

    def append(self, data: bytes) -> None:
        """More was written."""
        self._data += data

    def drop(self, offset: int) -> None:
        """What is before `offset` is not needed any more."""
        size = min(offset - self.start, len(self._data))
        if size > 0:
            del self._data[:size]
            self.start += size

    def read(self, offset: int, size: int) -> bytes:
        """Up to `size` bytes from `offset` on, which is still kept."""
        at = offset - self.start
        return bytes(self._data[at : at + size])
