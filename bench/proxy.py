"""`python -m bench proxy`: the proxy core beside mitmproxy and beside no proxy at all, in one run, interleaved.

Clients are wrk and curl, the origin is nginx: neither is the bottleneck. TLS on both sides of a proxy; ours decides by 201
rules, writes rows, and offers every request to those who listen for calls of models. All is on the loopback interface, without
a guest. mitmproxy is in an environment of its own, from PyPI, that is thrown away.
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import os
import re
import shutil
import socket
import ssl
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from bench.table import Row
from capsem.egress import mint
from capsem.egress.sockets import HIGH_WATER

DIRECT = "nginx alone"
NAME = "localhost"  # what every program here can resolve
BIG = 100 << 20
NGINX = """
{user} daemon off; pid {home}/nginx.pid; error_log {home}/nginx.log; worker_processes 1; events {{ worker_connections 1024; }}
http {{
  access_log off; client_body_temp_path {home}/body; proxy_temp_path {home}/proxy; fastcgi_temp_path {home}/fastcgi;
  uwsgi_temp_path {home}/uwsgi; scgi_temp_path {home}/scgi; keepalive_requests 1000000000; sendfile on;
  server {{
    listen 127.0.0.1:{port} ssl; ssl_certificate {home}/origin.pem; ssl_certificate_key {home}/origin.pem;
    location = /small {{ return 200 "twenty-five bytes of text"; }}
    location = /big {{ root {home}/www; }}
  }}
}}
"""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_for(port: int, process: subprocess.Popen[bytes]) -> None:
    """Until something listens there."""
    while process.poll() is None:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
            return
        time.sleep(0.05)
    raise SystemExit(f"{process.args!r} has ended with status {process.returncode}")


@contextlib.contextmanager
def running(process: subprocess.Popen[bytes]) -> Iterator[subprocess.Popen[bytes]]:
    try:
        yield process
    finally:
        process.terminate()
        process.wait()


def certificate(home: Path) -> None:
    """An authority for the origin, and its leaf."""
    now = datetime.datetime.now(datetime.UTC)
    authority, _ = mint.make(now, "bench")
    (home / "origin-ca.pem").write_bytes(authority.pem)
    key = ec.generate_private_key(ec.SECP256R1())
    leaf = authority.sign(NAME, key.public_key(), now)
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    (home / "origin.pem").write_bytes(private + leaf.public_bytes(serialization.Encoding.PEM))


@contextlib.contextmanager
def nginx(home: Path) -> Iterator[int]:
    port = free_port()
    (home / "www").mkdir()
    with (home / "www" / "big").open("wb") as file:
        file.truncate(BIG)
    (home / "nginx.conf").write_text(NGINX.format(home=home, port=port, user="user root;" if os.geteuid() == 0 else ""))
    with running(subprocess.Popen(["nginx", "-c", str(home / "nginx.conf"), "-p", str(home)])) as process:
        wait_for(port, process)
        yield port


@contextlib.contextmanager
def ours(home: Path, origin: int) -> Iterator[tuple[int, int]]:
    """The port to connect to and the process."""
    command = [sys.executable, "-m", "bench.proxied", str(home), str(origin)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        yield int(process.stdout.readline()), process.pid
    finally:
        process.stdin.close()
        process.wait()


@contextlib.contextmanager
def mitmproxy(home: Path, origin: int, program: str) -> Iterator[tuple[int, int]]:
    port = free_port()
    command = [
        program, "--quiet", "--mode", f"reverse:https://{NAME}:{origin}", "--listen-host", "127.0.0.1",
        "--listen-port", str(port), "--set", f"ssl_verify_upstream_trusted_ca={home}/origin-ca.pem",
        "--set", "stream_large_bodies=1", "--set", f"confdir={home}/mitmproxy", "--set", "http2=false",
    ]  # fmt: skip
    with running(subprocess.Popen(command)) as process:
        wait_for(port, process)
        yield port, process.pid


def requests_per_second(port: int, clients: int, seconds: int) -> float:
    command = ["wrk", "-t1", f"-c{clients}", f"-d{seconds}s", f"https://{NAME}:{port}/small"]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "Non-2xx" not in text, text
    assert "Socket errors" not in text, text
    found = re.search(r"Requests/sec:\s+([0-9.]+)", text)
    assert found is not None, text
    return float(found[1])


def megabytes_per_second(port: int) -> float:
    command = [
        "curl",
        "-sk",
        "-o",
        "/dev/null",
        "-w",
        "%{speed_download} %{size_download}",
        f"https://{NAME}:{port}/big",
    ]
    speed, size = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    assert int(size) == BIG
    return float(speed) / 1e6


def resident(pid: int, what: str) -> float:
    """VmRSS or VmHWM of a process, in MB."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(f"{what}:"):
            return int(line.split()[1]) * 1024 / 1e6
    raise AssertionError(what)


