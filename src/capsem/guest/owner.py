"""Which program a local socket belongs to: a label for the record, for people to read.

Nothing is decided by it. A program may hide, or take another's name; and it is looked for briefly only, for its request waits.
The kernel names the socket's inode (sock_diag(7) for a connection, /proc/net/udp for a question), and /proc/PID/fd has who
holds that: as a rule who held the last ones, or the program that was started last.
"""

from __future__ import annotations

import _socket
import os
import struct

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

    Address = tuple[str, int]

# What is looked at for one socket: a millisecond or two under emulation where it is found at once, a few tens at the most.
MAX_PROCESSES = 128  # the kernel's own among them
MAX_FILES = 512  # of theirs, together
_REMEMBERED = 8
_NETLINK, _SOCK_DIAG, _BY_FAMILY = 16, 4, 20  # AF_NETLINK, linux/netlink.h, linux/sock_diag.h
_NO_COOKIE = b"\xff" * 8
_HEADER = struct.Struct("=IHHII")  # struct nlmsghdr
_REQUEST = struct.Struct("=BBBxI")  # struct inet_diag_req_v2, before its id
_ANSWER = struct.Struct("=BBBB48xIIIII")  # struct inet_diag_msg


class Owners:
    """Remembers the last owners, and where among their files the socket was."""

    def __init__(self) -> None:
        self._last: dict[int, int] = {}  # process -> file, the last last

    def of_connection(self, accepted: _socket.socket, remote: Address) -> str | None:
        """Who has opened a TCP connection, by name; `remote` is where it thinks that it leads."""
        try:
            return self._holder(_inode(accepted.getpeername(), remote))
        except (OSError, ValueError, struct.error):  # the kernel does not tell; or the program has ended
            return None

    def of_question(self, local: Address) -> str | None:
        """Whose UDP socket that is, by name."""
        try:
            with open("/proc/net/udp", encoding="ascii") as file:
                port = f":{local[1]:04X}"
                for line in file:
                    words = line.split(None, 10)
                    if words[1].endswith(port):
                        return self._holder(int(words[9]))
        except (OSError, ValueError, IndexError):
            pass
        return None

    def _holder(self, inode: int) -> str | None:
        if not inode:  # it is closed already
            return None
        wanted = f"socket:[{inode}]"
        for pid, file in reversed(tuple(self._last.items())):
            try:
                if os.readlink(f"/proc/{pid}/fd/{file}") == wanted:
                    return self._found(pid, file)
            except OSError:
                self._last.pop(pid)
        left = MAX_FILES
        for pid in self._candidates():
            try:
                # The file that was opened last has, as a rule, the highest number.
                files = sorted(map(int, os.listdir(f"/proc/{pid}/fd")), reverse=True)[:left]
                left -= len(files)
                for file in files:
                    if os.readlink(f"/proc/{pid}/fd/{file}") == wanted:
                        return self._found(pid, file)
            except OSError:  # it has ended meanwhile, or closed a file
                continue
            if not left:
                break
        return None

    def _candidates(self) -> Iterator[int]:
        """Processes: those remembered first, then the youngest. The agent's own sockets are nobody's request."""
        yield from reversed(tuple(self._last))
        others = {int(each) for each in os.listdir("/proc") if each.isdigit()} - self._last.keys() - {1, os.getpid()}
        yield from sorted(others, reverse=True)[:MAX_PROCESSES]

    def _found(self, pid: int, file: int) -> str:
        with open(f"/proc/{pid}/comm", encoding="utf-8", errors="replace") as comm:
            name = comm.read().rstrip("\n")
        self._last.pop(pid, None)
        self._last[pid] = file
        if len(self._last) > _REMEMBERED:
            del self._last[next(iter(self._last))]
        return name


def _inode(local: Address, remote: Address) -> int:
    """Of the socket of a TCP connection, seen from the end that is `local`. Raises OSError, ValueError, struct.error."""
    ends = struct.pack("!HH", local[1], remote[1]) + _packed(local) + _packed(remote) + bytes(4) + _NO_COOKIE
    body = _REQUEST.pack(_socket.AF_INET, _socket.IPPROTO_TCP, 0, 0xFFFFFFFF) + ends
    netlink = _socket.socket(_NETLINK, _socket.SOCK_RAW, _SOCK_DIAG)
    try:
        netlink.setblocking(False)  # it is answered within the call that asks
        netlink.send(_HEADER.pack(_HEADER.size + len(body), _BY_FAMILY, 1, 0, 0) + body)
        answer = netlink.recv(4096)
    finally:
        netlink.close()
    if _HEADER.unpack_from(answer)[1] != _BY_FAMILY:
        raise ValueError("there is no such connection")
    return int(_ANSWER.unpack_from(answer, _HEADER.size)[-1])


def _packed(address: Address) -> bytes:
    return _socket.inet_aton(address[0]) + bytes(12)
