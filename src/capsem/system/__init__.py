"""The seam to the host: clock, randomness, channels and processes, passed in to everything that decides.

Nothing above the drivers and the durable file layer reaches for these itself. That is what lets the whole control
plane run under a simulated host, with its own time, its own faults and its own order of events.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

ProtocolFactory = Callable[[], asyncio.Protocol]


class Clock(Protocol):
    """Time. Sleeping and time-outs go through the event loop, which a simulation replaces as a whole."""

    def time(self) -> float:
        """Wall clock, seconds since 1970."""

    def monotonic(self) -> float:
        """Seconds since some point; does not count while the host sleeps."""

    def boot_time(self) -> float:
        """As `monotonic`, but counts on while the host sleeps: the difference tells that it slept."""

    async def jumped(self) -> None:
        """Return when the wall clock was set, or the host woke up."""

    def boot_id(self) -> str:
        """Identifies this run of the host's kernel."""


class Entropy(Protocol):
    """Randomness."""

    def token_bytes(self, size: int) -> bytes:
        """Unpredictable bytes."""

    def choose(self, words: Sequence[str]) -> str:
        """One of them."""


class Network(Protocol):
    """Byte streams, as asyncio transports."""

    async def attach(self, endpoint: Any, factory: ProtocolFactory) -> asyncio.Transport:
        """Drive a connected endpoint, such as a machine's control channel."""

    async def connect(self, path: Path, factory: ProtocolFactory) -> asyncio.Transport:
        """Connect to a Unix socket. Raises OSError."""

    async def listen(self, path: Path, factory: ProtocolFactory) -> Listener:
        """Bind a Unix socket, mode 0600, and serve. Raises OSError."""


class Listener(Protocol):
    """A bound Unix socket."""

    def close(self) -> None:
        """Stop accepting; connections go on."""


class Child(Protocol):
    """A process that we started."""

    @property
    def pid(self) -> int:
        """Its process id."""

    @property
    def status(self) -> int | None:
        """Exit status, negative for a signal; None while it runs."""

    async def feed(self, data: bytes) -> None:
        """Write to its standard input, which was kept open, and close that. Raises OSError when it has ended."""

    async def read_line(self) -> bytes:
        """The next line of its standard output, b"" at the end."""

    async def wait(self) -> int:
        """Reap it; returns `status`."""


class Processes(Protocol):
    """Processes of this host."""

    async def spawn(
        self, argv: Sequence[str], *, env: Mapping[str, str], stdin: bytes | None, log: Path, keep: Sequence[int] = ()
    ) -> Child:
        """Start a process in a session of its own: `stdin` is fed and closed (None: see `Child.feed`), standard error is
        appended to `log` (mode 0600), standard output is ours, the descriptors in `keep` are inherited. Raises OSError.
        """

    def own_pid(self) -> int:
        """The id of this process."""

    def signal(self, pid: int, number: int) -> None:
        """Send a signal; a process that is gone is no error."""

    async def gone(self, pid: int) -> None:
        """Return when a process has ended (need not be our child); at once when there is none."""

    def start_time(self, pid: int) -> int | None:
        """When a process started, in clock ticks since boot: with the pid it is one process for sure. None: gone."""


@dataclass(frozen=True, slots=True)
class System:
    """The host, as seen from above the drivers."""

    clock: Clock
    entropy: Entropy
    network: Network
    processes: Processes
