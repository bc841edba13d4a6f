"""`capsem secret` as a process, against a service with settings of its own."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import keyring
import keyring.backends.fail
import pytest

import capsem
from capsem.api.exec_types import RunRequest
from capsem.api.vm_types import ProvisionRequest
from contract.fake_service import FakeService, fake_service

SOURCE = str(Path(capsem.__file__).parent.parent)


@pytest.fixture
def service(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeService]:
    monkeypatch.setattr(keyring, "get_keyring", keyring.backends.fail.Keyring)
    with fake_service() as running:
        running.manager.settle({"CAPSEM_HOME": str(tmp_path), "FROM_HERE": "value"}, tmp_path)
        yield running


def environment() -> dict[str, str]:
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("CAPSEM_", "RUST_LOG"))}
    return {**kept, "PYTHONPATH": SOURCE, "HOME": "/nonexistent"}


def run(service: FakeService, *args: str, stdin: str = "") -> tuple[int, str, str]:
    argv = [sys.executable, "-m", "capsem", "--uds-path", str(service.path), *args]
    done = subprocess.run(argv, env=environment(), input=stdin, capture_output=True, text=True, timeout=60)
    return done.returncode, done.stdout, done.stderr


def test_a_value_comes_in_and_never_out(service: FakeService, tmp_path: Path) -> None:
    home = tmp_path.resolve()
    assert run(service, "secret", "ls") == (0, "No secrets.\n", "")
    code, out, err = run(
        service, "secret", "set", "key", "--host", "api.test", "--host", "*.b.test", "--env", "K", "--query", stdin="hidden\n"
    )  # fmt: skip
    assert (code, err) == (0, "")
    assert out == f"key: keyring:capsem/key, kept in {home / 'secrets.json'}; for api.test, *.b.test\n"
    assert json.loads((home / "secrets.json").read_text()) == {"capsem/key": "hidden"}
    assert run(service, "secret", "test", "key")[:1] == (0,)
    code, out, err = run(service, "secret", "ls")
    assert (code, err) == (0, "")
    assert [line.split() for line in out.splitlines()] == [
        ["NAME", "SOURCE", "HOSTS", "VARIABLE", "LENT", "TO"],
        ["key", "keyring:capsem/key", "api.test,*.b.test", "K", "-"],
    ]
    shown = run(service, "secret", "ls", "--json")[1]
    assert "hidden" not in shown
    assert json.loads(shown)["secrets"][0]["query"] is True
    assert run(service, "secret", "rm", "key") == (0, "key is removed.\n", "")
    assert json.loads((home / "secrets.json").read_text()) == {}
    assert run(service, "secret", "rm", "key")[0] == 1


def test_sources(service: FakeService) -> None:
    assert run(service, "secret", "set", "a", "--host", "a.test", "--source", "env:FROM_HERE")[0] == 0
    code, out, _ = run(service, "secret", "test", "a")
    assert (code, out[:15]) == (0, "a: 5 characters")
    assert run(service, "secret", "set", "a", "--host", "a.test", "--source", "env:NOT_HERE")[0] == 0
    code, out, err = run(service, "secret", "test", "a")
    assert (code, out, err) == (1, "", "a: the service has no variable NOT_HERE\n")
    code, out, err = run(service, "secret", "set", "a", "--host", "*", "--source", "env:FROM_HERE")
    assert code == 2
    assert "may go anywhere is none" in err
    code, out, err = run(
        service,
        "secret",
        "set",
        "b",
        "--host",
        "b.test",
        "--source",
        "command:gh auth token",
        "--header",
        "X-Key",
        "--no-basic",
    )
    assert (code, out) == (0, "b: command:gh; for b.test\n")
    assert run(service, "secret", "set", "b", "--host", "b.test", "--header", "X", "--no-header", stdin="v")[0] == 2
    assert run(service, "secret", "set", "b", stdin="v")[0] == 2


def test_a_value_that_is_typed_is_not_shown(service: FakeService, tmp_path: Path) -> None:
    main, child = pty.openpty()
    argv = [sys.executable, "-m", "capsem", "--uds-path", str(service.path), "secret", "set", "key", "--host", "a.test"]
    process = subprocess.Popen(argv, env=environment(), stdin=child, stdout=child, stderr=child, start_new_session=True)
    os.close(child)
    shown = b""
    while b"Value of key" not in shown:
        shown += os.read(main, 1000)
    os.write(main, b"typed-value\n")
    while b"kept in" not in shown:
        shown += os.read(main, 1000)
    assert process.wait(60) == 0
    os.close(main)
    assert b"typed-value" not in shown
    assert "typed-value" in (tmp_path / "secrets.json").read_text()


def test_vms_that_are_lent_something(service: FakeService) -> None:
    assert run(service, "create", "-n", "new", "--secret", "a", "--secret", "b")[0] == 0
    assert service.manager.requests[-1] == ProvisionRequest(name="new", persistent=True, secrets=["a", "b"])
    assert run(service, "run", "--secret", "a", "true")[0] == 0
    assert RunRequest("true", secrets=["a"]) in service.manager.requests
