"""Commands in the background, from the service's side: begun, fed, followed, killed, each by a request of its own."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from capsem.api.exec_types import ExecRequest, ExecResponse, KillJobRequest, Offsets
from capsem.api.vm_types import ProvisionRequest
from capsem.model.errors import AlreadyExists, InvalidInput, NotFound, NotRunning, TimedOut, WrongState
from service_world import World, play

SIGTERM, SIGKILL = 15, 9


async def start(it: World, command: str, *, stdin: bool = False) -> str:
    began = await it.handlers.execute("box", ExecRequest(command=command, wait=False, stdin=stdin))
    assert began.running
    assert began.job is not None
    return began.job


async def follow(it: World, job: str, *, wait: bool = True) -> ExecResponse:
    request = ExecRequest(job=job, offsets=Offsets(), wait=wait, keep=True)
    return await it.handlers.execute("box", request)


async def body(*pieces: bytes) -> AsyncIterator[bytes]:
    for piece in pieces:
        yield piece


async def box(it: World) -> None:
    await it.handlers.provision(ProvisionRequest(name="box", persistent=True))


def test_a_command_goes_on_by_itself_and_is_fetched_later(tmp_path: Path) -> None:
    async def scene(it: World) -> None:
        await box(it)
        job = await start(it, "read x < /dev/null; echo out; echo err >&2; exit 3")
        ended = await follow(it, job)
        assert (ended.stdout, ended.stderr, ended.exit_code, ended.running) == ("out\n", "err\n", 3, False)
        (listed,) = (await it.handlers.jobs("box")).details
        assert (listed.id, listed.exit_code) == (job, 3)
        with pytest.raises(AlreadyExists):
            await it.handlers.execute("box", ExecRequest(command="true", wait=False, job=job))

    play(tmp_path, scene)


def test_input_comes_in_parts_and_ends_when_it_is_said(tmp_path: Path) -> None:
    async def scene(it: World) -> None:
        await box(it)
        job = await start(it, "cat; echo end", stdin=True)
        assert (await it.handlers.feed_job("box", job, body(b"one\n"), end=False)).size == 4
        assert (await follow(it, job, wait=False)).running
        large = b"x" * 300_000 + b"\n"
        assert (await it.handlers.feed_job("box", job, body(large[:7], large[7:]), end=True)).size == len(large)
        ended = await follow(it, job)
        assert ended.stdout == "one\n" + large.decode() + "end\n"
        with pytest.raises(WrongState, match="has ended"):
            await it.handlers.feed_job("box", job, body(b"more"), end=False)

    play(tmp_path, scene)


def test_calls_that_feed_at_once_do_not_mix(tmp_path: Path) -> None:
    async def scene(it: World) -> None:
        await box(it)
        job = await start(it, "cat", stdin=True)
        lines = [(letter * 50_000 + "\n").encode() for letter in "abcdef"]
        await asyncio.gather(
            *(it.handlers.feed_job("box", job, body(line[:20_000], line[20_000:]), end=False) for line in lines)
        )
        await it.handlers.feed_job("box", job, body(), end=True)
        assert sorted((await follow(it, job)).stdout.splitlines()) == [line.decode().strip() for line in lines]

    play(tmp_path, scene)


def test_who_feeds_a_command_that_does_not_read_waits_and_can_go_away(tmp_path: Path) -> None:
    async def scene(it: World) -> None:
        await box(it)
        job = await start(it, "echo there; exec sleep 1000", stdin=True)
        feeding = asyncio.ensure_future(it.handlers.feed_job("box", job, body(*[b"x" * 100_000] * 100), end=True))
        while not (await follow(it, job, wait=False)).stdout:
            await asyncio.sleep(0.005)
        assert not feeding.done()
        feeding.cancel()
        await asyncio.wait({feeding})
        assert (await follow(it, job, wait=False)).running
        await it.handlers.kill_job("box", KillJobRequest(job=job))
        assert (await follow(it, job)).signal == SIGKILL

    play(tmp_path, scene)


def test_a_signal_ends_a_command_and_those_who_follow_are_told(tmp_path: Path) -> None:
    async def scene(it: World) -> None:
        await box(it)
        job = await start(it, "trap 'echo bye; exit 5' TERM; echo there; while :; do sleep 0.01; done")
        following = asyncio.ensure_future(follow(it, job))
        while not (await follow(it, job, wait=False)).stdout:
            await asyncio.sleep(0.005)
        assert (await it.handlers.kill_job("box", KillJobRequest(job=job, signal=SIGTERM))).running
        ended = await following
        assert (ended.stdout, ended.exit_code, ended.signal) == ("there\nbye\n", 5, None)
        assert not (await it.handlers.kill_job("box", KillJobRequest(job=job))).running

    play(tmp_path, scene)


def test_its_time_limit_is_the_guests(tmp_path: Path) -> None:
    async def scene(it: World) -> None:
        await box(it)
        request = ExecRequest(command="sleep 1000", wait=False, timeout_secs=0.1)
        began = await it.handlers.execute("box", request)
        assert began.job is not None
        with pytest.raises(TimedOut):
            await follow(it, began.job)

    play(tmp_path, scene)


def test_what_is_not_there(tmp_path: Path) -> None:
    async def scene(it: World) -> None:
        await box(it)
        with pytest.raises(NotFound):
            await it.handlers.kill_job("box", KillJobRequest(job="nothing"))
        with pytest.raises(NotFound):
            await it.handlers.feed_job("box", "nothing", body(b"x"), end=False)
        job = await start(it, "sleep 1000")
        with pytest.raises(WrongState, match="takes no input"):
            await it.handlers.feed_job("box", job, body(b"x"), end=False)
        await it.handlers.stop("box")
        with pytest.raises(NotRunning):
            await it.handlers.kill_job("box", KillJobRequest(job=job))

    play(tmp_path, scene)


def test_requests_that_make_no_sense() -> None:
    for bad in ({"command": "x", "keep": True}, {"command": "x", "stdin": True}):
        with pytest.raises(InvalidInput):
            ExecRequest(**bad)  # type: ignore[arg-type]
