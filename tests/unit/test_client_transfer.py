"""Copies have a time limit, wherever they hang; within it nothing changes."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from capsem.client.sync import Client
from capsem.client.transfer import Download, upload
from capsem.model.errors import Interrupted, TimedOut

HEAD = b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\n"


class Silent:
    """A service that says `words` to whoever connects, reads nothing, and keeps the connection open."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.words = b""
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen()
        self.connections: list[socket.socket] = []
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            self.connections.append(connection)
            connection.sendall(self.words)

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for connection in self.connections:
            connection.close()


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Silent]:
    it = Silent(tmp_path / "sock")
    yield it
    it.close()


@pytest.mark.parametrize("words", [b"", HEAD, HEAD + b"half"])
def test_a_download_that_hangs(service: Silent, words: bytes) -> None:
    service.words = words
    client = Client(service.path)
    with (
        pytest.raises(TimedOut, match=r"within 0\.1 s"),
        contextlib.closing(Download(client, "box", "file", timeout=0.1)) as incoming,
    ):
        b"".join(incoming)


@pytest.mark.parametrize("size", [10, 64 << 20])  # waits for the answer; waits for somebody to read
def test_an_upload_that_hangs(service: Silent, tmp_path: Path, size: int) -> None:
    file = tmp_path / "file"
    with file.open("wb") as new:
        new.truncate(size)
    with file.open("rb") as opened, pytest.raises(TimedOut, match=r"within 0\.1 s"):
        upload(Client(service.path), "box", "file", opened.fileno(), size, 0o644, timeout=0.1)


def test_one_that_is_done_in_time(service: Silent) -> None:
    service.words = HEAD + b"0123456789"
    incoming = Download(Client(service.path), "box", "file", timeout=60)
    assert b"".join(incoming) == b"0123456789"
    incoming.close()
    assert incoming._limit._timer is not None
    assert incoming._limit._timer.finished.is_set()  # it will hang up on nobody


def test_what_breaks_off_before_is_told_as_it_is(service: Silent) -> None:
    service.words = HEAD + b"half"
    incoming = Download(Client(service.path), "box", "file", timeout=60)
    service.connections[0].close()
    with pytest.raises(Interrupted):
        b"".join(incoming)
    incoming.close()
