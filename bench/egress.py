"""`python -m bench egress`: what programs in a guest get of the way out, with origins on this computer's loopback interface.

There is nothing to put beside it, for a guest has no other way out; the proxy alone is `bench.proxy`.
"""

from __future__ import annotations

import datetime
import ssl
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from bench.host import service
from bench.table import Row
from capsem.client.sync import Client
from capsem.egress import mint

MEGABYTES = 32
EXECS = 40

# Connections of a program that runs already, to an address that it knows: connect, ask, read to the end; milliseconds.
ASK = """
import socket, sys, time
address = socket.getaddrinfo("plain.test", None, socket.AF_INET)[0][4][0]
request = "GET /small HTTP/1.1\\r\\nHost: plain.test:%s\\r\\nConnection: close\\r\\n\\r\\n" % sys.argv[1]
for _ in range(int(sys.argv[2])):
    began = time.perf_counter()
    with socket.create_connection((address, int(sys.argv[1]))) as connection:
        connection.sendall(request.encode())
        while connection.recv(65536):
            pass
    print((time.perf_counter() - began) * 1e3)
"""
# One that waits for bytes that do not come, and writes down when it was told that they will not.
WAIT = """
import socket, sys, time
with socket.create_connection(("plain.test", int(sys.argv[1]))) as connection:
    connection.sendall(b"GET /never HTTP/1.1\\r\\nHost: plain.test:%s\\r\\n\\r\\n" % sys.argv[1].encode())
    open("/dev/shm/waits", "w").close()
    try:
        while connection.recv(65536):
            pass
    except ConnectionResetError:
        print(time.time(), file=open("/dev/shm/told", "w"))
"""


class Origin(BaseHTTPRequestHandler):
    """/small, /big, /never, /endless; and whatever is put is thrown away."""

    protocol_version = "HTTP/1.1"
    piece = bytes(256 * 1024)
    disable_nagle_algorithm = True  # or the second of two small writes waits for an acknowledgement

    def do_GET(self) -> None:
        """See the class."""
        size = {"/big": MEGABYTES << 20, "/endless": 1 << 50, "/never": 1}.get(self.path, 25)
        self.send_response(200)
        self.send_header("Content-Length", str(size))
        self.end_headers()
        if self.path == "/never":
            self.rfile.read(1)
            return
        with suppress(OSError):
            while size > 0:
                size -= self.wfile.write(self.piece[:size])

    def do_PUT(self) -> None:
        """See the class."""
        left = int(self.headers["Content-Length"])
        while left > 0 and (data := self.rfile.read1(min(left, 1 << 20))):
            left -= len(data)
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - as the base class has it
        """Nothing."""


@contextmanager
def origins(directory: Path) -> Iterator[tuple[int, int]]:
    """Ports of one that is plain and one in TLS; `ca.pem` and `hosts` in the directory."""
    authority, _ = mint.make(datetime.datetime.now(datetime.UTC), "bench")
    (directory / "ca.pem").write_bytes(authority.pem)
    (directory / "hosts").write_text("127.0.0.1 plain.test tls.test\n")
    servers = [ThreadingHTTPServer(("127.0.0.1", 0), Origin) for _ in range(2)]
    context: ssl.SSLContext = mint.Minter(authority, time.time).context("tls.test")
    servers[1].socket = context.wrap_socket(servers[1].socket, server_side=True)
    for server in servers:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield servers[0].server_port, servers[1].server_port
    finally:
        for server in servers:
            server.shutdown()
            server.server_close()


