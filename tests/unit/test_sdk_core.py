"""The SDK's core, fed with bytes: no socket, no process, no clock."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from capsem import CommandFailed, Interrupted, InvalidInput, NotFound, Result
from capsem.api import stream
from capsem.client.http import encode_chunk
from capsem.sdk import core
from capsem.sdk.types import Output

SOURCE = Path(core.__file__).parents[2]


def answer(status: int, body: bytes) -> bytes:
    return b"HTTP/1.1 %d X\r\ncontent-length: %d\r\n\r\n%b" % (status, len(body), body)


def outcome(call: core.Call[core.T], data: bytes) -> core.T:
    exchange = core.Exchange(call)
    for byte in data:
        exchange.take(exchange.answer.feed(bytes([byte])))
    assert exchange.answer.done
    return exchange.outcome()


def test_a_call_says_where_and_what() -> None:
    said = core.write_file("my box", "/root/a b", b"\0data", 0o755).encode()
    head, _, body = said.partition(b"\r\n\r\n")
    assert head.startswith(b"POST /files/my%20box/content?path=a%20b&mode=755&exact=1 HTTP/1.1\r\n")
    assert body == b"\0data"
    provision = core.provision(
        "box",
        persistent=None,
        ram_mb=None,
        cpus=2,
        disk_mb=None,
        env=None,
        secrets=(),
        profile=None,
        source="old",
        network="off",
    )
    sent = json.loads(provision.encode().partition(b"\r\n\r\n")[2])
    assert sent == {"name": "box", "persistent": True, "cpus": 2, "from": "old", "network": {"preset": "off"}}


def test_an_answer_becomes_a_value_or_an_error() -> None:
    assert outcome(core.read_file("box", "x"), answer(200, b"\0\xff")) == b"\0\xff"
    info = outcome(core.info("box"), answer(200, b'{"id":"box","pid":1,"status":"Running","persistent":true,"new":1}'))
    assert (info.id, info.status) == ("box", "Running")
    for call in (core.info("box"), core.read_file("box", "x")):
        with pytest.raises(NotFound) as caught:
            outcome(call, answer(404, b'{"error":"no","code":"not_found","message":"no box","hint":"look"}'))  # type: ignore[arg-type]
        assert (caught.value.message, caught.value.hint) == ("no box", "look")


def frames(*pieces: tuple[int, bytes]) -> bytes:
    return b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n" + b"".join(
        encode_chunk(stream.encode(channel, data)) for channel, data in pieces
    )


def test_a_conversation_keeps_to_its_credit() -> None:
    talk = core.Conversation("box", {"command": "cat"}, bytes(stream.WINDOW + 10))
    first = talk.to_send()
    assert stream.WINDOW < len(first) < stream.WINDOW + 1000
    assert talk.to_send() == b""
    assert not [*talk.take(talk.answer.feed(frames((stream.STDOUT, b""), (stream.CREDIT, (4).to_bytes(4, "big")))))]
    assert bytes(4) in talk.to_send()
    assert not [*talk.take(talk.answer.feed(encode_chunk(stream.encode_credit(100))))]
    assert talk.to_send().endswith(encode_chunk(b""))  # the end of the input, once
    assert talk.to_send() == b""


def test_a_conversation_that_breaks_off_is_interrupted() -> None:
    talk = core.Conversation("box", {"command": "x"})
    assert [*talk.take(talk.answer.feed(frames((stream.STDOUT, b"so far"))))] == [Output("stdout", b"so far")]
    talk.answer.feed(encode_chunk(b""))
    assert talk.answer.done
    with pytest.raises(Interrupted):
        talk.outcome()


def test_output_that_comes_with_an_error_is_not_lost() -> None:
    error = json.dumps(Interrupted("suspended").to_dict()).encode()
    talk, got = core.Conversation("box", {"command": "x"}), []
    with pytest.raises(Interrupted, match="suspended"):
        for piece in talk.take(talk.answer.feed(frames((stream.STDOUT, b"so far"), (stream.ERROR, error)))):
            got.append(piece)  # noqa: PERF402
    assert got == [Output("stdout", b"so far")]


def test_progress_goes_on_where_it_was() -> None:
    at = core.Progress("box", "mine")
    at.take(Output("stdout", b"abc"))
    at.take(Output("stderr", b"x"))
    said = at.follow(wait=True).to_send().partition(b"{")[2].rpartition(b"}")[0]
    body = json.loads(b"{" + said + b"}")
    assert body == {"job": "mine", "offsets": {"stdout": 3, "stderr": 1}, "wait": True, "keep": True}
    assert at.end({"exit_code": 0, "running": True}) is None
    at.take(Output("stdout", b"d"))
    assert at.end({"exit_code": 2}) == Result("abcd", "x", 2, job="mine")


def test_progress_holds_a_bounded_tail() -> None:
    at = core.Progress("box", "mine")
    for _ in range(3):
        at.take(Output("stdout", bytes(core.KEPT // 2)))
    result = at.end({"exit_code": 0})
    assert result is not None
    assert (len(result.stdout), result.truncated) == (core.KEPT, True)


@pytest.mark.parametrize(
    ("path", "inner"),
    [("a/b", "a/b"), ("/root/a", "a"), ("/root", ""), ("", ""), (".", ""), ("./a//b/../c", "a/c"), ("a..", "a..")],
)
def test_paths_of_the_workspace(path: str, inner: str) -> None:
    assert core.workspace_path(path) == inner


@pytest.mark.parametrize("path", ["/etc/passwd", "/rootkit", "..", "../x", "a/../../x", "/root/../etc", "a\udc80"])
def test_paths_elsewhere(path: str) -> None:
    with pytest.raises(InvalidInput):
        core.workspace_path(path)


def test_a_failed_command_says_how() -> None:
    with pytest.raises(CommandFailed, match="exit code 3: the last line"):
        Result("", "first\nthe last line\n", 3).check()
    with pytest.raises(CommandFailed, match="signal 9"):
        Result("", "", 1, signal=9).check()


def test_importing_capsem_costs_next_to_nothing() -> None:
    dear = ("capsem.", "asyncio", "importlib", "msgspec", "socket", "typing")
    code = (
        f"import sys; sys.path.append({str(SOURCE)!r}); before = set(sys.modules); import capsem; "
        f"print([name for name in set(sys.modules) - before if name.startswith({dear})])"
    )
    done = subprocess.run([sys.executable, "-I", "-S", "-c", code], capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("[]\n", "")
