"""Both faces of the SDK against a service whose guests run real commands."""

from __future__ import annotations

import asyncio
import inspect
import signal
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from served_world import served_world

from capsem import (
    AsyncSandbox,
    Client,
    CommandFailed,
    InvalidInput,
    NotFound,
    Sandbox,
    TimedOut,
    Unavailable,
    WrongState,
)
from capsem.sdk import aio, sync
from capsem.sdk.aio_network import AsyncNetwork
from capsem.sdk.network import Network


@pytest.fixture(scope="module")
def client() -> Iterator[Client]:
    with served_world() as socket:
        yield Client(socket)


@pytest.fixture(scope="module")
def box(client: Client) -> Sandbox:
    return Sandbox.create("box", client=client, env={"GREETING": "hello"})


def test_commands(box: Sandbox) -> None:
    result = box.exec("echo $GREETING; echo oops >&2; exit 3")
    assert (result.stdout, result.stderr, result.exit_code, result.ok) == ("hello\n", "oops\n", 3, False)
    assert box.exec(["echo", "a b", "$GREETING"]).stdout == "a b $GREETING\n"
    assert box.exec("echo $N; pwd -P", env={"N": "7"}, cwd="/").stdout == "7\n/\n"
    with pytest.raises(CommandFailed, match="oops") as caught:
        box.exec("echo oops >&2; false", check=True)
    assert caught.value.result.exit_code == 1
    with pytest.raises(TimedOut, match="command timed out"):
        box.exec("sleep 1000", timeout=0.1)
    with pytest.raises(NotFound) as missing:
        Sandbox("nothing", client=box._transport.client).exec("true")
    assert missing.value.hint


def test_input_and_output_of_any_size(box: Sandbox) -> None:
    data = bytes(range(256)) * 8000
    assert box.exec("sha256sum", input=data).stdout == box.exec("cat | sha256sum", input=data).stdout
    assert box.exec("wc -c; head -c 3000000 /dev/zero | tr '\\0' x", input=data).stdout == "2048000\n" + "x" * 3_000_000
    assert box.exec("head -c 1 > /dev/null; echo done", input=data * 4).stdout == "done\n"


def greeter() -> tuple[socket.socket, int]:
    """A server that greets whoever connects, in what is "the guest" here; its port."""
    listener = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            with connection:
                connection.sendall(b"hello " + connection.recv(100))

    threading.Thread(target=serve, daemon=True).start()
    return listener, listener.getsockname()[1]


def greeted(address: tuple[str, int]) -> bytes:
    with socket.create_connection(address) as connection:
        connection.sendall(b"you")
        return connection.makefile("rb").read()


def test_a_port_leads_into_the_vm_again_after_a_resume(client: Client) -> None:
    listener, port = greeter()
    with listener, Sandbox.create("ports", client=client, persistent=True) as box:
        with box.forward(port) as forwarding:
            assert greeted(forwarding.address) == b"hello you"
            box.stop()
            assert greeted(forwarding.address) == b""
            box.resume()
            assert greeted(forwarding.address) == b"hello you"
        with pytest.raises(ConnectionRefusedError):
            greeted(forwarding.address)
        with pytest.raises(NotFound):
            Sandbox("nothing", client=client).forward(port)

        async def main() -> None:
            again = await AsyncSandbox.connect("ports", client=client)
            with await again.forward(port) as it:
                assert await asyncio.to_thread(greeted, it.address) == b"hello you"

        asyncio.run(main())
        box.delete()
        listener.shutdown(socket.SHUT_RDWR)


def test_a_process_is_followed_fed_and_killed(box: Sandbox) -> None:
    with box.spawn("while read x; do echo got $x; done; echo end >&2; exit 4", stdin=True) as process:
        assert process.poll() is None
        pieces = iter(process)
        process.write("one\n")
        first = next(pieces)
        assert (first.channel, first.text) == ("stdout", "got one\n")
        process.write(b"two\n")
        process.close_stdin()
        assert "".join(piece.text for piece in pieces) == "got two\nend\n"
        result = process.wait()
        assert (result.stdout, result.stderr, result.exit_code) == ("got one\ngot two\n", "end\n", 4)
        assert process.poll() == result
        with pytest.raises(WrongState):
            process.write("three\n")
    again = box.process(process.job).wait()
    assert again == result
    assert process.job in [job.id for job in box.processes()]


def test_patience_ends_before_a_process_does(box: Sandbox) -> None:
    process = box.spawn("echo there; exec sleep 1000")
    with pytest.raises(TimedOut):
        process.wait(timeout=0.2)
    assert process.poll() is None
    assert process.kill(signal.SIGTERM)
    result = process.wait()
    assert (result.stdout, result.signal) == ("there\n", signal.SIGTERM)
    assert not process.kill()


def test_leaving_the_block_kills_a_process(box: Sandbox) -> None:
    with box.spawn("sleep 1000") as process:
        pass
    assert box.process(process.job).wait().signal == signal.SIGKILL