class Box:
    """A VM that may reach the origins."""

    def __init__(self, client: Client, directory: Path, ports: tuple[int, int]) -> None:
        self._client = client
        self._ports = ports
        rule = {"name": "origins", "action": "allow", "host": ["*.test"], "cidr": ["127.0.0.0/8"], "port": list(ports)}
        network = {"preset": "high", "policy": {"extra_ca": [str(directory / "ca.pem")], "rule": [rule]}}
        client.call("provision", body={"name": "box", "ram_mb": 512, "cpus": 1, "network": network})
        for name, text in (("ask.py", ASK), ("wait.py", WAIT)):
            client.call("write_file", vm_id="box", body={"path": name, "content": text})
        self.output(f"head -c {MEGABYTES << 20} /dev/zero >/dev/shm/big")

    def output(self, command: str, vm: str = "box") -> str:
        """Of a command that goes well."""
        done = self._client.call("exec", vm_id=vm, body={"command": command})
        if done["exit_code"]:
            raise SystemExit(f"{command}: {done['stderr']}")
        return str(done["stdout"])

    def begin(self, command: str) -> None:
        """Start a command that goes on until `end`."""
        self._client.call(
            "exec", vm_id="box", body={"command": f"{command} & echo $! >/dev/shm/pid; wait", "wait": False}
        )

    def end(self) -> None:
        """See `begin`."""
        self.output("kill $(cat /dev/shm/pid)")

    def transfer(self, *, secure: bool, up: bool) -> float:
        """MB/s of one file."""
        url = f"https://tls.test:{self._ports[1]}" if secure else f"http://plain.test:{self._ports[0]}"
        what = f"-T /dev/shm/big -w '%{{speed_upload}}' {url}/put" if up else f"-w '%{{speed_download}}' {url}/big"
        return float(self.output(f"curl -sSf -o /dev/null {what}")) / 1e6

    def requests(self, count: int) -> list[float]:
        """Milliseconds of each."""
        return [float(line) for line in self.output(f"python3 ask.py {self._ports[0]} {count}").split()]

    def execs(self) -> list[float]:
        """Milliseconds of `exec true`."""
        times = []
        for _ in range(EXECS):
            began = time.perf_counter()
            self.output("true")
            times.append((time.perf_counter() - began) * 1e3)
        return times

    def execs_beside_a_download(self) -> list[float]:
        """The same while as much comes in as can."""
        url = f"http://plain.test:{self._ports[0]}/endless"
        self.begin(f"curl -sS -o /dev/null {url}")
        self.requests(20)  # by when it runs at full speed
        try:
            return self.execs()
        finally:
            self.end()

    def told_after_fork(self) -> float:
        """Milliseconds from the answer that the fork is ready until a program in it knew that its connection is gone; less than
        none where it knew before."""
        self.output("rm -f /dev/shm/told /dev/shm/waits")
        self.begin(f"python3 wait.py {self._ports[0]}")
        self.output("until [ -e /dev/shm/waits ]; do sleep 0.1; done")
        self._client.call("fork", vm_id="box", body={"name": "copy", "live": True})
        ready = time.time()
        try:
            return (
                float(self.output("until [ -s /dev/shm/told ]; do :; done; cat /dev/shm/told", "copy")) - ready
            ) * 1e3
        finally:
            self._client.call("delete", vm_id="copy")
            self.end()


def measure(directory: Path, runs: int) -> list[Row]:
    """The rows."""
    with (
        origins(directory) as ports,
        service(directory / "home", CAPSEM_HOSTS=str(directory / "hosts"), CAPSEM_TEMPLATES="off") as (client, _),
    ):
        box = Box(client, directory, ports)
        box.requests(20)  # the first ones meet code that was not translated yet
        rows = [
            Row(
                f"{MEGABYTES} MiB {'up' if up else 'down'}, {'TLS' if secure else 'plain'} (MB/s)",
                [box.transfer(secure=secure, up=up) for _ in range(runs)],
                target=target,
            )
            for up, secure, target in (
                (False, False, "25"),
                (False, True, "13"),
                (True, False, "15"),
                (True, True, "7"),
            )
        ]
        rows.append(Row("connect and a small request (ms)", box.requests(300), target="12"))
        idle = box.execs()
        during = box.execs_beside_a_download()
        rows.append(Row("exec true during a download (ms)", during, target="2.5 x", peers={"without one": idle}))
        told = [box.told_after_fork() for _ in range(runs)]
        rows.append(Row("fork: from ready to the end of old connections (ms)", told, target="200"))
        return rows
