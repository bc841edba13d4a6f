"""Files: what the real agent reads and writes, and what it refuses (interface.md 6.4)."""

from __future__ import annotations

import asyncio
import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from agent_bench import Bench
from capsem.model.errors import (
    CapsemError,
    GuestFailed,
    Interrupted,
    InvalidInput,
    NotFound,
    PayloadTooLarge,
    PermissionDenied,
)
from capsem.wire.messages import STDIN, STDOUT, FileRead, Freeze, ReadFile, Sync, Synced, Thawed, WriteFile
from capsem.wire.streams import WINDOW

Run = Callable[..., None]
LIMIT = 10 << 20


def leftovers(workspace: Path) -> list[str]:
    return [str(path) for path in workspace.rglob(".capsem*")]


def names(bench: Bench) -> list[str]:
    return [path.name for path in bench.workspace.iterdir()]


def descriptors(bench: Bench) -> int:
    return len(list(Path(f"/proc/{bench.pid}/fd").iterdir()))


@pytest.mark.parametrize("size", [0, 1, 1000, WINDOW, WINDOW + 1, 3_000_000])
def test_what_is_written_is_read(with_agent: Run, size: int) -> None:
    async def scenario(bench: Bench) -> None:
        data = os.urandom(size)
        assert await bench.guest.write_file("file", data) == size
        assert (bench.workspace / "file").read_bytes() == data
        content, result = await bench.guest.read_file("file", LIMIT)
        assert content == data
        assert (result.size, result.mode) == (size, 0o644)
        assert leftovers(bench.workspace) == []

    with_agent(scenario)


def test_parents_are_made_and_modes_are_kept(with_agent: Run) -> None:
    before = os.umask(0o077)
    try:

        async def scenario(bench: Bench) -> None:
            root = bench.workspace
            await bench.guest.write_file("a/b/c/file", b"x")
            await bench.guest.write_file("a/script", b"x", 0o750)
            await bench.guest.write_file("a/setuid", b"x", 0o6755)
            assert (root / "a/b/c/file").stat().st_mode & 0o7777 == 0o644
            assert (root / "a/script").stat().st_mode & 0o7777 == 0o750
            assert (root / "a/setuid").stat().st_mode & 0o7777 == 0o755
            _, result = await bench.guest.read_file("a/script", LIMIT)
            assert result.mode == 0o750

        with_agent(scenario)
    finally:
        os.umask(before)


def test_paths_are_absolute_or_of_the_workspace(with_agent: Run) -> None:
    async def scenario(bench: Bench) -> None:
        for number, path in enumerate(
            (
                "x",
                "./x",
                "d//x",
                "d/./x",
                str(bench.workspace / "x"),
                f"/{bench.workspace}//x",
                "ü/\U0001f600 \n",
                "x" * 255,
            )
        ):
            data = str(number).encode()
            await bench.guest.write_file(path, data)
            assert (bench.workspace / path.lstrip("/") if path[0] != "/" else Path(path)).read_bytes() == data
            assert (await bench.guest.read_file(path, LIMIT))[0] == data

    with_agent(scenario)


def test_names_that_are_not_utf8_are_names(with_agent: Run) -> None:
    async def scenario(bench: Bench) -> None:
        await bench.guest.write_file("caf\udce9", b"x")
        assert [os.fsencode(name) for name in names(bench)] == [b"caf\xe9"]
        assert (await bench.guest.read_file("caf\udce9", LIMIT))[0] == b"x"

    with_agent(scenario)


def test_the_content_is_replaced_as_a_whole(with_agent: Run) -> None:
    async def scenario(bench: Bench) -> None:
        path = bench.workspace / "file"
        path.write_bytes(b"old and longer")
        with path.open("rb") as reader:
            await bench.guest.write_file("file", b"new")
            assert reader.read() == b"old and longer"
        assert path.read_bytes() == b"new"
        assert leftovers(bench.workspace) == []

    with_agent(scenario)


async def half_written(bench: Bench, path: str = "file"):  # type: ignore[no-untyped-def]
    """A write of which much has arrived and the end has not."""
    stream = bench.guest.channel.open(WriteFile(path=path))
    await stream.write(STDIN, bytes(3 * WINDOW))
    await bench.guest.ping(10)
    links = [os.readlink(entry.path) for entry in os.scandir(f"/proc/{bench.pid}/fd")]
    assert any(link.startswith(f"{bench.workspace}/") for link in links)
    assert leftovers(bench.workspace) == []
    return stream


