"""A command on a terminal: its bash leads a session whose controlling terminal is a pty, of which the agent has the far end.

All else is as with any command. What differs: there is one output; input stays open while nobody is attached, who
comes next types on; and the end of output is an error of the pty's (EIO), when nobody has the terminal open any more.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct

from capsem.guest.processes import Command
from capsem.wire.messages import STDIN, STDOUT, Resize, Terminal

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from capsem.wire.messages import Exec
    from capsem.wire.schema import Message

_TIOCSWINSZ = 0x5414  # python3-minimal has no termios
_SIZE = struct.Struct("=HHHH")  # rows, columns, and their size in pixels, which nobody knows
_LARGEST = 0xFFFF


class TerminalCommand(Command):
    """See the module; started by a Terminal request."""

    terminal = True

    def _open(self, request: Exec | Terminal, nothing: int) -> tuple[list[int], list[tuple[Any, ...]]]:
        assert isinstance(request, Terminal)
        ours, theirs = os.openpty()
        self._pipes = {STDOUT: ours, STDIN: os.dup(ours)}
        for fd in self._pipes.values():
            os.set_blocking(fd, False)
        self._resize(request.rows, request.columns)
        # It is opened by its name, by the leader of a session that has no terminal yet: that makes it the controlling one.
        open_it = (os.POSIX_SPAWN_OPEN, 0, os.ttyname(theirs), os.O_RDWR, 0)
        return [theirs], [open_it, (os.POSIX_SPAWN_DUP2, 0, 1), (os.POSIX_SPAWN_DUP2, 0, 2)]

    def _take(self, fd: int, size: int) -> bytes:
        try:
            return os.read(fd, size)
        except OSError as error:
            if error.errno == errno.EIO:
                return b""
            raise

    def _resize(self, rows: int, columns: int) -> None:
        fd = self._pipes.get(STDOUT)
        if fd is not None and 0 < rows <= _LARGEST and 0 < columns <= _LARGEST:
            fcntl.ioctl(fd, _TIOCSWINSZ, _SIZE.pack(rows, columns, 0, 0))  # SIGWINCH for who runs in the foreground

    def message(self, message: Message) -> None:
        """Another size, or a signal."""
        if isinstance(message, Resize):
            self._resize(message.rows, message.columns)
        else:
            super().message(message)

    def feed_end(self) -> None:
        """Whoever typed has gone; others may come."""
