"""Where the sockets of supervisors lie whose run directory has too long a name."""

from __future__ import annotations

import os
import stat
import tempfile
from pathlib import Path

import pytest

from capsem.model.errors import HostNotReady
from capsem.store.layout import SOCKET_PATH_LIMIT, Layout


@pytest.fixture
def layout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Layout:
    """A run directory whose sockets lie elsewhere."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return Layout(tmp_path / ("d" * SOCKET_PATH_LIMIT))


def test_a_directory_of_our_own_is_made_and_used_again(layout: Layout) -> None:
    socket = layout.instance_socket("box")
    for _ in range(2):
        layout.make_socket_directory(socket)
        assert stat.S_IMODE(socket.parent.stat().st_mode) == 0o700
    assert socket.parent.parent == Path(tempfile.gettempdir())
    assert socket != layout.instance_socket("box-2")


@pytest.mark.parametrize("what", ["another's", "open", "link", "file"])
def test_one_that_somebody_else_prepared_is_not_used(
    layout: Layout, what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    socket = layout.instance_socket("box")
    if what == "file":
        socket.parent.touch()
    elif what == "link":
        (tmp_path / "elsewhere").mkdir(mode=0o700)
        socket.parent.symlink_to("elsewhere")
    else:
        socket.parent.mkdir(mode=0o700)
    if what == "open":
        socket.parent.chmod(0o777)
    if what == "another's":
        monkeypatch.setattr(os, "geteuid", lambda: socket.parent.stat().st_uid + 1)
    with pytest.raises(HostNotReady, match="yours alone") as caught:
        layout.make_socket_directory(socket)
    assert "CAPSEM_RUN_DIR" in str(caught.value.hint)


def test_a_short_one_has_them_beside_it(tmp_path: Path) -> None:
    layout = Layout(Path("/run/capsem"))
    assert layout.instance_socket("box") == layout.instances / "box.sock"
    mine = Layout(tmp_path)
    mine.make_socket_directory(mine.instances / "box.sock")
    assert mine.instances.is_dir()


def test_directories_of_somebody_else_are_told_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As after a command under sudo."""
    layout, access = Layout(tmp_path), os.access
    layout.create()
    layout.create()
    monkeypatch.setattr(os, "access", lambda path, mode: path != layout.layers and access(path, mode))
    with pytest.raises(HostNotReady, match=str(layout.layers)) as caught:
        layout.create()
    assert f"chown -R $USER {tmp_path}" in str(caught.value.hint)
