"""Bad input from outside, at a real service without VMs: refused in so many words, nothing changed, nothing left."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from capsem.api.operations import OPERATIONS
from capsem.client.http import encode_chunk
from outside import Http, ask, descriptors, refused, resident, traces
from vm.real_service import BIN, Service, start_process, wait_for, wait_until_it_answers

MIB = 1024 * 1024


@contextlib.contextmanager
def serving(home: Path, *options: str, **env: str) -> Iterator[Service]:
    service = Service(home, start_process(home, *options, **env))
    try:
        wait_until_it_answers(service.client)
        yield service
    finally:
        service.stop()


@pytest.fixture
def home() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="capsem-") as text:  # a short path: sockets have to fit
        yield Path(text)


@pytest.fixture(scope="module")
def shared() -> Iterator[Service]:
    with tempfile.TemporaryDirectory(prefix="capsem-") as text, serving(Path(text)) as service:
        service.cli("list")
        yield service


@pytest.fixture
def service(shared: Service) -> Iterator[Service]:
    """The shared service, which has to be as it was when the test is over, and to answer."""
    before = traces(shared.run_dir)
    yield shared
    assert traces(shared.run_dir) == before
    assert ask(shared.socket, "GET", "/list")[1]["sandboxes"] == []


SIZES: list[dict[str, Any]] = [
    *({"cpus": cpus} for cpus in (0, 99, -1, "2", 1.5, True)),
    *({"ram_mb": ram} for ram in (0, 255, 999999, -1, "512", [512])),
    *({"disk_mb": disk} for disk in (0, -1, 10**12, "1")),
    *({"env": env} for env in ({"LD_PRELOAD": "/x.so"}, {"": "x"}, {"A=B": "x"}, {"A": "x\0"}, {"A": None}, ["A=B"])),
]
NAMES: list[dict[str, Any]] = [
    *({"name": name} for name in ("../x", "", "a" * 65, "a\0b", "-x", "_x", ".", "a/b", "naïve", "a b", "x\n")),
    {"persistent": "yes"},
    {"from": "../x"},
]


@pytest.mark.parametrize(
    ("route", "body"),
    [
        *(("/provision", body) for body in (*NAMES, *SIZES)),
        *(("/run", {"command": "true", **body}) for body in SIZES),
        *(("/persist/ghost", body) for body in NAMES[:-2]),
        *(("/fork/ghost", body) for body in NAMES[:-2]),
    ],
    ids=lambda part: json.dumps(part)[:40],
)
def test_a_vm_that_cannot_be(service: Service, route: str, body: dict[str, Any]) -> None:
    refused(ask(service.socket, "POST", route, body), 400, "invalid_input")


def test_a_copy_of_nothing(service: Service) -> None:
    refused(ask(service.socket, "POST", "/provision", {"from": "ghost"}), 404, "not_found")


_BODIES = {
    "exec": {"command": "true"},
    "exec_stream": b"\x03\x00\x00\x00\x12" + b'{"command":"true"}',
    "write_file": {"path": "a", "content": "b"},
    "read_file": {"path": "a"},
    "persist": {"name": "kept"},
    "fork": {"name": "child"},
    "remove_checkpoint": {"checkpoint": "3f2a"},
    "verify_checkpoint": {"checkpoint": "3f2a"},
    "rollback": {"checkpoint": "3f2a"},
    "put_file": b"content",
    "inspect": {"sql": "SELECT 1"},
    "forward": b"\x03\x00\x00\x00\x0b" + b'{"port":80}',
    "kill_job": {"job": "one"},
    "network_allow": {"host": "example.com"},
    "network_deny": {"host": "example.com"},
    "network_learn": {"action": "start"},
    "feed_job": b"",
}


@pytest.mark.parametrize(
    "operation", [each for each in OPERATIONS.values() if each.takes_id], ids=lambda each: each.name
)
def test_a_vm_that_is_not_there(service: Service, operation: Any) -> None:
    path = operation.path.replace("{id}", "ghost") + ("?path=a&checkpoint=3f2a&job=one" if operation.query else "")
    error = refused(ask(service.socket, operation.method, path, _BODIES.get(operation.name)), 404, "not_found")
    assert "ghost" in error["error"]


@pytest.mark.parametrize("words", ["..%2Fx", "%2e%2e", "a%2Fb", "%00", "-x", "a" * 65, "%C3%A9", ""])
@pytest.mark.parametrize(
    "operation", [each for each in OPERATIONS.values() if each.takes_id], ids=lambda each: each.name
)
def test_an_id_that_cannot_be(service: Service, operation: Any, words: str) -> None:
    path = operation.path.replace("{id}", words) + ("?path=a" if "file" in operation.name else "")
    status, body = ask(service.socket, operation.method, path, _BODIES.get(operation.name))
    assert (status, body["code"]) in {(400, "invalid_input"), (404, "not_found"), (405, "invalid_input")}, body
    assert body["error"]


@pytest.mark.parametrize(
    "body", [b"[]", b"7", b'"x"', b"{", b"\xff", b"null", b"{}{}", b'{"command":[]}', b"[" * 99999]
)
@pytest.mark.parametrize("route", ["/run", "/exec/ghost", "/fork/ghost", "/persist/ghost", "/write_file/ghost"])
def test_bodies_that_are_no_requests(service: Service, route: str, body: bytes) -> None:
    refused(ask(service.socket, "POST", route, body), 400, "invalid_input")


def test_unknown_fields_are_ignored(service: Service) -> None:
    body = {"all": False, "colour": {"deep": [1]}, "": None}
    assert ask(service.socket, "POST", "/purge", body) == (
        200,
        {"purged": 0, "persistent_purged": 0, "ephemeral_purged": 0},
    )


def test_routes_that_are_none(service: Service) -> None:
    refused(ask(service.socket, "PATCH", "/list"), 405, "invalid_input")
    refused(ask(service.socket, "DELETE", "/provision"), 405, "invalid_input")
    refused(ask(service.socket, "GET", "/nothing"), 404, "not_found")
    refused(ask(service.socket, "GET", "/../../etc/passwd"), 404, "not_found")


@pytest.mark.parametrize("size", [10_000, 60_000, 1_000_000])
def test_a_very_long_url(service: Service, size: int) -> None:
    with contextlib.suppress(ConnectionError):  # at some length the server only hangs up
        status, _ = ask(service.socket, "GET", "/info/" + "a" * size)
        assert status in (400, 404, 414)


def test_50_mb_are_refused_in_little_memory(service: Service) -> None:
    ask(service.socket, "POST", "/exec/ghost", b" " * (MIB - 100) + b"{}")  # as much as is ever taken
    before = resident(service.process.pid)
    for route in ("/provision", "/exec/ghost", "/write_file/ghost", "/stop/ghost"):
        with contextlib.suppress(ConnectionError):  # it need not be read to the end
            status, body = ask(service.socket, "POST", route, b" " * (50 * MIB))
            assert (status, body["code"]) == (413, "payload_too_large"), route
            assert body["hint"]
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(10)
            connection.connect(str(service.socket))
            connection.sendall(f"POST {route} HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n".encode())
            piece = encode_chunk(b" " * 65536)
            with contextlib.suppress(ConnectionError):
                for _ in range(50 * 16):
                    connection.sendall(piece)
    assert resident(service.process.pid) - before < 24 * 1024


def test_a_chunked_body_is_as_good_as_another(service: Service) -> None:
    with contextlib.closing(Http(service.socket)) as connection:
        connection.request(
            "POST",
            "/purge",
            iter([b'{"al', b'l":', b"false}"]),
            encode_chunked=True,
            headers={"Transfer-Encoding": "chunked"},
        )
        answer = connection.getresponse()
        assert (answer.status, json.loads(answer.read())["purged"]) == (200, 0)


GARBAGE = [
    b"\0" * 4096,
    os.urandom(4096),
    b"GET\r\n\r\n",
    b"GET / HTTP/9.9\r\n\r\n",
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",  # TLS
    b"GET /list HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n",
    b"GET /list HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n",
    b"POST /run HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
    b"GET /list HTTP/1.1\r\n" + b"X: y\r\n" * 20000,
    b"POST /run HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{",
    b"GET /li",
    b"",
]


@pytest.mark.parametrize("half_close", [True, False])
def test_garbage_on_the_socket(service: Service, half_close: bool) -> None:
    held = descriptors(service.process.pid)
    for data in GARBAGE:
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(10)
            connection.connect(str(service.socket))
            with contextlib.suppress(ConnectionError):
                connection.sendall(data)
                if half_close:
                    connection.shutdown(socket.SHUT_WR)
                    while connection.recv(65536):
                        pass
        assert ask(service.socket, "GET", "/version")[0] == 200, data[:60]
    wait_for(lambda: descriptors(service.process.pid) <= held)


def test_many_who_say_nothing_hold_up_nobody(service: Service) -> None:
    with contextlib.ExitStack() as stack:
        for _ in range(200):
            connection = stack.enter_context(socket.socket(socket.AF_UNIX))
            connection.connect(str(service.socket))
            connection.sendall(b"POST /run HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n{")
        assert ask(service.socket, "GET", "/version")[0] == 200


# -- the command line


@pytest.mark.parametrize(
    ("words", "code", "text"),
    [
        (("create", "-n", "../x"), 2, "bad name"),
        (("create", "-n", "naïve"), 2, "bad name"),
        *(
            ((*words, bad), 2, "bad name")
            for words in (("create", "-n"), ("fork", "ghost"), ("persist", "ghost"))
            for bad in ("", "a" * 65, "..", "a/b")
        ),
        (("create", "--cpu", "0"), 2, "cpus"),
        (("create", "--cpu", "99"), 2, "cpus"),
        (("create", "--ram", "0"), 2, "ram"),
        *(
            ((*words, "--ram", ram), 2, f"--ram is {ram} GB\nhint: choose 0.25 to 16\n")
            for words in (("create",), ("run", "true"))
            for ram in ("0.1", "99", "999999")
        ),
        *(
            ((*words, "--disk", "0.4"), 2, "--disk is 0.4 GB\nhint: choose 0.5 to 1024\n")
            for words in (("create",), ("run", "true"))
        ),
        (("create", "-e", "LD_PRELOAD=/x.so"), 2, "LD_PRELOAD"),
        (("run", "-e", "LD_PRELOAD=/x.so", "true"), 2, "LD_PRELOAD"),
        *((("run", "--cpu", cpus, "true"), 2, "cpus") for cpus in ("0", "99")),
        (("run", "--ram", "0", "true"), 2, "ram"),
        (("create", "--from", "ghost"), 1, "ghost"),
        *(((*verb, "ghost"), 1, "ghost") for verb in (("info",), ("logs",), ("stop",), ("resume",), ("attach",))),
        *(((*verb, "ghost"), 1, "ghost") for verb in (("delete",), ("rm",), ("restart",))),
        (("exec", "ghost", "true"), 1, "ghost"),
        (("fork", "ghost", "child"), 1, "ghost"),
        (("persist", "ghost", "kept"), 1, "ghost"),
        (("cp", "ghost:a", "-"), 1, "ghost"),
        (("cp", "/etc/hostname", "ghost:a"), 1, "ghost"),
        (("cp", "a", "b"), 2, "SESSION:PATH"),
        (("cp", "x..y:a", "b"), 2, "bad session"),
        *(
            ((*verb, bad), 2, "bad session")
            for verb in (("info",), ("rm",), ("stop",))
            for bad in ("", "a/b", "a\\b", "..")
        ),
        (("exec", "", "true"), 2, "bad session"),
        (("fork", "a/b", "c"), 2, "bad session"),
        (("completions", "csh"), 2, "csh"),
        (("nonsense",), 2, "nonsense"),
    ],
    ids=str,
)
def test_the_command_line(service: Service, words: tuple[str, ...], code: int, text: str) -> None:
    done = service.cli(*words)
    error = done.stderr.decode()
    assert (done.returncode, done.stdout) == (code, b""), error
    assert error.startswith("error: "), error
    assert text in error, error
    assert "\nhint: " in error, error


def test_purge_all_asks(service: Service) -> None:
    for answer in (b"", b"n\n", b"yes\n", b"\xff\n"):
        done = service.cli("purge", "--all", stdin=answer)
        assert (done.returncode, b"[y/N] " in done.stdout, done.stdout.endswith(b"Aborted.\n")) == (0, True, True)
    assert b"Purged 0" in service.cli("purge", "--all", stdin=b"y\n").stdout


# -- starting


def test_a_second_service_leaves_the_first_alone(service: Service) -> None:
    inode = service.socket.stat().st_ino
    second = start_process(service.home)
    assert second.wait(20) == 0
    assert service.socket.stat().st_ino == inode
    assert service.process.poll() is None


def start(*options: str, **env: str) -> tuple[int, str]:
    """A service that is not going to come up: its exit code and what it said."""
    done = subprocess.run(
        [BIN / "capsem-service", "--foreground", *options],
        env={**os.environ, **env},
        capture_output=True,
        text=True,
        timeout=20,
    )
    return done.returncode, done.stderr


@pytest.mark.parametrize("run", ["file/run", "file", "readonly", "/proc/nowhere"])
def test_a_run_directory_that_cannot_be(home: Path, run: str) -> None:
    (home / "file").touch()
    with contextlib.ExitStack() as stack:
        if run == "readonly":
            (home / run).mkdir()
            if os.geteuid() == 0:  # for whom modes do not count
                mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "ro", "none", home / run], capture_output=True)
                if mounted.returncode:
                    pytest.skip("root, and may not mount: there is no directory that cannot be written")
                stack.callback(subprocess.run, ["umount", home / run], check=True)
            else:
                (home / run).chmod(0o500)
        env = {"CAPSEM_HOME": str(home), "CAPSEM_RUN_DIR": str(home / run)}
        code, error = start(**env)
        assert code == 1
        assert error.startswith("error: "), error
        assert "Traceback" not in error
        assert str(home / run) in error
        done = subprocess.run([BIN / "capsem", "list"], env={**os.environ, **env}, capture_output=True, text=True)
        assert (done.returncode, done.stdout) == (1, "")
        assert done.stderr.startswith("error: "), done.stderr
        assert "\nhint: " in done.stderr
        assert str(home / run) in done.stderr


def test_a_run_directory_that_is_a_link(home: Path) -> None:
    (home / "real").mkdir()
    (home / "run").symlink_to("real")
    with serving(home) as service:
        assert service.cli("list").stdout == b"No sessions.\n"
        assert (home / "real/service.sock").is_socket()
        assert service.cli("status").returncode == 0
    assert (home / "run").is_symlink()
    assert not (home / "real/service.sock").exists()


def test_a_run_directory_with_a_long_name(home: Path) -> None:
    """The default socket does not fit: the service says what to do. With a shorter --uds-path it serves."""
    run = home / ("d" * 100)
    env = {"CAPSEM_HOME": str(home), "CAPSEM_RUN_DIR": str(run)}
    code, error = start(**env)
    assert code == 1
    assert error.startswith("error: cannot bind"), error
    assert "--uds-path" in error
    assert "CAPSEM_RUN_DIR" in error, "which users of the command line have set, if anything"
    for words in ("list", "create"):
        done = subprocess.run([BIN / "capsem", words], env={**os.environ, **env}, capture_output=True, text=True)
        assert (done.returncode, done.stdout) == (1, "")
        assert "error: cannot bind" in done.stderr, (
            done.stderr
        )  # after a word that it is being started, where that takes long
        assert "--uds-path" in done.stderr
        assert "\nhint: " in done.stderr
    short = home / "s.sock"
    process = start_process(home, "--uds-path", str(short), CAPSEM_RUN_DIR=str(run))
    try:
        wait_for(short.exists)
        assert ask(short, "GET", "/list")[0] == 200
    finally:
        process.terminate()
        process.wait(20)


@pytest.mark.parametrize("what", ["file", "link", "socket"])
def test_what_lies_where_the_socket_goes_is_replaced(home: Path, what: str) -> None:
    path = home / "run/service.sock"
    path.parent.mkdir()
    if what == "file":
        path.write_text("left over")
    elif what == "link":
        path.symlink_to("/nonexistent")
    else:
        with socket.socket(socket.AF_UNIX) as left:
            left.bind(str(path))
    with serving(home) as service:
        assert path.is_socket()
        assert not path.is_symlink()
        assert service.cli("list").returncode == 0


def test_a_directory_where_the_socket_goes_is_left_alone(home: Path) -> None:
    (home / "run/service.sock").mkdir(parents=True)
    code, error = start(CAPSEM_HOME=str(home), CAPSEM_RUN_DIR=str(home / "run"))
    assert code == 1
    assert error.startswith("error: cannot bind"), error
    assert (home / "run/service.sock").is_dir()


def test_no_service_at_the_socket_that_was_named(home: Path) -> None:
    (home / "dead.sock").touch()
    for name in ("none.sock", "dead.sock", "no/such/dir.sock"):
        done = subprocess.run(
            [BIN / "capsem", "--uds-path", home / name, "list"], capture_output=True, text=True, timeout=60
        )
        assert (done.returncode, done.stdout) == (1, "")
        assert done.stderr.startswith("error: cannot connect"), done.stderr
    assert sorted(path.name for path in home.iterdir()) == ["dead.sock"]


# -- what a VM needs and is not there

NO_IMAGE = "import sys; sys.prefix = sys.argv.pop(1); from capsem.service.__main__ import main; sys.exit(main())"


def test_without_an_image(home: Path) -> None:
    env = {**os.environ, "HOME": str(home), "CAPSEM_HOME": str(home), "CAPSEM_RUN_DIR": str(home / "run")}
    process = subprocess.Popen([sys.executable, "-c", NO_IMAGE, str(home / "prefix"), "--foreground"], env=env)
    service = Service(home, process)
    try:
        wait_until_it_answers(service.client)
        before = traces(service.run_dir)
        error = refused(
            ask(service.socket, "POST", "/provision", {"name": "box", "persistent": True}), 404, "not_found"
        )
        assert "capsem image build" in error["hint"]
        refused(ask(service.socket, "POST", "/run", {"command": "true"}), 404, "not_found")
        assert ask(service.socket, "GET", "/list")[1]["asset_health"]["ready"] is False
        for words in (("run", "true"), ("create", "-n", "box")):
            done = service.cli(*words)
            assert (done.returncode, done.stdout) == (1, b"")
            assert b"capsem image build" in done.stderr.partition(b"\nhint: ")[2]
        assert traces(service.run_dir) == before
    finally:
        service.stop()


@pytest.mark.parametrize("damage", ["short", "missing"])
def test_with_a_damaged_image(home: Path, damage: str) -> None:
    from capsem.image.catalog import Catalog

    image = Catalog.from_environment(os.environ).find()
    copy = home / "assets"
    copy.mkdir()
    for path in image.directory.iterdir():
        (copy / path.name).symlink_to(path)
    victim = copy / image.initrd.name
    victim.unlink()
    if damage == "short":
        victim.write_text("{")
    with serving(home, "--assets-dir", str(copy)) as service:
        before = traces(service.run_dir)
        error = refused(ask(service.socket, "POST", "/provision", {"name": "box", "persistent": True}), 500, "corrupt")
        assert victim.name in error["error"]
        assert "capsem image build" in error["hint"]
        for words in (("run", "true"), ("create", "-n", "box")):
            done = service.cli(*words)
            assert (done.returncode, done.stdout) == (1, b"")
            assert done.stderr.startswith(b"error: "), done.stderr
            assert victim.name.encode() in done.stderr
            assert b"capsem image build" in done.stderr.partition(b"\nhint: ")[2]
        assert traces(service.run_dir) == before


def test_an_image_whose_content_is_not_what_it_was(home: Path) -> None:
    """Of the same size, so that nothing but its digest can tell."""
    from capsem.image.catalog import Catalog

    image = Catalog.from_environment(os.environ).find()
    copy = home / "assets"
    copy.mkdir()
    for path in image.directory.iterdir():
        (copy / path.name).symlink_to(path)
    victim = copy / image.initrd.name
    victim.unlink()
    data = bytearray(image.initrd.read_bytes())
    data[len(data) // 2] ^= 1
    victim.write_bytes(data)
    words = [BIN / "capsem", "image", "--assets-dir", copy, "verify"]
    done = subprocess.run(words, env={**os.environ, "CAPSEM_HOME": str(home)}, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith("error: "), done.stderr
    assert victim.name in done.stderr
    assert "capsem image build" in done.stderr.partition("\nhint: ")[2]


def qemu(home: Path, script: str) -> str:
    path = home / "qemu"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return str(path)


VERSION = 'case "$*" in *-version*) echo "QEMU emulator version 9.2.0"; exit;; esac; '


@pytest.mark.parametrize(
    ("env", "code", "text"),
    [
        ({"CAPSEM_QEMU": "/nonexistent/qemu"}, "host_not_ready", "CAPSEM_QEMU names /nonexistent/qemu"),
        ({"CAPSEM_QEMU": "/etc/passwd"}, "host_not_ready", "cannot be run"),
        ({"CAPSEM_QEMU": "/bin/true"}, "host_not_ready", "QEMU"),
        ({"PATH": "/nonexistent"}, "host_not_ready", "is not installed"),
        ({"CAPSEM_QEMU": VERSION + "exit 3"}, "machine_failed", "QEMU did not start"),
        ({"CAPSEM_QEMU": VERSION + "echo boo >&2; exit 1"}, "machine_failed", "boo"),
        ({"CAPSEM_QEMU": VERSION + "kill -9 $$"}, "machine_failed", "QEMU did not start"),
    ],
    ids=str,
)
def test_without_a_qemu_that_works(home: Path, env: dict[str, str], code: str, text: str) -> None:
    if env.get("CAPSEM_QEMU", "").startswith(VERSION):
        env = {"CAPSEM_QEMU": qemu(home, env["CAPSEM_QEMU"])}
    with serving(home, **env) as service:
        before = traces(service.run_dir)
        error = refused(ask(service.socket, "POST", "/provision", {"ram_mb": 512}), 500, code)
        assert text in error["error"]
        refused(ask(service.socket, "POST", "/run", {"command": "true", "ram_mb": 512}), 500, code)
        for words in (("run", "--ram", "0.5", "true"), ("create", "--ram", "0.5")):
            done = service.cli(*words)
            assert (done.returncode, done.stdout) == (1, b"")
            assert done.stderr.startswith(b"error: "), done.stderr
            assert text.encode() in done.stderr
            assert b"\nhint: " in done.stderr
        error = refused(ask(service.socket, "POST", "/provision", {"name": "box", "persistent": True}), 500, code)
        after = traces(service.run_dir)
        assert after[1:] == before[1:]
        # The logs of a VM that failed are kept, and one that is to persist is there, to be resumed or deleted.
        assert ask(service.socket, "DELETE", "/delete/box")[0] == 200
        service.client.call("df")  # once what was removed is gone
        left = {path for path in traces(service.run_dir)[0] if path not in before[0]}
        assert not [path for path in left if path.startswith(("instances", "store/layers", "persistent/"))]
        assert all("-failed-" in path for path in left if path.startswith("sessions"))
