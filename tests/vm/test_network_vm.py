"""What programs in a VM reach, from their socket to an origin on this computer, and what a suspend or a fork does to it."""

from __future__ import annotations

import datetime
import http.server
import os
import socketserver
import ssl
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from capsem.egress import mint
from real_service import SMALL, Service, running_service, wait_for


class _Handler(http.server.BaseHTTPRequestHandler):
    """ "/": a word. "/slow": bytes that never end."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self.send_response(200)
        if self.path == "/slow":
            self.send_header("Content-Length", str(1 << 40))
            self.end_headers()
            try:
                while True:
                    self.wfile.write(bytes(16384))
                    time.sleep(0.02)
            except OSError:
                self.close_connection = True
        else:
            self.send_header("Content-Length", "6")
            self.end_headers()
            self.wfile.write(b"hello\n")

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - as the base class has it
        """Nothing."""


class _Greeter(socketserver.StreamRequestHandler):
    """Speaks first, and nothing that is HTTP."""

    def handle(self) -> None:
        self.wfile.write(b"welcome\n")


@pytest.fixture(scope="module")
def greeter() -> Iterator[int]:
    """Its port."""
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), _Greeter) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield int(server.server_address[1])
        server.shutdown()


@pytest.fixture(scope="module")
def origins(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, int, int]]:
    """A directory with a file of hosts and an authority; ports of an origin, plain and in TLS, named *.test."""
    directory = tmp_path_factory.mktemp("origins")
    authority, _ = mint.make(datetime.datetime.now(datetime.UTC), "origins")
    (directory / "ca.pem").write_bytes(authority.pem)
    (directory / "hosts").write_text("127.0.0.1 *.test\n")
    servers = [http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Handler) for _ in range(2)]
    context: ssl.SSLContext = mint.Minter(authority, time.time).context("some.test")
    servers[1].socket = context.wrap_socket(servers[1].socket, server_side=True)
    for server in servers:
        threading.Thread(target=server.serve_forever, daemon=True).start()
    yield directory, servers[0].server_port, servers[1].server_port
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.fixture(scope="module")
def networked(origins: tuple[Path, int, int], greeter: int) -> Iterator[Service]:
    """A service with a VM "net" that may reach the origins."""
    directory, plain, secure = origins
    there = {"action": "allow", "host": ["*.test"], "cidr": ["127.0.0.0/8"]}
    policy = {
        "extra_ca": [str(directory / "ca.pem")],
        "rule": [
            {"name": "t", "port": [plain, secure], **there},
            {"name": "greeter", "port": [greeter], "protocol": "tcp", **there},
        ],
    }
    with running_service(CAPSEM_HOSTS=str(directory / "hosts")) as service:
        network = {"preset": "high", "policy": policy}
        service.client.call("provision", body={"name": "net", "persistent": True, "network": network, **SMALL})
        yield service


def decisions(service: Service, vm_id: str) -> list[list[object]]:
    sql = "SELECT domain, decision, status_code, tls FROM net_events ORDER BY id"
    return list(service.client.call("inspect", vm_id=vm_id, body={"sql": sql})["rows"])


def resident(pid: int) -> int:
    """Bytes of memory of a process."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_what_is_allowed_passes_and_the_rest_is_told_why(networked: Service, origins: tuple[Path, int, int]) -> None:
    _, plain, secure = origins
    # Programs that are told nothing trust the proxy, too.
    read = f"import urllib.request; print(urllib.request.urlopen('https://some.test:{secure}/').read())"
    assert networked.output("net", f"curl -sS http://some.test:{plain}/ https://some.test:{secure}/") == "hello\n" * 2
    assert networked.output("net", f'python3 -c "{read}"; env -i /usr/bin/python3 -c "{read}"') == "b'hello\\n'\n" * 2
    page = networked.output("net", "curl -sS https://nowhere.example/")
    assert "did not let this request to nowhere.example pass" in page
    assert networked.exec("net", f"curl -sS http://127.0.0.1:{plain}/")[0] == 7  # the guest's own, not the host's
    assert ["nowhere.example", "denied", 403, "intercepted"] in decisions(networked, "net")
    # Who it was is a label that the guest gives.
    for table in ("net_events", "dns_events"):
        sql = f"SELECT DISTINCT process_name FROM {table} WHERE domain = 'some.test' ORDER BY 1"
        assert networked.client.call("inspect", vm_id="net", body={"sql": sql})["rows"] == [["curl"], ["python3"]], (
            table
        )
    # So it is of one that asks over TCP.
    assert networked.output("net", f"RES_OPTIONS=use-vc curl -sS http://by-tcp.test:{plain}/") == "hello\n"
    sql = "SELECT DISTINCT process_name FROM dns_events WHERE domain = 'by-tcp.test'"
    assert networked.client.call("inspect", vm_id="net", body={"sql": sql})["rows"] == [["curl"]]


