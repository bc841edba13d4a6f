"""The service as a process: a real one without VMs; what systemd is told."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import capsem
from capsem.client import daemon
from capsem.config import Paths
from capsem.model.errors import TimedOut, Unavailable

SOURCE = str(Path(capsem.__file__).parent.parent)


@pytest.fixture
def home() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="capsem-") as text:
        yield Path(text)


def environment(home: Path) -> dict[str, str]:
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("CAPSEM_", "RUST_LOG", "XDG_"))}
    return {
        **kept,
        "PYTHONPATH": SOURCE,
        "HOME": str(home),
        "CAPSEM_HOME": str(home),
        "XDG_RUNTIME_DIR": "/nonexistent",
    }


def cli(home: Path, *args: str) -> tuple[int, str, str]:
    done = subprocess.run(
        [sys.executable, "-m", "capsem", *args], env=environment(home), capture_output=True, text=True, timeout=60
    )
    return done.returncode, done.stdout, done.stderr


def test_companions_are_accepted_and_left_alone(home: Path) -> None:
    """interface.md 1.2: a gateway or a tray that is missing or fails does not keep the service from starting."""
    options = "--foreground --gateway-binary /nonexistent/a --gateway-port 0 --tray-binary /nonexistent/b".split()
    process = subprocess.Popen([sys.executable, "-m", "capsem.service", *options], env=environment(home))
    try:
        deadline = time.monotonic() + 15
        while json.loads(cli(home, "status", "--json")[1])["pid"] != process.pid:
            assert process.poll() is None
            assert time.monotonic() < deadline
        assert not Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text()
    finally:
        process.terminate()
        assert process.wait(15) == 0


def test_start_status_stop(home: Path) -> None:
    assert cli(home, "status")[0] == 1
    assert cli(home, "stop")[0] == 1
    assert cli(home, "start")[:2] == (0, f"capsem-service {capsem.__version__} is running.\n")
    try:
        code, out, _ = cli(home, "status", "--json")
        status = json.loads(out)
        assert code == 0
        assert (status["running"], status["version"], status["running_vms"]) == (True, capsem.__version__, 0)
        assert status["pid"] == int((home / "run/service.pid").read_text())
        assert cli(home, "start")[0] == 0
        assert json.loads(cli(home, "status", "--json")[1])["pid"] == status["pid"]
    finally:
        stopped = cli(home, "stop")
    assert stopped == (0, "Service stopped.\n", "")
    assert not alive(status["pid"])
    assert cli(home, "status")[0] == 1


def alive(pid: int) -> bool:
    """A zombie, which whoever adopted it has yet to wait for, is not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def pretender(home: Path, *, owns: bool) -> subprocess.Popen[bytes]:
    """A process called capsem-service that SIGTERM does not end, and that answers nobody."""
    code = (
        "import signal, sys, time; from pathlib import Path; from capsem.store.locks import try_lock;"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN);"
        "lock = try_lock(Path(sys.argv[1])) if sys.argv[1] else None;"
        "Path('/proc/self/comm').write_text('capsem-service'); print(flush=True); time.sleep(60)"
    )
    lock = home / "run" / daemon.OWNER_LOCK
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(lock) if owns else ""], env=environment(home), stdout=subprocess.PIPE
    )
    assert process.stdout is not None
    process.stdout.readline()
    (home / "run/service.pid").write_text(f"{process.pid}\n")
    return process


@pytest.mark.parametrize("owns", [True, False])
def test_only_the_service_of_this_run_directory_is_signalled(home: Path, owns: bool) -> None:
    (home / "run").mkdir()
    paths = Paths.from_environment({"CAPSEM_HOME": str(home)})
    process = pretender(home, owns=owns)
    try:
        assert daemon.find(paths) == (process.pid if owns else None)
        with pytest.raises(TimedOut if owns else Unavailable):
            daemon.stop(paths, within=0.2)
        assert process.poll() is None
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate()


def test_a_pid_file_left_behind_means_nothing(home: Path) -> None:
    (home / "run").mkdir()
    paths = Paths.from_environment({"CAPSEM_HOME": str(home)})
    for text in (str(os.getpid()), "x", "", "99999999999", "-1"):
        (home / "run/service.pid").write_text(text)
        assert daemon.find(paths) is None


def test_the_unit(home: Path) -> None:
    path = home / ".config/systemd/user/capsem.service"
    code, out, _ = cli(home, "install", "--dry-run")
    assert code == 0
    assert out.startswith(f"# {path}\n[Unit]\n")
    assert not path.exists()
    code, out, _ = cli(home, "install")
    assert code == 0
    assert "systemctl --user enable --now capsem.service" in out
    lines = path.read_text().splitlines()
    [start] = [line for line in lines if line.startswith("ExecStart=")]
    program = start.removeprefix("ExecStart=").split()[0].strip('"')
    assert os.access(program, os.X_OK)
    assert start.endswith('"--foreground"')
    assert {"Restart=on-failure", "KillMode=process", f'Environment="CAPSEM_HOME={home}"'} <= set(lines)
    code, out, _ = cli(home, "uninstall")
    assert code == 0
    assert not path.exists()
    assert cli(home, "uninstall")[:2] == (0, "Not installed.\n")


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed")
def test_systemd_understands_the_unit(home: Path) -> None:
    cli(home, "install")
    unit = home / ".config/systemd/user/capsem.service"
    done = subprocess.run(["systemd-analyze", "verify", "--man=no", unit], capture_output=True, text=True, timeout=60)
    complaints = [line for line in done.stderr.splitlines() if "capsem" in line]
    assert (done.returncode, complaints) == (0, []), done.stderr
    unit.write_text(unit.read_text().replace("ExecStart=", "ExecStart=relative/"))
    wrong = subprocess.run(["systemd-analyze", "verify", "--man=no", unit], capture_output=True, text=True, timeout=60)
    assert wrong.returncode != 0  # it does look


def test_odd_names_in_a_unit() -> None:
    text = daemon.unit_text(["/o p/100%$x\\"], {"CAPSEM_HOME": 'a "b" $c %h'})
    assert 'ExecStart="/o p/100%%$$x\\\\" "--foreground"' in text
    assert 'Environment="CAPSEM_HOME=a \\"b\\" $c %%h"' in text
    assert daemon.unit_path({"XDG_CONFIG_HOME": "/c", "HOME": "/h"}) == Path("/c/systemd/user/capsem.service")
    assert daemon.unit_path({"XDG_CONFIG_HOME": "c", "HOME": "/h"}) == Path("/h/.config/systemd/user/capsem.service")


def test_a_stopping_service_is_waited_for(home: Path) -> None:
    cli(home, "start")
    paths = Paths.from_environment({"CAPSEM_HOME": str(home)})
    pid = daemon.stop(paths)
    assert not alive(pid)
