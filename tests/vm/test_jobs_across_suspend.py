"""Commands that a suspend, a rollback or a fork meets on their way: they go on, their clients are told, nothing is lost."""

from __future__ import annotations

import subprocess
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from capsem.api.stream import STDERR, STDOUT
from capsem.model.errors import Interrupted, NotFound
from real_service import BIN, SMALL, Service, wait_for

CUT_OFF = 75
NAP = "read -t 0.01 -u 3"  # sleeps without a process, which under emulation would cost more than the sleep
NAPS = "f=$(mktemp -u); mkfifo $f; exec 3<>$f; "


def numbers(last: int) -> bytes:
    return b"".join(b"%d\n" % number for number in range(1, last + 1))


class Client:
    """Follows a command on a thread of its own, as far as that goes."""

    def __init__(self, service: Service, vm_id: str, body: dict[str, Any]) -> None:
        self.output = {STDOUT: bytearray(), STDERR: bytearray()}
        self.result: dict[str, Any] = {}
        self.error: Interrupted | None = None
        self._stream = service.client.stream(vm_id, body)
        self._thread = threading.Thread(target=self._follow)
        self._thread.start()

    def _follow(self) -> None:
        try:
            with self._stream as pieces:
                for channel, data in pieces:
                    self.output[channel] += data
            self.result = self._stream.result
        except Interrupted as error:
            self.error = error

    def end(self) -> Client:
        self._thread.join()
        return self

    @property
    def offsets(self) -> dict[str, int]:
        return {"stdout": len(self.output[STDOUT]), "stderr": len(self.output[STDERR])}


@pytest.fixture(scope="module")
def worker(service: Service) -> Iterator[str]:
    service.client.call("provision", body={"name": "worker", "persistent": True, **SMALL})
    service.output("worker", "true")
    yield "worker"
    service.client.call("delete", vm_id="worker")


def suspend_and_resume(service: Service, vm_id: str) -> None:
    service.client.call("suspend", vm_id=vm_id)
    assert service.client.call("resume", vm_id=vm_id)["boot_kind"] == "warm"


def rest(service: Service, vm_id: str, job: str, client: Client) -> bytes:
    """What a client has, and what it fetches from there on."""
    again = Client(service, vm_id, {"job": job, "offsets": client.offsets, "keep": True}).end()
    assert again.error is None
    assert not again.result.get("truncated")
    client.result = again.result
    return bytes(client.output[STDOUT] + again.output[STDOUT])


def test_a_client_is_told_at_once_and_fetches_the_rest_after_the_resume(service: Service, worker: str) -> None:
    command = NAPS + f"echo x >> /root/runs; for i in {{1..1000}}; do echo $i; {NAP}; done; exit 7"
    client = Client(service, worker, {"command": command, "job": "counting"})
    wait_for(lambda: client.output[STDOUT].endswith(b"\n"))
    service.client.call("suspend", vm_id=worker)
    error = client.end().error  # with the VM asleep nobody but the supervisor can have told it
    assert error is not None
    assert error.job == "counting"
    assert "counting" in error.message
    assert "capsem output worker counting" in str(error.hint)
    assert service.client.call("resume", vm_id=worker)["boot_kind"] == "warm"
    info = service.client.call("jobs", vm_id=worker)
    assert "counting" in info["running"]
    assert rest(service, worker, "counting", client) == numbers(1000)
    assert client.result["exit_code"] == 7
    assert service.output(worker, "cat /root/runs") == "x\n"
    # Whoever has nothing yet gets all of it, over plain HTTP too.
    whole = service.client.call("exec", vm_id=worker, body={"job": "counting", "offsets": {"stdout": 0}})
    assert (whole["stdout"].encode(), whole["exit_code"]) == (numbers(1000), 7)


def test_a_flood_loses_nothing_and_repeats_nothing(service: Service, worker: str) -> None:
    """9 MB, less than the guest keeps in the worst case, cut by suspends wherever they happen to come."""
    last = 1_300_000
    # It cannot end before the second cut, however fast the machine is.
    command = f"seq {last}; until [ -e /tmp/cut ]; do sleep 0.1; done; exit 4"
    client = Client(service, worker, {"command": command, "job": "flood"})
    wait_for(lambda: len(client.output[STDOUT]) > 100_000)
    suspend_and_resume(service, worker)
    assert client.end().error is not None
    second = Client(service, worker, {"job": "flood", "offsets": client.offsets, "keep": True})
    wait_for(lambda: len(second.output[STDOUT]) > 500_000)
    suspend_and_resume(service, worker)
    assert second.end().error is not None
    service.output(worker, "touch /tmp/cut")
    client.output[STDOUT] += second.output[STDOUT]
    assert rest(service, worker, "flood", client) == numbers(last)
    assert client.result["exit_code"] == 4


