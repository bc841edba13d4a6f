"""Traces: what is done goes where somebody wants to know it, whole and in order, and nowhere else."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from capsem import faults, tracing
from capsem.log import trace as logged
from capsem.tracing import Event, Trace, span


@pytest.fixture
def events() -> Iterator[list[Event]]:
    found: list[Event] = []
    tracing.follow(Trace(found.append, "test", "f" * 32))
    yield found
    tracing.follow(None)


def work(events: list[Event]) -> list[Event]:
    return [event for event in events if event["ph"] == "X"]


def names(events: list[Event], what: str) -> dict[tuple[int, int], str]:
    return {(event["pid"], event["tid"]): event["args"]["name"] for event in events if event["name"] == what}


def test_nobody_wants_to_know() -> None:
    assert tracing.active() is None
    with span("a") as it:
        it.about["more"] = 1
    with logged("b"):
        faults.at("boot.begun")


def test_spans_lie_within_each_other(events: list[Event]) -> None:
    with span("outer", why="because") as outer, span("inner"):
        outer.about["pages"] = 3
    inner, outer_event = work(events)
    assert (inner["name"], outer_event["name"]) == ("inner", "outer")
    assert "args" not in inner
    assert outer_event["args"] == {"why": "because", "pages": 3}
    assert outer_event["ts"] <= inner["ts"]
    assert inner["ts"] + inner["dur"] <= outer_event["ts"] + outer_event["dur"]
    assert {inner["pid"], outer_event["pid"]} == {os.getpid()}
    assert names(events, "process_name") == {(os.getpid(), 0): "test"}


def test_a_failure_shows(events: list[Event]) -> None:
    with pytest.raises(KeyError), span("a"):
        raise KeyError
    assert work(events)[0]["args"] == {"failed": "KeyError"}


def test_steps_and_logged_work_are_in_it(events: list[Event]) -> None:
    with logged("save.sync"):
        faults.at("suspend.held")
    assert [(event["name"], event["ph"]) for event in events if event["ph"] != tracing.NAMES] == [
        ("suspend.held", "i"),
        ("save.sync", "X"),
    ]


def test_each_task_and_thread_has_a_lane(events: list[Event]) -> None:
    def in_thread() -> None:
        with span("thread"):
            pass

    async def main() -> None:
        async def one(name: str) -> None:
            with span(name):
                await asyncio.sleep(0)

        await asyncio.gather(*(asyncio.create_task(one(name), name=f"task {name}") for name in "ab"))

    asyncio.run(main())
    thread = threading.Thread(target=in_thread, name="helper")
    thread.start()
    thread.join()
    lanes = names(events, "thread_name")
    by_name = {event["name"]: lanes[event["pid"], event["tid"]] for event in work(events)}
    assert by_name == {"a": "task a", "b": "task b", "thread": "helper"}


def test_a_guest_is_a_process_of_its_own(events: list[Event]) -> None:
    active = tracing.active()
    assert active is not None
    active.add("boot", 2000, 5000, guest="guest of box")
    [event] = work(events)
    assert (event["ts"], event["dur"]) == (2.0, 3.0)
    assert event["pid"] != os.getpid()
    assert "guest of box" in names(events, "process_name").values()


def test_a_context_has_its_own_and_its_tasks_have_it_too() -> None:
    mine: list[Event] = []
    others: list[Event] = []

    async def piece(name: str) -> None:
        with span(name):
            await asyncio.sleep(0)

    async def traced(found: list[Event], name: str) -> None:
        with tracing.tracing(Trace(found.append, "test")):
            await asyncio.create_task(piece(name))
        await piece("late")

    async def main() -> None:
        await asyncio.gather(traced(mine, "mine"), traced(others, "others"), piece("nobody's"))

    asyncio.run(main())
    assert [event["name"] for event in work(mine)] == ["mine"]
    assert [event["name"] for event in work(others)] == ["others"]


def test_a_task_that_goes_on_is_of_no_trace_any_more(events: list[Event]) -> None:
    found: list[Event] = []

    async def main() -> None:
        ended = asyncio.Event()

        async def goes_on() -> None:
            await ended.wait()
            with span("later"):
                pass

        with tracing.tracing(Trace(found.append, "test")):
            task = asyncio.create_task(goes_on())
        ended.set()
        await task

    asyncio.run(main())
    assert work(found) == []
    assert [event["name"] for event in work(events)] == ["later"]  # but of the process's


def test_what_comes_after_the_end_is_dropped() -> None:
    found: list[Event] = []
    closed: list[bool] = []
    trace = Trace(found.append, "test")
    trace.on_close.append(lambda: closed.append(True))
    with tracing.tracing(trace):
        pass
    before = len(found)
    trace.add("late", 1, 2)
    trace.instant("late")
    assert (len(found), closed) == (before, [True])


def test_processes_write_whole_lines_to_one_file(tmp_path: Path) -> None:
    path = tmp_path / "trace"
    code = (
        "import sys; from capsem import tracing; tracing.follow(tracing.to_file(sys.argv[1], 'p'));"
        "[tracing.span('x' * 200).__enter__().__exit__(None) for _ in range(500)]"
    )
    running = [subprocess.Popen([sys.executable, "-c", code, path]) for _ in range(3)]
    assert [process.wait() for process in running] == [0, 0, 0]
    events = [json.loads(line) for line in path.read_bytes().splitlines()]
    assert len(work(events)) == 1500
    assert len({event["pid"] for event in work(events)}) == 3
    assert path.stat().st_mode & 0o777 == 0o600


def test_a_file_has_a_bound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracing, "LIMIT", 1000)
    trace = tracing.to_file(str(tmp_path / "trace"), "test")
    for _ in range(100):
        trace.instant("x")
    trace.close()
    assert 500 < (tmp_path / "trace").stat().st_size <= 1000


def test_a_process_knows_when_it_was_started() -> None:
    code = "from capsem import tracing; print(tracing.process_began(), tracing.now())"
    before = tracing.now()
    began, now = map(int, subprocess.check_output([sys.executable, "-c", code], text=True).split())
    tick = 1_000_000_000 // os.sysconf("SC_CLK_TCK")
    assert before - tick <= began < now <= tracing.now()


@pytest.mark.parametrize("text", ["", "f" * 31, "F" * 32, "../" + "f" * 29, "f" * 33, "g" * 32])
def test_what_is_no_id(text: str) -> None:
    assert not tracing.is_id(text)
    assert tracing.is_id("0123456789abcdef" * 2)
