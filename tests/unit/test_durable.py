"""Files that survive a crash: the order of calls, and what is left when any of them fails."""

import os
import socket
from pathlib import Path

import pytest

from capsem.store import durable


class Recorder:
    """Records the calls that matter, by the path they concern, and fails the `fail_at`-th of them."""

    CALLS = ("write", "fsync", "replace", "rename")

    def __init__(self, monkeypatch: pytest.MonkeyPatch, fail_at: int | None = None) -> None:
        self.calls: list[tuple[str, str]] = []
        self.fail_at = fail_at
        for name in self.CALLS:
            monkeypatch.setattr(os, name, self._wrapped(name, getattr(os, name)))

    def _wrapped(self, name, real):  # type: ignore[no-untyped-def]
        def call(target, *rest):  # type: ignore[no-untyped-def]
            path = Path(f"/proc/self/fd/{target}").readlink() if isinstance(target, int) else target
            if len(self.calls) == self.fail_at:
                self.calls.append(("failed", Path(path).name))
                raise OSError(5, "injected")
            self.calls.append((name, Path(path).name))
            return real(target, *rest)

        return call


def descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def _names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def test_what_need_not_last_is_atomic_all_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = Recorder(monkeypatch)
    durable.write(tmp_path / "record", b"content", lasting=False)
    temporary = f"{durable.TEMPORARY}record.{os.getpid()}"
    assert recorder.calls == [("write", temporary), ("replace", temporary)]
    assert _names(tmp_path) == ["record"]


def test_write_makes_everything_durable_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = Recorder(monkeypatch)
    durable.write(tmp_path / "record", b"content")
    temporary = f"{durable.TEMPORARY}record.{os.getpid()}"
    assert recorder.calls == [
        ("write", temporary),
        ("fsync", temporary),
        ("replace", temporary),
        ("fsync", tmp_path.name),
    ]
    assert (tmp_path / "record").read_bytes() == b"content"
    assert _names(tmp_path) == ["record"]


@pytest.mark.parametrize("fail_at", [0, 1, 2])
@pytest.mark.parametrize("old", [None, b"old"])
def test_a_failed_write_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fail_at: int, old: bytes | None
) -> None:
    path = tmp_path / "record"
    if old is not None:
        path.write_bytes(old)
    with monkeypatch.context() as patch:
        Recorder(patch, fail_at)
        with pytest.raises(OSError, match="injected"):
            durable.write(path, b"new")
    assert _names(tmp_path) == ([] if old is None else ["record"])
    assert old is None or path.read_bytes() == old


def test_a_directory_that_cannot_be_synced_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Recorder(monkeypatch, fail_at=3)
    with pytest.raises(OSError, match="injected"):
        durable.write(tmp_path / "record", b"new")
    assert (tmp_path / "record").read_bytes() == b"new"


def test_short_writes_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.write
    monkeypatch.setattr(os, "write", lambda fd, data: real(fd, data[:7]))
    durable.write(tmp_path / "record", bytes(range(256)))
    assert (tmp_path / "record").read_bytes() == bytes(range(256))


def test_empty_content(tmp_path: Path) -> None:
    durable.write(tmp_path / "record", b"")
    assert (tmp_path / "record").read_bytes() == b""


@pytest.mark.parametrize(("mode", "expected"), [(None, 0o600), (0o644, 0o644), (0o400, 0o400)])
def test_mode(tmp_path: Path, mode: int | None, expected: int) -> None:
    before = os.umask(0o022)
    try:
        for _ in range(2):
            durable.write(tmp_path / "record", b"x", **({} if mode is None else {"mode": mode}))
    finally:
        os.umask(before)
    assert (tmp_path / "record").stat().st_mode & 0o777 == expected


def test_a_temporary_file_left_by_a_crash_is_no_obstacle(tmp_path: Path) -> None:
    (tmp_path / f"{durable.TEMPORARY}record.{os.getpid()}").write_bytes(b"left behind, and longer than what comes")
    durable.write(tmp_path / "record", b"new")
    assert _names(tmp_path) == ["record"]
    assert (tmp_path / "record").read_bytes() == b"new"


