"""The doctor's checks, of this host with a driver that answers at once, and of a VM that is a script."""

from __future__ import annotations

import io
import json
import os
import re
import tarfile
import time
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest

import capsem
from capsem.cli.main import main
from capsem.client import bundle, health
from capsem.client.health import Check, Status, guest_checks, host_checks
from capsem.config import Paths
from capsem.hypervisor.driver import Accelerator
from capsem.hypervisor.qemu.probe import Verdict
from capsem.model.errors import HostNotReady, LimitReached
from capsem.model.lifecycle import State
from capsem.model.spec import VmSpec
from capsem.model.vm import Exit, VmRecord
from capsem.store import records
from capsem.store.layout import Layout


class Driver:
    """Knows already."""

    verdict_of = Verdict(Accelerator.TCG, "KVM opens, but a test guest did not end", "7.2.0")

    def __init__(self, _cache: Path) -> None:
        pass

    async def verdict(self) -> Verdict:
        return self.verdict_of


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for key in list(os.environ):
        if key.startswith("CAPSEM_"):
            monkeypatch.delenv(key)
    qemu = tmp_path / "qemu"
    qemu.write_text("#!/bin/sh\necho QEMU emulator version 7.2.0\n")
    qemu.chmod(0o755)
    monkeypatch.setenv("CAPSEM_QEMU", str(qemu))
    monkeypatch.setenv("CAPSEM_HOME", str(tmp_path / "home"))
    monkeypatch.setattr("sys.prefix", str(tmp_path / "prefix"))
    monkeypatch.setattr(health, "QemuDriver", Driver)
    return tmp_path / "home"


def look(**environ: str) -> dict[str, Check]:
    known = {**os.environ, **environ}
    return {check.name: check for check in host_checks(Paths.from_environment(known), known, fast=True)}


def test_a_host_without_an_image(home: Path) -> None:
    checks = look()
    assert [checks[name].status for name in ("python", "qemu", "run directory", "settings", "service")] == ["ok"] * 5
    assert checks["accelerator"].status == "warning"
    assert "(TCG)" in checks["accelerator"].found
    assert "KVM opens, but a test guest did not end" in checks["accelerator"].found
    assert checks["image"].status == "failed"
    assert "capsem image build" in str(checks["image"].fix)
    assert (home / "run").stat().st_mode & 0o777 == 0o700
    assert all(check.fix for check in checks.values() if check.status != "ok")


def test_kvm(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Driver, "verdict_of", Verdict(Accelerator.KVM, "KVM ran a test guest in 80 ms", "7.2.0"))
    assert look()["accelerator"] == Check("accelerator", Status.OK, "KVM: KVM ran a test guest in 80 ms")
    monkeypatch.setattr(Driver, "verdict_of", Verdict(Accelerator.TCG, "/dev/kvm may not be opened by", "7.2.0"))
    assert "usermod -aG kvm" in str(look()["accelerator"].fix)


