"""What the agent does to the machine it runs in: clock, host name, power. `Bystander` does nothing of it (tests)."""

from __future__ import annotations

import _socket
import fcntl
import os
import signal
import struct
import time

from capsem.guest.loop import READ, Loop
from capsem.guest.trust import Trust

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

POWER_OFF_STATUS = 100  # tells PID 1 (image/guestfs/init) to switch the machine off instead of starting the agent again
SYSUTIL = "/run/capsem-sysutil"
_TURN = 0.02
_RNDADDENTROPY, _RNDRESEEDCRNG = 0x40085203, 0x5207
_CLOCK_TOLERANCE = 0.05
_OWN = b"127.0.1.1"  # the address that Debian gives a machine's own name in hosts(5)

_LOCAL = "127.0.0.1"
# Where the packet filter redirects to (interface.md 7.2), and the proxy that programs ask for by themselves.
_TLS_PORT, _HTTP_PORT, _PROXY_PORT, _DNS_PORT = 10443, 10080, 3128, 1053
_BACKLOG = 1024
_SO_ORIGINAL_DST = 80  # linux/netfilter_ipv4.h
_NETWORK_READY = "/run/capsem/network"  # made by init-late once connections are redirected

Listeners = tuple[list[_socket.socket], _socket.socket, _socket.socket, _socket.socket]

_SYSUTIL_TEXT = """#!/bin/sh
# Asks the host to stop or suspend this machine. Linked as shutdown, halt, poweroff, reboot and suspend.
action=${0##*/}
[ "$action" = capsem-sysutil ] && action=$1 && { [ $# -gt 0 ] && shift; }
case $action in
shutdown | halt | poweroff) request=shutdown ;;
suspend) request=suspend ;;
reboot) echo "reboot: not supported in a Capsem VM; use 'capsem restart' on the host" >&2; exit 1 ;;
*) echo "usage: capsem-sysutil shutdown|suspend [now]" >&2; exit 2 ;;
esac
case " $* " in
*" now "* | *" -f "* | *" 0 "*) ;;
*) echo "$action: in 3 seconds"; sleep 3 ;;
esac
echo "$request" > /run/capsem/lifecycle
"""


class Bystander:
    """An agent that is a plain process on somebody's computer leaves that computer alone."""

    volume = ""  # where the VM's own file system is mounted; "": there is none
    groups = ""  # where control groups are; "": none for us

    def __init__(self, ports: str = "") -> None:
        """`ports`: a file to write the ports into at which it listens for connections; "": it does not."""
        self.written: dict[str, float] = {}  # files, with their sizes, that nobody was told of yet
        self.captures = bool(ports)
        self._ports = ports

    def set_clock(self, now: float) -> float:
        """How many seconds the clock would have been stepped."""
        return now - time.time()

    def set_hostname(self, name: str) -> None:
        """Nothing."""

    def set_identity(self, machine_id: str | None, token: str | None) -> None:
        """Nothing."""

    def trust(self, certificate: str) -> None:
        """Nothing."""

    def reseed(self, entropy: bytes) -> bool:
        """Whether the kernel took it."""
        return False

    def install(self, loop: Loop, request: Callable[[str], None]) -> None:
        """Nothing."""

    def network_ready(self) -> bool:
        """Whether connections are redirected."""
        return True

    def listen(self) -> Listeners:
        """The sockets to which connections are redirected, the explicit proxy's, and the name server's two. Raises OSError."""
        stream, datagram = _socket.SOCK_STREAM, _socket.SOCK_DGRAM
        redirected, proxy, udp, tcp = (bound(kind, 0) for kind in (stream, stream, datagram, stream))
        ports = " ".join(str(each.getsockname()[1]) for each in (redirected, proxy, udp, tcp))
        with open(f"{self._ports}.new", "w") as file:
            file.write(ports)
        os.rename(f"{self._ports}.new", self._ports)
        return [redirected], proxy, udp, tcp

    def destination(self, sock: _socket.socket) -> tuple[str, int]:
        """Where a redirected connection was going; port 0: it was not redirected."""
        address, port = sock.getsockname()
        return address, port

    def power_off(self, loop: Loop, grace: float) -> None:
        """Only the agent ends."""
        loop.exit(POWER_OFF_STATUS)


def accept(listener: _socket.socket) -> _socket.socket | None:
    """The next who has connected, None if there is none now."""
    try:
        fd, _ = listener._accept()  # type: ignore[attr-defined]  # noqa: SLF001 - what `socket.accept` is made of
    except OSError:  # nobody is there, or not any more
        return None
    sock = _socket.socket(_socket.AF_INET, _socket.SOCK_STREAM, 0, fd)
    sock.setblocking(False)
    return sock


def bound(kind: int, port: int) -> _socket.socket:
    """A local socket of a kind; of a stream's it listens. Raises OSError."""
    sock = _socket.socket(_socket.AF_INET, kind)
    sock.setblocking(False)
    if kind == _socket.SOCK_STREAM:
        sock.setsockopt(_socket.SOL_SOCKET, _socket.SO_REUSEADDR, 1)
    sock.bind((_LOCAL, port))
    if kind == _socket.SOCK_STREAM:
        sock.listen(_BACKLOG)
    return sock


def with_own_name(hosts: bytes, name: str) -> bytes:
    """The text of an /etc/hosts in which a machine finds itself by `name`; what else its owner has in there stays."""
    own = _OWN + b" " + name.encode()
    lines = [line for line in hosts.removesuffix(b"\n").split(b"\n") if line.split()[:1] != [_OWN]] if hosts else []
    return b"\n".join((*lines[:1], own, *lines[1:], b""))


