"""The QEMU process: finding the binary, spawning it so that it can never be orphaned, and reaping it.

`subprocess.Popen` and a pidfd rather than asyncio's subprocess: spawning is then one step that a cancellation cannot
cut in two, no thread waits for the child, and a signal can only reach the process it was meant for.

The child dies with us: PR_SET_PDEATHSIG, set before it becomes QEMU. The kernel sends that signal when the *thread*
that forked ends, so only the main thread may spawn.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import re
import shutil
import signal
import subprocess
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Final

from capsem.hypervisor.qemu.command import BINARY
from capsem.model.errors import HostNotReady, MachineFailed

MINIMUM: Final = (7, 2)
INSTALL_HINT: Final = "apt install qemu-system-x86"
VERSION_LIMIT: Final = 20.0  # seconds for `--version` on a very busy host
KILL_LIMIT: Final = 10.0  # seconds for a killed process to be gone; KVM may hold one up for a moment
STDERR_BYTES: Final = 16384  # of QEMU's last words
ENVIRONMENT: Final[Mapping[str, str]] = {"PATH": "/usr/bin:/bin", "LC_ALL": "C.UTF-8"}

_PR_SET_PDEATHSIG: Final = 1  # prctl(2)
_libc = ctypes.CDLL(None, use_errno=True)


def find_qemu(environ: Mapping[str, str] = os.environ) -> Path:
    """QEMU's binary: CAPSEM_QEMU, or from PATH. Raises HostNotReady."""
    named = environ.get("CAPSEM_QEMU")
    if named:
        if not os.access(named, os.X_OK):
            raise HostNotReady(
                f"CAPSEM_QEMU names {named}, which cannot be run", hint=f"correct or unset it; {INSTALL_HINT}"
            )
        return Path(named).resolve()
    found = shutil.which(BINARY, path=environ.get("PATH", os.defpath))
    if found is None:
        raise HostNotReady(f"{BINARY} is not installed", hint=INSTALL_HINT)
    return Path(found).resolve()


def parse_version(text: str) -> str:
    """ "7.2.22" from the output of `--version`. Raises HostNotReady if it is too old, or no version."""
    match = re.search(r"version (\d+)\.(\d+)(?:\.(\d+))?", text)
    if match is None:
        raise HostNotReady(f"this is not QEMU: {text[:80]!r}", hint=f"unset CAPSEM_QEMU; {INSTALL_HINT}")
    major, minor, micro = (int(number or 0) for number in match.groups())
    if (major, minor) < MINIMUM:
        raise HostNotReady(
            f"QEMU {major}.{minor} is too old",
            hint=f"{MINIMUM[0]}.{MINIMUM[1]} or newer is needed: Debian 12, Ubuntu 24.04",
        )
    return f"{major}.{minor}.{micro}"


async def query_version(binary: Path) -> str:
    """The version of a QEMU binary. Raises HostNotReady."""
    try:
        process = await asyncio.create_subprocess_exec(
            str(binary),
            "--version",
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=ENVIRONMENT,
        )
    except OSError as error:
        raise HostNotReady(f"{binary} cannot be run: {error.strerror}", hint=INSTALL_HINT) from error
    try:
        async with asyncio.timeout(VERSION_LIMIT):
            output, _ = await process.communicate()
    except TimeoutError:
        raise HostNotReady(f"{binary} --version says nothing", hint="is the host overloaded?") from None
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    return parse_version(output.decode(errors="replace"))


def complaint(stderr: str) -> str:
    """What QEMU's standard error says went wrong: its last message, without its own name, warnings, and echoed options."""
    lines = [line.removeprefix(f"{BINARY}: ").strip() for line in stderr.splitlines() if line.strip()]
    errors = [line for line in lines if not line.startswith("warning: ")]
    # A message may have continuation lines ("Is another process using the image [...]?"); one line tells enough.
    last = next((line for line in reversed(errors) if not line.endswith("?")), "")
    return re.sub(r"^-\w+ \{.*\}: ", "", last)


def lacking_features(stderr: str) -> list[str]:
    """CPU features that QEMU says the accelerator does not have, such as "avx2"."""
    return sorted(set(re.findall(r"requested feature: \S+?:\w+\.(\S+) \[bit", stderr)))


