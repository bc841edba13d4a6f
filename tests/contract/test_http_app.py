"""The HTTP face: real application, real uvicorn on a Unix socket, scripted manager."""

from __future__ import annotations

import http.client
import json
import select
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import quote

import pytest

from capsem.api import stream
from capsem.api.file_types import CONTENT_LIMIT
from capsem.api.operations import OPERATIONS
from capsem.client import sync
from capsem.client.http import encode_chunk
from capsem.client.sync import Client
from capsem.model.errors import InvalidInput, NotFound, NotRunning, TimedOut, Unavailable
from capsem.model.lifecycle import State
from contract.fake_service import FakeService, fake_service

PATIENCE = 60.0  # seconds for what must come true, however busy the machine


@pytest.fixture(scope="module")
def shared() -> Iterator[FakeService]:
    """For tests that leave it as it is."""
    with fake_service() as running:
        yield running


def _everything(connection: socket.socket) -> bytes:
    answer = b""
    while piece := connection.recv(65536):
        answer += piece
    return answer


def _answer(connection: socket.socket) -> http.client.HTTPResponse:
    answer = http.client.HTTPResponse(connection)
    answer.begin()
    return answer


@pytest.fixture
def service() -> Iterator[FakeService]:
    with fake_service() as running:
        yield running


def test_every_json_operation_answers_in_the_contract_s_shape(service: FakeService) -> None:
    def ask(method: str, path: str, body: object = None) -> dict[str, object]:
        status, answer, _ = service.request(method, path, b"" if body is None else json.dumps(body).encode())
        assert status == 200, answer
        return answer

    assert ask("GET", "/version") == {"version": "1.2.3"}
    assert ask("POST", "/provision", {"name": "new", "persistent": True}) == {"id": "new", "uds_path": "/run/new.sock"}
    assert ask("POST", "/provision")["id"] == "calm-otter-tmp"
    listed = ask("GET", "/list")
    assert listed["asset_health"] == {"ready": True, "version": "1", "missing": []}
    assert {box["id"] for box in listed["sandboxes"]} >= {"box", "off", "broken", "new"}  # type: ignore[attr-defined]
    assert ask("GET", "/info/off") == {"id": "off", "name": "off", "pid": 0, "status": "Stopped", "persistent": True}
    assert ask("POST", "/exec/box", {"command": "both", "timeout_secs": 5}) == {
        "stdout": "out\n",
        "stderr": "err\n",
        "exit_code": 0,
    }
    assert ask("POST", "/write_file/box", {"path": "a", "content": "é\n"}) == {"success": True}
    assert ask("POST", "/read_file/box", {"path": "a"}) == {"content": "é\n"}
    assert ask("GET", "/logs/box")["logs"] == "Linux version 6\nready\n"
    saved = {"bytes": 4096, "pause_ms": 2.5, "synced": True}
    assert ask("POST", "/checkpoint/box", {"message": "m"}) == {"id": "c" * 32, **saved}
    assert ask("GET", "/checkpoints/box") == {"checkpoints": []}
    assert ask("POST", "/checkpoints/box/verify", {"checkpoint": "cc"}) == {"success": True}
    assert ask("POST", "/checkpoints/box/remove", {"checkpoint": "cc"}) == {"success": True}
    assert ask("POST", "/rollback/box", {"checkpoint": "cc"}) == {"success": True, "checkpoint": "cc"}
    assert ask("POST", "/suspend/box", {}) == {"success": True, "checkpoint": "c" * 32, **saved}
    assert ask("POST", "/resume/box", {"cold": True}) == {"id": "box", "uds_path": ""}
    assert ask("POST", "/stop/box", {}) == {"success": True, "persistent": True}
    assert ask("POST", "/resume/box") == {"id": "box", "uds_path": ""}
    assert ask("DELETE", "/delete/box", {}) == {"success": True}
    assert ask("POST", "/run", {"command": "exit 3"})["exit_code"] == 3