@pytest.mark.parametrize("off", [-3600, 3600])
def test_a_guest_whose_clock_is_an_hour_off_trusts_the_proxy(
    networked: Service, origins: tuple[Path, int, int], off: int
) -> None:
    """The proxy's certificate and its authority are as old as this test. A clock that is set is set right again at once, so it
    is a client that is told another time."""
    _, _, secure = origins
    told = networked.output(
        "net",
        f"openssl s_client -connect some.test:{secure} -servername some.test -verify_hostname some.test"
        f" -verify_return_error -attime $(($(date +%s) + {off})) -CAfile /etc/ssl/certs/ca-certificates.crt </dev/null",
    )
    assert "Verify return code: 0 (ok)" in told


def test_a_guest_that_opens_all_it_can_still_runs_commands(networked: Service, origins: tuple[Path, int, int]) -> None:
    _, plain, _ = origins
    supervisor = int(networked.client.call("info", vm_id="net")["pid"])
    before = resident(supervisor)
    # Half a request on each; those beyond what the agent carries at once wait in a queue, and a few get their turn.
    flood = f"""
import socket, time
held = []
while len(held) < 600:
    one = socket.socket()
    one.setblocking(False)
    one.connect_ex(("192.0.2.1", {plain}))
    held.append(one)
    if len(held) <= 500:
        one.setblocking(True)
        one.sendall(b"GET / HTTP/1.1\\r\\nX: " + 1000 * b"x")
open("/tmp/flooded", "w").close()
time.sleep(3600)
"""
    networked.client.call("write_file", vm_id="net", body={"path": "flood.py", "content": flood})
    command = "python3 flood.py & echo $! >/tmp/flooding; wait"
    networked.client.call("exec", vm_id="net", body={"command": command, "wait": False})
    networked.output("net", "until [ -e /tmp/flooded ]; do sleep 0.1; done")
    assert networked.output("net", "echo here") == "here\n"
    assert resident(supervisor) - before < 64 << 20
    networked.output("net", "kill $(cat /tmp/flooding)")
    assert networked.output("net", f"curl -sS http://some.test:{plain}/") == "hello\n"


def test_connections_end_with_a_suspend_and_in_a_fork_and_new_ones_work(
    networked: Service, origins: tuple[Path, int, int], greeter: int
) -> None:
    _, plain, _ = origins
    client = networked.client
    # What an address stood for it stands for afterwards: nothing but that says where this leads.
    meet = f"head -n 1 </dev/tcp/$(cat /tmp/address)/{greeter}"
    assert networked.output("net", f"getent ahostsv4 host.test | head -n 1 | cut -d' ' -f1 >/tmp/address; {meet}") == (
        "welcome\n"
    )
    command = f"curl -sS -o /tmp/slow http://some.test:{plain}/slow; echo $? > /tmp/ended"
    client.call("exec", vm_id="net", body={"command": command, "wait": False})
    networked.output("net", "until [ -s /tmp/slow ]; do sleep 0.1; done")
    made = client.call("fork", vm_id="net", body={"name": "copy", "live": True})
    assert made["lost"] == {"streams": 1}
    again = f"until [ -e /tmp/ended ]; do sleep 0.1; done; cat /tmp/ended; curl -sS http://some.test:{plain}/"
    assert networked.output("copy", f"{meet}; {again}") == "welcome\n56\nhello\n"  # 56: connection reset by peer
    client.call("delete", vm_id="copy")
    # The source has lost nothing, until it is suspended itself.
    networked.output(
        "net", "[ ! -e /tmp/ended ]; at=$(stat -c %s /tmp/slow); until [ $(stat -c %s /tmp/slow) -gt $at ]; do :; done"
    )
    assert client.call("suspend", vm_id="net")["lost"] == {"streams": 1}
    assert client.call("resume", vm_id="net")["lost"] == {"streams": 1}
    assert networked.output("net", f"{meet}; {again}") == "welcome\n56\nhello\n"
    wait_for(lambda: ["some.test", "interrupted", 200, "none"] in decisions(networked, "net"))
