"""Servers as a VM meets them outside, on 127.0.0.1: package indexes of pip, npm and apt, a git repository, a model, a mirror of
what was asked. All are `NAME.test` in TLS at one port, signed by an authority of their own.

`python tests/origins.py DIRECTORY` serves until it is ended, and writes there: `ca.pem`, `hosts` (a file like /etc/hosts),
`port`, `policy.toml`, `floor.toml` (the same without a name), and `seen`, a line of JSON for each request. Tests use `serving`.
"""

from __future__ import annotations

import base64
import contextlib
import datetime
import gzip
import hashlib
import io
import json
import ssl
import subprocess
import sys
import tarfile
import threading
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from capsem.egress import mint

NAMES = ("pypi.test", "npm.test", "apt.test", "git.test", "llm.test", "mirror.test", "other.test", "news.test")
STREAMS = Path(__file__).parent / "model_streams"
PACKAGE = "capsem-demo"  # in every index; says hello
HELLO = "hello from a package"
HALF = 100_000  # bytes of what is held
RELEASE_WITHIN = 240.0  # seconds


@dataclass
class Origins:
    """Where they are, and what they have seen."""

    directory: Path
    port: int

    def url(self, name: str, path: str = "/") -> str:
        return f"https://{name}.test:{self.port}{path}"

    @property
    def hosts(self) -> Path:
        return self.directory / "hosts"

    @property
    def authority(self) -> Path:
        return self.directory / "ca.pem"

    @property
    def seen(self) -> list[dict[str, Any]]:
        """Every request so far: host, method, target, headers, body."""
        return [json.loads(line) for line in (self.directory / "seen").read_text().splitlines()]

    def policy(self, *names: str, **more: object) -> str:
        """A VM's own policy that allows these names, or all but news.test, at that port on the loopback interface."""
        hosts = [f"{name}.test" for name in names] or [name for name in NAMES if name != "news.test"]
        lines = [
            "[network]",
            f"extra_ca = [{json.dumps(str(self.authority))}]",
            "[[network.rule]]",
            'name = "this-computer"',
            'action = "allow"',
            'cidr = ["127.0.0.1/32"]',
            f"port = [{self.port}]",
            "[[network.rule]]",
            'name = "lab"',
            'action = "allow"',
            f"host = {json.dumps(hosts)}",
            f"port = [{self.port}]",
            *(f"{key} = {json.dumps(value)}" for key, value in more.items()),
        ]
        return "\n".join(lines) + "\n"


