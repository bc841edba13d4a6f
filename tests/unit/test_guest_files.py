"""Writing a file in the guest: what is durable when it is acknowledged, and what a failure leaves."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from capsem.guest import files
from capsem.guest.files import Reader, Refused, open_parent, refusal
from capsem.guest.writer import LARGE_RING, Rings, Temporary, Writer
from capsem.wire.events import Closed, CreditReceived, DataReceived, EndReceived
from capsem.wire.messages import STDIN, STDOUT, Failed, FileRead, FileWritten, ReadFile, WriteFile
from capsem.wire.streams import WINDOW
from wire_pair import pair, settle


def descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


class Deferred:
    """A loop of which the threads run when the test says so."""

    def __init__(self) -> None:
        self.work: list[tuple[Callable[[], Any], Callable[[Any], None]]] = []

    def offload(self, work: Callable[[], Any], then: Callable[[Any], None]) -> None:
        self.work.append((work, then))

    def run(self) -> None:
        work, then = self.work.pop(0)
        try:
            result = work()
        except OSError as error:
            result = error
        then(result)


class Case:
    """A guest's end of a stream with a servant on it, the host's end, and every call that makes things durable."""

    def __init__(self, workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.workspace = workspace
        self.loop = Deferred()
        self.host, self.guest = pair()
        self.calls: list[tuple[str, str]] = []
        self.fail: str | None = None
        self.finished: list[int] = []
        self.notes = workspace.parent / "notes"
        self.notes.mkdir()
        self.temporary = Temporary(str(self.notes))
        for name in ("fsync", "rename", "mkdir"):
            monkeypatch.setattr(files.os, name, self._recorded(name, getattr(os, name)))

    def _recorded(self, name: str, real: Callable[..., None]) -> Callable[..., None]:
        def call(target: Any, *rest: Any, **options: Any) -> None:
            path = Path(f"/proc/self/fd/{target}").readlink() if isinstance(target, int) else target
            name_ = Path(path).name  # "#<inode> (deleted)" is what the kernel shows for a file without a name
            shown = "temporary" if name_.startswith(".capsem-") or name_.endswith(" (deleted)") else name_
            self.calls.append((name, shown))
            if self.fail == name:
                raise OSError(28, "injected")
            real(target, *rest, **options)

        return call

    def open(self, request: ReadFile | WriteFile) -> int:
        stream = self.host.mux.open(request)
        settle(self.host, self.guest)
        self.host.told()
        return stream

    def writer(self, path: str = "file") -> Writer:
        request = WriteFile(path=path)
        stream = self.open(request)
        rings, done = Rings(), self.finished.append
        return Writer(
            self.loop,  # type: ignore[arg-type]
            self.guest.mux,
            stream,
            request,
            str(self.workspace),
            rings,
            self.temporary,
            done,
        )

    def answer(self) -> list[object]:
        settle(self.host, self.guest)
        return [event.message for event in self.host.told() if isinstance(event, Closed)]

    def arrives(self, writer: Writer) -> int:
        """Hand on what can come from the host; returns how many bytes of the file there were."""
        settle(self.host, self.guest)
        size = 0
        for event in self.guest.told():
            if isinstance(event, DataReceived):
                writer.feed(event.data)
                size += len(event.data)
            elif isinstance(event, EndReceived) and not isinstance(event, CreditReceived):
                writer.feed_end()
        return size

    def names(self) -> list[str]:
        return sorted(path.name for path in self.workspace.iterdir())


@pytest.fixture
def case(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Case:
    (tmp_path / "root").mkdir()
    return Case(tmp_path / "root", monkeypatch)


def test_nothing_is_acknowledged_before_file_and_directory_are_durable(case: Case) -> None:
    writer = case.writer()
    writer.feed(b"content")
    assert (case.answer(), case.calls) == ([], [])
    writer.feed_end()
    assert (case.answer(), case.calls) == ([], [])
    case.loop.run()
    assert case.calls == [("fsync", "temporary"), ("rename", "temporary"), ("fsync", "root")]
    assert case.answer() == [FileWritten(size=7, created=True)]
    assert (case.workspace / "file").read_bytes() == b"content"
    assert case.names() == ["file"]
    assert case.finished == [1]


def test_a_file_system_that_knows_no_nameless_files(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    real = files.os.open

    def open_(path: str, flags: int, *rest: Any, **options: Any) -> int:
        if flags & os.O_TMPFILE == os.O_TMPFILE:
            raise OSError(95, "Operation not supported")
        return real(path, flags, *rest, **options)

    monkeypatch.setattr(files.os, "open", open_)
    writer, given_up = case.writer(), case.writer("other")
    assert [name.startswith(".capsem-") for name in case.names()] == [True, True]
    writer.feed(b"content")
    writer.feed_end()
    case.loop.run()
    given_up.cancelled()
    assert (case.workspace / "file").read_bytes() == b"content"
    assert case.names() == ["file"]


def test_parents_are_durable_too(case: Case) -> None:
    writer = case.writer("a/b/file")
    assert case.calls == [("mkdir", "a"), ("fsync", "root"), ("mkdir", "b"), ("fsync", "a")]
    writer.feed_end()
    case.loop.run()
    assert case.calls[-1] == ("fsync", "b")


@pytest.mark.parametrize("fail", ["fsync", "rename"])
@pytest.mark.parametrize("old", [None, b"old"])
def test_a_failure_is_said_and_leaves_what_was_there(case: Case, fail: str, old: bytes | None) -> None:
    if old is not None:
        (case.workspace / "file").write_bytes(old)
    before = descriptors()
    writer = case.writer()
    writer.feed(b"new")
    writer.feed_end()
    case.fail = fail
    case.loop.run()
    (failed,) = case.answer()
    assert isinstance(failed, Failed)
    assert failed.code == "guest_failed"
    assert "No space left" in failed.message
    assert failed.hint is not None
    assert case.names() == ([] if old is None else ["file"])
    assert old is None or (case.workspace / "file").read_bytes() == old
    assert list(case.notes.iterdir()) == []
    assert descriptors() == before


class Killed(BaseException):
    pass


def test_what_a_killed_agent_leaves_is_removed_by_the_next(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed between the link beside the target and the rename over it."""

    def rename(*_: object, **__: object) -> None:
        raise Killed

    (case.workspace / "file").write_bytes(b"old")
    (case.workspace / ".capsem-mine").touch()
    monkeypatch.setattr(files.os, "rename", rename)
    writer = case.writer()
    writer.feed(b"new")
    with pytest.raises(Killed):
        writer._commit()
    assert len(case.names()) == 3
    Temporary(str(case.notes))
    assert case.names() == [".capsem-mine", "file"]
    assert (case.workspace / "file").read_bytes() == b"old"
    assert list(case.notes.iterdir()) == []
    writer.cancelled()


