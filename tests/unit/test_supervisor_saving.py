"""What a save does on threads."""

from __future__ import annotations

import asyncio
import threading

import pytest

from capsem.supervisor.saving import _together


def test_who_is_cancelled_waits_for_the_threads_and_keeps_nobody_else_waiting() -> None:
    async def scenario() -> None:
        begun, goes_on, done = threading.Event(), threading.Event(), []

        def work() -> None:
            begun.set()
            goes_on.wait()
            done.append("file")

        task = asyncio.create_task(_together(work))
        await asyncio.to_thread(begun.wait)
        task.cancel()
        for _ in range(3):  # which the loop could not, were it kept waiting
            await asyncio.sleep(0)
        assert not task.done()
        task.cancel()
        goes_on.set()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert done == ["file"]

    asyncio.run(scenario())


def test_the_first_failure_is_told_when_all_have_ended() -> None:
    done = []

    def fails() -> None:
        raise OSError("full")

    async def scenario() -> None:
        with pytest.raises(OSError, match="full"):
            await _together(fails, lambda: done.append(1))
        assert await _together(lambda: 1, lambda: 2) == [1, 2]

    asyncio.run(scenario())
    assert done == [1]
