"""Files of VMs that do not run: read from the volume, as the guest left it."""

from __future__ import annotations

import hashlib
import json
import os
import signal
from pathlib import Path

import pytest
from test_real_files import request

from capsem.model.errors import InvalidInput, NotFound, PermissionDenied
from real_service import SMALL, Service, wait_for

MIB = 1024 * 1024

MAKE = """
set -e
mkdir -p many/a/b; cd /root/many
for i in $(seq 300); do echo $i > "file-$i"; done
cd /root; rm many/file-1*; ln -s many near; ln -s /root/many absolute; ln -s /etc out; ln -s ../etc up
ln -s many/file-2 link; ln -s loop loop; mkfifo fifo
head -c 3000000 /dev/urandom > big; truncate -s 4M big; printf end >> big
sha256sum big | cut -d' ' -f1
"""


def content(service: Service, vm_id: str, path: str) -> tuple[int, bytes]:
    return request(service, "GET", f"/files/{vm_id}/content?path={path}")


def check(service: Service, digest: str) -> None:
    status, body = request(service, "GET", "/files/still?path=&depth=2")
    entries = {entry["path"]: entry for entry in json.loads(body)["entries"]}
    assert (status, set(entries)) == (200, {"many", "big"})
    names = {entry["name"] for entry in entries["many"]["children"]}
    assert names == {"a", *(f"file-{n}" for n in range(1, 301) if not str(n).startswith("1"))}
    assert (entries["big"]["size"], entries["many"]["type"]) == (4 * MIB + 3, "directory")
    assert hashlib.sha256(content(service, "still", "big")[1]).hexdigest() == digest
    for path, expected in (
        ("many/file-300", (200, b"300\n")),
        ("near/file-2", (200, b"2\n")),
        ("absolute/file-2", (200, b"2\n")),
    ):
        assert content(service, "still", path) == expected
    for path, status in (
        ("out/passwd", 403),
        ("up/passwd", 403),
        ("link", 403),
        ("many", 404),
        ("fifo", 404),
        ("many/file-1", 404),
        ("big/x", 404),
        ("loop/x", 500),
        ("../etc/passwd", 400),
    ):
        assert content(service, "still", path)[0] == status, path
    call = service.client.call
    assert call("read_file", vm_id="still", body={"path": "/root/many/file-2"}) == {"content": "2\n"}
    for path, error in (
        ("/etc/passwd", PermissionDenied),
        ("../x", InvalidInput),
        ("none", NotFound),
        ("out/passwd", PermissionDenied),
    ):
        with pytest.raises(error):
            call("read_file", vm_id="still", body={"path": path})
    answer = request(service, "POST", "/files/still/content?path=x", b"x")
    assert (answer[0], json.loads(answer[1])["hint"]) == (409, "capsem resume still")


def test_a_stopped_vm(service: Service) -> None:
    client = service.client
    client.call("provision", body={"name": "still", "persistent": True, **SMALL})
    try:
        digest = service.output("still", MAKE).strip()
        client.call("stop", vm_id="still")
        check(service, digest)
        # Its child reads the same through one layer more, though nothing ever ran on that.
        client.call("fork", vm_id="still", body={"name": "heir"})
        assert content(service, "heir", "many/file-2") == (200, b"2\n")
        client.call("delete", vm_id="heir")
        client.call("resume", vm_id="still")
        service.output("still", "echo changed > many/file-2; sync")
        assert content(service, "still", "many/file-2") == (200, b"changed\n")
    finally:
        client.call("delete", vm_id="still")


def test_a_vm_that_was_killed(service: Service, tmp_path: Path) -> None:
    """What is only in the journal counts; the volume itself is left as it is."""
    client = service.client
    client.call("provision", body={"name": "still", "persistent": True, **SMALL})
    try:
        digest = service.output("still", MAKE + "sync").strip()
        os.kill(client.call("info", vm_id="still")["pid"], signal.SIGKILL)
        wait_for(lambda: service.status("still") == "Defunct")
        layers = json.loads((service.run_dir / "persistent/still/vm.json").read_text())["layers"]
        top = service.run_dir / "store" / "layers" / f"{layers[-1]}.qcow2"
        before = hashlib.sha256(top.read_bytes()).hexdigest()
        check(service, digest)
        assert hashlib.sha256(top.read_bytes()).hexdigest() == before
        client.call("resume", vm_id="still")
        assert service.output("still", "sha256sum big").split()[0] == digest
    finally:
        client.call("delete", vm_id="still")