def test_a_job_that_ended_while_nobody_looked(service: Service, worker: str) -> None:
    """Before the suspend, and while its end was still under way."""
    early = Client(service, worker, {"command": "echo early; exit 5", "job": "early"}).end()
    assert early.result["exit_code"] == 5
    command = "mkfifo /tmp/go; echo begun; read x < /tmp/go; echo ended >&2; exit 6"
    client = Client(service, worker, {"command": command, "job": "later"})
    wait_for(lambda: client.output[STDOUT] == b"begun\n")
    service.output(worker, "setsid sh -c 'sleep 1; echo > /tmp/go' > /dev/null 2>&1 &")
    suspend_and_resume(service, worker)
    wait_for(lambda: "later" not in service.client.call("jobs", vm_id=worker)["running"])
    details = {each["id"]: each for each in service.client.call("jobs", vm_id=worker)["details"]}
    assert (details["early"]["exit_code"], details["later"]["exit_code"]) == (5, 6)
    suspend_and_resume(service, worker)
    shown = service.cli("output", worker, "later")
    assert (shown.returncode, shown.stdout, shown.stderr) == (6, b"begun\n", b"ended\n")
    shown = service.cli("output", worker, "early")
    assert (shown.returncode, shown.stdout) == (5, b"early\n")


def test_the_command_line(service: Service, worker: str) -> None:
    command = "echo begun; until [ -e /root/end ]; do sleep 0.1; done; echo ended; exit 3"
    argv = [BIN / "capsem", "exec", worker, command]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=service.env) as running:
        assert running.stdout is not None
        assert running.stdout.readline() == b"begun\n"
        (job,) = service.client.call("jobs", vm_id=worker)["running"]
        service.client.call("suspend", vm_id=worker)
        out, err = running.communicate()
    assert (running.returncode, out) == (CUT_OFF, b"")
    assert f"capsem output {worker} {job}".encode() in err
    assert service.cli("output", worker, job).returncode == 1  # it does not run
    service.client.call("resume", vm_id=worker)
    shown = service.cli("output", worker, job)
    assert (shown.returncode, shown.stdout) == (0, b"begun\n")
    assert b"still runs" in shown.stderr
    listed = service.cli("jobs", worker).stdout.decode()
    assert any(job in line and "running" in line and "echo begun" in line for line in listed.splitlines())
    argv = [BIN / "capsem", "output", "--follow", worker, job]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, env=service.env) as following:
        assert following.stdout is not None
        assert following.stdout.readline() == b"begun\n"
        following.kill()  # leaves the command running
    service.output(worker, "touch /root/end")
    shown = service.cli("output", "--follow", worker, job)
    assert (shown.returncode, shown.stdout) == (3, b"begun\nended\n")
    assert service.cli("output", worker, "no-such-job").returncode == 1


def test_a_checkpoint_leaves_clients_alone_and_a_rollback_brings_jobs_back(service: Service, worker: str) -> None:
    command = NAPS + f"echo x >> /root/once; for i in {{1..200}}; do echo $i; {NAP}; done; exit 8"
    client = Client(service, worker, {"command": command, "job": "again"})
    wait_for(lambda: client.output[STDOUT].endswith(b"\n"))
    made = service.client.call("checkpoint", vm_id=worker)
    assert client.end().error is None
    assert (bytes(client.output[STDOUT]), client.result["exit_code"]) == (numbers(200), 8)
    after = Client(service, worker, {"command": "true", "job": "not-yet"}).end()
    assert after.error is None
    service.client.call("rollback", vm_id=worker, body={"checkpoint": made["id"]})
    known = service.client.call("jobs", vm_id=worker)["jobs"]
    assert "again" in known
    assert "not-yet" not in known
    once_more = Client(service, worker, {"job": "again", "offsets": {"stdout": 0, "stderr": 0}}).end()
    assert (bytes(once_more.output[STDOUT]), once_more.result["exit_code"]) == (numbers(200), 8)
    assert service.output(worker, "cat /root/once") == "x\n"


def test_both_sides_of_a_fork_finish_their_own_copy(service: Service, worker: str) -> None:
    command = NAPS + f"echo x >> /root/forked; for i in {{1..150}}; do echo $i; {NAP}; done; hostname; exit 9"
    client = Client(service, worker, {"command": command, "job": "both"})
    wait_for(lambda: client.output[STDOUT].endswith(b"\n"))
    last = 1_200_000
    flood = Client(service, worker, {"command": f"seq {last}; exit 4", "job": "flooding"})
    wait_for(lambda: len(flood.output[STDOUT]) > 300_000)
    service.client.call("fork", vm_id=worker, body={"name": "copy", "live": True})
    try:
        assert client.end().error is None
        child = Client(service, "copy", {"job": "both", "offsets": {"stdout": 0, "stderr": 0}}).end()
        assert bytes(client.output[STDOUT]) == numbers(150) + b"worker\n"
        assert bytes(child.output[STDOUT]) == numbers(150) + b"copy\n"
        assert client.result["exit_code"] == child.result["exit_code"] == 9
        assert flood.end().error is None
        assert bytes(flood.output[STDOUT]) == numbers(last)
        copied = Client(service, "copy", {"job": "flooding", "offsets": {"stdout": 0, "stderr": 0}}).end()
        assert bytes(copied.output[STDOUT]) == numbers(last)
        assert not copied.result.get("truncated")
        for name in (worker, "copy"):
            assert service.output(name, "cat /root/forked") == "x\n"
    finally:
        service.client.call("delete", vm_id="copy")


def test_a_cold_start_knows_no_jobs(service: Service, worker: str) -> None:
    client = Client(service, worker, {"command": "echo begun; sleep 1000", "job": "gone"})
    wait_for(lambda: client.output[STDOUT] == b"begun\n")
    service.client.call("suspend", vm_id=worker)
    assert client.end().error is not None
    service.client.call("resume", vm_id=worker, body={"cold": True})
    with pytest.raises(NotFound):
        service.client.call("exec", vm_id=worker, body={"job": "gone", "offsets": {}})
