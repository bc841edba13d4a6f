"""Commands and files in a real VM, over HTTP and through the command line."""

from __future__ import annotations

import hashlib
import os
from concurrent.futures import ThreadPoolExecutor

import pytest

from capsem.model.errors import CapsemError, GuestFailed, InvalidInput, NotFound, PermissionDenied, TimedOut
from capsem.model.spec import ENV_ENTRY_BYTES, ENV_TOTAL_BYTES
from capsem.service.commands import COMMAND_LIMIT
from real_service import SMALL, Service


def test_outputs_and_exit_code(service: Service, box: str) -> None:
    assert service.exec(box, "echo out; echo err >&2; exit 3") == (3, "out\n", "err\n")
    assert service.exec(box, "kill -9 $$")[0] == 1
    assert service.exec(box, "pwd") == (0, "/root\n", "")


def test_three_at_once_do_not_mix(service: Service, box: str) -> None:
    def one(n: int) -> tuple[int, str, str]:
        return service.exec(box, f"for i in $(seq 300); do echo out{n}; echo err{n} >&2; done; exit {n}")

    with ThreadPoolExecutor(3) as pool:
        for n, answer in enumerate(pool.map(one, range(3))):
            assert answer == (n, f"out{n}\n" * 300, f"err{n}\n" * 300)


def test_the_largest_environment_and_the_longest_command(service: Service) -> None:
    env, left = {"BIG": "x" * (ENV_ENTRY_BYTES - len("BIG=") - 1)}, ENV_TOTAL_BYTES - ENV_ENTRY_BYTES - 8
    for number in range(left // 100_000):
        env[f"N{number:02}"] = "x" * (100_000 - len("N00=") - 1 - 8)
    left %= 100_000
    env["REST"] = "\1" * (left - len("REST=") - 1 - 8)
    command = "echo ${#BIG} ${#N00} ${#REST}; /bin/true #"
    service.client.call("provision", body={"name": "full", "env": env, **SMALL})
    out = service.output("full", command + "x" * (COMMAND_LIMIT - len(command)))
    assert out.split() == [str(len(env[name])) for name in ("BIG", "N00", "REST")]
    with pytest.raises(InvalidInput, match="too large"):
        service.client.call("provision", body={"name": "fuller", "env": {**env, "REST": env["REST"] + "x"}, **SMALL})
    service.client.call("delete", vm_id="full")


def test_time_out(service: Service, box: str) -> None:
    with pytest.raises(TimedOut, match=r"timed out after 0\.5s"):
        service.exec(box, "echo $$ > /tmp/pid; sleep 100", timeout_secs=0.5)
    assert service.exec(box, "kill -0 $(cat /tmp/pid)")[0] == 1


def test_background_processes_live_on(service: Service, box: str) -> None:
    service.output(box, "sleep 1000 & echo $! > /tmp/pid")
    service.output(box, "kill -0 $(cat /tmp/pid) && kill $(cat /tmp/pid)")


def test_much_output_is_capped(service: Service, box: str) -> None:
    answer = service.client.call("exec", vm_id=box, body={"command": "head -c 12000000 /dev/zero | tr '\\0' x"})
    assert len(answer["stdout"]) == 10 * 1024 * 1024
    assert answer["truncated"] is True


def test_the_command_line(service: Service, box: str) -> None:
    done = service.cli("exec", box, "echo out; echo err >&2; exit 7")
    assert (done.returncode, done.stdout, done.stderr) == (7, b"out\n", b"err\n")
    data = os.urandom(300_000)
    done = service.cli("exec", "-i", box, "cat > /root/in.bin; sha256sum < /root/in.bin", stdin=data)
    assert done.stdout.decode().split()[0] == hashlib.sha256(data).hexdigest()
    done = service.cli("exec", box, "cat /root/in.bin; rm /root/in.bin")
    assert done.stdout == data
    done = service.cli("exec", box, "--timeout", "0.5", "sleep 60")
    assert done.returncode == 124
    assert b"timed out" in done.stderr


def test_files(service: Service, box: str) -> None:
    client = service.client
    text = "x" * 100_000 + "\n"
    client.call("write_file", vm_id=box, body={"path": "a/b/c.txt", "content": text})
    assert client.call("read_file", vm_id=box, body={"path": "/root/a/b/c.txt"})["content"] == text
    assert service.output(box, "stat -c '%a %U' a/b/c.txt; rm -r a") == "644 root\n"


@pytest.mark.parametrize(
    ("path", "error"),
    [
        ("../etc/passwd", InvalidInput),
        ("/etc/passwd", PermissionDenied),
        ("", InvalidInput),
        ("missing", NotFound),
        (".", InvalidInput),
        ("link", PermissionDenied),
        ("out/passwd", PermissionDenied),
    ],
)
def test_files_are_confined(service: Service, box: str, path: str, error: type[CapsemError]) -> None:
    service.output(box, "ln -sfn /etc/passwd link; ln -sfn /etc out")
    with pytest.raises(error):
        service.client.call("read_file", vm_id=box, body={"path": path})
    if error is PermissionDenied:
        with pytest.raises((PermissionDenied, GuestFailed)):
            service.client.call("write_file", vm_id=box, body={"path": path, "content": "x"})
        assert service.output(box, "head -c 4 /etc/passwd") == "root"
    service.output(box, "rm -f link out")
