"""Bringing the service up when none runs.

It is started detached, in a session of its own, and lives on when the caller ends. Starting is safe to do at once
from many places: the service itself sees to it that one remains (interface.md 1.2), so all that is done here is to
start one and wait until any answers.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final

from capsem.client.sync import Client
from capsem.config import SOCKET_NAME, Paths
from capsem.model.errors import CapsemError, HostNotReady

EXECUTABLE: Final = "capsem-service"
LOG_NAME: Final = "service-start.log"
START_WITHIN: Final = 15.0  # seconds
QUIET: Final = 1.0  # seconds of waiting before it is worth a word
_POLL: Final = 0.02
_PROBE: Final = 0.5
_LAST_LINES: Final = 10


def start(
    paths: Paths,
    environ: Mapping[str, str],
    *,
    command: list[str] | None = None,
    notify: Callable[[str], None] = lambda _text: None,
    within: float = START_WITHIN,
) -> None:
    """Start the service and return when it answers at `paths.uds_path`. Blocks for `within` seconds at most.

    `command` takes the place of the executable that `find_command` finds; `notify` is told, once, when it takes more
    than a second. Raises HostNotReady with the last lines of the log when the service ends or does not come up.
    """
    if _answers(paths):
        return
    log = paths.run_dir / LOG_NAME
    argv = [*(command or find_command(environ)), "--foreground"]
    if paths.uds_path != paths.run_dir / SOCKET_NAME:
        argv += ["--uds-path", str(paths.uds_path)]
    try:
        paths.run_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
        fd = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    except OSError as exc:
        raise HostNotReady(
            f"the run directory {paths.run_dir} cannot be used: {exc.strerror}",
            hint="CAPSEM_RUN_DIR names it; it has to be a directory that you may write to",
        ) from exc
    try:
        try:
            # The working directory is the root: the service must keep no directory of ours from being unmounted.
            process = subprocess.Popen(
                argv, stdin=subprocess.DEVNULL, stdout=fd, stderr=fd, cwd="/", env=environ, start_new_session=True
            )
        finally:
            os.close(fd)
    except OSError as exc:
        raise HostNotReady(f"cannot start {argv[0]}: {exc}", hint="is Capsem installed completely?") from exc
    try:
        _wait(process, paths, log, notify, within)
    finally:
        if process.returncode is None:
            process.returncode = 0  # it is to outlive us: nothing to wait for, nothing to warn about


def find_command(environ: Mapping[str, str]) -> list[str]:
    """The service's executable: beside this program or this Python, in PATH, or as a module of this Python."""
    beside = [Path(program).absolute().parent for program in (sys.argv[0], sys.executable) if os.sep in program]
    for directory in beside:
        if os.access(directory / EXECUTABLE, os.X_OK):
            return [str(directory / EXECUTABLE)]
    found = shutil.which(EXECUTABLE, path=environ.get("PATH"))
    return [found] if found else [sys.executable, "-m", "capsem.service"]


def _answers(paths: Paths) -> bool:
    try:
        Client(paths.uds_path, timeout=_PROBE).call("version")
    except CapsemError:
        return False
    return True


def _wait(
    process: subprocess.Popen[bytes], paths: Paths, log: Path, notify: Callable[[str], None], within: float
) -> None:
    began = time.monotonic()
    told = False
    while True:
        # One that came first may be answering while ours has yet to notice it: left alone, ours would take its place
        # should it be stopped in between. The service's own pid file says which of them it is.
        if _answers(paths) and (process.poll() is not None or _is_the_service(process.pid, paths)):
            return
        # Exit code 0 means that another one was there first, which is then about to answer.
        if process.poll() not in (None, 0):
            raise HostNotReady(
                f"capsem-service ended with exit status {process.returncode}: {_tail(log)}", hint=f"see {log}"
            )
        waited = time.monotonic() - began
        if waited > within:
            raise HostNotReady(
                f"capsem-service did not answer at {paths.uds_path} within {within:g} s: {_tail(log)}",
                hint=f"see {log} and {paths.run_dir / 'service.log'}",
            )
        if waited > QUIET and not told:
            notify("starting capsem-service")
            told = True
        time.sleep(_POLL)


def _is_the_service(pid: int, paths: Paths) -> bool:
    try:
        return (paths.run_dir / "service.pid").read_text(encoding="ascii").strip() == str(pid)
    except OSError:
        return False


def _tail(log: Path) -> str:
    try:
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    return " | ".join(line.strip() for line in lines[-_LAST_LINES:] if line.strip()) or "it said nothing"