def test_what_is_missing_is_named_with_its_package(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(health, "BUILD_TOOLS", ("mmdebstrap", "mkfs.erofs"))
    monkeypatch.setattr(health.shutil, "which", lambda *_args, **_more: None)
    for user, packages in ((0, "mmdebstrap erofs-utils"), (1000, "mmdebstrap erofs-utils uidmap")):
        monkeypatch.setattr("os.geteuid", lambda user=user: user)
        tools = look()["build tools"]
        assert (tools.status, tools.fix) == ("warning", f"sudo apt-get install -y {packages}")
    monkeypatch.setenv("CAPSEM_QEMU", "/none")
    qemu = look()["qemu"]
    assert qemu.status == "failed"
    assert "qemu-system-x86" in str(qemu.fix)


def test_a_run_directory_that_cannot_be_one(home: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    checks = look(CAPSEM_RUN_DIR=str(tmp_path / "file" / "run"))
    assert checks["run directory"].status == "failed"
    assert "GiB free" in checks["disk space"].found
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o755)
    opened = look(CAPSEM_RUN_DIR=str(tmp_path / "open"))["run directory"]
    assert (opened.status, opened.fix) == ("warning", f"chmod 700 {tmp_path / 'open'}")
    assert look(CAPSEM_RUN_DIR=str(tmp_path / ("d" * 120)))["socket path"].status == "failed"


@pytest.mark.parametrize(("free", "status"), [(1 << 20, "failed"), (2 << 30, "warning"), (9 << 30, "ok")])
def test_disk_space(home: Path, monkeypatch: pytest.MonkeyPatch, free: int, status: str) -> None:
    monkeypatch.setattr(health.shutil, "disk_usage", lambda _path: type("Usage", (), {"free": free}))
    assert look()["disk space"].status == status


def test_settings(home: Path) -> None:
    home.mkdir()
    (home / "config.toml").write_text("[vm]\nodd = 1\n")
    assert look()["settings"].status == "warning"
    assert look(CAPSEM_CPU_COUNT="99")["settings"].status == "failed"


def test_the_command(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--fast"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert re.match(r"ok +python +Python 3\.", lines[0])
    assert any(re.match(r"failed +image +there is no image 'default'$", line) for line in lines)
    assert any(line.strip() == "fix: make it with: capsem image build" for line in lines)
    assert re.match(r"1 of \d+ checks failed", lines[-1])
    assert main(["doctor", "--fast", "--json"]) == 1
    listed = json.loads(capsys.readouterr().out)
    assert listed[0]["name"] == "python"
    assert {check["status"] for check in listed} <= {"ok", "warning", "failed"}


# -- a VM

GUEST: Mapping[str, tuple[int, str]] = {
    "echo out": (7, "out\n"),
    "date": (0, ""),
    "dd ": (0, "1048576\n"),
    "hostname": (0, "calm-otter-tmp\n"),
    "ls /sys/class/net": (0, "lo\ndummy0\n"),
    "awk": (0, "overlay\n"),
    "for n in": (0, "1\n"),
}


class Script:
    """A service whose one VM says what it is told to."""

    def __init__(self, **wrong: tuple[int, str]) -> None:
        self.wrong = wrong
        self.files: dict[str, str] = {}
        self.deleted: list[str | None] = []
        self.refusal: Exception | None = None

    def call(self, name: str, *, vm_id: str | None = None, body: Mapping[str, Any] | None = None) -> dict[str, Any]:
        if name == "provision":
            if self.refusal:
                raise self.refusal
            return {"id": "calm-otter-tmp"}
        if name == "delete":
            self.deleted.append(vm_id)
            return {"success": True}
        assert body is not None
        if name == "write_file":
            self.files[body["path"]] = body["content"]
            return {"success": True}
        if name == "read_file":
            return {"content": self.files[body["path"]]}
        command = body["command"]
        answers = {**GUEST, "date": (0, f"{time.time():.9f}\n"), **self.wrong}
        code, out = next((answer for start, answer in answers.items() if command.startswith(start)), (0, ""))
        return {"exit_code": code, "stdout": out, "stderr": "err\n" if code == 7 else ""}


def test_a_sound_vm() -> None:
    script = Script()
    checks = list(guest_checks(script))
    assert {check.status for check in checks} == {"ok"}
    assert [check.name for check in checks[:2]] == ["vm boots", "vm exec"]
    assert checks[-1].name == "vm deleted"
    assert script.deleted == ["calm-otter-tmp"]


@pytest.mark.parametrize(
    ("name", "start", "answer"),
    [
        ("exec", "echo out", (0, "out\n")),
        ("clock", "date", (0, f"{time.time() - 3600}\n")),
        ("workspace", "dd ", (1, "")),
        ("workspace", "dd ", (0, "")),
        ("hostname", "hostname", (0, "debian\n")),
        ("network", "ls /sys/class/net", (0, "lo\neth0\n")),
        ("root", "awk", (0, "ext4\n")),
        ("modules", "for n in", (0, "0\n")),
    ],
)
def test_a_vm_with_something_wrong(name: str, start: str, answer: tuple[int, str]) -> None:
    script = Script(**{start: answer})
    checks = list(guest_checks(script))
    assert [check.name for check in checks if check.status == "failed"] == [f"vm {name}"]
    assert all(check.fix for check in checks if check.status == "failed")
    assert script.deleted == ["calm-otter-tmp"]


def test_no_vm_at_all() -> None:
    script = Script()
    script.refusal = LimitReached("10 VMs are running", hint="stop one")
    [check] = guest_checks(script)
    assert check == Check("vm boots", Status.FAILED, "10 VMs are running", "stop one")
    script.refusal = HostNotReady("no service")
    assert len(list(guest_checks(script))) == 1
    assert script.deleted == []


def test_a_vm_goes_when_the_caller_does() -> None:
    script = Script()
    checks = guest_checks(script)
    next(checks)
    checks.close()  # type: ignore[attr-defined]
    assert script.deleted == ["calm-otter-tmp"]


# -- the report

SECRET = 'hunter2-"quoted"'


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    layout = Layout(tmp_path / "run")
    layout.create()
    session = layout.session("box", persistent=True)
    session.path.mkdir()
    spec = VmSpec(1, 512, 1024, MappingProxyType({"TOKEN": SECRET, "LANG": "C"}))
    record = VmRecord(
        "box", True, spec, "default", "d" * 64, (), 0.0, state=State.FAILED, last_exit=Exit("failed", f"said {SECRET}")
    )
    records.write(session, record)
    session.process_log.write_text(f"with {SECRET} and {json.dumps(SECRET)}\n")
    session.serial_log.write_text("x" * bundle.TAIL + "the end ghp_12345\n")
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "process.log").write_text("private")
    (layout.sessions / "linked").symlink_to(outside)
    other = layout.session("other", persistent=False).path
    other.mkdir()
    (other / "process.log").symlink_to(outside / "process.log")
    (other / "vm.json").write_text(f'{{"spec": {{"env": ["{SECRET}')
    os.mkfifo(other / "serial.log")
    (layout.run_dir / "service.log").write_text("serving\n")
    return layout.run_dir


def unpack(data: bytes) -> dict[str, bytes]:
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        return {
            member.name.removeprefix("capsem-report/"): archive.extractfile(member).read()  # type: ignore[union-attr]
            for member in archive
        }


def test_the_report_holds_what_helps_and_no_secret(run_dir: Path) -> None:
    paths = Paths(str(run_dir.parent), str(run_dir), str(run_dir / "service.sock"))
    environ = {"CAPSEM_HOME": str(run_dir.parent), "GITHUB_TOKEN": "ghp_12345"}
    files = unpack(bundle.collect(paths, environ, [Check("qemu", Status.OK, "here")]))
    assert set(files) >= {
        "doctor.json",
        "versions.json",
        "service.log",
        "persistent/box/vm.json",
        "persistent/box/process.log",
        "persistent/box/serial.log",
        "sessions/other/vm.json",
    }
    assert not any(
        "linked" in name or name in ("sessions/other/process.log", "sessions/other/serial.log") for name in files
    )
    record = json.loads(files["persistent/box/vm.json"])
    assert record["spec"]["env"] == {"TOKEN": "***", "LANG": "***"}
    assert record["last_exit"]["reason"] == "said ***"
    assert json.loads(files["doctor.json"]) == [{"name": "qemu", "status": "ok", "found": "here", "fix": None}]
    assert json.loads(files["versions.json"])["capsem"] == capsem.__version__
    assert files["persistent/box/serial.log"].endswith(b"the end ***\n")
    everything = b"".join(files.values())
    for secret in (b"hunter2", b"ghp_12345", b"private"):
        assert secret not in everything


def test_the_report_is_written_where_asked(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "r.tar.gz"
    assert main(["doctor", "--fast", "--bundle", str(target)]) == 1
    assert capsys.readouterr().out.endswith(f"report: {target}\n")
    assert target.stat().st_mode & 0o777 == 0o600
    assert "doctor.json" in unpack(target.read_bytes())
