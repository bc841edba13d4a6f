"""A program on a terminal of its own, and somebody who types and reads there."""

from __future__ import annotations

import fcntl
import os
import pty
import select
import struct
import subprocess
import termios
import time
from collections.abc import Sequence
from types import TracebackType

LIMIT = 60.0  # seconds: ends what hangs


class RealTerminal:
    """Runs `command` on a new terminal, which controls its session."""

    def __init__(
        self, command: Sequence[str | os.PathLike[str]], env: dict[str, str], size: tuple[int, int] = (24, 80)
    ):
        self._fd, theirs = pty.openpty()
        self.resize(*size)
        self.process = subprocess.Popen(
            ["setsid", "--ctty", "--wait", *command],
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            env={**env, "TERM": "dumb"},
        )
        self.modes = termios.tcgetattr(theirs)
        self._theirs = theirs  # kept open: its modes are looked at, and nothing shown is lost
        self.shown = b""

    def __enter__(self) -> RealTerminal:
        return self

    def __exit__(
        self, _kind: type[BaseException] | None, _error: BaseException | None, _traceback: TracebackType | None
    ) -> None:
        if self.process.poll() is None:
            self.process.terminate()
            self.process.wait(LIMIT)
        os.close(self._theirs)
        os.close(self._fd)

    def resize(self, rows: int, columns: int) -> None:
        fcntl.ioctl(self._fd, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    def type(self, text: bytes) -> None:
        os.write(self._fd, text)

    def _readable(self, limit: float) -> bool:
        poll = select.poll()  # select(2) knows descriptors below 1024 alone
        poll.register(self._fd, select.POLLIN)
        return bool(poll.poll(limit * 1000))

    def expect(self, text: bytes) -> bytes:
        """Read until `text` is shown; what was shown up to its end is returned, and taken away."""
        deadline = time.monotonic() + LIMIT
        while text not in self.shown:
            left = deadline - time.monotonic()
            assert left > 0, (text, self.shown)
            assert self._readable(min(left, 0.2)) or self.process.poll() is None, self.shown
            if self._readable(0):
                self.shown += os.read(self._fd, 65536)
        end = self.shown.index(text) + len(text)
        taken, self.shown = self.shown[:end], self.shown[end:]
        return taken

    def wait(self) -> int:
        """Its exit code; what it still shows is read meanwhile."""
        deadline = time.monotonic() + LIMIT
        while self.process.poll() is None:
            assert time.monotonic() < deadline, self.shown
            if self._readable(0.05):
                self.shown += os.read(self._fd, 65536)
        while self._readable(0):
            self.shown += os.read(self._fd, 65536)
        return self.process.returncode

    @property
    def is_as_it_was(self) -> bool:
        """Whether the terminal's modes are those that it began with."""
        return termios.tcgetattr(self._theirs) == self.modes
