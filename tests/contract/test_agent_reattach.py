"""Commands whose stream an epoch took away: the host goes on with them where it stopped, and nothing comes twice."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable

import pytest
from test_agent_exec import until_ended

from agent_bench import Bench
from capsem.control.channel import Stream
from capsem.guest.kept import LIMIT
from capsem.model.errors import AlreadyExists, Interrupted, InvalidInput, NotFound
from capsem.wire.messages import STDERR, STDOUT, Exited, Forget, Reattach, Reattached, Signal
from capsem.wire.schema import Message
from capsem.wire.streams import WINDOW

Run = Callable[..., None]


async def begin_anew(bench: Bench) -> None:
    """As a host does that has restored the machine: the guest was not asked."""
    again = bench.next_epoch()
    bench.guest._begin_epoch()
    await again


def reattach(bench: Bench, job: str, stdout: int = 0, stderr: int = 0) -> tuple[Stream, list[Message]]:
    stream = bench.guest.channel.open(Reattach(job=job, stdout=stdout, stderr=stderr))
    said: list[Message] = []
    stream.on_message = said.append
    return stream, said


async def read_some(stream: Stream, channel: int, size: int) -> bytes:
    content = b""
    while len(content) < size:
        content += await stream.read(channel)
    return content


def numbers(last: int) -> bytes:
    return b"".join(b"%d\n" % number for number in range(1, last + 1))


def test_a_running_command_goes_on_from_where_the_host_is(with_agent: Run) -> None:
    async def scenario(bench: Bench) -> None:
        os.mkfifo(bench.workspace / "go")
        stream = bench.start("echo one; echo two >&2; read x < go; echo three; echo four >&2; exit 7", job="mine")
        assert (await stream.read(STDOUT), await stream.read(STDERR)) == (b"one\n", b"two\n")
        await begin_anew(bench)
        with pytest.raises(Interrupted):
            await stream.result()
        again, said = reattach(bench, "mine", stdout=2, stderr=4)
        assert await read_some(again, STDOUT, 2) == b"e\n"
        await bench.run("echo > go")
        ran = await bench.finish(again)
        assert (ran.stdout, ran.stderr, ran.code) == (b"three\n", b"four\n", 7)
        assert said == [Reattached(stdout=2, stderr=4)]

    with_agent(scenario)


def test_one_that_ended_meanwhile_is_told_as_often_as_asked_until_it_is_forgotten(with_agent: Run) -> None:
    async def scenario(bench: Bench) -> None:
        os.mkfifo(bench.workspace / "go")
        stream = bench.start("echo $$; read x < go; echo out; echo err >&2; kill -9 $$", job="mine")
        pid = await stream.read(STDOUT)
        await begin_anew(bench)
        await bench.run("echo > go")
        await until_ended(int(pid))
        for _ in range(2):
            again, _said = reattach(bench, "mine", stdout=len(pid))
            ran = await bench.finish(again)
            assert (ran.stdout, ran.stderr) == (b"out\n", b"err\n")
            assert (ran.code, ran.exited.signal) == (1, signal.SIGKILL)
            await begin_anew(bench)
        await bench.ask(Forget(job="mine"))
        with pytest.raises(NotFound):
            await reattach(bench, "mine")[0].result()
        with pytest.raises(AlreadyExists):
            await bench.run("true", job="mine")

    with_agent(scenario)


def test_what_the_host_has_not_read_is_not_lost(with_agent: Run) -> None:
    """The end of a command is under way to a host that never sees it: it is sent again, from where that host is."""

    async def scenario(bench: Bench) -> None:
        for taken in (0, 5, 1000, WINDOW // 2 + 7, WINDOW):
            job = f"taken-{taken}"
            stream = bench.start(f"head -c {WINDOW} /dev/zero | tr '\\0' x; echo end; exit 3", job=job)
            content = bytearray()
            while len(content) < taken:
                content += await stream.read(STDOUT)
            await bench.run("sleep 0.1")
            await begin_anew(bench)
            again, said = reattach(bench, job, stdout=len(content))
            ran = await bench.finish(again)
            assert (content + ran.stdout, ran.code) == (b"x" * WINDOW + b"end\n", 3)
            assert said == [Reattached(stdout=len(content), stderr=0)]

    with_agent(scenario)


def test_a_flood_through_many_epochs_comes_whole_and_once(with_agent: Run) -> None:
    async def scenario(bench: Bench) -> None:
        stream = bench.start("seq 500000; exit 4", job="flood")
        content = bytearray()
        for round_ in range(8):
            wanted = len(content) + 200_000 + 31 * round_
            while len(content) < wanted:
                content += await stream.read(STDOUT)
            await begin_anew(bench)
            stream, _said = reattach(bench, "flood", stdout=len(content))
        ran = await bench.finish(stream)
        assert bytes(content) + ran.stdout == numbers(500_000)
        assert ran.code == 4

    with_agent(scenario)


def test_what_nobody_takes_is_kept_to_its_cap_and_holds_nobody_up(with_agent: Run) -> None:
    async def scenario(bench: Bench) -> None:
        os.mkfifo(bench.workspace / "go")
        size = LIMIT + 3_000_000
        stream = bench.start(f"echo $$; read x < go; head -c {size} /dev/zero; echo end; exit 6", job="much")
        pid = await stream.read(STDOUT)
        await begin_anew(bench)
        await bench.run("echo > go")
        await until_ended(int(pid))
        again, said = reattach(bench, "much", stdout=len(pid))
        ran = await bench.finish(again)
        assert (len(ran.stdout), ran.stdout[-4:], ran.code) == (LIMIT, b"end\n", 6)
        assert said == [Reattached(stdout=len(pid) + size + 4 - LIMIT, stderr=0)]

    with_agent(scenario)


def test_ended_commands_are_kept_within_bounds(with_agent: Run) -> None:
    async def scenario(bench: Bench) -> None:
        for number in range(70):
            await bench.run(f"echo {number}", job=f"small-{number}")
        for number, known in ((0, False), (5, False), (6, True), (69, True)):
            stream, _said = reattach(bench, f"small-{number}")
            if known:
                assert (await bench.finish(stream)).stdout == b"%d\n" % number
            else:
                with pytest.raises(NotFound):
                    await stream.result()
        for number in range(4):
            os.mkfifo(bench.workspace / f"go-{number}")
        streams = [
            bench.start(f"echo $$; read x < go-{number}; head -c 20000000 /dev/zero", job=f"large-{number}")
            for number in range(4)
        ]
        pids = [int(await stream.read(STDOUT)) for stream in streams]
        await begin_anew(bench)
        for number in range(4):
            await bench.run(f"echo > go-{number}")
        await asyncio.gather(*map(until_ended, pids))
        known = []
        for number in range(4):
            stream, _said = reattach(bench, f"large-{number}")
            try:
                known.append(len((await bench.finish(stream)).stdout))
            except NotFound:
                known.append(0)
        assert sorted(known) == [0, LIMIT, LIMIT, LIMIT]

    with_agent(scenario)


def test_signals_and_giving_up_reach_a_command_on_its_new_stream(with_agent: Run) -> None:
    async def scenario(bench: Bench) -> None:
        stream = bench.start("trap 'echo got it; exit 9' USR1; sleep 100 & echo $$; wait", job="signalled")
        pid = await stream.read(STDOUT)
        given_up = bench.start("echo $$; sleep 100", job="given up")
        other = await given_up.read(STDOUT)
        await begin_anew(bench)
        again, _said = reattach(bench, "signalled", stdout=len(pid))
        again.send(Signal(number=signal.SIGUSR1))
        ran = await bench.finish(again)
        assert (ran.stdout, ran.code) == (b"got it\n", 9)
        again, said = reattach(bench, "given up", stdout=len(other))
        await bench.serves()
        assert said == [Reattached(stdout=len(other), stderr=0)]
        again.reset()
        await until_ended(int(other))

    with_agent(scenario)


def test_standard_input_is_at_its_end_after_an_epoch(with_agent: Run) -> None:
    async def scenario(bench: Bench) -> None:
        stream = bench.start("echo begun; cat; echo end", job="fed", stdin=True)
        assert await stream.read(STDOUT) == b"begun\n"
        await begin_anew(bench)
        again, _said = reattach(bench, "fed", stdout=6)
        ran = await bench.finish(again)
        assert (ran.stdout, ran.code) == (b"end\n", 0)

    with_agent(scenario)


def test_what_cannot_be_reattached_is_refused_and_goes_on(with_agent: Run) -> None:
    async def scenario(bench: Bench) -> None:
        os.mkfifo(bench.workspace / "go")
        stream = bench.start("echo one; read x < go; echo two", job="mine")
        assert await stream.read(STDOUT) == b"one\n"
        with pytest.raises(AlreadyExists, match="followed already"):
            await reattach(bench, "mine")[0].result()
        with pytest.raises(NotFound):
            await reattach(bench, "nobody's")[0].result()
        await begin_anew(bench)
        for offset in (-1, 5, 1 << 60):
            with pytest.raises(InvalidInput):
                await reattach(bench, "mine", stdout=offset)[0].result()
        again, _said = reattach(bench, "mine", stdout=4)
        await bench.run("echo > go")
        assert (await bench.finish(again)).stdout == b"two\n"

    with_agent(scenario)


def test_a_background_process_may_go_on_writing_while_nobody_is_attached(with_agent: Run) -> None:
    async def scenario(bench: Bench) -> None:
        stream = bench.start("yes & echo $! >&2; sleep 100", job="mine")
        pid = int(await stream.read(STDERR))
        await begin_anew(bench)
        again, _said = reattach(bench, "mine", stderr=len(str(pid)) + 1)
        assert len(await read_some(again, STDOUT, 3 * WINDOW)) >= 3 * WINDOW
        again.reset()
        await until_ended(pid)
        assert not isinstance(again._result, Exited)
        await bench.serves()

    with_agent(scenario)