def test_get_and_delete_may_carry_a_body_and_a_content_type(service: FakeService) -> None:
    kind = "Content-Type: application/json\r\n"
    assert service.request("GET", "/list", b"{}", kind)[0] == 200
    assert service.request("GET", "/info/box", b"not json", kind)[0] == 200
    assert service.request("DELETE", "/delete/box", b"{}", kind)[0] == 200


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "code"),
    [
        ("GET", "/nothing", b"", 404, "not_found"),
        ("GET", "/list/", b"", 404, "not_found"),
        ("POST", "/list", b"{}", 405, "invalid_input"),
        ("GET", "/exec/box", b"", 405, "invalid_input"),
        ("PUT", "/exec/box/stream", b"", 405, "invalid_input"),
        ("GET", "/info/ghost", b"", 404, "not_found"),
        ("GET", "/info/", b"", 400, "invalid_input"),
        ("GET", "/info/..%2Fx", b"", 400, "invalid_input"),
        ("GET", "/info/../x", b"", 400, "invalid_input"),
        ("GET", "/info/%00", b"", 400, "invalid_input"),
        ("GET", "/info/%ff", b"", 400, "invalid_input"),
        ("GET", "/info/" + "a" * 65, b"", 400, "invalid_input"),
        ("GET", "/info/" + quote("naïve"), b"", 400, "invalid_input"),
        ("DELETE", "/delete/a%20b", b"", 400, "invalid_input"),
        ("POST", "/exec/off", b'{"command":"echo"}', 404, "not_running"),
        ("POST", "/stop/off", b"", 404, "not_running"),
        ("POST", "/exec/box", b"{", 400, "invalid_input"),
        ("POST", "/exec/box", b"\xff\xfe", 400, "invalid_input"),
        ("POST", "/exec/box", b"[" * 200_000, 400, "invalid_input"),
        ("POST", "/exec/box", b'{"x":' + b"[" * 200_000, 400, "invalid_input"),
        ("POST", "/exec/box", b'{"command":"\\ud800"}', 400, "invalid_input"),
        ("POST", "/exec/box", b"[]", 400, "invalid_input"),
        ("POST", "/exec/box", b"{}", 400, "invalid_input"),
        ("POST", "/exec/box", b'{"command":7}', 400, "invalid_input"),
        ("POST", "/exec/box", b'{"command":"a\\u0000"}', 400, "invalid_input"),
        ("POST", "/exec/box", b'{"command":"a","timeout_secs":0}', 400, "invalid_input"),
        ("POST", "/exec/box", b'{"command":"a","timeout_secs":1e400}', 400, "invalid_input"),
        ("POST", "/exec/box", b'{"command":"a","timeout_secs":"5"}', 400, "invalid_input"),
        ("POST", "/provision", b'{"name":"../x"}', 400, "invalid_input"),
        ("POST", "/provision", b'{"name":""}', 400, "invalid_input"),
        ("POST", "/provision", b'{"name":"' + b"a" * 65 + b'"}', 400, "invalid_input"),
        ("POST", "/provision", b'{"name":"a\\u0000"}', 400, "invalid_input"),
        ("POST", "/provision", b'{"ram_mb":"1024"}', 400, "invalid_input"),
        ("POST", "/provision", b'{"cpus":true}', 400, "invalid_input"),
        ("POST", "/provision", b'{"env":{"A":1}}', 400, "invalid_input"),
        ("POST", "/provision", b'{"from":"a","image":"b"}', 400, "invalid_input"),
        ("POST", "/provision", b'{"from":"../a"}', 400, "invalid_input"),
        ("POST", "/provision", b'{"name":"box"}', 409, "already_exists"),
        ("POST", "/provision", b'{"name":"full"}', 429, "limit_reached"),
        ("POST", "/exec/box", b'{"command":"timeout"}', 500, "timed_out"),
        ("POST", "/exec/box", b'{"command":"boom"}', 500, "internal"),
        ("POST", "/exec/ghost/stream", stream.encode(stream.REQUEST, b'{"command":"cat"}'), 404, "not_found"),
        ("POST", "/exec/../stream", stream.encode(stream.REQUEST, b'{"command":"cat"}'), 400, "invalid_input"),
        ("POST", "/exec/box/stream", b"", 400, "invalid_input"),
        ("POST", "/exec/box/stream", b"\x03\x00\x00\x00\x09{}", 400, "invalid_input"),
        ("POST", "/exec/box/stream", b"\x03\xff\xff\xff\xff", 400, "invalid_input"),
        ("POST", "/exec/box/stream", stream.encode(stream.STDIN, b"x"), 400, "invalid_input"),
        ("POST", "/exec/box/stream", stream.encode(stream.REQUEST, b"{"), 400, "invalid_input"),
        ("POST", "/exec/box/stream", stream.encode(stream.REQUEST, b'{"command":"boom"}'), 500, "internal"),
    ],
)
def test_bad_requests(
    shared: FakeService, method: str, path: str, body: bytes, status: int, code: str, caplog: pytest.LogCaptureFixture
) -> None:
    got, answer, head = shared.request(method, path, body)
    assert (got, answer["code"]) == (status, code)
    assert answer["error"]
    assert "application/json" in head
    assert "secret" not in json.dumps(answer)
    assert ("secret" in caplog.text) == (b"boom" in body)
    assert shared.request("GET", "/version")[0] == 200


