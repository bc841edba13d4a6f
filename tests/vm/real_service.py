"""A real service with real VMs, for tests."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from capsem.client.sync import Client
from capsem.image.catalog import Catalog
from capsem.model.errors import CapsemError

BIN = Path(sys.executable).parent
SMALL = {"ram_mb": 512, "cpus": 1}
PATIENCE = 120.0  # seconds for what must come true, however busy the machine


@dataclass
class Service:
    """A capsem-service of its own, in a fresh home, with the command line to it."""

    home: Path
    process: subprocess.Popen[bytes]

    @property
    def run_dir(self) -> Path:
        return self.home / "run"

    @property
    def socket(self) -> Path:
        return self.run_dir / "service.sock"

    @property
    def client(self) -> Client:
        return Client(self.socket)

    @property
    def env(self) -> dict[str, str]:
        return environment(self.home)

    def cli(self, *arguments: str, stdin: bytes = b"", limit: float = 120) -> subprocess.CompletedProcess[bytes]:
        return subprocess.run(
            [BIN / "capsem", *arguments], input=stdin, env=self.env, capture_output=True, timeout=limit
        )

    def start_cli(self, *arguments: str) -> subprocess.Popen[bytes]:
        return subprocess.Popen([BIN / "capsem", *arguments], env=self.env, stdout=subprocess.DEVNULL)

    def exec(self, vm_id: str, command: str, **body: object) -> tuple[int, str, str]:
        answer = self.client.call("exec", vm_id=vm_id, body={"command": command, **body})
        return answer["exit_code"], answer["stdout"], answer["stderr"]

    def output(self, vm_id: str, command: str) -> str:
        code, out, err = self.exec(vm_id, command)
        assert code == 0, (command, code, out, err)
        return out

    def status(self, vm_id: str) -> str:
        return str(self.client.call("info", vm_id=vm_id)["status"])

    def restart(self, **env: str) -> None:
        self.process = start_process(self.home, **env)
        wait_until_it_answers(self.client)

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait(PATIENCE)


def environment(home: Path) -> dict[str, str]:
    return {
        **os.environ,
        "HOME": str(home),
        "CAPSEM_HOME": str(home),
        "CAPSEM_RUN_DIR": str(home / "run"),
        "CAPSEM_TEMPLATES": "off",
    }


def start_process(home: Path, *options: str, **env: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen([BIN / "capsem-service", "--foreground", *options], env=environment(home) | env)


def wait_until_it_answers(client: Client, limit: float = PATIENCE) -> None:
    deadline = time.monotonic() + limit
    while True:
        try:
            client.call("version")
        except CapsemError:
            assert time.monotonic() < deadline, "the service does not answer"
            time.sleep(0.02)
        else:
            return


def wait_for(condition: object, limit: float = PATIENCE) -> None:
    """Wait until a condition of the outside world holds; the limit is for what never comes, not for how fast it does."""
    assert callable(condition)
    deadline = time.monotonic() + limit
    while not condition():
        assert time.monotonic() < deadline, "it did not come true in time"
        time.sleep(0.02)


def alive(pid: int) -> bool:
    """Whether a process exists and is no zombie."""
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def children(pid: int) -> list[int]:
    """Processes started by `pid`."""
    return [
        int(word) for task in Path(f"/proc/{pid}/task").iterdir() for word in (task / "children").read_text().split()
    ]


@contextlib.contextmanager
def running_service(home: Path | None = None, **env: str) -> Iterator[Service]:
    """A service in `home`, else in a fresh one that goes with it. VMs boot, unless `env` has it otherwise: what tests count
    and break is their own VMs'."""
    Catalog.from_environment(os.environ).find()  # says how to make it when it is missing
    # A short path: sockets have to fit.
    with tempfile.TemporaryDirectory(prefix="capsem-vm-") as text:
        place = home or Path(text)
        service = Service(place, start_process(place, **env))
        try:
            wait_until_it_answers(service.client)
            yield service
        finally:
            service.stop()
