"""Logs that a guest or a process may fill without bound: one capped writer, one reader."""

from __future__ import annotations

import os
from pathlib import Path

CAP = 4 * 1024 * 1024  # bytes of a log, and of the one before it


class CappedLog:
    """Appends bytes to a file (mode 0600); at the cap, the file becomes `<name>.1` and a new one is begun."""

    def __init__(self, path: Path, cap: int = CAP) -> None:
        self.path = path
        self._cap = cap
        self._fd = -1
        self._size = 0
        self._open()

    def _open(self) -> None:
        self._fd = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        self._size = os.fstat(self._fd).st_size

    def write(self, data: bytes) -> None:
        """Append. Raises OSError (disk full)."""
        if self._size + len(data) > self._cap and self._size:
            os.close(self._fd)
            os.rename(self.path, previous(self.path))
            self._open()
        self._size += os.write(self._fd, data)

    def close(self) -> None:
        """Close the file; calling again is no error."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def previous(path: Path) -> Path:
    """Where a capped log's older part is."""
    return path.with_name(f"{path.name}.1")


def read_tail(path: Path, size: int) -> str:
    """The last `size` bytes of a capped log, both parts taken together, from a line's beginning; "" if there is none."""
    data = b""
    for part in (path, previous(path)):
        if len(data) <= size:
            try:
                with part.open("rb") as file:
                    file.seek(max(0, file.seek(0, os.SEEK_END) - size - 1 + len(data)))
                    data = file.read(size + 1) + data
            except FileNotFoundError:
                continue
    if len(data) > size:
        data = data[-size:]
        data = data[data.find(b"\n") + 1 :]
    return data.decode("utf-8", "replace")


def last_lines(path: Path, count: int) -> str:
    """The last lines of a log."""
    return "\n".join(read_tail(path, 64 * 1024).splitlines()[-count:])