def test_wrong_method_says_which_is_allowed(service: FakeService) -> None:
    assert "allow: POST" in service.request("GET", "/run")[2]


@pytest.mark.parametrize("line", [b"GET /files/box/content?path=\xc3\xbc HTTP/1.1", b"hello", b"GET / HTTP/9"])
def test_what_is_no_http_is_refused_like_everything_else(service: FakeService, line: bytes) -> None:
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(str(service.path))
        connection.sendall(line + b"\r\nHost: x\r\n\r\n")
        answer = _answer(connection)
        said = json.loads(answer.read())
    assert (answer.status, answer.headers["content-type"], said["code"]) == (400, "application/json", "invalid_input")
    assert said["error"] == f"{said['message']} ({said['hint']})"


def test_unknown_fields_and_nulls_are_ignored(service: FakeService) -> None:
    body = b'{"command":"exit 4","timeout_secs":null,"colour":{"deep":[1,2]}}'
    assert service.request("POST", "/exec/box", body)[1]["exit_code"] == 4
    nulls = b'{"name":null,"ram_mb":null,"cpus":null,"env":null,"from":null,"image":null,"version":"x"}'
    assert service.request("POST", "/provision", nulls)[0] == 200
    assert service.request("POST", "/provision", b'{"name":"copy","image":"off"}')[0] == 200
    assert service.manager.requests[-1].source == "off"  # type: ignore[attr-defined]


def test_unavailable_says_when_to_come_back(service: FakeService) -> None:
    status, _, head = service.request("POST", "/resume/busy")
    assert status == 503
    assert "retry-after: 3" in head.lower()
    with pytest.raises(Unavailable) as caught:
        Client(service.path).call("resume", vm_id="busy")
    assert caught.value.retry_after == 3


@pytest.mark.parametrize("path", ["/exec/box", "/write_file/box", "/provision", "/info/box"])
def test_a_body_of_50_mb_is_refused_unread(service: FakeService, path: str) -> None:
    size = 50 * 1024 * 1024
    method = "GET" if "info" in path else "POST"
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(10)
        connection.connect(str(service.path))
        connection.sendall(f"{method} {path} HTTP/1.1\r\nHost: x\r\nContent-Length: {size}\r\n\r\n".encode())
        with _answer(connection) as answer:  # before a byte of it was sent
            assert (answer.status, answer.getheader("Connection")) == (413, "close")
            assert json.loads(answer.read())["code"] == "payload_too_large"