def test_a_write_that_is_given_up_changes_nothing(with_agent: Run) -> None:
    async def scenario(bench: Bench) -> None:
        (bench.workspace / "file").write_bytes(b"old")
        stream = await half_written(bench)
        stream.reset()
        await bench.guest.ping(10)
        assert (bench.workspace / "file").read_bytes() == b"old"
        assert names(bench) == ["file"]

    with_agent(scenario)


def test_a_write_cut_off_by_a_new_epoch_changes_nothing(with_agent: Run) -> None:
    """The host end was restarted, or the VM was resumed from before the write."""

    async def scenario(bench: Bench) -> None:
        (bench.workspace / "file").write_bytes(b"old")
        stream = await half_written(bench)
        again = bench.next_epoch()
        bench.guest._begin_epoch()
        await again
        with pytest.raises(Interrupted):
            await stream.result()
        assert (bench.workspace / "file").read_bytes() == b"old"
        assert names(bench) == ["file"]
        await bench.serves()

    with_agent(scenario)


def test_a_write_cut_off_by_the_agents_death_changes_nothing(with_agent: Run) -> None:
    async def scenario(bench: Bench) -> None:
        (bench.workspace / "file").write_bytes(b"old")
        stream = await half_written(bench)
        await bench.restart()
        with pytest.raises(Interrupted):
            await stream.result()
        assert (bench.workspace / "file").read_bytes() == b"old"
        assert names(bench) == ["file"]
        await bench.guest.write_file("file", b"new")
        assert (bench.workspace / "file").read_bytes() == b"new"

    with_agent(scenario)


def test_a_reader_that_goes_away_costs_nothing(with_agent: Run) -> None:
    async def scenario(bench: Bench) -> None:
        (bench.workspace / "large").write_bytes(bytes(3_000_000))
        before = descriptors(bench)
        for _ in range(3):
            stream = bench.guest.channel.open(ReadFile(path="large"))
            assert await stream.read(STDOUT)
            stream.reset()
        again = bench.next_epoch()
        stream = bench.guest.channel.open(ReadFile(path="large"))
        assert await stream.read(STDOUT)
        bench.guest._begin_epoch()
        await again
        assert descriptors(bench) == before

    with_agent(scenario)


def test_refusals_leave_no_descriptor_open(with_agent: Run) -> None:
    async def scenario(bench: Bench) -> None:
        (bench.workspace / "d").mkdir()
        before = descriptors(bench)
        for path in ("../x", "missing", "d", "d/../x", "d/missing/x", "x\0y", "", "/etc/passwd", "d" * 300):
            with pytest.raises(CapsemError):
                await bench.guest.read_file(path, LIMIT)
            if path not in ("missing", "d/missing/x"):
                with pytest.raises(CapsemError):
                    await bench.guest.write_file(path, b"x")
        with pytest.raises(InvalidInput):
            await bench.run("true", cwd="/missing")
        assert descriptors(bench) == before

    with_agent(scenario)


# -- confinement


def prepare(directory: Path) -> Path:
    """A workspace full of traps beside things that must not be touched."""
    root = directory / "root"
    outside = directory / "outside"
    outside.mkdir()
    (outside / "secret").write_bytes(b"secret")
    (root / "dir").mkdir()
    (root / "dir" / "file").write_bytes(b"x")
    (root / "file").write_bytes(b"x")
    (root / "link-in").symlink_to("dir")
    (root / "link-out").symlink_to(outside)
    (root / "link-up").symlink_to("..")
    (root / "link-abs").symlink_to("/etc")
    (root / "loop").symlink_to("loop")
    (root / "file-link").symlink_to("file")
    (root / "secret-link").symlink_to(outside / "secret")
    (root / "dangling").symlink_to(outside / "made")
    os.mkfifo(root / "fifo")
    os.mknod(root / "socket", 0o600 | stat.S_IFSOCK)
    (directory / "root-but-longer").mkdir()
    (directory / "root-but-longer" / "x").write_bytes(b"secret")
    return outside


BOTH = ("read", "write")


