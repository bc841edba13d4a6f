"""A stress test that cannot fail proves nothing: what it holds VMs against notices every kind of loss."""

from __future__ import annotations

import json
import subprocess
import time
from collections import Counter
from pathlib import Path

import pytest

from capsem.cli.main import main
from capsem.model.errors import HostNotReady, InvalidInput, WrongState
from capsem.stress import options
from capsem.stress.guests import LinuxGuest, SimGuest
from capsem.stress.hosts import Service
from capsem.stress.options import Options
from capsem.stress.report import Report
from capsem.stress.truth import Seen, State, Truth

LINUX, SIM = LinuxGuest(), SimGuest()


def look(truth: Truth, memory: str, **files: str) -> str | None:
    seen = Seen(memory, {name: SIM.digest(((text, 1),)) for name, text in files.items()}, "")
    return truth.hold_against(seen, SIM.digest, SIM.follows)


class TestTruth:
    def test_notices_what_is_missing_or_changed(self) -> None:
        truth = Truth(State({}, "4"))
        truth.wrote("a", ("one", 1), append=False)
        assert look(truth.copy(), "5", a="one") is None
        assert look(truth.copy(), "5", a="one", b="more") is None
        assert "a is gone" in str(look(truth.copy(), "5"))
        assert "another content" in str(look(truth.copy(), "5", a="two"))
        assert "memory was '4'" in str(look(truth.copy(), "4", a="one"))  # counted back, or never counted

    def test_forgets_a_file_that_may_or_may_not_be_there(self) -> None:
        truth = Truth(State({}, "1"))
        truth.wrote("a", ("one", 1), append=False)
        truth.removed("a")
        assert look(truth.copy(), "2") is None
        assert look(truth.copy(), "2", a="half") is None

    def test_learns_which_of_two_states_it_is(self) -> None:
        truth = Truth(State({"a": (("new", 1),)}, "7"))
        truth.maybe(State({"a": (("old", 1),)}, "3"))
        assert truth.certain is None
        assert look(truth.copy(), "4", a="new") is not None  # the disk of one, the memory of the other
        assert look(truth, "4", a="old") is None
        assert truth.certain == State({"a": (("old", 1),)}, "4")
        assert look(truth, "5", a="new") is not None

    def test_allows_for_looks_whose_answers_were_lost(self) -> None:
        truth = Truth(State({}, "4"))
        truth.unsure = 2
        assert look(truth.copy(), "7") is None
        assert look(truth.copy(), "8") is not None

    def test_passes_on_what_the_guest_itself_finds_wrong(self) -> None:
        assert Truth().hold_against(Seen("", {}, "", "line 3 is 5"), SIM.digest, SIM.follows) == "line 3 is 5"


class TestLinuxGuest:
    def shell(self, command: str, root: Path) -> subprocess.CompletedProcess[str]:
        command = command.replace("/root", str(root)).replace("/dev/shm", str(root / "shm"))
        return subprocess.run(["bash", "-c", command], capture_output=True, text=True)

    def test_tells_of_each_file_what_it_should(self, tmp_path: Path) -> None:
        for name in ("stress", "shm"):
            (tmp_path / name).mkdir()
        pieces = (("deadbeef", 30_000), ("cafe", 3))
        for number, piece in enumerate(pieces):
            assert self.shell(LINUX.put("f1", piece, append=number > 0), tmp_path).returncode == 0
        assert self.shell(LINUX.put("f2", pieces[0], append=False), tmp_path).returncode == 0
        assert self.shell(LINUX.remove("f2"), tmp_path).returncode == 0
        (tmp_path / "count").write_text("1\n2\n3\n")
        seen = LINUX.read(self.shell(LINUX.look(["f1", "f2"]), tmp_path).stdout)
        assert seen.files == {"f1": LINUX.digest(pieces)}
        assert seen.wrong == ""
        (tmp_path / "count").write_text("1\n2\n4\n")
        seen = LINUX.read(self.shell(LINUX.look([]), tmp_path).stdout)
        assert seen.wrong == "line 3 of the count is 4"


def test_a_simulated_guest_is_read() -> None:
    seen = SIM.read("3\n=====\nfile a\nx\ny\nfile b\n=====\nloop: Write error\n")
    assert (seen.memory, seen.files, seen.log) == ("3", {"a": "x\ny\n"}, "loop: Write error\n")


class TestReport:
    @pytest.fixture
    def service(self, tmp_path: Path) -> Service:
        service = Service(tmp_path / "home", Options(), {})
        session = service.run_dir / "persistent/vm-1"
        session.mkdir(parents=True)
        (session / "serial.log").write_text("all is well\n")
        return service

    def test_an_anomaly_has_its_evidence_and_its_name(self, tmp_path: Path, service: Service) -> None:
        report = Report(Options(seed=1), tmp_path / "evidence")
        assert report.clean
        report.anomaly("lost", service, "vm-1", "file a is gone", "loop: Write error at byte offset 0")
        [anomaly] = report.anomalies
        assert anomaly.fingerprints == ("overlay-write-failed",)
        assert (Path(anomaly.evidence) / "vm-1-serial.log").read_text() == "all is well\n"
        told = "\n".join(report.lines([service]))
        assert "ANOMALY lost: vm-1: file a is gone [overlay-write-failed]" in told
        assert anomaly.evidence in told
        assert json.loads(json.dumps(report.to_dict([service])))["clean"] is False

    def test_signs_in_logs_count_though_every_operation_went_well(self, tmp_path: Path, service: Service) -> None:
        report = Report(Options(), tmp_path / "evidence")
        report.look_for_signs(service, "vm-1")
        assert report.clean
        with next(service.logs("vm-1")).open("a") as log:
            log.write("EXT4-fs error (device vdb)\n")
        report.look_for_signs(service, "vm-1")
        report.look_for_signs(service, "vm-1")
        assert [each.fingerprints for each in report.anomalies] == [("file-system-damaged",)]

    def test_percentiles_and_refusals(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        report = Report(Options(), tmp_path)
        clock = iter(range(10_000))
        monkeypatch.setattr(time, "monotonic", lambda: next(clock))
        for _ in range(10):
            with report.timed("suspend"):
                next(clock)
        with pytest.raises(WrongState), report.timed("resume"):
            raise WrongState("not now")
        assert report.latencies() == {"suspend": {"count": 10, "p50": 2, "p95": 2, "p99": 2, "max": 2}}
        assert report.totals.refused == Counter(resume=1)

    def test_what_is_left_over_is_found(self, service: Service) -> None:
        (service.run_dir / "store/layers").mkdir(parents=True)
        (service.run_dir / "store/layers/x.qcow2").touch()
        assert service.remains() == ["store/layers/x.qcow2", "persistent/vm-1"]


def test_without_the_gate_only_simulated_vms_are_put_at_risk(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(InvalidInput):
        Options(gate=False)
    assert main(["stress", "--no-gate"]) == 2
    assert "--hypervisor sim" in capfd.readouterr().err


def test_a_host_without_room_is_told_before_anything_is_started(monkeypatch: pytest.MonkeyPatch) -> None:
    Options(vms=1).check_room({})
    monkeypatch.setattr(options, "available_memory", lambda: 1 << 30)
    with pytest.raises(HostNotReady, match="memory") as caught:
        Options(vms=8).check_room({})
    assert caught.value.hint
