"""Sockets that are private from the start, and leave the process's umask alone."""

from __future__ import annotations

import asyncio
import os
import stat
from pathlib import Path

import pytest

from capsem.system.real import RealNetwork
from capsem.system.unix import bind_private


def current_umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


@pytest.mark.parametrize("umask", [0, 0o022, 0o077])
def test_nobody_else_may_connect_whatever_the_umask(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        bind_private(tmp_path / "sock").close()
        assert current_umask() == umask
    finally:
        os.umask(before)
    mode = (tmp_path / "sock").stat().st_mode
    assert stat.S_ISSOCK(mode)
    assert stat.S_IMODE(mode) == 0o600


def test_something_is_there(tmp_path: Path) -> None:
    (tmp_path / "sock").write_text("kept")
    with pytest.raises(OSError, match="in use"):
        bind_private(tmp_path / "sock")
    assert (tmp_path / "sock").read_text() == "kept"


def test_listening_in_many_places_at_once_leaves_the_umask_alone(tmp_path: Path) -> None:
    """Two that overlapped once left each other's umask behind: directories that not even their owner could enter."""

    async def listen() -> None:
        network = RealNetwork()
        listeners = await asyncio.gather(
            *(network.listen(tmp_path / str(number), asyncio.Protocol) for number in range(8))
        )
        for listener in listeners:
            listener.close()

    before = current_umask()
    asyncio.run(listen())
    assert current_umask() == before
    assert {stat.S_IMODE((tmp_path / str(number)).stat().st_mode) for number in range(8)} == {0o600}
