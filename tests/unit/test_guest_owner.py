"""Whose a socket is: found among the files of processes that are not the agent's own."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import sys
from collections.abc import Iterator

import pytest

from capsem.guest import owner
from capsem.guest.owner import Owners

CONNECT = """
import socket, sys
tcp = socket.create_connection(("127.0.0.1", int(sys.argv[1])))
udp = socket.socket(type=socket.SOCK_DGRAM)
udp.connect(("127.0.0.1", 53))
open("/proc/self/comm", "w").write("a (client) :)")
print(udp.getsockname()[1], flush=True)
for line in sys.stdin:
    another = socket.create_connection(("127.0.0.1", int(sys.argv[1])))
    print(flush=True)
"""
Address = tuple[str, int]


@pytest.fixture(autouse=True)
def unlimited(monkeypatch: pytest.MonkeyPatch) -> None:
    """This computer may have many more processes than a guest."""
    monkeypatch.setattr(owner, "MAX_PROCESSES", 1 << 20)
    monkeypatch.setattr(owner, "MAX_FILES", 1 << 20)


@contextlib.contextmanager
def client() -> Iterator[tuple[socket.socket, subprocess.Popen[bytes], int]]:
    """A listener, a program that has connected to it, and the port of that one's UDP socket."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        argv = [sys.executable, "-c", CONNECT, str(listener.getsockname()[1])]
        with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            assert process.stdin is not None
            try:
                yield listener, process, int(process.stdout.readline())
            finally:
                process.stdin.close()


def test_the_program_that_has_connected() -> None:
    owners = Owners()
    with client() as (listener, process, udp):
        accepted, _ = listener.accept()
        with accepted:
            assert owners.of_connection(accepted, accepted.getsockname()) == "a (client) :)"
            assert owners.of_question(("127.0.0.1", udp)) == "a (client) :)"
            assert process.stdin is not None
            process.stdin.write(b"\n")
            process.stdin.flush()
            again, _ = listener.accept()
            with again:
                assert owners.of_connection(again, again.getsockname()) == "a (client) :)"


def test_one_that_has_ended_is_nobody() -> None:
    owners = Owners()
    with client() as (listener, process, udp):
        accepted, _ = listener.accept()
        assert owners.of_connection(accepted, accepted.getsockname())
        assert process.stdin is not None
        process.stdin.close()
        process.wait()
        assert owners.of_connection(accepted, accepted.getsockname()) is None
        assert owners.of_question(("127.0.0.1", udp)) is None
        accepted.close()
        assert owners.of_connection(accepted, ("127.0.0.1", 2)) is None


def test_it_is_not_looked_for_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(owner, "MAX_FILES", 0)
    with client() as (listener, _, _):
        accepted, _ = listener.accept()
        with accepted:
            assert Owners().of_connection(accepted, accepted.getsockname()) is None