def rewrite(path: str, text: Callable[[bytes], bytes], mode: int = 0o644) -> dict[str, float]:
    """Have a file say what `text` makes of what it says; {path: size} if that is something else. By as few and as plain
    steps as will do: in a machine that was just restored every one is a first one. Raises OSError.
    """
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, mode)
    try:
        was = os.read(fd, os.fstat(fd).st_size)
        new = text(was)
        if new == was:
            return {}
        os.pwrite(fd, new, 0)
        if len(new) < len(was):
            os.ftruncate(fd, len(new))
    finally:
        os.close(fd)
    return {path: len(new)}


class Machine(Bystander):
    """The real thing: the agent runs as root in a guest of its own."""

    volume = "/mnt/system"
    groups = "/sys/fs/cgroup"

    def set_clock(self, now: float) -> float:
        """Step the wall clock if it is off; returns by how many seconds."""
        step = now - time.time()
        if abs(step) <= _CLOCK_TOLERANCE:
            return 0.0
        time.clock_settime(time.CLOCK_REALTIME, now)
        return step

    def __init__(self) -> None:
        super().__init__()
        self.captures = True
        self._trust = Trust()
        self._hostname = ""
        self._identity: tuple[str | None, str | None] = (None, None)
        self._random = os.open("/dev/random", os.O_WRONLY | os.O_CLOEXEC)

    def set_hostname(self, name: str) -> None:
        """Set it in the kernel, and in /etc/hosts so that it resolves. What it is already is left alone: each file costs
        a machine that was just restored, whose every step is a first one for the emulator, several milliseconds.
        """
        if name == self._hostname:
            return
        _socket.sethostname(name)
        self.written |= rewrite("/etc/hostname", lambda _was: f"{name}\n".encode())
        self.written |= rewrite("/etc/hosts", lambda was: with_own_name(was, name))
        self._hostname = name

    def set_identity(self, machine_id: str | None, token: str | None) -> None:
        """What tells this machine from others (machine-id(5)), and this boot of it from others, forks included."""
        if (machine_id, token) == self._identity:
            return
        if machine_id is not None:
            self.written |= rewrite("/etc/machine-id", lambda _was: f"{machine_id}\n".encode(), 0o444)
        if token is not None:
            self.written |= rewrite("/run/capsem/boot-token", lambda _was: f"{token}\n".encode(), 0o444)
        self._identity = (machine_id, token)

    def trust(self, certificate: str) -> None:
        """Have programs trust the host's authority. Raises OSError."""
        self.written |= self._trust.trust(certificate)

    def reseed(self, entropy: bytes) -> bool:
        """Mix in entropy, count it, and have every generator start anew from it; random(4)."""
        fcntl.ioctl(self._random, _RNDADDENTROPY, struct.pack("ii", len(entropy) * 8, len(entropy)) + entropy)
        fcntl.ioctl(self._random, _RNDRESEEDCRNG)
        return True

    def install(self, loop: Loop, request: Callable[[str], None]) -> None:
        """Make the lifecycle FIFO and the commands that write to it; `request` gets "shutdown" or "suspend"."""
        fifo = "/run/capsem/lifecycle"
        if not os.path.exists(fifo):
            os.mkfifo(fifo, 0o600)
        # Opened for writing as well, so that it never reports a hang-up.
        fd = os.open(fifo, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)

        def ready(_events: int) -> None:
            for line in os.read(fd, 4096).decode("ascii", "replace").split():
                request(line)

        loop.watch(fd, READ, ready)
        self.written |= rewrite(SYSUTIL, lambda _was: _SYSUTIL_TEXT.encode(), 0o755)

    def network_ready(self) -> bool:
        """See Bystander."""
        return os.path.exists(_NETWORK_READY)

    def listen(self) -> Listeners:
        """See Bystander."""
        stream, datagram = _socket.SOCK_STREAM, _socket.SOCK_DGRAM
        return (
            [bound(stream, port) for port in (_TLS_PORT, _HTTP_PORT)],
            bound(stream, _PROXY_PORT),
            bound(datagram, _DNS_PORT),
            bound(stream, _DNS_PORT),
        )

    def destination(self, sock: _socket.socket) -> tuple[str, int]:
        """See Bystander; the kernel's record of the redirection has it, as a struct sockaddr_in."""
        try:
            name = sock.getsockopt(_socket.SOL_IP, _SO_ORIGINAL_DST, 16)
        except OSError:  # no such record: the filter was flushed
            return "", 0
        address, port = ".".join(map(str, name[4:8])), name[2] << 8 | name[3]
        return (address, port) if (address, port) != sock.getsockname() else ("", 0)

    def power_off(self, loop: Loop, grace: float) -> None:
        """SIGTERM to everything but PID 1 and us, SIGKILL after `grace` seconds, flush, then leave it to PID 1."""
        deadline = time.monotonic() + grace
        self._signal_all(signal.SIGTERM)

        def check() -> None:
            if not self._others():
                loop.offload(os.sync, lambda _: loop.exit(POWER_OFF_STATUS))
            elif time.monotonic() >= deadline:
                self._signal_all(signal.SIGKILL)
                loop.offload(os.sync, lambda _: loop.exit(POWER_OFF_STATUS))
            else:
                loop.after(_TURN, check)

        check()

    @staticmethod
    def _signal_all(number: int) -> None:
        try:
            os.kill(-1, number)
        except ProcessLookupError:
            pass

    @staticmethod
    def _others() -> bool:
        """Is there a user process besides PID 1 and us? Kernel threads and zombies have no command line."""
        own = {"1", str(os.getpid())}
        for pid in os.listdir("/proc"):
            if pid.isdigit() and pid not in own:
                try:
                    with open(f"/proc/{pid}/cmdline", "rb") as file:
                        if file.read(1):
                            return True
                except OSError:
                    continue
        return False
