"""Files over HTTP and `capsem cp`: the real application, service and agent; only the machine is a plain process."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import io
import json
import os
import socket
import stat
import subprocess
import sys
import tarfile
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

import pytest
import uvicorn

from capsem.api.vm_types import ProvisionRequest
from capsem.client.http import Answer, encode_chunk
from capsem.service.app import build_app
from service_world import World, world

CAPSEM = Path(sys.executable).parent / "capsem"
MIB = 1024 * 1024


@dataclass
class Live:
    """A service that answers at a socket, with the VMs `box` and `off`, of which one runs."""

    socket: Path
    workspace: Path
    world: World

    def request(self, method: str, path: str, body: bytes | list[bytes] = b"") -> tuple[int, dict[str, str], bytes]:
        """Status, headers and body; a body in pieces is sent in chunks."""
        head = f"{method} {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n"
        if isinstance(body, list):
            sent = head.encode() + b"Transfer-Encoding: chunked\r\n\r\n" + b"".join(map(encode_chunk, [*body, b""]))
        else:
            sent = head.encode() + b"Content-Length: %d\r\n\r\n" % len(body) + body
        answer, content = Answer(), bytearray()
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(30)
            connection.connect(str(self.socket))
            with contextlib.suppress(BrokenPipeError):
                connection.sendall(sent)
            while not answer.done:
                data = connection.recv(MIB)
                content += answer.feed(data)
                if not data:
                    answer.eof()
        return answer.status, answer.headers, bytes(content)

    def listed(self, query: str = "", vm_id: str = "box") -> tuple[int, dict[str, object]]:
        status, _, content = self.request("GET", f"/files/{vm_id}{query}")
        return status, json.loads(content)

    def cp(self, *words: str | Path, stdin: bytes = b"") -> subprocess.CompletedProcess[bytes]:
        return subprocess.run(
            [CAPSEM, "--uds-path", self.socket, "cp", *words], input=stdin, capture_output=True, timeout=60
        )


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    directory = tmp_path_factory.mktemp("live")
    ready, over, found = threading.Event(), threading.Event(), []

    async def run() -> None:
        async with world(directory) as it:
            await it.handlers.provision(ProvisionRequest(name="box", persistent=True))
            path = directory / "service.sock"
            config = uvicorn.Config(
                build_app(it.handlers, "1"),
                uds=str(path),
                http="httptools",
                loop="asyncio",
                log_config=None,
                lifespan="off",
            )
            server = uvicorn.Server(config)
            serving = asyncio.create_task(server.serve())
            while not server.started:
                await asyncio.sleep(0.005)
            found.append(Live(path, it.driver.machines[0]._directory / "root", it))
            await it.handlers.provision(ProvisionRequest(name="off", persistent=True))
            await it.handlers.stop("off")
            ready.set()
            await asyncio.to_thread(over.wait)
            server.should_exit = True
            await serving

    thread = threading.Thread(target=asyncio.run, args=(run(),))
    thread.start()
    assert ready.wait(30)
    yield found[0]
    over.set()
    thread.join(30)
    assert not thread.is_alive()


@pytest.fixture
def inside(live: Live) -> Iterator[Path]:
    """The workspace, empty before and after."""
    yield live.workspace
    subprocess.run(["find", live.workspace, "-mindepth", "1", "-delete"], check=True)


def test_a_listing_is_nested_and_in_order(live: Live, inside: Path) -> None:
    (inside / "b/c/d").mkdir(parents=True)
    (inside / "b/c/d/e.json").write_text("{}")
    (inside / "system").mkdir()
    (inside / "b/system").mkdir()
    (inside / "a.txt").write_text("hello")
    (inside / "z.png").write_bytes(b"\x89PNG")
    (inside / "Zoo").mkdir()
    status, answer = live.listed()
    assert status == 200
    entries = answer["entries"]
    assert isinstance(entries, list)
    assert [(each["name"], each["type"]) for each in entries] == [
        ("Zoo", "directory"),
        ("b", "directory"),
        ("a.txt", "file"),
        ("z.png", "file"),
    ]
    assert "children" not in entries[1]
    assert entries[2] | {"mtime": 0} == {
        "name": "a.txt",
        "path": "a.txt",
        "type": "file",
        "size": 5,
        "mtime": 0,
        "mime": "text/plain",
        "is_text": True,
    }
    assert (entries[3]["mime"], entries[3]["is_text"]) == ("image/png", False)

    [c, system] = live.listed("?path=/b&depth=99")[1]["entries"]  # type: ignore[misc]
    assert (c["path"], system["path"]) == ("b/c", "b/system")
    [d] = c["children"]
    assert [each["path"] for each in d["children"]] == ["b/c/d/e.json"]


@pytest.mark.parametrize(
    ("query", "status"),
    [
        ("?path=..", 400),
        ("?path=a/../b", 400),
        ("?path=a/.%24./b", 400),  # ".." once the dollar sign is gone
        ("?depth=0", 400),
        ("?depth=x", 400),
        ("?depth=-1", 400),
        ("?path=missing", 404),
        ("?path=file", 404),
        ("?path=out", 404),
        ("?path=out/etc", 403),
        ("?path=//&depth=2", 200),
        ("?path=%24%25", 200),
    ],
)
def test_paths_of_listings(live: Live, inside: Path, query: str, status: int) -> None:
    (inside / "file").touch()
    (inside / "out").symlink_to("/")
    assert live.listed(query)[0] == status


@pytest.mark.parametrize("method", ["GET", "POST"])
@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("", 400),
        ("/", 400),
        ("$", 400),
        ("../x", 400),
        ("a/..", 400),
        ("a/.\0./b", 400),
        ("out/passwd", 403),
        ("link", 403),
        ("dir", {"GET": 404, "POST": 400}),
        ("file/x", {"GET": 404, "POST": 400}),
        ("missing", {"GET": 404, "POST": 200}),
        ("fifo", {"GET": 404, "POST": 400}),
    ],
)
def test_paths_of_contents(live: Live, inside: Path, method: str, path: str, status: int | dict[str, int]) -> None:
    (inside / "file").touch()
    (inside / "dir").mkdir()
    (inside / "out").symlink_to("/etc")
    (inside / "link").symlink_to("/etc/passwd")
    os.mkfifo(inside / "fifo")
    wanted = status if isinstance(status, int) else status[method]
    got, _, body = live.request(method, f"/files/box/content?path={quote(path)}", b"" if method == "GET" else b"x")
    assert got == wanted
    assert ("error" in json.loads(body)) == (wanted != 200)
    assert not list(inside.glob("**/.capsem-*"))


@pytest.mark.parametrize("size", [0, 1, 5, 256 * 1024 - 1, 256 * 1024, 256 * 1024 + 1, 3 * MIB, 10 * MIB])
@pytest.mark.parametrize("chunked", [False, True])
def test_round_trip(live: Live, inside: Path, size: int, chunked: bool) -> None:
    data = os.urandom(size)
    body = [data[at : at + 100_000] for at in range(0, size, 100_000)] if chunked else data
    status, _, content = live.request("POST", "/files/box/content?path=new/we+ird%20n%C3%A4me.txt", body)
    assert (status, json.loads(content)) == (200, {"success": True, "size": size})
    file = inside / "new/weirdnme.txt"
    assert file.stat().st_mode & 0o777 == 0o644
    assert file.read_bytes() == data
    status, headers, content = live.request("GET", "/files/box/content?path=new/weirdnme.txt")
    assert (status, hashlib.sha256(content).digest()) == (200, hashlib.sha256(data).digest())
    assert headers["content-type"] == "text/plain"
    assert headers["content-disposition"] == 'attachment; filename="weirdnme.txt"'
    assert (headers["content-length"], headers["x-capsem-mode"]) == (str(size), "644")


ODD = ("a b", "ab", "näme.txt", "日本/🎉.md", "q?&#%41+=", "'\"$x`;", "..x/y..z", "new\nline", "\\", "~")


@pytest.mark.parametrize("name", ODD)
def test_a_name_that_is_meant_exactly(live: Live, inside: Path, name: str) -> None:
    path = f"path={quote(name)}&exact=1"
    assert live.request("POST", f"/files/box/content?{path}", name.encode())[0] == 200
    assert (inside / name).read_text() == name
    assert live.request("GET", f"/files/box/content?{path}")[::2] == (200, name.encode())
    parent, _, last = name.rpartition("/")
    entries = live.listed(f"?path={quote(parent)}&exact=1")[1]["entries"]
    assert [(each["name"], each["path"]) for each in entries] == [(last, name)]  # type: ignore[attr-defined]
    for bad, status in (("a\0b", 400), ("..", 400), ("a/../b", 400), ("", 400)):
        assert live.request("GET", f"/files/box/content?path={quote(bad)}&exact=1")[0] == status


def test_more_than_10_mib_comes_in_but_not_out(live: Live, inside: Path) -> None:
    assert live.request("POST", "/files/box/content?path=big", bytes(10 * MIB + 1))[0] == 200
    status, _, content = live.request("GET", "/files/box/content?path=big")
    assert (status, json.loads(content)["code"]) == (413, "payload_too_large")


def nameless(directory: Path) -> list[str]:
    """Files without a name that somebody has open in a directory: what is being written."""
    found = []
    for descriptor in Path("/proc").glob("[0-9]*/fd/*"):
        with contextlib.suppress(OSError):
            target = os.readlink(descriptor)
            if target.startswith(f"{directory}/#") or (target.startswith(str(directory)) and "(deleted)" in target):
                found.append(target)
    return found


def test_a_body_that_breaks_off_changes_nothing(live: Live, inside: Path) -> None:
    (inside / "file").write_text("old")
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(str(live.socket))
        connection.sendall(
            b"POST /files/box/content?path=file HTTP/1.1\r\nHost: x\r\nContent-Length: 900000\r\n\r\nhalf"
        )
        for _ in range(200):
            if nameless(inside):
                break
            threading.Event().wait(0.01)
        assert nameless(inside)
    for _ in range(200):
        if not nameless(inside):
            break
        threading.Event().wait(0.01)
    assert not nameless(inside)
    assert [each.name for each in inside.iterdir()] == ["file"]
    assert (inside / "file").read_text() == "old"


def test_who_stops_reading_holds_up_nobody(live: Live, inside: Path) -> None:
    (inside / "file").write_bytes(bytes(9 * MIB))
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(str(live.socket))
        connection.sendall(b"GET /files/box/content?path=file HTTP/1.1\r\nHost: x\r\n\r\n")
        assert connection.recv(100)
        assert live.request("GET", "/files/box/content?path=file")[0] == 200
    assert live.request("GET", "/files/box/content?path=file")[0] == 200


def test_many_at_once(live: Live, inside: Path) -> None:
    def one(n: int) -> bool:
        data = bytes([n]) * (2 * MIB + n)
        assert live.request("POST", f"/files/box/content?path=f{n}", data)[0] == 200
        return live.request("GET", f"/files/box/content?path=f{n}")[2] == data

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(one, range(8)))


def test_vms_that_do_not_run_are_read_and_not_written(live: Live) -> None:
    [machine] = [each for each in live.world.driver.machines if each._directory / "root" != live.workspace]
    root = machine._directory / "root"
    (root / "kept").write_bytes(b"x" * (10 * MIB))
    (root / "kept").chmod(0o750)
    (root / "large").write_bytes(b"y" * (10 * MIB + 1))
    status, headers, content = live.request("GET", "/files/off/content?path=kept")
    assert (status, headers["content-length"], headers["x-capsem-mode"]) == (200, str(10 * MIB), "750")
    assert content == b"x" * (10 * MIB)
    assert live.request("GET", "/files/off/content?path=large")[0] == 413
    assert len(live.request("GET", "/files/off/content?path=large&whole=1")[2]) == 10 * MIB + 1
    names = {each["name"] for each in json.loads(live.request("GET", "/files/off")[2])["entries"]}
    assert names >= {"kept", "large"}
    status, _, content = live.request("POST", "/files/off/content?path=a", b"x")
    assert (status, json.loads(content)["hint"]) == (409, "capsem resume off")
    (root / "large").unlink()


@pytest.mark.parametrize(
    ("method", "route"),
    [("GET", "/files/{}"), ("GET", "/files/{}/content?path=a"), ("POST", "/files/{}/content?path=a")],
)
def test_vms_that_are_not_there(live: Live, method: str, route: str) -> None:
    assert live.request(method, route.format("nobody"))[0] == 404
    assert live.request(method, route.format("../x"))[0] == 400


def test_other_methods(live: Live) -> None:
    assert live.request("DELETE", "/files/box/content?path=a")[0] == 405
    assert live.request("POST", "/files/box")[0] == 405


# -- capsem cp


def test_cp_of_a_file(live: Live, inside: Path, tmp_path: Path) -> None:
    data = os.urandom(12 * MIB)
    source = tmp_path / "tool 1.sh"
    source.write_bytes(data)
    source.chmod(0o750)
    done = live.cp(source, "box:")
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
    file = inside / "tool 1.sh"
    assert (file.read_bytes() == data, file.stat().st_mode & 0o777) == (True, 0o750)
    assert live.cp(source, "box:new/dir/x").returncode == 0
    assert live.cp(source, "box:other/").returncode == 0
    assert (inside / "new/dir/x").read_bytes() == (inside / "other/tool 1.sh").read_bytes() == data

    (tmp_path / "to").mkdir()
    done = live.cp("box:tool 1.sh", tmp_path / "to")
    assert (done.returncode, done.stderr) == (0, b"")
    back = tmp_path / "to/tool 1.sh"
    assert (back.read_bytes() == data, back.stat().st_mode & 0o777) == (True, 0o750)
    assert live.cp(f"box:{inside}/tool 1.sh", tmp_path / "back").returncode == 0  # an absolute path
    assert (tmp_path / "back").read_bytes() == data
    assert sorted(each.name for each in tmp_path.iterdir()) == ["back", "to", "tool 1.sh"]
    assert not list(inside.glob("**/.capsem-*"))


@pytest.mark.parametrize("name", ODD)
def test_cp_of_a_file_with_an_odd_name(live: Live, inside: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / "here").write_text(name)
    assert live.cp(tmp_path / "here", f"box:{name}").stderr == b""
    assert (inside / name).read_text() == name
    [machine] = [each for each in live.world.driver.machines if each._directory / "root" != live.workspace]
    kept = machine._directory / "root" / name
    kept.parent.mkdir(exist_ok=True)
    kept.write_text(name)
    for box in ("box", "off") if name != "~" else ("box",):  # a "~" the files API is not asked for
        assert live.cp(f"{box}:{name}", tmp_path / "back").stderr == b""
        assert (tmp_path / "back").read_text() == name


def test_cp_of_a_directory(live: Live, inside: Path, tmp_path: Path) -> None:
    source = tmp_path / "src"
    (source / "sub/empty").mkdir(parents=True)
    (source / "sub/run").write_text("#!/bin/sh\n")
    (source / "sub/run").chmod(0o755)
    (source / "sub").chmod(0o711)
    (source / "secret").write_bytes(os.urandom(100_000))
    (source / "secret").chmod(0o600)
    (source / "link").symlink_to("sub/run")
    os.mkfifo(source / "sub/fifo")
    os.mknod(source / "socket", 0o600 | stat.S_IFSOCK)
    done = live.cp(source, "box:")  # into a directory that is there
    assert (done.returncode, sorted(done.stderr.decode().splitlines())) == (
        0,
        [
            "note: left out socket: neither a file nor a directory",
            "note: left out sub/fifo: neither a file nor a directory",
        ],
    )
    assert live.cp(source, "box:a/b").returncode == 0  # as a new one
    (inside / "src/sub/out").symlink_to("/etc")
    (inside / "src/sub/up").symlink_to("../secret")
    os.mkfifo(inside / "src/fifo")
    os.link(inside / "src/secret", inside / "src/twin")
    done = live.cp("box:src", tmp_path / "back")
    assert (done.returncode, sorted(done.stderr.decode().splitlines())) == (
        0,
        [
            "note: left out fifo: neither a file nor a directory",
            "note: left out sub/out: a link that leads out, to /etc",
        ],
    )
    back = tmp_path / "back"
    assert sorted(str(each.relative_to(back)) for each in back.rglob("*")) == [
        "link", "secret", "sub", "sub/empty", "sub/run", "sub/up", "twin",
    ]  # fmt: skip
    for name in ("secret", "sub", "sub/run"):
        assert (back / name).stat().st_mode == (source / name).stat().st_mode
    assert (back / "twin").read_bytes() == (source / "secret").read_bytes()
    assert (back / "link").readlink() == Path("sub/run")
    done = live.cp("box:src", back)
    assert done.returncode == 0  # inside it, as cp does
    assert (back / "src/secret").exists()
    done = live.cp("box:src", back)
    assert (done.returncode, b"exists" in done.stderr, b"hint: " in done.stderr) == (1, True, True)


def test_cp_with_standard_input_and_output(live: Live, inside: Path) -> None:
    data = os.urandom(3 * MIB)
    assert live.cp("-", "box:in", stdin=data).returncode == 0
    assert (inside / "in").read_bytes() == data
    assert live.cp("box:in", "-").stdout == data
    (inside / "d").mkdir()
    (inside / "d/f").write_text("x")
    with tarfile.open(fileobj=io.BytesIO(live.cp("box:d", "-").stdout)) as archive:
        assert "./f" in archive.getnames()


def test_cp_that_fails(live: Live, inside: Path, tmp_path: Path) -> None:
    (inside / "file").touch()
    os.mkfifo(inside / "fifo")
    for words, code, text in [
        (("a", "b"), 2, "exactly one"),
        (("box:a", "box:b"), 2, "exactly one"),
        (("box:missing", tmp_path), 1, "no such file"),
        (("box:fifo", tmp_path), 2, "neither"),
        (("box:file", tmp_path / "no/where"), 1, f"{tmp_path}/no is no directory\nhint: mkdir -p "),
        ((tmp_path / "missing", "box:"), 1, "no such file"),
        ((tmp_path, "box:file/x"), 1, "file"),
        (("-", "box:"), 2, "no name"),
        (("nobody:x", tmp_path), 1, "nobody"),
        (("off:x", tmp_path), 1, "off:x: no such file"),
        (("off:x y", tmp_path), 1, "off:x y: no such file"),
        (("off:../x", tmp_path), 1, "not running"),
        ((__file__, "off:x"), 1, "while it runs"),
        (("..:x", tmp_path), 2, "bad session"),
    ]:
        done = live.cp(*words)
        assert (done.returncode, text in done.stderr.decode()) == (code, True), (words, done)
        assert not done.stdout
    assert not list(tmp_path.iterdir())
