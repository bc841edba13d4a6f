"""Bad input and rude clients, at a real VM."""

from __future__ import annotations

import contextlib
import json
import os
import socket
from collections.abc import Iterator
from typing import Any

import pytest

from capsem.api import stream
from capsem.model.errors import CapsemError
from outside import ask, refused, traces
from real_service import PATIENCE, SMALL, Service, wait_for


@pytest.fixture
def untouched(service: Service, box: str) -> Iterator[Service]:
    """The shared service, which has to be as it was when the test is over."""
    wait_for(lambda: service.client.call("jobs", vm_id=box)["running"] == [])
    before = traces(service.run_dir)
    yield service
    wait_for(lambda: traces(service.run_dir) == before)
    assert service.client.call("jobs", vm_id=box)["running"] == []
    assert service.output(box, "echo alive") == "alive\n"


@contextlib.contextmanager
def begun(service: Service, path: str, body: Any, *, promised: int = 0) -> Iterator[socket.socket]:
    """A request that is under way; leaving hangs up. `promised`: bytes of the body that do not come."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(PATIENCE)
        connection.connect(str(service.socket))
        head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(data) + promised}\r\n\r\n"
        connection.sendall(head.encode() + data)
        yield connection


def runs(service: Service, box: str, word: str) -> bool:
    """Whether a process with this word among its arguments runs in the guest."""
    return service.output(box, f"pgrep -f '[{word[0]}]{word[1:]}' || true") != ""


@pytest.mark.parametrize("name", ["LD_PRELOAD", "BASH_ENV", "A=B", ""])
def test_variables_that_are_not_let_in(untouched: Service, box: str, name: str) -> None:
    body = {"command": "true", "env": {name: "/x.so"}}
    refused(ask(untouched.socket, "POST", f"/exec/{box}", body), 400, "invalid_input")
    assert untouched.cli("exec", "-e", f"{name}=/x.so", box, "true").returncode == (0 if name == "A=B" else 2)


@pytest.mark.parametrize("path", ["", "..", "../etc/passwd", "/etc/passwd", "a\0b", "x/../../etc/passwd"])
@pytest.mark.parametrize("route", ["read_file", "write_file"])
def test_paths_that_lead_out(untouched: Service, box: str, route: str, path: str) -> None:
    status, body = ask(untouched.socket, "POST", f"/{route}/{box}", {"path": path, "content": "x"})
    assert (status, body["code"]) in {(400, "invalid_input"), (403, "permission_denied")}, body
    assert body["error"]


def test_a_name_that_is_taken(untouched: Service, box: str) -> None:
    for route, body in (("/provision", {"name": box}), (f"/fork/{box}", {"name": box})):
        error = refused(ask(untouched.socket, "POST", route, body), 409, "already_exists")
        assert box in error["error"]
    refused(ask(untouched.socket, "POST", f"/persist/{box}", {"name": "other"}), 400, "invalid_input")


def test_hanging_up_during_a_command(untouched: Service, box: str) -> None:
    for path, body in (
        (f"/exec/{box}", {"command": "exec sleep 4711"}),
        (f"/exec/{box}/stream", stream.encode(stream.REQUEST, b'{"command":"exec sleep 4711"}')),
    ):
        with begun(untouched, path, body, promised=0 if isinstance(body, dict) else 100):
            wait_for(lambda: runs(untouched, box, "sleep 4711"))
        wait_for(lambda: not runs(untouched, box, "sleep 4711"))


def test_hanging_up_in_the_middle_of_a_file(untouched: Service, box: str) -> None:
    untouched.client.call("write_file", vm_id=box, body={"path": "kept", "content": "old"})
    with begun(untouched, f"/files/{box}/content?path=kept", os.urandom(300_000), promised=300_000):
        pass
    with begun(untouched, f"/write_file/{box}", b'{"path":"kept","content":"new', promised=10):
        pass
    assert untouched.output(box, "cat kept; rm kept; ls -A | grep -c capsem || true") == "old0\n"


def test_an_agent_that_is_killed_in_the_middle_of_a_file(untouched: Service, box: str) -> None:
    """What was there stays, and nothing is left beside it."""
    untouched.client.call("write_file", vm_id=box, body={"path": "kept", "content": "old"})
    agents = "$(pgrep -f '[/]usr/lib/capsem/agent.py' | sed 's|.*|/proc/&/fd|')"  # with what it keeps to start others
    with begun(untouched, f"/files/{box}/content?path=kept", os.urandom(3_000_000), promised=3_000_000) as connection:
        wait_for(lambda: untouched.exec(box, f"ls -l {agents} | grep -q '/root/.*(deleted)'")[0] == 0)
        with pytest.raises(CapsemError):  # it goes as well
            untouched.exec(box, "pkill -9 -f '[/]usr/lib/capsem/agent.py'; sleep 1000")
        connection.sendall(b"more")  # who says nothing is not told anything, either
        answer = connection.recv(65536)
    assert answer.startswith(b"HTTP/1.1 5"), answer
    assert untouched.output(box, "cat kept; rm kept; ls -A | grep -c capsem || true") == "old0\n"


def test_the_longest_variable_that_linux_takes(untouched: Service, box: str) -> None:
    """The kernel has a limit for each string that it hands to a program: what is just within it arrives, the next is refused."""
    longest = "x" * (128 * 1024 - len("A=\0"))
    assert untouched.exec(box, 'echo "${#A}"', env={"A": longest}) == (0, f"{len(longest)}\n", "")
    refused(
        ask(untouched.socket, "POST", f"/exec/{box}", {"command": "true", "env": {"A": longest + "x"}}),
        400,
        "invalid_input",
    )


@pytest.mark.parametrize(
    "words", [("exec", "sleep 4714"), ("run", "--ram", "0.5", "--cpu", "1", "sleep 4714")], ids=str
)
def test_a_command_line_that_is_killed(untouched: Service, box: str, words: tuple[str, ...]) -> None:
    """It can say nothing more; what it had begun ends all the same."""
    ids = {vm["id"] for vm in untouched.client.call("list")["sandboxes"]}
    name, *rest = words
    client = untouched.start_cli(name, *([box] if name == "exec" else []), *rest)
    if name == "exec":
        wait_for(lambda: runs(untouched, box, "sleep 4714"))
    else:
        wait_for(lambda: len(untouched.client.call("list")["sandboxes"]) > len(ids))
    client.kill()
    client.wait()
    wait_for(lambda: not runs(untouched, box, "sleep 4714"))
    wait_for(lambda: {vm["id"] for vm in untouched.client.call("list")["sandboxes"]} == ids)


def test_hanging_up_during_a_run(untouched: Service) -> None:
    """The VM made for it goes, booting or not."""
    ids = {vm["id"] for vm in untouched.client.call("list")["sandboxes"]}
    with begun(untouched, "/run", {"command": "sleep 4712", **SMALL}):
        wait_for(lambda: len(untouched.client.call("list")["sandboxes"]) > len(ids))
    wait_for(lambda: {vm["id"] for vm in untouched.client.call("list")["sandboxes"]} == ids)


def test_hanging_up_during_a_provision(untouched: Service) -> None:
    """A transition runs to its end: the VM is there, and can be had."""
    with begun(untouched, "/provision", {"name": "orphan", **SMALL}):
        wait_for(lambda: "orphan" in {vm["id"] for vm in untouched.client.call("list")["sandboxes"]})
    wait_for(lambda: untouched.status("orphan") == "Running")
    untouched.client.call("delete", vm_id="orphan")
