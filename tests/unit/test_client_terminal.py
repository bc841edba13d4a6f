"""What is typed, and the wish to leave in it; ports on a command line; a log that grows."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from capsem.api import stream
from capsem.cli.forward import Ports, parse_ports
from capsem.cli.shell import newest_left
from capsem.cli.show import added
from capsem.client.terminal import Escape
from capsem.model.errors import InvalidInput


@pytest.mark.parametrize(
    ("typed", "sent", "left"),
    [
        (b"~.", b"", True),
        (b"ls\r~.rest", b"ls\r", True),
        (b"a~.b", b"a~.b", False),
        (b"~~.", b"~.", False),
        (b"\r~x\r~.", b"\r~x\r", True),
        (b"~\r~.", b"~\r", True),
    ],
)
def test_escape(typed: bytes, sent: bytes, left: bool) -> None:
    assert Escape().feed(typed) == (sent, left)
    # The same, key by key.
    escape, out, gone = Escape(), b"", False
    for key in typed:
        if not gone:
            more, gone = escape.feed(bytes([key]))
            out += more
    assert (out, gone) == (sent, left)


@pytest.mark.parametrize(
    ("followed", "wanted"),
    [((), "shell-2"), (("shell-2",), "shell-1"), (("shell-1",), "shell-2"), (("shell-1", "shell-2"), "shell-2")],
)
def test_the_shell_to_go_back_to(followed: tuple[str, ...], wanted: str) -> None:
    others = [{"id": "shell-0", "running": False}, {"id": "mine", "running": True}]
    assert newest_left(others) is None
    shells = [{"id": each, "running": True, "followed": each in followed} for each in ("shell-1", "shell-2")]
    assert newest_left([*others, *shells, {"id": "shell-3", "running": False}]) == wanted


@given(st.binary().filter(lambda data: b"~" not in data))
def test_all_else_is_sent_as_it_is(data: bytes) -> None:
    assert Escape().feed(data) == (data, False)


@pytest.mark.parametrize(
    ("text", "ports"),
    [
        ("80", Ports("127.0.0.1", 80, 80)),
        ("8080:80", Ports("127.0.0.1", 8080, 80)),
        ("0:80", Ports("127.0.0.1", 0, 80)),
        ("0.0.0.0:80", Ports("0.0.0.0", 80, 80)),
        ("localhost:8080:80", Ports("localhost", 8080, 80)),
    ],
)
def test_ports(text: str, ports: Ports) -> None:
    assert parse_ports(text) == ports


@pytest.mark.parametrize("text", ["", ":", "x", "80:", ":80", "0", "80:0", "99999", "a:b:1:2", "-1", "a:b", "a:1:b"])
def test_bad_ports(text: str) -> None:
    with pytest.raises(InvalidInput):
        parse_ports(text)


def test_what_a_log_has_more() -> None:
    assert added("", "a\nb\nhal") == "a\nb\n"
    assert added("a\nb\n", "a\nb\nhalf\n") == "half\n"
    long = "".join(f"line {number}\n" for number in range(1000))
    assert added(long[:8000].rpartition("\n")[0] + "\n", long[500:]) == long[len(long[:8000].rpartition("\n")[0]) + 1 :]


def test_resize_frames() -> None:
    [(channel, payload)] = stream.Decoder().feed(stream.encode_resize(50, 132))
    assert (channel, stream.decode_resize(payload)) == (stream.RESIZE, (50, 132))
    with pytest.raises(InvalidInput):
        stream.decode_resize(b"123")