REFUSED: list[tuple[tuple[str, ...], str, type[CapsemError]]] = [
    (BOTH, "", InvalidInput),
    (BOTH, ".", InvalidInput),
    (BOTH, "/", InvalidInput),
    (BOTH, "{root}", InvalidInput),
    (BOTH, "{root}/", InvalidInput),
    (BOTH, "..", InvalidInput),
    (BOTH, "../outside/secret", InvalidInput),
    (BOTH, "dir/../file", InvalidInput),
    (BOTH, "dir/..", InvalidInput),
    (BOTH, "{root}/../outside/secret", InvalidInput),
    (BOTH, "{root}-but-longer/x", PermissionDenied),
    (BOTH, "{outside}/secret", PermissionDenied),
    (BOTH, "/etc/passwd", PermissionDenied),
    (BOTH, "/x", PermissionDenied),
    (BOTH, "/proc/self/root/etc/passwd", PermissionDenied),
    (BOTH, "link-out/secret", PermissionDenied),
    (BOTH, "link-up/outside/secret", PermissionDenied),
    (BOTH, "link-abs/passwd", PermissionDenied),
    (BOTH, "dir/file/below", InvalidInput),
    (BOTH, "fifo", InvalidInput),
    (BOTH, "socket", InvalidInput),
    (BOTH, "dir", InvalidInput),
    (BOTH, "secret-link", PermissionDenied),
    (BOTH, "file-link", PermissionDenied),
    (BOTH, "dangling", PermissionDenied),
    (BOTH, "loop", PermissionDenied),
    (BOTH, "loop/x", CapsemError),
    (BOTH, "a\0b", InvalidInput),
    (BOTH, "\ud800", CapsemError),
    (BOTH, "x" * 256, InvalidInput),
    (BOTH, "x" * 256 + "/y", InvalidInput),
    (BOTH, "ü" * 128, InvalidInput),
    (BOTH, "x/" * 2500, InvalidInput),
    (BOTH, "x" * 1_000_000, InvalidInput),
    (("read",), "missing", NotFound),
    (("read",), "missing/file", NotFound),
    (("read",), "/proc/self/mem", PermissionDenied),
]


def test_confinement(with_agent: Run, tmp_path: Path) -> None:
    async def scenario(bench: Bench) -> None:
        def everything() -> list[str]:
            return sorted(str(each) for each in tmp_path.rglob("*") if "memory" not in str(each))

        outside = prepare(tmp_path)
        before = everything()
        guest = bench.guest
        for operations, path, error in REFUSED:
            full = path.format(root=bench.workspace, outside=outside) if "{" in path else path
            for operation in operations:
                call = guest.read_file(full, LIMIT) if operation == "read" else guest.write_file(full, b"overwritten")
                caught: CapsemError | None = None
                try:
                    await call
                except CapsemError as raised:
                    caught = raised
                assert isinstance(caught, error), f"{operation} {path[:80]!r}: {caught!r}"
                assert len(str(caught)) < 6000
        assert everything() == before
        assert (outside / "secret").read_bytes() == b"secret"
        assert guest.epoch == 1
        await bench.serves()

    with_agent(scenario)


def test_a_link_that_stays_inside_is_followed_on_the_way(with_agent: Run, tmp_path: Path) -> None:
    async def scenario(bench: Bench) -> None:
        prepare(tmp_path)
        await bench.guest.write_file("link-in/new", b"x")
        assert (bench.workspace / "dir" / "new").read_bytes() == b"x"
        assert (await bench.guest.read_file("link-in/file", LIMIT))[0] == b"x"
        assert (bench.workspace / "link-in").is_symlink()

    with_agent(scenario)


def test_a_workspace_that_is_a_link_is_no_way_out(with_agent: Run, tmp_path: Path) -> None:
    async def scenario(bench: Bench) -> None:
        bench.workspace.rename(tmp_path / "real")
        bench.workspace.symlink_to(tmp_path / "real")
        await bench.guest.write_file("d/x", b"x")
        await bench.guest.write_file(f"{tmp_path}/real/d/y", b"y")
        assert (tmp_path / "real" / "d" / "x").read_bytes() == b"x"
        with pytest.raises(PermissionDenied):
            await bench.guest.read_file(f"{tmp_path}/agent-memory", LIMIT)

    with_agent(scenario)


# -- limits and failures


