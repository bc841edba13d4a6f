"""The service as a process of this host: whether it runs, how to end it, and the systemd unit that keeps it."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import struct
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final, NamedTuple

from capsem.client.service import EXECUTABLE
from capsem.client.sync import Client
from capsem.config import Paths
from capsem.model.errors import CapsemError, HostNotReady, MachineFailed, TimedOut, Unavailable
from capsem.store.locks import holders

STOP_WITHIN: Final = 15.0  # seconds: what harnesses of the contract give it
UNIT_NAME: Final = "capsem.service"
OWNER_LOCK: Final = "owner.lock"  # in the run directory, held by its service
# Where things are, for a service that does not inherit it from a shell.
UNIT_ENVIRONMENT: Final = (
    "CAPSEM_HOME CAPSEM_RUN_DIR CAPSEM_ASSETS_DIR CAPSEM_USER_CONFIG CAPSEM_CORP_CONFIG CAPSEM_QEMU".split()
)
_ANSWER_WITHIN: Final = 5.0


class Found(NamedTuple):
    """What is there of a service. `version` is None when none answers, `pid` None when no process was found."""

    version: str | None
    pid: int | None
    running_vms: int | None


def look(paths: Paths) -> Found:
    """Whether the service runs. Starts nothing; what does not answer within some seconds counts as not running."""
    client = Client(paths.socket, timeout=_ANSWER_WITHIN)
    version = running = None
    with contextlib.suppress(CapsemError):
        version = str(client.call("version")["version"])
        boxes = client.call("list")["sandboxes"]
        running = sum(bool(box["pid"]) for box in boxes)
    return Found(version, find(paths), running)


def find(paths: Paths) -> int | None:
    """The process id of the service: of whoever listens on the socket, or is named in service.pid and owns the run
    directory. Only a process called capsem-service counts."""
    listener = _listener(paths)
    if listener is not None and _is_service(listener):
        return listener
    try:
        pid = int((paths.run_dir / "service.pid").read_text(encoding="ascii"))
    except (OSError, ValueError):
        return None
    # The number in a file left behind may be another process's by now, even another run directory's service.
    if _is_service(pid) and pid in holders(paths.run_dir / OWNER_LOCK):
        return pid
    return None


def stop(paths: Paths, *, within: float = STOP_WITHIN) -> int:
    """End the service with SIGTERM and wait until its process is gone; returns the process id it had.

    Raises Unavailable when none runs, TimedOut when it does not end in time (it is not killed), MachineFailed when it
    may not be signalled.
    """
    pid = find(paths)
    if pid is None:
        raise Unavailable(f"no capsem-service runs in {paths.run_dir}", hint="capsem start")
    try:
        # From here on this descriptor means that very process, whoever gets its number later.
        handle = os.pidfd_open(pid)
    except ProcessLookupError:
        return pid
    try:
        if not _is_service(pid):
            return pid
        signal.pidfd_send_signal(handle, signal.SIGTERM)
        poll = select.poll()
        poll.register(handle, select.POLLIN)
        if not poll.poll(within * 1000):
            raise TimedOut(
                f"capsem-service (process {pid}) has not ended within {within:g} s",
                hint=f"see {paths.run_dir / 'service.log'}; kill -9 {pid} ends it, the VMs live on",
            )
    except ProcessLookupError:
        pass
    except PermissionError as exc:
        raise MachineFailed(f"process {pid} may not be signalled: {exc}") from exc
    finally:
        os.close(handle)
    return pid


def _listener(paths: Paths) -> int | None:
    """Who listens on the socket, as the kernel has it."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(_ANSWER_WITHIN)
        try:
            connection.connect(paths.socket)
            credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
        except OSError:
            return None
    pid: int = struct.unpack("3i", credentials)[0]
    return pid or None  # 0: in another pid namespace


def _is_service(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/comm").read_text(encoding="utf-8").strip() == EXECUTABLE
    except (OSError, UnicodeDecodeError):
        return False


# -- systemd


def unit_path(environ: Mapping[str, str]) -> Path:
    """Where this user's unit belongs. Raises HostNotReady when there is no home directory."""
    configured = environ.get("XDG_CONFIG_HOME", "")
    if Path(configured).is_absolute():  # a relative one is to be ignored, says its specification
        return Path(configured) / "systemd/user" / UNIT_NAME
    if home := environ.get("HOME"):
        return Path(home) / ".config/systemd/user" / UNIT_NAME
    raise HostNotReady("neither XDG_CONFIG_HOME nor HOME is set", hint="set HOME to your home directory")


def unit_text(command: Sequence[str], environ: Mapping[str, str]) -> str:
    """The unit's content; `command` starts the service."""
    lines = [f"Environment={_quoted(f'{key}={environ[key]}')}" for key in UNIT_ENVIRONMENT if environ.get(key)]
    return "\n".join(
        (
            "[Unit]",
            "Description=Capsem: Linux machines for AI agents",
            "",
            "[Service]",
            f"ExecStart={' '.join(_quoted(word, command=True) for word in (*command, '--foreground'))}",
            *lines,
            "Restart=on-failure",
            "# Signals for the service alone: it ends the VMs in order, or leaves them to the next one, as after a crash.",
            "KillMode=process",
            f"TimeoutStopSec={STOP_WITHIN:g}",
            "UMask=0077",
            "",
            "[Install]",
            "WantedBy=default.target",
            "",
        )
    )


def systemctl(environ: Mapping[str, str], *words: str) -> str | None:
    """Run `systemctl --user`; None when that went well, else what it said."""
    try:
        done = subprocess.run(
            ["systemctl", "--user", *words], env=dict(environ), capture_output=True, text=True, timeout=60, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as exc:
        return str(exc)
    if done.returncode == 0:
        return None
    return done.stderr.strip() or f"exit status {done.returncode}"


def _quoted(text: str, *, command: bool = False) -> str:
    """One word of a unit file; % begins a specifier everywhere, $ a variable in a command."""
    text = text.replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%").replace("\n", "\\n")
    if command:
        text = text.replace("$", "$$")
    return f'"{text}"'