def test_a_parent_that_somebody_else_makes_meanwhile_is_used(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.mkdir

    def mkdir(path: Any, mode: int = 0o777, *, dir_fd: int | None = None) -> None:
        real(path, mode, dir_fd=dir_fd)
        raise FileExistsError(17, "made by a command of the guest")

    monkeypatch.setattr(files.os, "mkdir", mkdir)
    case.writer("a/b/file").feed_end()
    case.loop.run()
    assert case.answer() == [FileWritten(size=0, created=True)]


def test_short_writes_are_continued(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.pwrite
    monkeypatch.setattr(files.os, "pwrite", lambda fd, data, at: real(fd, data[:7], at))
    writer = case.writer()
    writer.feed(bytes(range(100)))
    writer.feed_end()
    case.loop.run()
    assert (case.workspace / "file").read_bytes() == bytes(range(100))


def test_giving_up_at_any_moment_leaves_nothing_behind(case: Case) -> None:
    before = descriptors()
    for moment in range(4):
        writer = case.writer()
        if moment > 0:
            writer.feed(b"x")
        if moment > 1:
            writer.feed_end()
        writer.cancelled()
        if moment > 1:
            case.loop.run()  # the thread finds its file gone
        if moment > 2:
            writer.cancelled()
        assert case.names() == []
    assert descriptors() == before


def test_credit_is_given_as_bytes_are_written_and_no_more_comes_than_there_is_memory_for(case: Case) -> None:
    content = random.Random(1).randbytes(3 * LARGE_RING + 12345)
    writer = case.writer()
    case.host.mux.send(1, STDIN, content)
    case.host.mux.end(1, STDIN)
    received, most = case.arrives(writer), 0
    assert received == LARGE_RING
    while not case.finished:
        case.loop.run()
        received += case.arrives(writer)
        most = max(most, received - writer._written)
    assert most <= LARGE_RING
    assert case.answer() == [FileWritten(size=len(content), created=True)]
    assert (case.workspace / "file").read_bytes() == content


def test_what_comes_while_a_part_is_written_waits(case: Case) -> None:
    writer = case.writer()
    case.host.mux.send(1, STDIN, bytes(LARGE_RING))
    case.host.mux.end(1, STDIN)
    case.arrives(writer)
    for _ in range(3):  # two halves of the ring, and the commit
        assert len(case.loop.work) == 1
        assert case.finished == []
        case.loop.run()
    assert case.finished == [1]


@pytest.mark.parametrize(
    "error", [None, OSError(22, "Invalid argument"), OSError(95, "Operation not supported")], ids=str
)
def test_a_large_file_is_written_past_the_page_cache_where_that_can_be_done(
    case: Case, monkeypatch: pytest.MonkeyPatch, error: OSError | None
) -> None:
    real, flags = files.os.open, []

    def open_(path: str, how: int, *rest: Any, **options: Any) -> int:
        flags.append(how)
        if how & os.O_DIRECT and error is not None:
            raise error
        return real(path, how & ~os.O_DIRECT, *rest, **options)  # what lies below the tests may not take it

    monkeypatch.setattr(files.os, "open", open_)
    content = random.Random(2).randbytes(LARGE_RING + 5)
    for data, direct in ((content[:1000], False), (content, True)):
        flags.clear()
        writer = case.writer()
        case.host.mux.send(writer._stream, STDIN, data)
        case.host.mux.end(writer._stream, STDIN)
        case.arrives(writer)
        while case.loop.work:
            case.loop.run()
            case.arrives(writer)
        assert (case.workspace / "file").read_bytes() == data
        assert any(how & os.O_DIRECT for how in flags) is direct


def test_of_what_is_left_at_the_end_all_blocks_are_written_past_the_cache_if_that_is_much(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    real_open, real_write = files.os.open, os.pwrite
    direct: set[int] = set()
    written = {True: 0, False: 0}

    def open_(path: str, how: int, *rest: Any, **options: Any) -> int:
        fd = real_open(path, how & ~os.O_DIRECT, *rest, **options)
        (direct.add if how & os.O_DIRECT else direct.discard)(fd)
        return fd

    def pwrite(fd: int, data: memoryview, at: int) -> int:
        written[fd in direct] += len(data)
        return real_write(fd, data, at)

    monkeypatch.setattr(files.os, "open", open_)
    monkeypatch.setattr(files.os, "pwrite", pwrite)
    content = random.Random(3).randbytes(LARGE_RING // 2 + 600_000)
    writer = case.writer()
    case.host.mux.send(writer._stream, STDIN, content)
    case.host.mux.end(writer._stream, STDIN)
    case.arrives(writer)
    while case.loop.work:
        case.loop.run()
        case.arrives(writer)
    assert (case.workspace / "file").read_bytes() == content
    assert written == {True: len(content) - len(content) % 4096, False: len(content) % 4096}


def test_a_write_that_fails_ends_the_upload_at_once_and_leaves_what_was_there(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    def pwrite(*_: object) -> int:
        raise OSError(28, "No space left on device")

    (case.workspace / "file").write_bytes(b"old")
    before = descriptors()
    monkeypatch.setattr(files.os, "pwrite", pwrite)
    writer = case.writer()
    case.host.mux.send(1, STDIN, bytes(LARGE_RING))
    case.arrives(writer)
    case.loop.run()
    (failed,) = case.answer()
    assert isinstance(failed, Failed)
    assert failed.message == "file: No space left on device"
    assert case.names() == ["file"]
    assert (case.workspace / "file").read_bytes() == b"old"
    assert (case.finished, descriptors()) == ([1], before)


def test_who_gives_up_while_a_thread_writes_takes_nothing_away_from_under_it(case: Case) -> None:
    """The number of a descriptor that was closed may be another file's by the time of the write."""
    before = descriptors()
    writer = case.writer()
    case.host.mux.send(1, STDIN, bytes(LARGE_RING))
    case.arrives(writer)
    writer.cancelled()
    assert descriptors() > before
    case.loop.run()
    assert descriptors() == before
    assert case.loop.work == []
    assert case.names() == []


def test_many_files_at_once_have_little_memory_each(case: Case) -> None:
    rings = Rings()
    sizes = [rings.take() for _ in range(20)]
    assert (sizes.count(LARGE_RING), sizes.count(WINDOW)) == (4, 16)
    for size in sizes:
        rings.give_back(size)
    assert rings.take() == LARGE_RING


# -- a parent that changes while it is opened


def test_a_directory_swapped_for_a_link_is_refused_not_followed(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the check of the real path and the opening."""
    outside = tmp_path / "outside"
    outside.mkdir()
    (case.workspace / "dir").mkdir()
    real = os.path.realpath

    def swap(path: str) -> str:
        found = real(path)
        if found.endswith("/dir"):
            (case.workspace / "dir").rmdir()
            (case.workspace / "dir").symlink_to(outside)
        return found

    monkeypatch.setattr(files.os.path, "realpath", swap)
    with pytest.raises(OSError, match=r"Not a directory|symbolic links"):
        open_parent(str(case.workspace), "dir/file", create=True)
    assert list(outside.iterdir()) == []


def test_a_file_swapped_for_a_link_is_refused_not_followed(case: Case, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_bytes(b"secret")
    writer = case.writer()
    writer.feed(b"new")
    (case.workspace / "file").symlink_to(secret)
    writer.feed_end()
    case.loop.run()
    assert secret.read_bytes() == b"secret"
    assert (case.workspace / "file").read_bytes() == b"new"


# -- reading


def test_reading_keeps_within_credit(case: Case) -> None:
    (case.workspace / "file").write_bytes(bytes(3 * WINDOW))
    request = ReadFile(path="file")
    stream = case.open(request)
    buffer = memoryview(bytearray(WINDOW))
    Reader(case.guest.mux, stream, request, str(case.workspace), buffer, case.finished.append)
    settle(case.host, case.guest)
    assert case.guest.mux.room(stream, STDOUT) == 0
    size = 0
    while not case.finished:
        settle(case.host, case.guest)
        for event in case.host.told():
            if isinstance(event, DataReceived):
                size += len(event.data)
                case.host.mux.consumed(stream, STDOUT, len(event.data))
        settle(case.host, case.guest)
    settle(case.host, case.guest)
    *data, last = case.host.told()
    assert isinstance(last, Closed)
    assert isinstance(last.message, FileRead)
    assert last.message.size == 3 * WINDOW
    assert size + sum(len(event.data) for event in data if isinstance(event, DataReceived)) == 3 * WINDOW


# -- refusals


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (Refused("permission_denied", "no"), "permission_denied"),
        (FileNotFoundError(2, "x"), "not_found"),
        (NotADirectoryError(20, "x"), "invalid_input"),
        (IsADirectoryError(21, "x"), "invalid_input"),
        (OSError(36, "name too long"), "invalid_input"),
        (OSError(7, "arguments too long"), "invalid_input"),
        (OSError(28, "full"), "guest_failed"),
        (OSError("without a number"), "guest_failed"),
        (PermissionError(13, "x"), "guest_failed"),
        (ValueError("x"), "guest_failed"),
        (OverflowError("x"), "guest_failed"),
    ],
    ids=str,
)
def test_every_error_becomes_a_message(error: Exception, code: str) -> None:
    failed = refusal(error, "a/path")
    assert failed.code == code
    assert failed.message


def test_a_refusal_quotes_no_more_than_it_must() -> None:
    assert len(Refused("invalid_input", "x" * 10**7).failed.message) <= 1000
