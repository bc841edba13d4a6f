"""Programs of a guest are held still from before a checkpoint until the machine is who it is to be."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from itertools import pairwise, takewhile

import pytest

from real_service import SMALL, Service

# Writes down, as fast as it can, when it is and on which machine it runs; and answers on a socket.
RECORDER = r"""
import os, socket, threading, time
server = socket.create_server(("127.0.0.1", 7000))
def serve():
    while True:
        connection, _ = server.accept()
        connection.sendall(b"%d" % os.getpid()); connection.close()
threading.Thread(target=serve, daemon=True).start()
kept = open("/root/kept", "w+"); kept.write("kept"); kept.flush()
out = os.open("/dev/shm/records", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
while True:
    name = os.uname().nodename
    token = open("/run/capsem/boot-token").read().strip()
    os.write(out, f"{time.time()} {name} {token} {os.urandom(8).hex()}\n".encode())
"""
START = f"cat > /root/recorder.py <<'END'\n{RECORDER}\nEND\nsetsid python3 /root/recorder.py > /dev/null 2>&1 & echo $!"
ASK = (
    "python3 -c \"import socket; print(socket.create_connection(('127.0.0.1', 7000)).recv(99).decode())\""
    " && pgrep -fx 'sleep 77777' && ls -l /proc/$(pgrep -f '[r]ecorder.py')/fd | grep -c /root/kept"
)


@pytest.fixture(scope="module")
def recorder(service: Service) -> Iterator[str]:
    """A persistent VM in which the recorder runs, and a command is in flight."""
    service.client.call("provision", body={"name": "recorder", "persistent": True, **SMALL})
    service.output("recorder", START)
    service.output(
        "recorder", "setsid sleep 77777 > /dev/null 2>&1 & until test -s /dev/shm/records; do sleep 0.1; done"
    )
    yield "recorder"
    service.client.call("delete", vm_id="recorder")


Record = tuple[float, str, str, str]  # when; the name, the token and the random number of the machine it ran on


def records(service: Service, vm_id: str) -> tuple[str, list[Record]]:
    """The machine's token, and its records, oldest first, as far as they matter."""
    text = service.output(vm_id, "cat /run/capsem/boot-token; head -n 20000 /dev/shm/records")
    token, *lines = text.splitlines()
    return token, [(float(when), *rest) for when, *rest in map(str.split, lines)]  # type: ignore[misc]


def test_no_program_of_a_fork_runs_as_its_parent(service: Service, recorder: str) -> None:
    told = service.output(recorder, f"{ASK} && truncate -s 0 /dev/shm/records")
    before = time.time()
    names = service.client.call("fork", vm_id=recorder, body={"name": "fork", "live": True, "count": 2})["names"]
    seen = []
    try:
        parents_token, parents = records(service, recorder)
        for name in names:
            token, found = records(service, name)
            # What the parent wrote before the instant; one record that was half made then; nothing else of the parent's.
            inherited = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(found, parents, strict=False)))
            own = found[inherited + 1 :]
            assert {each[1:3] for each in own} == {(name, token)}
            assert token != parents_token
            assert before < own[0][0] < time.time()
            assert all(one[0] <= following[0] for one, following in pairwise(own))
            seen.append({each[3] for each in own})
            assert service.output(name, ASK) == told  # the same pid, open files, server, sleep
        assert not seen[0] & seen[1]
    finally:
        for name in names:
            service.client.call("delete", vm_id=name)
    assert service.output(recorder, ASK) == told


def test_a_checkpoint_says_that_all_was_still(service: Service, recorder: str) -> None:
    answer = json.loads(service.cli("checkpoint", recorder, "--json").stdout)
    assert (answer["synced"], answer["frozen"]) == (True, True)
    assert service.output(recorder, "cat /sys/fs/cgroup/capsem/cgroup.freeze") == "0\n"
    service.client.call("remove_checkpoint", vm_id=recorder, body={"checkpoint": answer["id"]})


def test_what_was_held_goes_on_after_a_resume(service: Service, recorder: str) -> None:
    told = service.output(recorder, ASK)
    assert service.client.call("suspend", vm_id=recorder)["frozen"]
    service.client.call("resume", vm_id=recorder)
    assert service.output(recorder, ASK) == told
    lines = "wc -l < /dev/shm/records"
    first = int(service.output(recorder, lines))
    assert int(service.output(recorder, f"sleep 0.2; {lines}")) > first


def test_agent_and_init_are_outside(service: Service, recorder: str) -> None:
    assert service.output(recorder, "cat /proc/self/cgroup /proc/1/cgroup") == "0::/capsem\n0::/\n"
    assert service.output(recorder, "cat /proc/$(pgrep -of '[a]gent.py')/cgroup") == "0::/\n"
