"""`capsem shell` on a real terminal, and `capsem forward`, with a real VM."""

from __future__ import annotations

import stat
import subprocess
import urllib.request
from collections.abc import Iterator
from http.client import HTTPException

import pytest

from capsem.client.forward import Forwarding
from real_service import BIN, SMALL, Service, wait_for
from real_terminal import RealTerminal


@pytest.fixture(scope="module")
def desk(service: Service) -> Iterator[str]:
    service.client.call("provision", body={"name": "desk", "persistent": True, **SMALL})
    service.output("desk", "true")
    yield "desk"
    service.client.call("delete", vm_id="desk")


def shell(service: Service, *arguments: str, size: tuple[int, int] = (24, 80)) -> RealTerminal:
    return RealTerminal([BIN / "capsem", "shell", *arguments], service.env, size)


def test_a_shell_is_a_terminal_and_its_exit_code_ours(service: Service, desk: str) -> None:
    with shell(service, desk, size=(31, 97)) as tty:
        tty.expect(b"desk:~#")
        tty.type(b"stty size; tty; echo $TERM $((6*7))\r")
        shown = tty.expect(b"dumb 42\r\n")
        assert b"31 97\r\n" in shown
        assert b"/dev/pts/" in shown
        # What a command prints tells where the shell is; a prompt may be shown twice, and ^C before the terminal
        # belongs to the command ends nothing.
        tty.type(b"sh -c 'echo $((40+3)); exec cat'\r")
        tty.expect(b"43\r\n")
        tty.type(b"\x03")  # ends cat, and not the shell
        tty.expect(b"desk:~#")
        tty.type(b"trap 'stty size' WINCH; echo $((50+1))\r")
        tty.expect(b"51\r\n")
        tty.expect(b"desk:~#")
        tty.resize(44, 123)
        tty.expect(b"44 123\r\n")
        tty.type(b"exit 7\r")
        assert tty.wait() == 7
        assert tty.is_as_it_was
    log = service.run_dir / "persistent" / desk / "pty.log"
    assert stat.S_IMODE(log.stat().st_mode) == 0o600
    assert b"dumb 42" in log.read_bytes()


def test_one_that_was_left_is_gone_back_to(service: Service, desk: str) -> None:
    with shell(service, desk) as tty:
        tty.expect(b"desk:~#")
        tty.type(b"mine=here\r~.")
        assert tty.wait() == 0
        assert b"--attach desk" in tty.shown
    with shell(service, desk) as other:  # is newer, and was not left
        other.expect(b"desk:~#")
        jobs = lambda: service.client.call("jobs", vm_id=desk)["details"]  # noqa: E731
        wait_for(lambda: [job.get("followed", False) for job in jobs() if job["running"]] == [False, True])
        with shell(service, "--attach", desk) as tty:
            tty.type(b"echo still-$mine\r")
            tty.expect(b"still-here\r\n")
            tty.type(b"exit 3\r")
            assert tty.wait() == 3
        other.type(b"exit 0\r")
        assert other.wait() == 0
    gone = service.cli("shell", "--attach", desk)
    assert (gone.returncode, b"no shell was left" in gone.stderr) == (1, True)


def test_it_goes_on_after_a_suspend(service: Service, desk: str) -> None:
    with shell(service, desk) as tty:
        tty.expect(b"desk:~#")
        tty.type(b"before=kept\r")
        tty.expect(b"desk:~#")
        service.client.call("suspend", vm_id=desk)
        tty.expect(b"waiting until it runs again")
        service.client.call("resume", vm_id=desk)
        tty.type(b"echo after-$before\r")
        tty.expect(b"after-kept\r\n")
        tty.type(b"exit 0\r")
        assert tty.wait() == 0
        assert tty.is_as_it_was


def test_without_a_terminal_it_runs_a_script(service: Service, desk: str) -> None:
    ran = service.cli("shell", desk, stdin=b"echo out; echo err >&2\nexit 4\n")
    assert (ran.returncode, ran.stdout, ran.stderr) == (4, b"out\n", b"err\n")


def test_a_port_is_reached_before_and_after_a_suspend(service: Service, desk: str) -> None:
    service.output(
        desk,
        "mkdir -p /root/www && head -c 300000 /dev/urandom > /root/www/big && sha256sum < /root/www/big > /root/www/sum",
    )
    service.client.call(
        "exec",
        vm_id=desk,
        body={"command": "exec python3 -m http.server 8000 --bind 127.0.0.1 -d /root/www", "job": "web", "wait": False},
    )
    service.output(desk, "until ss -ltn | grep -q :8000; do sleep 0.1; done")

    def fetch(address: tuple[str, int], path: str) -> bytes:
        with urllib.request.urlopen(f"http://{address[0]}:{address[1]}/{path}", timeout=60) as answer:
            content: bytes = answer.read()
            return content

    with Forwarding(service.client, desk, 8000) as forwarding:
        forwarding.start()
        first = fetch(forwarding.address, "big")
        assert len(first) == 300_000
        service.client.call("suspend", vm_id=desk)
        with pytest.raises((ConnectionError, HTTPException)):
            fetch(forwarding.address, "sum")
        service.client.call("resume", vm_id=desk)
        assert fetch(forwarding.address, "big") == first
    command = [BIN / "capsem", "forward", desk, "0:8000"]
    with subprocess.Popen(command, env=service.env, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        where, _, rest = process.stdout.readline().decode().partition(" -> ")
        assert rest == "desk:8000\n"
        host, port = where.split(":")
        assert len(fetch((host, int(port)), "sum")) > 60
        process.terminate()