def wheel() -> bytes:
    name, info = "capsem_demo", "capsem_demo-1.0.dist-info"
    files = {
        f"{name}.py": f"print({HELLO!r})\n",
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {PACKAGE}\nVersion: 1.0\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: tests\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = "".join(f"{path},,\n" for path in [*files, f"{info}/RECORD"])
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w") as archive:
        for path, text in [*files.items(), (f"{info}/RECORD", record)]:
            archive.writestr(path, text)
    return made.getvalue()


def tarball(files: dict[str, bytes], mode: int = 0o644) -> bytes:
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w:gz") as archive:
        for path, data in files.items():
            entry = tarfile.TarInfo(path)
            entry.size, entry.mode = len(data), mode
            archive.addfile(entry, io.BytesIO(data))
    return made.getvalue()


def npm_package() -> bytes:
    about = {"name": PACKAGE, "version": "1.0.0", "main": "index.js"}
    program = f"console.log({json.dumps(HELLO)})\n"
    return tarball({"package/package.json": json.dumps(about).encode(), "package/index.js": program.encode()})


def deb() -> bytes:
    """An ar archive of three members."""
    control = (
        f"Package: {PACKAGE}\nVersion: 1.0\nArchitecture: all\nMaintainer: tests <t@example.test>\nDescription: demo\n"
    )
    members = {
        "debian-binary": b"2.0\n",
        "control.tar.gz": tarball({"./control": control.encode()}),
        "data.tar.gz": tarball({f"./usr/bin/{PACKAGE}": f"#!/bin/sh\necho {HELLO}\n".encode()}, 0o755),
    }
    made = b"!<arch>\n"
    for name, data in members.items():
        made += (
            f"{name:<16}{0:<12}{0:<6}{0:<6}{'100644':<8}{len(data):<10}`\n".encode() + data + b"\n" * (len(data) % 2)
        )
    return made


def repository(directory: Path) -> None:
    """A bare repository that plain files are enough to clone from."""
    work, bare = directory / "work", directory / "hello.git"
    who = ["-c", "user.name=tests", "-c", "user.email=t@example.test"]
    quiet = {"check": True, "capture_output": True}
    subprocess.run(["git", "init", "-q", "-b", "main", work], **quiet)  # type: ignore[call-overload]
    (work / "README").write_text("hello from a repository\n")
    subprocess.run(["git", "-C", work, "add", "."], **quiet)  # type: ignore[call-overload]
    subprocess.run(["git", "-C", work, *who, "commit", "-q", "-m", "Begin"], **quiet)  # type: ignore[call-overload]
    subprocess.run(["git", "clone", "-q", "--bare", work, bare], **quiet)  # type: ignore[call-overload]
    subprocess.run(["git", "-C", bare, "update-server-info"], **quiet)  # type: ignore[call-overload]


class Site:
    """Files by host and path, made once."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        package, tar, debian = wheel(), npm_package(), deb()
        sums = {kind: hashlib.new(kind, debian).hexdigest() for kind in ("md5", "sha256")}
        index = (
            f"Package: {PACKAGE}\nVersion: 1.0\nArchitecture: all\nMaintainer: tests <t@example.test>\n"
            f"Filename: ./{PACKAGE}.deb\nSize: {len(debian)}\nMD5sum: {sums['md5']}\nSHA256: {sums['sha256']}\n"
            "Description: demo\n"
        ).encode()
        file = "capsem_demo-1.0-py3-none-any.whl"
        link = f'<!doctype html><a href="/files/{file}#sha256={hashlib.sha256(package).hexdigest()}">{file}</a>'
        self.files: dict[tuple[str, str], tuple[str, bytes]] = {
            ("pypi.test", f"/simple/{PACKAGE}/"): ("text/html", link.encode()),
            ("pypi.test", f"/files/{file}"): ("application/octet-stream", package),
            ("npm.test", f"/{PACKAGE}/-/{PACKAGE}-1.0.0.tgz"): ("application/octet-stream", tar),
            ("apt.test", "/Packages"): ("text/plain", index),
            ("apt.test", "/Packages.gz"): ("application/gzip", gzip.compress(index)),
            ("apt.test", f"/{PACKAGE}.deb"): ("application/octet-stream", debian),
            ("news.test", "/"): ("text/plain", b"nothing new\n"),
        }
        self.integrity = "sha512-" + base64.b64encode(hashlib.sha512(tar).digest()).decode()

    def find(self, host: str, path: str, port: int) -> tuple[str, bytes] | None:
        if (host, path) == ("npm.test", f"/{PACKAGE}"):
            dist = {"tarball": f"https://npm.test:{port}/{PACKAGE}/-/{PACKAGE}-1.0.0.tgz", "integrity": self.integrity}
            version = {"name": PACKAGE, "version": "1.0.0", "dist": dist}
            about = {"name": PACKAGE, "dist-tags": {"latest": "1.0.0"}, "versions": {"1.0.0": version}}
            return "application/json", json.dumps(about).encode()
        if host == "git.test":
            file = (self.directory / path.lstrip("/")).resolve()
            if file.is_relative_to(self.directory / "hello.git") and file.is_file():
                return "application/octet-stream", file.read_bytes()
        return self.files.get((host, path))


class Handler(BaseHTTPRequestHandler):
    """One connection."""

    protocol_version = "HTTP/1.1"
    site: Site
    seen: Path
    lock: threading.Lock
    released: threading.Event  # what is held by /held goes on

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        """`seen` has it."""

    def _note(self) -> tuple[str, str, bytes]:
        host = (self.headers.get("Host") or "").partition(":")[0]
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if (self.headers.get("Transfer-Encoding") or "") == "chunked":
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        note = {
            "host": host,
            "method": self.command,
            "target": self.path,
            "headers": {name.lower(): value for name, value in self.headers.items()},
            "body": body.decode("utf-8", "replace"),
        }
        with self.lock, self.seen.open("a") as file:
            file.write(json.dumps(note) + "\n")
        return host, urlsplit(self.path).path, body

    def _answer(self, status: int, kind: str, body: bytes, **headers: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _get(self) -> None:
        host, path, body = self._note()
        port = self.server.server_address[1]
        if host in ("mirror.test", "other.test"):
            if path == "/redirect":
                self._answer(302, "text/plain", b"", Location=f"https://other.test:{port}/")
            elif path == "/held":
                self._held()
            elif path == "/release":
                self.released.set()
                self._answer(200, "text/plain", b"released\n")
            else:
                told = {"headers": dict(self.headers), "target": self.path, "body": body.decode("utf-8", "replace")}
                self._answer(200, "application/json", json.dumps(told, indent=1).encode())
        elif (found := self.site.find(host, path, int(port))) is not None:
            self._answer(200, *found)
        else:
            self._answer(404, "text/plain", b"there is no such thing\n")

    def _held(self) -> None:
        """One half at once, the other after somebody has asked for /release."""
        self.send_response(200)
        self.send_header("Content-Length", str(2 * HALF))
        self.end_headers()
        self.wfile.write(bytes(HALF))
        self.wfile.flush()
        self.released.wait(RELEASE_WITHIN)
        self.wfile.write(bytes(HALF))

    do_GET = do_HEAD = do_PUT = _get  # noqa: N815

    def do_POST(self) -> None:
        """The model's; others tell what they were sent."""
        if (self.headers.get("Host") or "").partition(":")[0] != "llm.test":
            return self._get()
        self._note()
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        for event in (STREAMS / "anthropic-stream.sse").read_bytes().split(b"\n\n"):
            if event:
                piece = event + b"\n\n"
                self.wfile.write(b"%x\r\n%b\r\n" % (len(piece), piece))
        self.wfile.write(b"0\r\n\r\n")
        return None


def contexts(directory: Path) -> ssl.SSLContext:
    """A context for whatever name a client asks for; the authority's certificate is written down."""
    now = datetime.datetime.now(datetime.UTC)
    authority, _ = mint.make(now, "origins of tests")
    (directory / "ca.pem").write_bytes(authority.pem)
    key = ec.generate_private_key(ec.SECP256R1())
    pem = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    made: dict[str, ssl.SSLContext] = {}
    for name in NAMES:
        path = directory / f"{name}.pem"
        path.write_bytes(pem + authority.sign(name, key.public_key(), now).public_bytes(serialization.Encoding.PEM))
        made[name] = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        made[name].load_cert_chain(path)

    def choose(connection: ssl.SSLObject | ssl.SSLSocket, name: str | None, _context: ssl.SSLContext) -> None:
        if name in made:
            connection.context = made[name]

    first = made[NAMES[0]]
    first.sni_callback = choose  # type: ignore[assignment]
    return first


class Server(ThreadingHTTPServer):
    """Shakes hands in the connection's own thread: a client that does not is nobody else's trouble."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, handler: type[Handler], context: ssl.SSLContext) -> None:
        super().__init__(("127.0.0.1", 0), handler)
        self._context = context

    def finish_request(self, request: Any, client_address: Any) -> None:
        """See BaseServer."""
        with contextlib.suppress(OSError), self._context.wrap_socket(request, server_side=True) as secure:
            super().finish_request(secure, client_address)


@contextlib.contextmanager
def serving(directory: Path) -> Iterator[Origins]:
    """All of them, as long as the block runs; `directory` is a fresh one."""
    directory = directory.resolve()
    repository(directory)
    (directory / "hosts").write_text("".join(f"127.0.0.1 {name}\n" for name in NAMES))
    (directory / "seen").touch()
    parts = {
        "site": Site(directory),
        "seen": directory / "seen",
        "lock": threading.Lock(),
        "released": threading.Event(),
    }
    server = Server(type("Bound", (Handler,), parts), contexts(directory))
    thread = threading.Thread(target=server.serve_forever, name="origins", daemon=True)
    thread.start()
    try:
        yield Origins(directory, server.server_address[1])
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def main() -> None:
    directory = Path(sys.argv[1])
    directory.mkdir(parents=True, exist_ok=True)
    with serving(directory) as origins, contextlib.suppress(KeyboardInterrupt):
        policy = origins.policy(model="anthropic")
        (directory / "policy.toml").write_text(policy)
        (directory / "floor.toml").write_text(policy.partition('[[network.rule]]\nname = "lab"')[0])
        (directory / "port").write_text(str(origins.port))
        threading.Event().wait()


if __name__ == "__main__":
    main()
