"""A file that is on its way when its VM is suspended: who moves it is told what has happened, and nobody is alarmed."""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from sim_world import SimWorld, sim_world

from capsem.client.http import Answer, BadAnswer
from capsem.model.errors import Interrupted
from capsem.service.__main__ import make_server

MORE_THAN_BUFFERS_HOLD = 24 << 20


async def bytes_of(*pieces: bytes) -> AsyncIterator[bytes]:
    for piece in pieces:
        yield piece


def test_an_upload(tmp_path: Path) -> None:
    async def run() -> Interrupted:
        async with sim_world(tmp_path) as world:
            await world.create("box")

            async def body() -> AsyncIterator[bytes]:
                yield b"half"
                await world.handlers.suspend("box")
                yield b"of it"

            with pytest.raises(Interrupted) as error:
                await world.handlers.put_file("box", "file", body())
            return error.value

    error = asyncio.run(run())
    assert error.message == "box was suspended meanwhile"
    assert error.hint == "capsem resume box, then try again"


async def _break_off(world: SimWorld, listener: socket.socket) -> None:
    """Begin to read a file, and have its VM suspended."""
    await world.handlers.put_file("box", "file", bytes_of(bytes(MORE_THAN_BUFFERS_HOLD)))
    reader, writer = await asyncio.open_unix_connection(listener.getsockname())
    writer.write(b"GET /files/box/content?path=file&whole=true HTTP/1.1\r\nHost: x\r\n\r\n")
    answer = Answer()
    answer.feed(await reader.read(1000))
    assert answer.status == 200
    await world.handlers.suspend("box")
    while data := await reader.read(1 << 20):
        answer.feed(data)
    with pytest.raises(BadAnswer, match="in the middle"):
        answer.eof()
    writer.close()


def test_a_download(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async def run() -> None:
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(tmp_path / "sock"))
            async with sim_world(tmp_path) as world:
                await world.create("box")
                server = make_server(world.handlers)
                await server.startup(sockets=[listener])
                await _break_off(world, listener)
                await server.shutdown(sockets=[listener])

    with caplog.at_level(logging.WARNING):
        asyncio.run(run())
    assert not [each for each in caplog.records if each.exc_info], "it is no fault of ours"
    assert [each for each in caplog.messages if each.startswith("an answer broke off")]
