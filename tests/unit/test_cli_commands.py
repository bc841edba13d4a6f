"""The command line as a process, against a scripted service."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import shutil
import signal
import subprocess
import sys
import tarfile
import termios
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import capsem
from capsem.api.exec_types import ExecRequest, JobInfo, RunRequest
from capsem.api.usage_types import PoolUsage
from capsem.api.vm_types import ProvisionRequest
from capsem.cli.main import ALIASES, COMMANDS, main
from capsem.model.lifecycle import State
from contract.fake_service import FakeService, fake_service

SOURCE = str(Path(capsem.__file__).parent.parent)


@pytest.fixture
def service() -> Iterator[FakeService]:
    with fake_service() as running:
        yield running


def environment(**more: str) -> dict[str, str]:
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("CAPSEM_", "RUST_LOG"))}
    return {**kept, "PYTHONPATH": SOURCE, "HOME": "/nonexistent", **more}


def start(service: FakeService | None, *args: str, **options: object) -> subprocess.Popen[bytes]:
    uds = [] if service is None else ["--uds-path", str(service.path)]
    given: dict[str, object] = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    argv = [sys.executable, "-m", "capsem", *uds, *args]
    return subprocess.Popen(argv, env=environment(), **(given | options))  # type: ignore[call-overload,no-any-return]


def run(service: FakeService | None, *args: str, stdin: bytes | None = None) -> tuple[int, str, str]:
    process = start(service, *args, **({} if stdin is None else {"stdin": subprocess.PIPE}))
    out, err = process.communicate(stdin, timeout=60)
    assert b"\x1b" not in out + err
    return process.returncode, out.decode(), err.decode()


def test_list(service: FakeService) -> None:
    code, out, err = run(service, "list")
    assert (code, err) == (0, "")
    head, *rows = out.splitlines()
    assert head.split() == ["ID", "NAME", "STATUS", "RAM", "CPUs", "UPTIME"]
    assert [row.split() for row in rows] == [
        ["box", "box", "Running", "512M", "1", "1m23s"],
        ["off", "off", "Stopped", "-", "-", "-"],
        ["broken", "-", "Defunct", "-", "-", "-"],
        ["last", "error:", "kernel", "panic"],
    ]
    assert run(service, "ls", "-q") == (0, "box\noff\nbroken\n", "")
    assert [box["id"] for box in json.loads(run(service, "ls", "--json")[1])["sandboxes"]] == ["box", "off", "broken"]
    service.manager.states.clear()
    assert run(service, "list") == (0, "No sessions.\n", "")
    assert run(service, "list", "--quiet") == (0, "", "")


def test_create(service: FakeService) -> None:
    assert run(service, "create") == (0, "calm-otter-tmp\n", "")
    request = service.manager.requests[-1]
    assert request == ProvisionRequest()
    assert run(
        service, "create", "--name", "new", "--ram", "0.5", "--cpu", "2", "--disk", "4", "-e", "A=b=c", "-e", "E="
    )[1] == ("new (persistent)\n")
    request = service.manager.requests[-1]
    assert request == ProvisionRequest(
        name="new", ram_mb=512, cpus=2, disk_mb=4096, persistent=True, env={"A": "b=c", "E": ""}
    )
    del service.manager.states["calm-otter-tmp"]
    assert run(service, "create", "-n", "coder", "--profile", "code")[0] == 0
    assert service.manager.requests[-1] == ProvisionRequest(name="coder", persistent=True, profile="code")
    assert run(service, "create", "--image", "off")[1] == "calm-otter-tmp (persistent)\n"
    assert service.manager.requests[-1] == ProvisionRequest(from_="off", persistent=True)


def test_changes(service: FakeService) -> None:
    assert run(service, "stop", "box") == (0, "Session stopped.\n", "")
    assert run(service, "attach", "box") == (0, "box\n", "")
    assert run(service, "resume", "box") == (0, "box\n", "")
    assert run(service, "rm", "box") == (0, "Session deleted.\n", "")
    code, out, err = run(service, "delete", "box")
    assert (code, out) == (1, "")
    assert err == "error: no VM is called box\nhint: capsem list shows those there are\n"


def test_info_and_logs(service: FakeService) -> None:
    assert json.loads(run(service, "info", "box", "--json")[1])["pid"] == 4242
    out = run(service, "info", "broken")[1]
    assert re.search(r"^status +Defunct$", out, re.MULTILINE)
    assert "kernel panic" in out
    out = run(service, "logs", "box")[1]
    assert "Linux version 6\nready\n" in out
    assert "started\nended\n" in out
    assert run(service, "logs", "box", "--tail", "1")[1].splitlines() == [
        "== console ==",
        "ready",
        "== process.log ==",
        "ended",
    ]


def test_exec(service: FakeService) -> None:
    assert run(service, "exec", "box", "both") == (0, "out\n", "err\n")
    assert run(service, "exec", "--timeout", "5", "box", "exit 7") == (7, "", "")
    assert run(service, "exec", "box", "exit 7", "--timeout", "1.5", "-e", "A=b", "-w", "/tmp")[0] == 7
    asked = service.manager.requests[-1]
    assert isinstance(asked, ExecRequest)
    assert asked.job  # chosen here, so that the run is found again when the connection breaks
    assert asked == ExecRequest(command="exit 7", timeout_secs=1.5, env={"A": "b"}, cwd="/tmp", job=asked.job)
    assert run(service, "exec", "box", "exit 256")[0] == 1
    assert run(service, "exec", "box", "exit -1")[0] == 255
    assert run(service, "exec", "box", "--", "echo", "a b", "-c")[1] == "'a b' -c\n"
    assert run(service, "exec", "box", "cat", stdin=b"nobody reads this")[1] == ""
    code, out, err = run(service, "exec", "box", "timeout")
    assert (code, out) == (124, "so far\n")
    assert err == "error: timed out after 1s\n"
    code, out, err = run(service, "exec", "box", "big")
    assert (code, len(out)) == (0, 3 * 1024 * 1024)
    assert err.startswith("note: ")
    assert run(service, "exec", "off", "echo")[2].startswith("error: off is not running\nhint: ")


def test_exec_with_input(service: FakeService) -> None:
    data = bytes(range(256)) * 8192
    process = start(service, "exec", "-i", "box", "cat", stdin=subprocess.PIPE)
    out, err = process.communicate(data, timeout=60)
    assert (process.returncode, out == data, err) == (0, True, b"")


def test_exec_ends_though_its_input_does_not(service: FakeService) -> None:
    process = start(service, "exec", "--stdin", "box", "exit 3", stdin=subprocess.PIPE)
    assert process.wait(60) == 3
    process.communicate()


def test_output_arrives_as_it_is_made(service: FakeService) -> None:
    service.manager.go_on.clear()
    process = start(service, "exec", "box", "slow")
    assert process.stdout is not None
    assert process.stdout.readline() == b"one\n"
    assert process.poll() is None
    service.manager.go_on.set()
    assert process.communicate(timeout=60) == (b"two\n", b"")


@pytest.mark.parametrize("args", [("exec", "box", "sleep"), ("exec", "-i", "box", "sleep"), ("run", "sleep")])
def test_ctrl_c_ends_the_command(service: FakeService, args: tuple[str, ...]) -> None:
    process = start(service, *args, stdin=subprocess.PIPE)
    assert service.manager.started.wait(60)
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 130
    assert service.manager.cancelled.wait(5)
    out, err = process.communicate()
    assert (out, err) == (b"", b"")


def test_a_reader_that_goes_away_ends_the_command_quietly(service: FakeService) -> None:
    process = start(service, "exec", "box", "yes")
    assert process.stdout is not None
    assert process.stdout.read(2) == b"y\n"
    process.stdout.close()
    assert process.wait(60) == 141
    assert service.manager.cancelled.wait(5)
    assert process.stderr is not None
    assert process.stderr.read() == b""
    process.stderr.close()


def test_run(service: FakeService) -> None:
    assert run(service, "run", "both") == (0, "out\n", "err\n")
    assert run(service, "run", "--timeout", "9", "-e", "A=b", "--profile", "code", "exit 3")[0] == 3
    asked = next(request for request in reversed(service.manager.requests) if isinstance(request, RunRequest))
    assert asked == RunRequest(command="exit 3", timeout_secs=9, env={"A": "b"}, profile="code")
    assert run(service, "run", "timeout")[0] == 124


@pytest.mark.parametrize(
    "args",
    [
        ("exec", "", "true"),
        ("exec", "a/b", "true"),
        ("info", "a\\b"),
        ("delete", ".."),
        ("stop", "x..y"),
        ("create", "--from", "../x"),
        ("create", "-e", "novalue"),
        ("create", "-e", "=x"),
        ("create", "--ram", "nan"),
        ("create", "--ram", "0"),
        ("exec", "box", "true", "--timeout", "-1"),
        ("exec", "box"),
        ("nonsense",),
        ("list", "--nonsense"),
        ("info",),
        ("create", "-n", "-bad"),
        ("create", "-n", ""),
        ("create", "-n", "a" * 65),
        ("create", "--cpu", "x"),
    ],
)
def test_mistakes_exit_with_2(service: FakeService, args: tuple[str, ...]) -> None:
    code, out, err = run(service, *args)
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert "\nhint: " in err
    assert not service.manager.requests


def test_what_was_meant_is_told(service: FakeService) -> None:
    assert run(service, "lst")[2].startswith("error: No such command 'lst'. (Did you mean one of: 'list', ")
    for verb in ("exec", "run"):
        words = (verb, "box", "ls", "-l")
        assert run(service, *words)[2].endswith(
            f"hint: capsem {verb} --help; options of the command in the VM go after a --\n"
        )
    assert run(service, "list", "-l")[2].endswith("hint: capsem list --help\n")


def test_no_service_at_the_socket_that_was_named(tmp_path: Path) -> None:
    process = start(None, "--uds-path", str(tmp_path / "none.sock"), "list")
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (1, b"")
    assert b"error: cannot connect" in err
    assert list(tmp_path.iterdir()) == []


def test_a_socket_with_a_long_path(service: FakeService, tmp_path: Path) -> None:
    directory = tmp_path / ("d" * 100)
    directory.mkdir()
    link = directory / "service.sock"
    link.symlink_to(service.path)
    assert len(str(link)) > 108
    process = start(None, "--uds-path", str(link), "list", "-q")
    assert process.communicate(timeout=60) == (b"box\noff\nbroken\n", b"")


def test_version_and_completions_need_no_service() -> None:
    code, out, err = run(None, "version")
    assert (code, err) == (0, "")
    assert out.startswith(f"capsem {capsem.__version__} ")
    assert json.loads(run(None, "version", "--json")[1])["version"] == capsem.__version__
    for shell in ("bash", "zsh", "fish"):
        assert "_CAPSEM_COMPLETE" in run(None, "completions", shell)[1]


def test_df(service: FakeService) -> None:
    code, out, err = run(service, "df")
    assert (code, err) == (0, "")
    assert [line.split() for line in out.splitlines()] == [
        ["VM", "OWN", "SHARED", "MEMORY", "MAKING", "SESSION"],
        ["box", "3M", "5M", "0B", "0B", "4K"],
        [],
        ["IMAGE", "SIZE", "VMS"],
        ["default-dddddddddddd", "188M", "1"],
        [],
        ["layers", "9M"],
        ["memory", "0B"],
        ["in", "the", "making", "0B"],
        ["unreferenced", "1M"],
        ["failed", "VMs", "0B"],
        ["total", "197M"],
        ["free", "0B"],
    ]
    assert json.loads(run(service, "df", "--json")[1])["vms"][0]["id"] == "box"


def test_a_trace_is_written(service: FakeService, tmp_path: Path) -> None:
    file = tmp_path / "trace.json"
    assert run(service, "--trace", str(file), "list")[0] == 0
    events = json.loads(file.read_text())["traceEvents"]
    names = {event["pid"]: event["args"]["name"] for event in events if event["name"] == "process_name"}
    spans = sorted((event["ts"], names[event["pid"]], event["name"]) for event in events if event["ph"] == "X")
    assert [span[1:] for span in spans] == [
        ("capsem", "start the program, import"),
        ("capsem", "list"),
        ("capsem-service", "GET /list"),
    ]
    assert spans[0][0] == 0
    # Whatever becomes of the command, and where there is no service.
    assert run(service, "--trace", str(file), "exec", "box", "exit 3")[0] == 3
    assert "stream" in file.read_text()
    assert run(None, "--trace", str(file), "version")[0] == 0
    assert len(json.loads(file.read_text())["traceEvents"]) == 3
    code, _, err = run(service, "--trace", str(tmp_path / "no" / "such"), "delete", "box")
    assert (code, service.manager.states["box"]) == (1, State.RUNNING)
    assert "No such file" in err


def test_commands_of_a_vm_that_had_none_and_that_had_some(service: FakeService) -> None:
    assert run(service, "jobs", "box") == (0, "No jobs.\n", "")
    assert run(service, "top")[1].splitlines()[1].split()[-1] == "-"
    service.manager.commands = [
        JobInfo(id="a", command="true", running=False, exit_code=0),
        JobInfo(id="b", command="make all", running=True),
    ]
    assert [row.split() for row in run(service, "jobs", "box")[1].splitlines()[1:]] == [
        ["a", "exit", "0", "true"],
        ["b", "running", "make", "all"],
    ]
    assert run(service, "top")[1].splitlines()[1].endswith("make all")


def test_the_pool_is_shown_where_memory_is(service: FakeService) -> None:
    line = "pool: 1 of 3 ready, 130M of memory"
    for short, more in ((False, ""), (True, "; the host has too little memory for more")):
        service.manager.pool = PoolUsage(wanted=3, ready=1, memory_bytes=130 << 20, short=short)
        assert run(service, "df")[1].splitlines()[-1] == line + more
        assert run(service, "top")[1].splitlines()[-1] == line + more


def test_the_state_of_the_service(service: FakeService) -> None:
    code, out, err = run(service, "status")
    assert (code, err) == (0, "")
    assert re.search(r"^running +yes\nversion +1\.2\.3\nrunning_vms +1$", out, re.MULTILINE)
    assert run(service, "start") == (0, "capsem-service 1.2.3 is running.\n", "")
    # What listens there is not a capsem-service, so it is let alone.
    code, _, err = run(service, "stop")
    assert code == 1
    assert err.startswith("error: no capsem-service runs in ")


def test_a_service_that_is_not_there(tmp_path: Path) -> None:
    path = ["--uds-path", str(tmp_path / "s.sock")]
    code, out, _ = run(None, *path, "status", "--json")
    assert code == 1
    assert json.loads(out) == {
        "running": False,
        "version": None,
        "pid": None,
        "running_vms": None,
        "socket": str(tmp_path / "s.sock"),
        "run_dir": str(tmp_path),
    }
    for command in ("start", "stop"):
        code, out, err = run(None, *path, command)
        assert (code, out) == (1, "")
        assert err.startswith("error: ")


def test_sessions_are_completed(service: FakeService) -> None:
    words = f"capsem --uds-path {service.path} info b"
    process = subprocess.run(
        [sys.executable, "-m", "capsem"],
        env=environment(_CAPSEM_COMPLETE="bash_complete", COMP_WORDS=words, COMP_CWORD="4"),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert process.stdout.split() == ["plain,box", "plain,broken"]
    assert process.returncode == 0


def test_without_a_command_help_is_shown() -> None:
    code, out, err = run(None)
    assert (code, out) == (2, "")
    assert "Usage: capsem" in err


@pytest.mark.parametrize("command", [*COMMANDS, *ALIASES])
def test_every_command_has_help_with_an_example(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command, "--help"]) == 0
    out = capsys.readouterr().out
    assert "Example" in out
    assert "capsem " in out.partition("Example")[2]
    assert all(len(line) <= 100 for line in out.splitlines())


def test_list_imports_nothing_heavy(service: FakeService) -> None:
    """What would be felt in every call: each of these costs 10 ms or more."""
    heavy = (
        "asyncio msgspec dataclasses pathlib http.client email subprocess tomllib urllib.parse logging rich starlette"
    )
    code = (
        f"import sys; from capsem.cli.main import main; main(['--uds-path', {str(service.path)!r}, 'list']);"
        f"print([name for name in {heavy.split()!r} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True, timeout=60)
    assert done.stdout.splitlines()[-1] == "[]", done.stdout + done.stderr


def test_an_unexpected_failure_is_told_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*_args: object, **_more: object) -> None:
        raise RuntimeError("odd\x1b[31m")

    monkeypatch.setattr("capsem.cli.context.Context.client", broken)
    monkeypatch.setenv("CAPSEM_LOG", "")
    monkeypatch.setenv("RUST_LOG", "")
    assert main(["list"]) == 1
    assert capsys.readouterr().err.startswith("error: unexpected RuntimeError: odd\nhint: ")


def _on_a_terminal(process: subprocess.Popen[bytes], ours: int, until: bytes) -> bytes:
    shown = b""
    deadline = time.monotonic() + 15
    while until not in shown and time.monotonic() < deadline:
        if select.select([ours], [], [], 1)[0]:
            try:
                shown += os.read(ours, 1000)
            except OSError:  # the terminal's other end is closed
                break
    return shown


@pytest.mark.parametrize("interrupted", [False, True])
def test_on_a_terminal_waiting_is_shown_and_taken_back(service: FakeService, interrupted: bool) -> None:
    ours, theirs = pty.openpty()
    process = start(service, "run", "sleep" if interrupted else "nap", stderr=theirs)
    os.close(theirs)
    shown = _on_a_terminal(process, ours, b"1 s")
    if interrupted:
        process.send_signal(signal.SIGINT)
    shown += _on_a_terminal(process, ours, b"never")
    assert process.wait(60) == (130 if interrupted else 0)
    process.communicate()
    os.close(ours)
    assert b"\rrunning in a new VM ... 1 s" in shown
    assert b"\x1b" not in shown
    assert shown.endswith(b"\n" if interrupted else b" \r")


@pytest.mark.parametrize(("size", "wanted"), [((0, 0), b"broken"), ((24, 12), b"broken"), ((4, 80), b"box")])
def test_top_fits_the_terminal_and_one_that_does_not_tell_its_size(
    service: FakeService, size: tuple[int, int], wanted: bytes
) -> None:
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, size)
    process = start(service, "top", stdout=theirs)
    os.close(theirs)
    shown = _on_a_terminal(process, ours, wanted)
    process.send_signal(signal.SIGINT)
    process.communicate()
    os.close(ours)
    assert shown.startswith(b"\x1b[H\x1b[JID")
    assert wanted in shown
    if size[0]:
        assert (b"broken" in shown) == (size[0] > 5)
        assert max(map(len, shown.removeprefix(b"\x1b[H\x1b[J").splitlines())) <= size[1]


def test_version_as_an_option() -> None:
    assert run(None, "--version") == run(None, "version")


def test_update_tells_and_changes_nothing() -> None:
    code, out, err = run(None, "update")
    assert (code, err) == (0, "")
    assert f"{sys.executable} -m pip install --upgrade" in out


@pytest.mark.parametrize(("typed", "expected"), [("sto", "stop"), ("completions fi", "fish"), ("info br", "broken")])
def test_completion_in_a_real_bash(service: FakeService, tmp_path: Path, typed: str, expected: str) -> None:
    """The script is sourced, and its function called as readline calls it."""
    words = ["capsem", "--uds-path", str(service.path), *typed.split()]
    program = tmp_path / "capsem"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -m capsem "$@"\n')
    program.chmod(0o755)
    script = f"""
        eval "$(capsem completions bash)"
        COMP_WORDS=({" ".join(words)}) COMP_CWORD={len(words) - 1} COMP_LINE="{" ".join(words)}"
        name=$(complete -p capsem | sed 's/.*-F \\([^ ]*\\) .*/\\1/')
        $name capsem "{words[-1]}" "{words[-2]}"
        printf '%s\\n' "${{COMPREPLY[@]}}"
    """
    env = environment()
    env["PATH"] = f"{tmp_path}:{env['PATH']}"
    done = subprocess.run(["bash", "-c", script], env=env, capture_output=True, text=True, timeout=60)
    assert done.stdout.split() == [expected], done.stderr


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_completion_scripts_are_scripts(shell: str) -> None:
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed")
    script = run(None, "completions", shell)[1]
    subprocess.run([shell, "-n"], input=script, text=True, check=True, timeout=60)


def test_a_support_bundle_is_written_without_a_service(tmp_path: Path) -> None:
    report = tmp_path / "report.tar.gz"
    process = subprocess.run(
        [sys.executable, "-m", "capsem", "support-bundle", report],
        env=environment(CAPSEM_HOME=str(tmp_path / "home")),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (process.returncode, process.stdout) == (0, f"report: {report}\n"), process.stderr
    with tarfile.open(report) as archive:
        assert any(name.endswith("doctor.json") for name in archive.getnames()), archive.getnames()
    assert not (tmp_path / "home/run/service.sock").exists()