def test_a_file_over_the_limit_is_refused_before_a_byte_is_sent(with_agent: Run) -> None:
    async def scenario(bench: Bench) -> None:
        (bench.workspace / "file").write_bytes(bytes(1000))
        assert len((await bench.guest.read_file("file", 1000))[0]) == 1000
        stream = bench.guest.channel.open(ReadFile(path="file", limit=999))
        assert await stream.read(STDOUT) == b""
        with pytest.raises(PayloadTooLarge, match="1000"):
            await stream.result()
        assert isinstance(await bench.ask(ReadFile(path="file", limit=1000)), FileRead)
        with (bench.workspace / "sparse").open("wb") as file:
            file.truncate(1 << 40)
        with pytest.raises(PayloadTooLarge):
            await bench.guest.read_file("sparse", LIMIT)

    with_agent(scenario)


def test_a_file_that_grows_while_it_is_read_is_not_sent_beyond_the_limit(with_agent: Run) -> None:
    async def scenario(bench: Bench) -> None:
        path = bench.workspace / "log"
        path.write_bytes(bytes(2 * WINDOW))
        stream = bench.guest.channel.open(ReadFile(path="log", limit=2 * WINDOW))
        assert await stream.read(STDOUT)
        with path.open("ab") as file:
            file.write(bytes(WINDOW))
        while await stream.read(STDOUT):
            pass
        with pytest.raises(PayloadTooLarge, match="grew"):
            await stream.result()
        await bench.serves()

    with_agent(scenario)


def test_a_full_disk_is_said_and_leaves_the_old_content(with_agent: Run) -> None:
    async def scenario(bench: Bench) -> None:
        import resource

        (bench.workspace / "file").write_bytes(b"old")
        resource.prlimit(bench.pid, resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
        with pytest.raises(GuestFailed, match="too large"):
            await bench.guest.write_file("file", bytes(1_000_000))
        assert (bench.workspace / "file").read_bytes() == b"old"
        assert names(bench) == ["file"]
        assert await bench.guest.write_file("file", b"new") == 3
        await bench.serves()

    with_agent(scenario)


def test_a_directory_that_is_removed_meanwhile(with_agent: Run) -> None:
    async def scenario(bench: Bench) -> None:
        stream = await half_written(bench, "d/file")
        await bench.run("rm -r d")
        stream.end(STDIN)
        with pytest.raises(NotFound):
            await stream.result()
        assert names(bench) == []
        await bench.serves()

    with_agent(scenario)


def test_many_at_once_do_not_mix(with_agent: Run) -> None:
    async def scenario(bench: Bench) -> None:
        async def one(number: int) -> None:
            data = bytes([number]) * 300_000
            await bench.guest.write_file(f"d{number % 3}/{number}", data)
            assert (await bench.guest.read_file(f"d{number % 3}/{number}", LIMIT))[0] == data
            await bench.guest.write_file("shared", data)

        await asyncio.gather(*(one(number) for number in range(12)))
        content = (bench.workspace / "shared").read_bytes()
        assert content == content[:1] * 300_000
        assert leftovers(bench.workspace) == []

    with_agent(scenario)


def test_sync(with_agent: Run) -> None:
    async def scenario(bench: Bench) -> None:
        result = await bench.guest.channel.open(Sync()).result()  # of this computer's disks, whatever else it does
        assert isinstance(result, Synced)
        assert result.duration >= 0
        assert result.frozen is None

    with_agent(scenario)


def test_holding_writes(with_agent: Run) -> None:
    """This agent has no volume of its own to freeze: it flushes, and keeps the time."""

    async def scenario(bench: Bench) -> None:
        async with bench.guest.frozen(20):
            await bench.guest.ping(10)
        thawed = await bench.ask(Freeze(limit=0.05))
        assert isinstance(thawed, Thawed)
        assert thawed.expired
        with pytest.raises(ZeroDivisionError):
            async with bench.guest.frozen(20):
                _ = 1 // 0
        before = descriptors(bench)
        stream = bench.guest.channel.open(Freeze(limit=20.0))
        await bench.guest.ping(10)
        stream.reset()
        await bench.serves()
        async with bench.guest.frozen(20):
            pass
        assert descriptors(bench) <= before
        assert bench.guest.channel.mux.streams == 0

    with_agent(scenario)