@pytest.mark.parametrize(
    ("path", "status", "chunked"),
    [
        ("/files/a%20b/content?path=a", 400, False),
        ("/files/a%20b/content?path=a", 400, True),
        ("/exec/box", 413, False),
        ("/exec/box", 413, True),
        ("/exec/ghost/stream", 400, False),
        ("/nowhere", 404, False),
        ("/nowhere", 404, True),
        ("/list", 405, False),
    ],
)
def test_who_sends_50_mb_before_looking_reads_the_refusal(
    shared: FakeService, path: str, status: int, chunked: bool
) -> None:
    data, pieces = bytes(1024 * 1024), 50
    head = "Transfer-Encoding: chunked" if chunked else f"Content-Length: {pieces * len(data)}"
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(PATIENCE)
        connection.connect(str(shared.path))
        connection.sendall(f"POST {path} HTTP/1.1\r\nHost: x\r\n{head}\r\n\r\n".encode())
        for _ in range(pieces):
            connection.sendall(encode_chunk(data) if chunked else data)
        if chunked:
            connection.sendall(encode_chunk(b""))
        with _answer(connection) as answer:
            assert (answer.status, answer.getheader("Connection")) == (status, "close")
            assert json.loads(answer.read())["error"]
        assert connection.recv(1) == b""


def test_a_chunked_body_is_refused_when_it_gets_too_large(service: FakeService) -> None:
    sent = 0
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(10)
        connection.connect(str(service.path))
        connection.sendall(b"POST /exec/box HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n")
        while not select.select([connection], [], [], 0)[0]:
            connection.sendall(encode_chunk(b" " * 65536))
            sent += 65536
        with _answer(connection) as answer:
            assert answer.status == 413
    assert sent < 4 * 1024 * 1024