def growth(pid: int, port: int) -> float:
    """How many MB more a process has at the most while 100 MB pass."""
    before = resident(pid, "VmRSS")
    Path(f"/proc/{pid}/clear_refs").write_text("5")
    megabytes_per_second(port)
    return max(0.0, resident(pid, "VmHWM") - before)


class Stamps:
    """An origin of events (text/event-stream), each with the time at which it was written, and a client that compares."""

    def __init__(self, home: Path, events: int) -> None:
        self._home = home
        self._events = events

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\n\r\n")
        for _ in range(self._events):
            await asyncio.sleep(0.01)
            writer.write(b"data: %d\n\n" % time.monotonic_ns())
        await writer.drain()
        writer.close()

    async def listen(self, port: int) -> list[float]:
        """Milliseconds that each event took."""
        context = ssl.create_default_context()
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        reader, writer = await asyncio.open_connection(
            "127.0.0.1", port, ssl=context, server_hostname=NAME, limit=HIGH_WATER
        )
        writer.write(b"GET /events HTTP/1.1\r\nHost: localhost\r\nAccept: text/event-stream\r\n\r\n")
        await reader.readuntil(b"\r\n\r\n")
        found: list[float] = []
        while len(found) < self._events:
            line = await reader.readline()
            if line.startswith(b"data: "):
                found.append((time.monotonic_ns() - int(line[6:])) / 1e6)
            elif not line:
                break
        writer.transport.abort()
        return found

    @contextlib.asynccontextmanager
    async def origin(self) -> object:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(self._home / "origin.pem")
        server = await asyncio.start_server(self.serve, "127.0.0.1", 0, ssl=context)
        try:
            yield int(server.sockets[0].getsockname()[1])
        finally:
            server.close()


TARGETS = {
    "requests, 64 clients (per second)": "5000, and 8 x mitmproxy",
    "100 MB down (MB/s)": "200",
    "memory more during the first 100 MB (MB)": "32",
    "an event on its way, beyond none (ms)": "1",
}


def measure(home: Path, rounds: int, seconds: int, mitmdump: str | None) -> dict[str, dict[str, list[float]]]:
    figures: dict[str, dict[str, list[float]]] = {}

    def note(name: str, column: str, value: float) -> None:
        figures.setdefault(name, {}).setdefault(column, []).append(value)

    certificate(home)
    with contextlib.ExitStack() as stack:
        origin = stack.enter_context(nginx(home))
        ports: dict[str, tuple[int, int | None]] = {"ours": stack.enter_context(ours(home, origin))}
        if mitmdump:
            ports["mitmproxy"] = stack.enter_context(mitmproxy(home, origin, mitmdump))
        ports[DIRECT] = origin, None
        for column, (port, pid) in ports.items():
            if pid is not None:
                note("memory more during the first 100 MB (MB)", column, growth(pid, port))
        for _ in range(rounds):
            for column, (port, _) in ports.items():
                note("requests, 64 clients (per second)", column, requests_per_second(port, 64, seconds))
                note("requests, 1 client (per second)", column, requests_per_second(port, 1, seconds))
                note("100 MB down (MB/s)", column, megabytes_per_second(port))
        for column, (_, pid) in ports.items():
            if pid is not None:
                note("memory at the end (MB)", column, resident(pid, "VmRSS"))
    asyncio.run(events(home, rounds, mitmdump, note))
    return figures


async def events(home: Path, rounds: int, mitmdump: str | None, note: Callable[[str, str, float], None]) -> None:
    """How long an event is on its way, the median of each round; ours and mitmproxy's less what it takes without them."""
    stamps = Stamps(home, 200)
    async with stamps.origin() as origin:
        with contextlib.ExitStack() as stack:
            ports = {DIRECT: origin, "ours": stack.enter_context(ours(home, origin))[0]}
            if mitmdump:
                ports["mitmproxy"] = stack.enter_context(mitmproxy(home, origin, mitmdump))[0]
            for _ in range(rounds):
                direct = 0.0
                for column, port in ports.items():
                    median = statistics.median(await stamps.listen(port))
                    direct = median if column == DIRECT else direct
                    if column != DIRECT:
                        note("an event on its way, beyond none (ms)", column, median - direct)


def rows(directory: Path, rounds: int, seconds: int, mitmdump: str | None) -> list[Row]:
    """The rows. Raises SystemExit when a program is missing."""
    missing = [program for program in ("wrk", "nginx", "curl") if shutil.which(program) is None]
    if missing:
        raise SystemExit(f"this needs {', '.join(missing)}: install them from the distribution")
    return [
        Row(
            name, found["ours"], target=TARGETS.get(name, ""), peers={who: found[who] for who in found if who != "ours"}
        )
        for name, found in measure(directory, rounds, seconds, mitmdump).items()
    ]
