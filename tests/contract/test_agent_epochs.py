"""What agent and host survive: the agent's death, garbage either way, a host that begins anew, another version."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from agent_bench import Bench
from capsem.model.errors import AlreadyExists, GuestFailed, Interrupted, TimedOut, Unavailable
from capsem.wire import frames
from capsem.wire.frames import FIRST_NONCE, answer_to, encode
from capsem.wire.messages import (
    PROTOCOL_VERSION,
    STDOUT,
    BootConfigDone,
    Exec,
    Ping,
    ReadFile,
    Ready,
    ShutdownRequest,
    Sync,
)
from capsem.wire.schema import encode_message

Run = Callable[..., None]


def test_a_first_boot(with_agent: Run) -> None:
    async def scenario(bench: Bench) -> None:
        guest = bench.guest
        assert (guest.epoch, guest.restarts, guest.is_ready) == (1, 0, True)
        assert guest.boot_id == Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        assert guest.boot_ready is not None
        assert guest.boot_ready.epoch == 1
        assert await guest.ping(10) > 0
        await bench.serves()

    with_agent(scenario)


def test_an_agent_that_dies_is_followed_by_one_that_serves(with_agent: Run) -> None:
    async def scenario(bench: Bench) -> None:
        guest = bench.guest
        told: list[bool] = []
        guest.on_ready = told.append
        for restarts in (1, 2, 3):
            running = bench.start("echo started; sleep 100")
            assert await running.read(STDOUT) == b"started\n"
            reading = guest.channel.open(ReadFile(path="missing"))
            await bench.restart()
            for stream in (running, reading):
                assert await stream.read(STDOUT) == b""
            with pytest.raises(Interrupted):
                await running.result()
            assert (guest.epoch, guest.restarts) == (1 + restarts, restarts)
            assert guest.channel.mux.streams == 0
            await bench.serves()
        assert told == [False, True] * 3

    with_agent(scenario)


def test_an_agent_that_dies_in_the_middle_of_everything(with_agent: Run) -> None:
    """Killed while much is under way both ways: the half frames of the old epoch do not disturb the new one."""

    async def scenario(bench: Bench) -> None:
        async def copy() -> None:
            data = os.urandom(20 << 20)
            with pytest.raises(Interrupted):
                await bench.run("cat", stdin=data)

        for _ in range(3):
            copies = [asyncio.create_task(copy()) for _ in range(4)]
            await bench.guest.ping(10)
            await bench.guest.ping(10)
            await bench.restart()
            await asyncio.gather(*copies)
            await bench.serves()

    with_agent(scenario)


def test_commands_of_a_dead_agent_are_not_started_again(with_agent: Run) -> None:
    async def scenario(bench: Bench) -> None:
        stream = bench.start("echo x >> log; echo done; read line", stdin=True)
        assert await stream.read(STDOUT) == b"done\n"
        await bench.restart()
        await bench.serves()
        assert (bench.workspace / "log").read_bytes() == b"x\n"

    with_agent(scenario)


def test_a_host_that_begins_anew_leaves_commands_running(with_agent: Run) -> None:
    """Their streams are gone, they are not; and the same job is still the same job."""

    async def scenario(bench: Bench) -> None:
        os.mkfifo(bench.workspace / "go")
        os.mkfifo(bench.workspace / "gone")
        stream = bench.start("echo started; read x < go; yes | head -100000; echo $? > gone", job="mine")
        assert await stream.read(STDOUT) == b"started\n"
        again = bench.next_epoch()
        bench.guest._begin_epoch()
        await again
        with pytest.raises(Interrupted):
            await stream.result()
        assert bench.guest.restarts == 0
        with pytest.raises(AlreadyExists):
            await bench.run("true", job="mine")
        assert (await bench.run("echo > go; cat gone")).stdout == b"0\n"

    with_agent(scenario)


GARBAGE = [
    b"\xff" * 100,
    b"\x00" * 13,
    b"GET / HTTP/1.1\r\nHost: capsem\r\n\r\n",
    bytes(range(256)) * 1000,
    encode(frames.DATA, 77, 0, b"never opened"),
    encode(frames.CONTROL, payload=b"not json"),
    encode(frames.CONTROL, payload=b'{"t":"ping","id":' + b"[" * 50_000 + b"}"),
    encode(frames.CONTROL, payload=b'{"t":"ping","id":1,"time":1e999}'),
    encode(frames.OPEN, 1, payload=encode_message(Ping(id=1))),
    encode(frames.OPEN, 2, payload=b'{"t":"unheard-of"}'),
    encode(frames.CONTROL, payload=encode_message(Exec(job="j", command="touch executed"))),
    encode(frames.CONTROL, payload=encode_message(ShutdownRequest())) + encode(frames.DATA, 1, 9, b""),
    encode(frames.CONTROL, payload=encode_message(BootConfigDone())),
    encode(frames.CONTROL, payload=encode_message(Ready(protocol=1, agent="1", boot_id="again"))),
]


@pytest.mark.parametrize("garbage", GARBAGE, ids=range(len(GARBAGE)))
def test_garbage_for_the_agent(with_agent: Run, garbage: bytes) -> None:
    async def scenario(bench: Bench) -> None:
        stream = bench.start("sleep 100")
        again = bench.next_epoch()
        assert bench.guest.channel._transport is not None
        bench.guest.channel._transport.write(garbage)
        await again
        with pytest.raises(Interrupted):
            await stream.result()
        assert bench.guest.restarts == 0
        await bench.serves()
        assert not (bench.workspace / "executed").exists()

    with_agent(scenario)


@pytest.mark.parametrize("garbage", GARBAGE, ids=range(len(GARBAGE)))
def test_garbage_from_the_agent(with_agent: Run, garbage: bytes) -> None:
    async def scenario(bench: Bench) -> None:
        stream = bench.start("sleep 100")
        await bench.guest.ping(10)
        again = bench.next_epoch()
        bench.agent._theirs.send(garbage)
        await again
        with pytest.raises(Interrupted):
            await stream.result()
        assert bench.guest.restarts == 0
        await bench.serves()

    with_agent(scenario)


def test_garbage_both_ways_again_and_again(with_agent: Run) -> None:
    async def scenario(bench: Bench) -> None:
        for garbage in GARBAGE[:3]:
            again = bench.next_epoch()
            assert bench.guest.channel._transport is not None
            bench.guest.channel._transport.write(garbage)
            bench.agent._theirs.send(garbage)
            await again
            await bench.serves()
        assert bench.guest.restarts == 0

    with_agent(scenario)


@pytest.mark.parametrize("marker", [FIRST_NONCE, answer_to(FIRST_NONCE)], ids=["nonce", "answer"])
def test_the_nonce_of_an_epoch_that_is_over_is_garbage(with_agent: Run, marker: bytes) -> None:
    """Each handshake hands over the next one; who only knows an old one cannot begin an epoch with it."""

    async def scenario(bench: Bench) -> None:
        for send in (bench.guest.channel._transport.write, bench.agent._theirs.send):  # type: ignore[union-attr]
            again = bench.next_epoch()
            send(marker)
            await again
            await bench.serves()

    with_agent(scenario)


def test_another_protocol_version_is_refused_by_name_and_not_tried_for_ever(
    with_agent: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario(bench: Bench) -> None:
        monkeypatch.setattr("capsem.wire.handshake.OLDEST_PROTOCOL", PROTOCOL_VERSION + 1)
        monkeypatch.setattr("capsem.wire.handshake.PROTOCOL_VERSION", PROTOCOL_VERSION + 1)
        bench.guest._set_ready(False)
        bench.guest._begin_epoch()
        with pytest.raises(GuestFailed) as caught:
            await bench.guest.wait_ready(20)
        assert f"protocol {PROTOCOL_VERSION}" in str(caught.value)
        assert f"host {PROTOCOL_VERSION + 1}" in str(caught.value)
        assert bench.guest.epoch == 1
        assert not bench.guest.channel.connected

    with_agent(scenario)


def test_power_off_ends_the_agent(with_agent: Run) -> None:
    async def scenario(bench: Bench) -> None:
        stream = bench.start("sleep 100")
        bench.guest.power_off(0.5)
        assert bench.agent.process is not None
        assert await bench.agent.process.wait() == 100
        stream.reset()

    with_agent(scenario)


def test_a_lost_connection_ends_everything_with_interrupted(with_agent: Run) -> None:
    async def scenario(bench: Bench) -> None:
        stream = bench.start("sleep 100")
        ping = asyncio.create_task(bench.guest.ping(20))
        await asyncio.sleep(0)
        bench.agent.process.send_signal(signal.SIGSTOP)  # type: ignore[union-attr]
        writing = asyncio.create_task(bench.guest.write_file("file", bytes(10 << 20)))
        await asyncio.sleep(0)
        bench.guest.channel._transport.abort()  # type: ignore[union-attr]
        for what in (ping, writing, stream.result(), bench.guest.ping(1), bench.guest.wait_ready(1)):
            with pytest.raises(Interrupted):
                await what
        with pytest.raises(Interrupted):
            bench.start("true")
        assert not bench.guest.is_ready
        bench.agent.process.send_signal(signal.SIGCONT)  # type: ignore[union-attr]
        assert await bench.agent.process.wait() == 0  # type: ignore[union-attr]

    with_agent(scenario)


def test_while_commands_are_held_nothing_is_started_and_nobody_let_in(with_agent: Run) -> None:
    async def scenario(bench: Bench) -> None:
        guest = bench.guest
        assert not await guest.hold(10)  # this computer's processes are none of its business
        with pytest.raises(Unavailable):
            await bench.run("true")
        with pytest.raises(TimedOut):
            await guest.wait_ready(0)
        waiting = asyncio.create_task(guest.wait_ready(60))
        await guest.ping(10)
        assert not waiting.done()
        guest.go_on()
        await waiting
        await bench.serves()
        # A new epoch lets go as well.
        await guest.hold(10)
        await bench.restart()
        await bench.serves()

    with_agent(scenario)


def test_a_flush_for_a_checkpoint_ends_in_a_hold(with_agent: Run) -> None:
    async def scenario(bench: Bench) -> None:
        guest = bench.guest
        assert await guest.quiesce(100, "a" * 32) is False  # see above
        with pytest.raises(Unavailable):
            await bench.run("true")
        guest.go_on()
        await guest.wait_ready(60)
        await bench.serves()

    with_agent(scenario)


def test_a_flush_that_was_given_up_holds_nothing_later(with_agent: Run) -> None:
    async def scenario(bench: Bench) -> None:
        guest = bench.guest
        with pytest.raises(TimedOut):
            await guest.quiesce(0, "a" * 32)
        guest.go_on()
        await guest.channel.open(Sync()).result()  # it takes as long as the other, which began before
        await guest.wait_ready(60)
        await bench.serves()

    with_agent(scenario)