def test_the_client_reads_the_refusal_of_a_body_that_is_too_large(service: FakeService) -> None:
    with pytest.raises(InvalidInput, match="too large"):
        Client(service.path).call("write_file", vm_id="box", body={"path": "a", "content": "x" * 50_000_000})
    with pytest.raises(InvalidInput, match="too long"):
        Client(service.path).call(
            "write_file", vm_id="box", body={"path": "a", "content": "é" * (CONTENT_LIMIT // 2 + 1)}
        )
    Client(service.path).call("write_file", vm_id="box", body={"path": "a", "content": "\x01" * CONTENT_LIMIT})
    assert len(service.manager.files["a"]) == CONTENT_LIMIT


# -- clients that hang up


def _hang_up_during(service: FakeService, head: str, body: bytes = b"") -> None:
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(str(service.path))
        connection.sendall(f"{head} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body)
        assert service.manager.started.wait(PATIENCE)


def _until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not true():
        assert time.monotonic() < deadline, "it did not come true"
        time.sleep(0.005)


def test_hanging_up_ends_a_command(service: FakeService) -> None:
    _hang_up_during(service, "POST /exec/box", b'{"command":"sleep"}')
    assert service.manager.cancelled.wait(PATIENCE)


def test_hanging_up_ends_a_run(service: FakeService) -> None:
    _hang_up_during(service, "POST /run", b'{"command":"sleep"}')
    assert service.manager.cancelled.wait(PATIENCE)
    assert "run" not in service.manager.states


@pytest.mark.parametrize("head", ["POST /stop/slowstop", "POST /provision"])
def test_hanging_up_does_not_stop_a_transition(service: FakeService, head: str) -> None:
    service.manager.states["slowstop"] = State.RUNNING
    service.manager.go_on.clear()
    _hang_up_during(service, head, b'{"name":"slow"}')
    _until(lambda: len(service.app.state.transitions) == 1)
    assert not service.manager.finished.is_set()
    service.manager.go_on.set()
    assert service.manager.finished.wait(PATIENCE)
    assert not service.manager.cancelled.is_set()
    _until(lambda: not service.app.state.transitions)


def test_hanging_up_in_the_middle_of_a_body(service: FakeService) -> None:
    for path in ("/exec/box", "/exec/box/stream"):
        with socket.socket(socket.AF_UNIX) as connection:
            connection.connect(str(service.path))
            connection.sendall(f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{{".encode())
    assert service.request("GET", "/version")[0] == 200


# -- streams


class Pieces:
    """Standard input that comes in pieces."""

    def __init__(self, *pieces: bytes) -> None:
        self.pieces = list(pieces)
        self.gate = threading.Event()
        self.read_size = 0

    def read(self, size: int, /) -> bytes:
        if not self.pieces:
            self.gate.wait(10)
            return b""
        piece = self.pieces.pop(0)
        self.read_size += len(piece)
        assert len(piece) <= size
        return piece


def test_output_arrives_while_the_command_runs(service: FakeService) -> None:
    service.manager.go_on.clear()
    with Client(service.path).stream("box", {"command": "slow"}) as output:
        seen = (each for each in output if each[1])
        assert next(seen) == (1, b"one\n")
        service.manager.go_on.set()
        assert list(seen) == [(1, b"two\n")]
    assert output.result == {"exit_code": 0}


def test_both_directions_at_once(service: FakeService) -> None:
    """The answer to a piece of input comes before the next piece is sent."""
    pieces = Pieces(b"first")
    seen = []
    with Client(service.path).stream("box", {"command": "cat"}, stdin=pieces) as output:
        for _, data in output:
            if not data:
                continue
            seen.append(data)
            if len(seen) == 1:
                pieces.pieces.append(b"second")
            pieces.gate.set()
    assert b"".join(seen).startswith(b"first")
    assert output.result == {"exit_code": 0}


def test_much_input_is_held_back_by_credit_and_arrives_whole(service: FakeService) -> None:
    data = [bytes([n % 251]) * 32768 for n in range(300)]
    pieces = Pieces(*data)
    pieces.gate.set()
    got = bytearray()
    with Client(service.path).stream("box", {"command": "cat"}, stdin=pieces) as output:
        for _, piece in output:
            got += piece
    assert bytes(got) == b"".join(data)


def test_input_to_a_command_that_says_nothing_until_its_end(service: FakeService) -> None:
    pieces = Pieces(*[b"x" * 32768] * 64)
    pieces.gate.set()
    with Client(service.path).stream("box", {"command": "count"}, stdin=pieces) as output:
        assert b"".join(data for _, data in output) == str(64 * 32768).encode()


def test_a_client_without_credit_is_slowed_down_but_served(service: FakeService) -> None:
    frames = [stream.encode(stream.REQUEST, b'{"command":"count"}')]
    frames += [stream.encode(stream.STDIN, b"x" * 65536)] * 160
    body = b"".join(frames)
    head = f"POST /exec/box/stream HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    assert str(160 * 65536).encode() in service.raw(head + body)


def test_hanging_up_is_noticed_though_the_command_does_not_read_its_input(service: FakeService) -> None:
    pieces = Pieces(*[b"x" * 32768] * 1000)
    output = Client(service.path).stream("box", {"command": "sleep on"}, stdin=pieces)
    assert next(iter(output)) == (1, b"on")
    _until(lambda: pieces.read_size >= stream.WINDOW)
    time.sleep(0.1)
    assert pieces.read_size == stream.WINDOW
    output.close()
    assert service.manager.cancelled.wait(PATIENCE)


def test_hanging_up_ends_a_command_that_floods(service: FakeService) -> None:
    output = Client(service.path).stream("box", {"command": "yes"})
    next(iter(output))
    time.sleep(0.2)
    output.close()
    assert service.manager.cancelled.wait(PATIENCE)


def test_an_empty_frame_ends_the_input(service: FakeService) -> None:
    body = stream.encode(stream.REQUEST, b'{"command":"count"}') + stream.encode(stream.STDIN, b"abc")
    body += stream.encode(stream.STDIN) + stream.encode(stream.STDIN, b"ignored") + stream.encode(77, b"unknown")
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(10)
        connection.connect(str(service.path))
        connection.sendall(b"POST /exec/box/stream HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n")
        connection.sendall(encode_chunk(body))  # and the body is never ended
        answer = _everything(connection)
    assert stream.encode(stream.STDOUT, b"3") in answer
    assert stream.encode(stream.RESULT, b'{"exit_code":0}') in answer


def test_garbage_after_the_beginning_ends_the_command(service: FakeService) -> None:
    body = stream.encode(stream.REQUEST, b'{"command":"sleep on"}')
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(10)
        connection.connect(str(service.path))
        connection.sendall(b"POST /exec/box/stream HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n")
        connection.sendall(encode_chunk(body))
        answer = connection.recv(65536)
        connection.sendall(encode_chunk(b"\x00\xff\xff\xff\xff"))
        while piece := connection.recv(65536):
            answer += piece
    assert b"invalid_input" in answer
    assert service.manager.cancelled.wait(PATIENCE)


def test_errors_of_a_stream(service: FakeService) -> None:
    client = Client(service.path)

    def outcome(vm_id: str, command: str) -> list[tuple[int, bytes]]:
        seen = []
        with client.stream(vm_id, {"command": command}) as output:
            try:
                seen.extend(output)
            finally:
                outcome.seen = seen  # type: ignore[attr-defined]
        return seen

    with pytest.raises(NotRunning):
        outcome("off", "echo")
    with pytest.raises(NotFound):
        outcome("ghost", "echo")
    with pytest.raises(TimedOut, match="timed out after 1s"):
        outcome("box", "timeout")
    assert outcome.seen == [(1, b"so far\n")]  # type: ignore[attr-defined]
    with pytest.raises(Exception, match="internal error"):
        outcome("box", "lateboom")
    with pytest.raises(Exception, match="without a result"):
        outcome("box", "cut")


def test_large_output_is_split_and_whole(service: FakeService) -> None:
    with Client(service.path).stream("box", {"command": "big"}) as output:
        assert sum(len(data) for _, data in output) == 3 * 1024 * 1024
    assert output.result == {"exit_code": 0, "truncated": True}


def test_many_at_once_do_not_mix(service: FakeService) -> None:
    wrong: list[object] = []

    def work(n: int) -> None:
        answer = Client(service.path).call("exec", vm_id="box", body={"command": f"echo {n}"})
        with Client(service.path).stream("box", {"command": f"echo {n}"}) as output:
            streamed = b"".join(data for _, data in output)
        if answer["stdout"] != f"{n}\n" or streamed != f"{n}\n".encode():
            wrong.append((n, answer, streamed))

    threads = [threading.Thread(target=work, args=(n,)) for n in range(50)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_no_service_and_no_answer(service: FakeService) -> None:
    with pytest.raises(Unavailable, match="cannot connect"):
        Client(service.path.with_name("none.sock")).call("list")
    with pytest.raises(TimedOut, match=r"did not answer within 0\.2 s"):
        Client(service.path, timeout=0.2).call("exec", vm_id="box", body={"command": "sleep"})


def test_the_service_of_another_user(service: FakeService, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_path: Path) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(sync, "_connect", refuse)
    with pytest.raises(Unavailable, match="Permission denied") as caught:
        Client(service.path).call("list")
    assert "another user's" in str(caught.value.hint)


def test_every_operation_has_its_route(service: FakeService) -> None:
    served = {(route.path.replace(":path", ""), *(route.methods - {"HEAD"})) for route in service.app.routes}  # type: ignore[attr-defined]
    assert served == {(operation.path, operation.method) for operation in OPERATIONS.values()}