def test_files(box: Sandbox, tmp_path: Path) -> None:
    box.files.write("a/b.txt", "héllo")
    assert box.files.read_text("/root/a/b.txt") == "héllo"
    assert [(entry.name, entry.type) for entry in box.files.list("a")] == [("b.txt", "file")]
    assert "a" in [entry.name for entry in box.files.list()]
    for name in ("a/ä b", "a/b", "a/ab", "a/x;y\n"):
        box.files.write(name, name)
    for name in ("a/ä b", "a/b", "a/ab", "a/x;y\n"):
        assert box.files.read_text(name) == box.exec(["cat", name]).stdout == name
    local = tmp_path / "large"
    local.write_bytes(bytes(range(256)) * 20_000)
    local.chmod(0o750)
    box.files.upload(local, "large")
    box.files.download("large", tmp_path / "back")
    assert (tmp_path / "back").read_bytes() == local.read_bytes()
    assert (tmp_path / "back").stat().st_mode & 0o777 == 0o750
    with pytest.raises(NotFound):
        box.files.download("nothing", tmp_path / "nothing")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["back", "large"]
    for path in ("/etc/passwd", "../x"):
        with pytest.raises(InvalidInput):
            box.files.read(path)


def test_a_sandbox_without_a_name_goes_with_its_block(client: Client) -> None:
    with Sandbox.create(client=client) as box:
        assert box.exec("true").ok
        assert box.info().status == "Running"
    with pytest.raises(NotFound):
        box.info()
    with pytest.raises(RuntimeError, match="mine"), Sandbox.create(client=client) as box:
        raise RuntimeError("mine")
    assert box.id not in [each.id for each in Sandbox.list(client=client)]
    with Sandbox.create(client=client) as kept:
        kept.persist("kept")
    assert Sandbox.connect("kept", client=client).id == "kept"
    kept.stop()
    kept.resume()
    kept.delete()


def test_run_is_a_vm_for_one_command(client: Client) -> None:
    assert Sandbox.run("echo $((6*7))", client=client).stdout == "42\n"


def test_nobody_listens(tmp_path: Path) -> None:
    with pytest.raises(Unavailable):
        Sandbox("box", client=Client(tmp_path / "none")).info()
    with pytest.raises(Unavailable):
        asyncio.run(AsyncSandbox("box", client=Client(tmp_path / "none")).info())


def test_asynchronously(client: Client, tmp_path: Path) -> None:
    async def scene() -> None:
        async with await AsyncSandbox.create(client=client) as box:
            assert (await box.exec("cat; exit 3", input="in")).stdout == "in"
            async with await box.spawn("while read x; do echo got $x; done", stdin=True) as process:
                await process.write("one\n")
                await process.close_stdin()
                assert [piece.text async for piece in process] == ["got one\n"]
                assert (await process.wait()).ok
            await box.files.write("x", b"\0\1")
            assert await box.files.read("x") == b"\0\1"
            await box.files.download("x", tmp_path / "x")
            await box.files.upload(tmp_path / "x", "y")
            assert sorted(entry.name for entry in await box.files.list() if entry.type == "file") == ["x", "y"]
            with pytest.raises(TimedOut):
                await box.exec("sleep 1000", timeout=0.1)
            with pytest.raises(TimedOut):
                await (await box.spawn("sleep 1000")).wait(timeout=0.1)
        with pytest.raises(NotFound):
            await box.info()

    asyncio.run(scene())


def test_who_is_cancelled_takes_the_command_along(box: Sandbox, client: Client) -> None:
    async def scene() -> None:
        there = AsyncSandbox("box", client=client)
        task = asyncio.ensure_future(there.exec("echo $$ > pid; exec sleep 1000"))
        while not (await there.exec("cat pid")).stdout:
            await asyncio.sleep(0.01)
        task.cancel()
        await asyncio.wait({task})
        await there.exec("while kill -0 $(cat pid) 2>/dev/null; do read -t 0.01 < <(sleep 1); done", timeout=30)

    asyncio.run(scene())


def test_fifty_clients_at_once_get_their_own_answers(box: Sandbox, client: Client) -> None:
    def one(number: int) -> tuple[str, str]:
        mine = Sandbox("box", client=client)
        mine.files.write(f"many/{number}", str(number))
        return mine.exec(f"echo {number}; cat many/{number}").stdout, mine.files.read_text(f"many/{number}")

    with ThreadPoolExecutor(50) as pool:
        answers = list(pool.map(one, range(50)))
    assert answers == [(f"{number}\n{number}", str(number)) for number in range(50)]

    async def many() -> list[str]:
        there = AsyncSandbox("box", client=client)
        before = threading.active_count()
        results = await asyncio.gather(*(there.exec("cat", input=str(number)) for number in range(50)))
        assert threading.active_count() - before < 20
        return [result.stdout for result in results]

    assert asyncio.run(many()) == [str(number) for number in range(50)]


def test_both_faces_are_one() -> None:
    """The same methods with the same parameters and the same words; only what blocks is awaited."""
    for blocking, awaited in (
        (sync.Sandbox, aio.AsyncSandbox),
        (sync.Process, aio.AsyncProcess),
        (sync.Files, aio.AsyncFiles),
        (Network, AsyncNetwork),
    ):
        names = [name for name in vars(blocking) if not name.startswith("_")]
        assert names == [name for name in vars(awaited) if not name.startswith("_")]
        for name in names:
            here, there = getattr(blocking, name), getattr(awaited, name)
            if not callable(here):
                continue
            assert list(inspect.signature(here).parameters) == list(inspect.signature(there).parameters), name
            assert inspect.iscoroutinefunction(there) == (name != "process"), name
            assert here.__doc__ == there.__doc__, name
