"""Starting a command's process: `bash -c COMMAND`, in the group of all commands and a session of its own."""

from __future__ import annotations

import os
import signal

from capsem.guest.group import Group

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

SHELL = "/bin/bash"
SHELL_ARGV = ("bash", "-c")  # and the command
# Python ignores the first two, the shell that started the agent in the background the others, and that is inherited.
_RESET_SIGNALS = (signal.SIGPIPE, signal.SIGXFSZ, signal.SIGHUP, signal.SIGINT, signal.SIGQUIT)


class Spawner:
    """Starts commands. It keeps open what each start needs, for none of that may cost a machine which was just restored."""

    def __init__(self, group: Group) -> None:
        """Commands are started in `group`."""
        self._group = group
        self.nothing = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)  # to read from
        self._home = os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        # The agent is protected where memory runs out; its commands are not, and it is inherited at the fork.
        self._oom_score, self._own_score = -1, b""
        try:
            fd = os.open("/proc/self/oom_score_adj", os.O_RDWR | os.O_CLOEXEC)
        except OSError:  # an unprivileged agent in tests
            return
        self._own_score = os.pread(fd, 16, 0)
        if int(self._own_score) < 0:
            self._oom_score = fd
        else:
            os.close(fd)

    def start(self, command: str, env: dict[str, str], cwd: str, actions: list[tuple[Any, ...]]) -> int:
        """Start `bash -c command` in a session of its own; `actions` are those of posix_spawn that give it its standard
        streams. Returns its pid.

        Raises OSError. Call it from the loop's thread alone: the working directory is the process's while it runs.
        """
        if self._oom_score >= 0:
            os.pwrite(self._oom_score, b"0", 0)
        try:
            os.chdir(cwd)
            self._group.enter()
            return os.posix_spawn(
                SHELL,
                [*SHELL_ARGV, command],
                env,
                file_actions=actions,
                setsid=True,
                setsigdef=_RESET_SIGNALS,
            )
        finally:
            self._group.leave()
            os.fchdir(self._home)
            if self._oom_score >= 0:
                os.pwrite(self._oom_score, self._own_score, 0)
