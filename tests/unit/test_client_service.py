"""Starting the service when none runs."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

import capsem
from capsem.client import service
from capsem.client.sync import Client
from capsem.config import Paths
from capsem.model.errors import HostNotReady
from contract import fake_service

SOURCE = str(Path(capsem.__file__).parent.parent)
COMMAND = [sys.executable, str(fake_service.__file__)]


class Home:
    def __init__(self, directory: str) -> None:
        self.path = Path(directory).resolve()
        self.environ = {
            "PATH": os.environ["PATH"],
            "PYTHONPATH": SOURCE,
            "CAPSEM_HOME": directory,
            "CAPSEM_RUN_DIR": f"{directory}/run",
        }
        self.paths = Paths.from_environment(self.environ)

    def pid(self) -> int:
        return int((self.paths.run_dir / "pid").read_text())


@pytest.fixture
def home() -> Iterator[Home]:
    with tempfile.TemporaryDirectory(prefix="capsem-") as directory:
        made = Home(directory)
        yield made
        if (made.paths.run_dir / "pid").exists():
            os.kill(made.pid(), signal.SIGKILL)


def test_it_is_started_and_lives_on(home: Home) -> None:
    service.start(home.paths, home.environ, command=COMMAND)
    assert Client(home.paths.uds_path).call("version") == {"version": "1.2.3"}
    assert json.loads((home.paths.run_dir / "argv").read_text()) == ["--foreground"]
    assert os.getsid(home.pid()) == home.pid()  # a Ctrl-C in our terminal is not for it
    assert (home.paths.run_dir / service.LOG_NAME).stat().st_mode & 0o777 == 0o600


def test_a_client_starts_it_once(home: Home) -> None:
    started = []

    def start() -> None:
        started.append(True)
        service.start(home.paths, home.environ, command=COMMAND)

    client = Client(home.paths.uds_path, start=start)
    assert client.call("list")["sandboxes"]
    assert client.call("list")["sandboxes"]
    assert started == [True]


def test_another_socket_is_passed_on(home: Home) -> None:
    paths = Paths.from_environment({**home.environ, "CAPSEM_UDS_PATH": str(home.path / "other.sock")})
    service.start(paths, home.environ, command=COMMAND)
    assert json.loads((home.paths.run_dir / "argv").read_text()) == ["--foreground", "--uds-path", str(paths.uds_path)]


def test_one_that_fails_is_quoted(home: Home) -> None:
    with pytest.raises(HostNotReady, match=r"exit status 1: no image \| cannot go on") as caught:
        service.start(home.paths, {**home.environ, "FAKE_SERVICE_FAILS": "1"}, command=COMMAND)
    assert "service-start.log" in str(caught.value.hint)


def test_one_that_takes_its_time_is_told_of(home: Home) -> None:
    told: list[str] = []
    service.start(home.paths, {**home.environ, "FAKE_SERVICE_DELAY": "1.3"}, command=COMMAND, notify=told.append)
    assert told == ["starting capsem-service"]


def test_one_that_never_answers(home: Home) -> None:
    script = home.path / "silent"
    script.write_text("#!/bin/sh\nexec sleep 2\n")
    script.chmod(0o755)
    with pytest.raises(HostNotReady, match=r"did not answer at .* within 0\.3 s: it said nothing"):
        service.start(home.paths, home.environ, command=[str(script)], within=0.3)


def test_one_that_finds_another_is_waited_for(home: Home) -> None:
    """It exits with 0 when another service was first; that one is about to answer."""
    home.paths.run_dir.mkdir(parents=True)
    environ = {**home.environ, "FAKE_SERVICE_DELAY": "0.3"}
    first = subprocess.Popen([*COMMAND, "--foreground"], env=environ)
    reaper = threading.Thread(target=first.wait)
    reaper.start()
    service.start(home.paths, home.environ, command=["/bin/true"])
    os.kill(home.pid(), signal.SIGKILL)
    (home.paths.run_dir / "pid").unlink()
    reaper.join(10)


def test_there_is_no_such_program(home: Home) -> None:
    with pytest.raises(HostNotReady, match="cannot start"):
        service.start(home.paths, home.environ, command=["/no/such/program"])


def test_a_run_directory_that_cannot_be_made(home: Home) -> None:
    (home.path / "run").write_text("a file")
    with pytest.raises(HostNotReady, match="cannot be used"):
        service.start(home.paths, home.environ, command=COMMAND)


def test_where_the_program_is_looked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def program(directory: str) -> Path:
        path = tmp_path / directory / "capsem-service"
        path.parent.mkdir()
        path.touch(mode=0o755)
        return path

    in_path, beside_python, beside_us = program("path"), program("python"), program("us")
    environ = {"PATH": str(in_path.parent)}
    monkeypatch.setattr(sys, "argv", [str(beside_us.with_name("capsem"))])
    monkeypatch.setattr(sys, "executable", str(beside_python.with_name("python3")))
    assert service.find_command(environ) == [str(beside_us)]
    beside_us.unlink()
    assert service.find_command(environ) == [str(beside_python)]
    beside_python.unlink()
    assert service.find_command(environ) == [str(in_path)]
    assert service.find_command({"PATH": "/nowhere"}) == [sys.executable, "-m", "capsem.service"]
