"""Files of a real VM: over HTTP and with `capsem cp`."""

from __future__ import annotations

import hashlib
import json
import os
import socket
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from capsem.client.http import Answer
from outside import resident
from real_service import BIN, Service, wait_for

MIB = 1024 * 1024


def request(service: Service, method: str, path: str, body: bytes = b"") -> tuple[int, bytes]:
    head = f"{method} {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: {len(body)}\r\n\r\n"
    answer, content = Answer(), bytearray()
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(120)
        connection.connect(str(service.run_dir / "service.sock"))
        connection.sendall(head.encode() + body)
        while not answer.done:
            data = connection.recv(MIB)
            content += answer.feed(data)
            if not data:
                answer.eof()
    return answer.status, bytes(content)


@pytest.fixture
def place(service: Service, box: str) -> Iterator[str]:
    """A directory of the workspace."""
    service.output(box, "mkdir -p /root/files")
    yield "files"
    service.output(box, "rm -rf /root/files")


def test_10_mb_both_ways(service: Service, box: str, place: str) -> None:
    data = os.urandom(10_000_000)
    url = f"/files/{box}/content?path={place}/ten"
    began = time.monotonic()
    status, content = request(service, "POST", url, data)
    print(f"10 MB in: {time.monotonic() - began:.2f} s")
    assert (status, json.loads(content)) == (200, {"success": True, "size": len(data)})
    told = service.output(box, f"cd {place}; sha256sum ten; stat -c '%a %U' ten").split()
    assert told == [hashlib.sha256(data).hexdigest(), "ten", "644", "root"]
    began = time.monotonic()
    status, content = request(service, "GET", url)
    print(f"10 MB out: {time.monotonic() - began:.2f} s")
    assert (status, content == data) == (200, True)


def test_100_mb_pass_in_flat_memory(service: Service, box: str, place: str) -> None:
    """Of the two processes on the way, beyond what 10 MB take."""
    way = [service.process.pid, service.client.call("info", vm_id=box)["pid"]]
    url = f"/files/{box}/content?path={place}/large"
    for size in (10_000_000, 100_000_000):
        data = os.urandom(size)
        before = [resident(pid) for pid in way]
        assert request(service, "POST", url, data)[0] == 200
        status, content = request(service, "GET", f"{url}&whole=1")
        assert (status, content == data) == (200, True)
        grown = [after - then for after, then in zip(map(resident, way), before, strict=True)]
    assert max(grown) < 16 * 1024, f"service and supervisor grew by {grown} KiB"


def test_more_than_10_mib_is_refused(service: Service, box: str, place: str) -> None:
    service.output(box, f"truncate -s {10 * MIB + 1} {place}/big; truncate -s {10 * MIB} {place}/most")
    assert request(service, "GET", f"/files/{box}/content?path={place}/big")[0] == 413
    status, content = request(service, "GET", f"/files/{box}/content?path={place}/most")
    assert (status, len(content)) == (200, 10 * MIB)


def test_listing(service: Service, box: str, place: str) -> None:
    service.output(box, f"cd {place}; mkdir -p b/c; echo hi > a.txt; echo {{}} > b/c/d.json; ln -s /etc out")
    status, content = request(service, "GET", f"/files/{box}?path={place}&depth=3")
    assert status == 200
    b, a = json.loads(content)["entries"]
    assert (b["path"], b["children"][0]["children"][0]["path"]) == (f"{place}/b", f"{place}/b/c/d.json")
    assert (a["name"], a["size"], a["mime"], a["is_text"]) == ("a.txt", 3, "text/plain", True)
    assert abs(a["mtime"] - time.time()) < 300
    assert request(service, "GET", f"/files/{box}?path={place}/none")[0] == 404


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("", 400),
        ("/", 400),
        ("..", 400),
        ("files/../../etc/passwd", 400),
        ("files/%00../x", 400),
        ("files/out/passwd", 403),
        ("files/link", 403),
        ("files/chain/passwd", 403),
        ("files/proc/self/root/etc/passwd", 403),
    ],
)
def test_confinement(service: Service, box: str, place: str, path: str, status: int) -> None:
    service.output(
        box,
        f"cd {place}; ln -s /etc out; ln -s /etc/passwd link; ln -s out chain; ln -s /proc proc; sha256sum /etc/passwd",
    )
    before = service.output(box, "sha256sum /etc/passwd")
    assert request(service, "GET", f"/files/{box}/content?path={path}")[0] == status
    assert request(service, "POST", f"/files/{box}/content?path={path}", b"x")[0] == status
    assert service.output(box, "sha256sum /etc/passwd") == before


def test_several_at_once(service: Service, box: str, place: str) -> None:
    def one(n: int) -> bool:
        data, url = os.urandom(MIB + n), f"/files/{box}/content?path={place}/{n}"
        assert request(service, "POST", url, data)[0] == 200
        return request(service, "GET", url) == (200, data)

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(one, range(4)))


def test_cp(service: Service, box: str, place: str, tmp_path: Path) -> None:
    source = tmp_path / "src"
    (source / "sub/empty").mkdir(parents=True)
    (source / "sub/with space").write_bytes(os.urandom(3 * MIB))
    (source / "run.sh").write_text("#!/bin/sh\necho ran\n")
    (source / "run.sh").chmod(0o755)
    (source / "link").symlink_to("run.sh")
    done = service.cli("cp", str(source), f"{box}:{place}")
    assert (done.returncode, done.stderr) == (0, b"")
    assert service.output(box, f"{place}/src/link; stat -c '%a %U' {place}/src/run.sh") == "ran\n755 root\n"
    done = service.cli("cp", f"{box}:{place}/src", str(tmp_path / "back"))
    assert (done.returncode, done.stderr) == (0, b"")
    for each in ("sub/with space", "run.sh"):
        assert (tmp_path / "back" / each).read_bytes() == (source / each).read_bytes()
        assert (tmp_path / "back" / each).stat().st_mode == (source / each).stat().st_mode
    assert (tmp_path / "back/link").readlink() == Path("run.sh")

    assert service.cli("cp", "-", f"{box}:/tmp/outside", stdin=b"anywhere").returncode == 0
    assert service.cli("cp", f"{box}:/tmp/outside", "-").stdout == b"anywhere"
    done = service.cli("cp", f"{box}:/tmp/none", str(tmp_path))
    assert (done.returncode, b"no such file" in done.stderr) == (1, True)
    service.output(box, "rm /tmp/outside")


@pytest.mark.parametrize("what", ["stdin", "tree"])
def test_a_copy_that_is_killed_leaves_nothing(
    service: Service, box: str, place: str, tmp_path: Path, what: str
) -> None:
    """Whatever way it goes: neither part of it, nor what it would have become."""
    tree = tmp_path / "tree"
    tree.mkdir()
    (tree / "a").write_bytes(b"a")
    with (tree / "b").open("wb") as file:
        file.truncate(8 << 30)  # it does not come to its end
    source = "-" if what == "stdin" else str(tree)
    command = [BIN / "capsem", "cp", source, f"{box}:{place}/it"]
    with subprocess.Popen(command, env=service.env, stdin=subprocess.PIPE) as copy:
        assert copy.stdin is not None
        copy.stdin.write(bytes(3 * MIB) if what == "stdin" else b"")
        copy.stdin.flush()
        wait_for(lambda: service.output(box, f"ls -A {place}") != "")
        copy.kill()
    wait_for(lambda: service.output(box, f"ls -A {place}") == "")
