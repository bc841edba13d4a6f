"""The control group that every command is started in, so that all of them, and what they left behind, can be held still.

A machine is saved while they are held; they go on when the guest is who it is to be. So no program of a fork runs for
an instant under the name, the clock or the random numbers of another machine. PID 1 and the agent are outside.

A process that a command moved into another top-level group is not held: whoever does that has left the promise.
"""

from __future__ import annotations

import _thread
import os
import select
import time

_SETTLE = 0.2  # seconds for all of them to have come to rest


class Group:
    """Held still or not. `root` is where the hierarchy is mounted; "": there is none (tests), and nothing is held.

    `hold` and `let_go` are the loop's alone, `freeze` is for a thread: it freezes only while the loop holds. That
    keeps the agent, which steps into the group for the moment of a spawn, from ever being frozen there itself.
    """

    def __init__(self, root: str) -> None:
        self.held = False
        self._lock = _thread.allocate_lock()
        self._path = f"{root}/capsem"
        self._inside = self._outside = self._events = self._state = -1
        if root:
            try:
                os.makedirs(self._path, exist_ok=True)
                self._inside = os.open(f"{self._path}/cgroup.procs", os.O_WRONLY | os.O_CLOEXEC)
                self._events = os.open(f"{self._path}/cgroup.events", os.O_RDONLY | os.O_CLOEXEC)
                self._state = os.open(f"{self._path}/cgroup.freeze", os.O_WRONLY | os.O_CLOEXEC)
                self._outside = os.open(f"{root}/cgroup.procs", os.O_WRONLY | os.O_CLOEXEC)
            except OSError as error:  # somebody has unmounted it: a guest that works matters more
                os.write(2, f"capsem-agent: commands cannot be held still: {error}\n".encode())

    # -- a command is started

    def enter(self) -> None:
        """What is spawned from here on is in the group. Not while it is held."""
        if self._outside >= 0:
            os.write(self._inside, b"0")

    def leave(self) -> None:
        """The agent is outside again."""
        if self._outside >= 0:
            os.write(self._outside, b"0")

    # -- a checkpoint is made

    def hold(self) -> None:
        """From here on nothing is spawned, and `freeze` may come."""
        self.held = True

    def freeze(self) -> bool:
        """Hold all of them still; whether they are. One that waits for a disk is not yet, but runs no further either."""
        if self._outside < 0:
            return False
        with self._lock:
            if not self.held:  # it took so long that the host has gone on
                return False
            os.pwrite(self._state, b"1", 0)
        poll, deadline = select.poll(), time.monotonic() + _SETTLE
        poll.register(self._events, select.POLLPRI)
        while not self._frozen():
            left = deadline - time.monotonic()
            if left <= 0:
                return False
            poll.poll(left * 1000)
        return True

    def let_go(self) -> bool:
        """Let them go on; whether they were held still until now. Safe when nothing is held."""
        with self._lock:
            self.held = False
            if self._outside < 0:
                return False
            still = self._frozen()
            os.pwrite(self._state, b"0", 0)
        return still

    def _frozen(self) -> bool:
        return b"frozen 1" in os.pread(self._events, 256, 0)