def test_a_planted_symbolic_link_is_not_followed(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.write_bytes(b"precious")
    (tmp_path / f"{durable.TEMPORARY}record.{os.getpid()}").symlink_to(outside)
    with pytest.raises(OSError, match="symbolic links"):
        durable.write(tmp_path / "record", b"new")
    (tmp_path / "record").symlink_to(outside)
    durable.write(tmp_path / "record", b"new")
    assert not (tmp_path / "record").is_symlink()
    assert outside.read_bytes() == b"precious"


def test_no_descriptor_is_left_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = descriptors()
    for fail_at in (None, 0, 1, 2, 3):
        with monkeypatch.context() as patch:
            Recorder(patch, fail_at)
            try:
                durable.write(tmp_path / "record", b"x")
            except OSError:
                assert fail_at is not None
    assert descriptors() == before


def test_rename_syncs_both_directories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    (tmp_path / "a" / "x").write_bytes(b"x")
    recorder = Recorder(monkeypatch)
    durable.rename(tmp_path / "a" / "x", tmp_path / "a" / "y")
    durable.rename(tmp_path / "a" / "y", tmp_path / "b" / "z")
    assert recorder.calls == [("rename", "x"), ("fsync", "a"), ("rename", "y"), ("fsync", "b"), ("fsync", "a")]
    assert (tmp_path / "b" / "z").read_bytes() == b"x"


def test_sync_file_and_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "x").write_bytes(b"x")
    recorder = Recorder(monkeypatch)
    durable.sync_file(tmp_path / "x")
    durable.sync_directory(tmp_path)
    assert recorder.calls == [("fsync", "x"), ("fsync", tmp_path.name)]
    with pytest.raises(NotADirectoryError):
        durable.sync_directory(tmp_path / "x")
    with pytest.raises(FileNotFoundError):
        durable.sync_file(tmp_path / "missing")


def test_remove_tree_removes_whatever_it_is(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "precious").write_bytes(b"x")
    tree = tmp_path / "tree"
    (tree / "deep" / "deeper").mkdir(parents=True)
    (tree / "deep" / "file").write_bytes(b"x")
    (tree / "link").symlink_to(outside)
    (tree / "dangling").symlink_to(tmp_path / "nowhere")
    os.mkfifo(tree / "fifo")
    durable.remove_tree(tree)
    (tmp_path / "link").symlink_to(outside)
    durable.remove_tree(tmp_path / "link")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    durable.remove_tree(tmp_path / "dangling")
    (tmp_path / "file").write_bytes(b"x")
    durable.remove_tree(tmp_path / "file")
    durable.remove_tree(tmp_path / "never-was")
    assert _names(tmp_path) == ["outside"]
    assert _names(outside) == ["precious"]


def test_remove_tree_removes_sockets_and_fifos(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "socket"))
    os.mkfifo(tmp_path / "fifo")
    durable.remove_tree(tmp_path / "socket")
    durable.remove_tree(tmp_path / "fifo")
    assert _names(tmp_path) == []


def test_remove_tree_goes_on_when_a_file_vanishes_under_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that ends removes its socket while we remove its directory."""
    tree = tmp_path / "tree"
    tree.mkdir()
    for name in "abcdef":
        (tree / name).write_bytes(b"x")
    real = os.unlink
    vanished: list[object] = []

    def unlink(path, **options):  # type: ignore[no-untyped-def]
        real(path, **options)
        if not vanished:
            vanished.append(path)
            raise FileNotFoundError(2, "gone already")

    monkeypatch.setattr(os, "unlink", unlink)
    durable.remove_tree(tree)
    assert vanished
    assert not tree.exists()


def test_remove_tree_reports_what_it_cannot_remove(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tree = tmp_path / "tree"
    tree.mkdir()
    (tree / "a").write_bytes(b"x")

    def unlink(path, **_options):  # type: ignore[no-untyped-def]
        raise PermissionError(1, "immutable", path)

    monkeypatch.setattr(os, "unlink", unlink)
    with pytest.raises(PermissionError):
        durable.remove_tree(tree)


def test_allocated_bytes_counts_no_holes_and_follows_no_links(tmp_path: Path) -> None:
    assert durable.allocated_bytes(tmp_path / "missing") == 0
    outside = tmp_path / "outside"
    outside.write_bytes(b"x" * 1_000_000)
    tree = tmp_path / "tree"
    tree.mkdir()
    empty = durable.allocated_bytes(tree)
    with (tree / "sparse").open("wb") as file:
        file.truncate(1 << 30)
    (tree / "link").symlink_to(outside)
    (tree / "loop").symlink_to(tree)
    assert durable.allocated_bytes(tree) - empty < 100_000
    with (tree / "sparse").open("r+b") as file:
        file.seek(1 << 20)
        file.write(b"x" * 500_000)
        file.flush()
        os.fsync(file.fileno())
    assert 500_000 <= durable.allocated_bytes(tree) - empty < 700_000
    assert durable.allocated_bytes(tree) > durable.allocated_bytes(tree / "sparse") >= 500_000


def test_a_file_is_created_once_and_whole(tmp_path: Path) -> None:
    assert durable.create(tmp_path / "key", b"first")
    assert not durable.create(tmp_path / "key", b"second")
    assert (tmp_path / "key").read_bytes() == b"first"
    assert (tmp_path / "key").stat().st_mode & 0o777 == 0o600
    assert _names(tmp_path) == ["key"]


def test_a_file_that_cannot_be_created_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for step in range(3):
        with monkeypatch.context() as patched:
            Recorder(patched, fail_at=step)
            with pytest.raises(OSError, match="injected"):
                durable.create(tmp_path / "key", b"first")
        assert _names(tmp_path) == []