class Process:
    """A running QEMU, ours to reap. Needs the event loop it was spawned on."""

    def __init__(self, popen: subprocess.Popen[bytes]) -> None:
        self._popen = popen
        self._loop = asyncio.get_running_loop()
        self._exited: asyncio.Future[int] = self._loop.create_future()
        self._stderr = bytearray()
        assert popen.stderr is not None
        os.set_blocking(popen.stderr.fileno(), False)
        self._loop.add_reader(popen.stderr.fileno(), self._read_stderr)
        self._pidfd = os.pidfd_open(popen.pid)
        self._loop.add_reader(self._pidfd, self._reap)

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._popen.pid

    def kill(self) -> None:
        """Send SIGKILL, if it still lives."""
        if self._pidfd >= 0:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)

    async def wait(self) -> int:
        """Its exit status, negative for a signal, once it has ended and was reaped."""
        return await asyncio.shield(self._exited)

    async def end(self) -> int:
        """Kill, wait and reap, whatever happens meanwhile to the caller's task. Raises MachineFailed if it will not die."""
        self.kill()
        try:
            async with asyncio.timeout(KILL_LIMIT):
                return await self.wait()
        except TimeoutError:
            raise MachineFailed(
                f"QEMU (process {self.pid}) does not die, {KILL_LIMIT:g} s after SIGKILL",
                hint="the kernel holds it: see its log; only a restart of the host may help",
            ) from None

    def cpu_seconds(self) -> float:
        """Processor time it has used so far; field 14 and 15 of /proc/<pid>/stat (proc(5)). 0 once it has ended."""
        try:
            fields = (
                Path(f"/proc/{self.pid}/stat").read_text(encoding="ascii", errors="replace").rpartition(")")[2].split()
            )
        except (FileNotFoundError, ProcessLookupError):
            return 0.0
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def stderr(self) -> str:
        """The end of what it wrote to its standard error."""
        return self._stderr.decode(errors="replace")

    def _read_stderr(self) -> None:
        stream = self._popen.stderr
        if stream is None or stream.closed:
            return
        try:
            data = os.read(stream.fileno(), 65536)
        except BlockingIOError:
            return
        self._stderr += data
        del self._stderr[:-STDERR_BYTES]
        if not data:
            self._close_stderr()

    def _close_stderr(self) -> None:
        stream = self._popen.stderr
        if stream is not None and not stream.closed:
            self._loop.remove_reader(stream.fileno())
            stream.close()

    def _reap(self) -> None:
        """Called once, when the pidfd says that the process has ended."""
        self._loop.remove_reader(self._pidfd)
        os.close(self._pidfd)
        self._pidfd = -1
        status = self._popen.wait()
        self._read_stderr()  # at most a pipe's worth is left
        self._close_stderr()
        if not self._exited.done():
            self._exited.set_result(status)


def spawn(argv: Sequence[str], *, keep: Sequence[int]) -> Process:
    """Start QEMU: new session, minimal environment, umask 077, no descriptors but `keep`, gone when we are.

    Must run on the main thread and inside a running event loop. Raises HostNotReady.
    """
    assert threading.current_thread() is threading.main_thread(), "PDEATHSIG follows the spawning thread"
    try:
        popen = subprocess.Popen(
            argv,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            pass_fds=tuple(keep),
            env=dict(ENVIRONMENT),
            umask=0o077,
            cwd="/",
            start_new_session=True,  # a Ctrl-C at somebody's terminal is not meant for the VM
            preexec_fn=_die_with(os.getpid()),  # noqa: PLW1509 - one C call, prepared here; nothing is imported or locked
        )
    except OSError as error:
        raise HostNotReady(f"{argv[0]} cannot be run: {error.strerror}", hint=INSTALL_HINT) from error
    try:
        return Process(popen)
    except BaseException:
        popen.kill()
        popen.wait()
        raise


def _die_with(parent: int) -> Callable[[], None]:
    """What the child does between fork and exec: ask for SIGKILL at our death, and make sure that we still live."""
    prctl, getppid, exit_now, sigkill = _libc.prctl, os.getppid, os._exit, int(signal.SIGKILL)

    def in_child() -> None:
        # We may have died before the call: then the parent is another by now, and no signal will ever come.
        if prctl(_PR_SET_PDEATHSIG, sigkill) != 0 or getppid() != parent:
            exit_now(1)

    return in_child
