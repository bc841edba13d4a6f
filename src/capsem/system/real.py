"""The real host."""

from __future__ import annotations

import asyncio
import ctypes
import os
import secrets
import socket
import struct
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from capsem.system import Child, Listener, ProtocolFactory, System
from capsem.system.unix import bind_private

_LINE_LIMIT = 1024 * 1024
_libc = ctypes.CDLL(None)
_ABSOLUTE, _CANCEL_ON_SET = 1, 2  # flags of timerfd_settime


def _watch_the_clock() -> int:
    """A timerfd that becomes readable when the wall clock jumps; -1 where the kernel has no such thing.

    Python has these calls from 3.13.
    """
    fd: int = _libc.timerfd_create(time.CLOCK_REALTIME, os.O_NONBLOCK | os.O_CLOEXEC)
    never = struct.pack("qqqq", 0, 0, 1 << 32, 0)  # interval and time of expiry, each in seconds and nanoseconds
    if fd >= 0 and _libc.timerfd_settime(fd, _ABSOLUTE | _CANCEL_ON_SET, never, None) < 0:
        os.close(fd)
        return -1
    return fd


class RealClock:
    """The kernel's clocks."""

    def time(self) -> float:
        """See Clock."""
        return time.time()

    def monotonic(self) -> float:
        """See Clock."""
        return time.monotonic()

    def boot_time(self) -> float:
        """See Clock."""
        return time.clock_gettime(time.CLOCK_BOOTTIME)

    async def jumped(self) -> None:
        """See Clock. A kernel that cannot tell leaves its caller to wait."""
        fd = _watch_the_clock()
        loop, jumped = asyncio.get_running_loop(), asyncio.Event()
        if fd >= 0:
            loop.add_reader(fd, jumped.set)
        try:
            await jumped.wait()
        finally:
            if fd >= 0:
                loop.remove_reader(fd)
                os.close(fd)

    def boot_id(self) -> str:
        """See Clock."""
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()


class RealEntropy:
    """The kernel's randomness."""

    def token_bytes(self, size: int) -> bytes:
        """See Entropy."""
        return secrets.token_bytes(size)

    def choose(self, words: Sequence[str]) -> str:
        """See Entropy."""
        return secrets.choice(words)


class RealNetwork:
    """Sockets on the running event loop."""

    async def attach(self, endpoint: Any, factory: ProtocolFactory) -> asyncio.Transport:
        """See Network; the endpoint is a connected socket."""
        assert isinstance(endpoint, socket.socket)
        transport, _ = await asyncio.get_running_loop().create_unix_connection(factory, sock=endpoint)
        return transport

    async def connect(self, path: Path, factory: ProtocolFactory) -> asyncio.Transport:
        """See Network."""
        transport, _ = await asyncio.get_running_loop().create_unix_connection(factory, str(path))
        return transport

    async def listen(self, path: Path, factory: ProtocolFactory) -> Listener:
        """See Network; whatever is at `path` was removed by the caller."""
        return await asyncio.get_running_loop().create_unix_server(factory, sock=bind_private(path))


class RealChild:
    """An asyncio subprocess."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process

    @property
    def pid(self) -> int:
        """See Child."""
        return self._process.pid

    @property
    def status(self) -> int | None:
        """See Child."""
        return self._process.returncode

    async def feed(self, data: bytes) -> None:
        """See Child."""
        assert self._process.stdin is not None
        self._process.stdin.write(data)
        await self._process.stdin.drain()
        self._process.stdin.close()

    async def read_line(self) -> bytes:
        """See Child."""
        assert self._process.stdout is not None
        return await self._process.stdout.readline()

    async def wait(self) -> int:
        """See Child."""
        return await self._process.wait()


class RealProcesses:
    """Processes of this host."""

    async def spawn(
        self, argv: Sequence[str], *, env: Mapping[str, str], stdin: bytes | None, log: Path, keep: Sequence[int] = ()
    ) -> Child:
        """See Processes."""
        fd = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            process = await asyncio.create_subprocess_exec(
                *argv,
                env=dict(env),
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=fd,
                pass_fds=tuple(keep),
                start_new_session=True,
                limit=_LINE_LIMIT,
            )
        finally:
            os.close(fd)
        child = RealChild(process)
        if stdin is not None:
            assert process.stdin is not None
            process.stdin.write(stdin)
            process.stdin.close()
        return child

    def own_pid(self) -> int:
        """See Processes."""
        return os.getpid()

    def signal(self, pid: int, number: int) -> None:
        """See Processes."""
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            return

    async def gone(self, pid: int) -> None:
        """See Processes."""
        try:
            fd = os.pidfd_open(pid)
        except ProcessLookupError:
            return
        loop, ended = asyncio.get_running_loop(), asyncio.Event()
        loop.add_reader(fd, ended.set)
        try:
            await ended.wait()
        finally:
            loop.remove_reader(fd)
            os.close(fd)

    def start_time(self, pid: int) -> int | None:
        """See Processes; field 22 of /proc/<pid>/stat (proc_pid_stat(5)), counted after the command's last ")"."""
        try:
            text = Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace")
        except (FileNotFoundError, ProcessLookupError):
            return None
        fields = text.rpartition(")")[2].split()
        return None if fields[0] == "Z" else int(fields[19])


def real_system() -> System:
    """This host."""
    return System(RealClock(), RealEntropy(), RealNetwork(), RealProcesses())
