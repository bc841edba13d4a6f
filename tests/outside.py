"""A service looked at from outside: plain HTTP over its socket, and what it holds of files, processes and locks."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import socket
from pathlib import Path
from typing import Any


class Http(http.client.HTTPConnection):
    """The standard library's client on a Unix socket."""

    def __init__(self, path: Path, timeout: float = 30) -> None:
        super().__init__("localhost", timeout=timeout)
        self.path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(self.timeout)
        self.sock.connect(str(self.path))

    def ask(self, method: str, path: str, body: Any = None) -> tuple[int, Any]:
        """Status and answer; a body that is neither None nor bytes is sent as JSON."""
        data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        self.request(method, path, data, {"Content-Type": "application/json"})
        answer = self.getresponse()
        text = answer.read()
        return answer.status, json.loads(text) if answer.headers.get_content_type() == "application/json" else text


def ask(path: Path, method: str, route: str, body: Any = None, timeout: float = 30) -> tuple[int, Any]:
    """One request on a connection of its own."""
    with contextlib.closing(Http(path, timeout)) as connection:
        return connection.ask(method, route, body)


def refused(answer: tuple[int, Any], status: int, code: str) -> dict[str, Any]:
    """Check that an answer is an error of that kind, with a hint for people."""
    got, body = answer
    assert (got, body.get("code")) == (status, code), body
    assert body["error"], body
    assert body.get("hint"), body
    return dict(body)


def traces(run_dir: Path) -> tuple[list[str], list[str], list[str]]:
    """What a service has in hand: files (not its log, which grows), processes of VMs, locks that are held."""
    files = sorted(str(path.relative_to(run_dir)) for path in run_dir.rglob("*"))
    return files, _processes(run_dir), _locks(run_dir)


def _processes(run_dir: Path) -> list[str]:
    """Every process whose arguments name something in the run directory: supervisors, VMMs."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            with contextlib.suppress(OSError):
                line = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                if f"{run_dir}/" in line and "pytest" not in line:
                    found.append(f"{entry.name} {line[:80]}")
    return sorted(found)


def _locks(run_dir: Path) -> list[str]:
    files = {}  # by device and inode: another file system, such as a small one of another test, has the same numbers
    for path in run_dir.rglob("*"):
        with contextlib.suppress(FileNotFoundError):
            status = path.stat()
            device = f"{os.major(status.st_dev):02x}:{os.minor(status.st_dev):02x}"
            files[f"{device}:{status.st_ino}"] = str(path.relative_to(run_dir))
    held, before = sorted(files[each] for each in _flocks() & set(files)), None
    while held != before:  # the list is read a page at a time, and others take and release locks meanwhile
        held, before = sorted(files[each] for each in _flocks() & set(files)), held
    return held


def _flocks() -> set[str]:
    """Device and inode of every file on this host that is locked."""
    found = set()
    for line in Path("/proc/locks").read_text().splitlines():
        words = line.split()
        if "FLOCK" in words:
            found.add(next(word for word in words if word.count(":") == 2))
    return found


def resident(pid: int) -> int:
    """The most memory a process ever had, in KiB."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1])
    raise AssertionError(f"process {pid} is gone")


def descriptors(pid: int) -> int:
    """How many files and connections a process has open."""
    return len(os.listdir(f"/proc/{pid}/fd"))
