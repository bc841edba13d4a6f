"""The agent's loop and its port: what is called, in which order, and what is not."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
from collections.abc import Iterator

import pytest

from capsem.guest import loop as loop_module
from capsem.guest.loop import READ, WRITE, Loop
from capsem.guest.port import Port


class StoppedClock:
    """Time that only moves when it is told to."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> StoppedClock:
    stopped = StoppedClock()
    monkeypatch.setattr(loop_module, "time", stopped)
    return stopped


@pytest.fixture
def loop() -> Iterator[Loop]:
    made = Loop()
    yield made
    made._epoll.close()  # not what its threads write to: an agent's loop lives as long as they do


@contextlib.contextmanager
def pipes(count: int) -> Iterator[list[tuple[int, int]]]:
    made = [os.pipe() for _ in range(count)]
    yield made
    for fd in (fd for both in made for fd in both):
        with contextlib.suppress(OSError):
            os.close(fd)


def turn(loop: Loop) -> None:
    """One turn of the loop, without waiting."""
    loop.exit_status = None
    loop.after(0, lambda: loop.exit(0))
    loop.run(lambda: None)


# -- timers


def test_timers_run_in_the_order_of_their_time_and_once(loop: Loop, clock: StoppedClock) -> None:
    called: list[str] = []
    loop.after(3, lambda: called.append("late"))
    loop.after(1, lambda: called.append("early"))
    cancelled = loop.after(2, lambda: called.append("cancelled"))
    loop.after(1, lambda: called.append("early too"))
    cancelled.cancel()
    loop._run_due()
    assert called == []
    clock.now += 5
    loop._run_due()
    assert sorted(called[:2]) == ["early", "early too"]
    assert called[2:] == ["late"]
    clock.now += 5
    loop._run_due()
    assert len(called) == 3


def test_the_loop_waits_for_the_next_timer_and_for_ever_without_one(loop: Loop, clock: StoppedClock) -> None:
    assert loop._next_due() is None
    loop.after(10, lambda: None).cancel()
    assert loop._next_due() is None
    loop.after(2.5, lambda: None)
    assert loop._next_due() == 2.5
    clock.now += 100
    assert loop._next_due() == 0


@pytest.mark.parametrize("seconds", [3e6, 1e18, 1.7e308])
def test_no_wait_is_longer_than_epoll_takes(loop: Loop, clock: StoppedClock, seconds: float) -> None:
    loop.after(seconds, lambda: None)
    wait = loop._next_due()
    assert wait is not None
    assert 0 < wait * 1000 < 2**31


def test_a_timer_may_set_another(loop: Loop, clock: StoppedClock) -> None:
    called: list[int] = []
    loop.after(0, lambda: called.append(1) or loop.after(0, lambda: called.append(2)))  # type: ignore[func-returns-value]
    turn(loop)
    turn(loop)
    assert called == [1, 2]


# -- descriptors


def test_a_descriptor_is_served_when_it_is_ready(loop: Loop) -> None:
    with pipes(2) as [(first, to_first), (second, _)]:
        served: list[int] = []
        loop.watch(first, READ, lambda _events: served.append(first))
        loop.watch(second, READ, lambda _events: served.append(second))
        turn(loop)
        assert served == []
        os.write(to_first, b"x")
        turn(loop)
        assert served == [first]
        loop.watch(first, READ, lambda _events: served.append(-1))
        turn(loop)
        assert served == [first, -1]
        loop.unwatch(first)
        loop.unwatch(first)
        turn(loop)
        assert served == [first, -1]


def test_an_event_is_not_handed_to_whoever_took_over_the_descriptor(loop: Loop) -> None:
    """Two are ready at once; the first handler closes the other, and the number is used again for something else."""
    with pipes(3) as [(first, to_first), (second, to_second), (third, _)]:
        wrongly: list[int] = []

        def replace(other: int) -> None:
            loop.unwatch(first)
            loop.unwatch(second)
            os.dup2(third, other)  # nothing is there to be read
            loop.watch(other, READ, lambda _events: wrongly.append(other))

        loop.watch(first, READ, lambda _events: replace(second))
        loop.watch(second, READ, lambda _events: replace(first))
        os.write(to_first, b"x")
        os.write(to_second, b"x")
        turn(loop)
        assert wrongly == []


# -- threads


def test_work_on_a_thread_comes_back_to_the_loop(loop: Loop) -> None:
    results: list[object] = []

    def failing() -> None:
        raise OSError(28, "full")

    def finished(result: object) -> None:
        results.append(result)
        if len(results) == 2:
            loop.exit(7)

    loop.offload(lambda: 42, finished)
    loop.offload(failing, finished)
    assert loop.run(lambda: None) == 7
    assert 42 in results
    assert any(isinstance(result, OSError) for result in results)


def test_one_call_after_the_other_is_made_on_the_same_thread(loop: Loop) -> None:
    threads: list[int] = []

    def then(thread: int) -> None:
        threads.append(thread)
        if len(threads) == 3:
            loop.exit(0)
        else:
            loop.offload(threading.get_ident, then)

    loop.offload(threading.get_ident, then)
    loop.run(lambda: None)
    assert len(set(threads)) == 1
    assert threads[0] != threading.get_ident()


def test_calls_at_once_do_not_wait_for_each_other(loop: Loop) -> None:
    meeting, met = threading.Barrier(5), []

    def then(result: int) -> None:
        met.append(result)
        if len(met) == 5:
            loop.exit(0)

    for _ in range(5):
        loop.offload(lambda: meeting.wait(20), then)
    loop.run(lambda: None)
    assert sorted(met) == [0, 1, 2, 3, 4]


def test_output_is_flushed_before_the_loop_ends(loop: Loop) -> None:
    """The last word, such as the answer to a request to power off, is not kept back."""
    flushed: list[str] = []
    loop.after(0, lambda: loop.exit(3))
    assert loop.run(lambda: flushed.append("x")) == 3
    assert len(flushed) == 2


# -- the port


class Ends:
    """A port on one end of a socket pair, and what goes through it."""

    def __init__(self, loop: Loop, *, ends: bool) -> None:
        self.ours, theirs = socket.socketpair()
        self.fd = theirs.detach()
        self.received = bytearray()
        self.output: list[bytes] = []
        self.port = Port(
            loop,
            self.fd,
            self._receive,
            lambda: [self.output.pop(0)] if self.output else [],
            missing=lambda: 0,
            ends=ends,
        )
        self.ours.setblocking(False)

    def _receive(self, buffer: bytearray, size: int) -> None:
        self.received += buffer[:size]

    def close(self) -> None:
        self.ours.close()
        os.close(self.fd)


@pytest.fixture(params=[True, False], ids=["socket", "port"])
def ends(loop: Loop, request: pytest.FixtureRequest) -> Iterator[Ends]:
    made = Ends(loop, ends=request.param)
    yield made
    made.close()


def test_bytes_pass_both_ways(loop: Loop, ends: Ends) -> None:
    ends.ours.send(b"towards the agent")
    turn(loop)
    assert ends.received == b"towards the agent"
    ends.output = [b"a", b"b" * 1000, b"c"]
    ends.port.flush()
    assert ends.ours.recv(1 << 20) == b"a" + b"b" * 1000 + b"c"


@pytest.mark.parametrize("size", [1000, 32768, 100_000, 3 << 20])
def test_a_host_that_does_not_read_is_waited_for(loop: Loop, ends: Ends, size: int) -> None:
    data = os.urandom(3 << 20)
    ends.output = [data[at : at + size] for at in range(0, len(data), size)]
    ends.output.append(b"last")
    data += b"last"
    ends.port.flush()
    assert ends.output
    assert ends.port._events == READ | WRITE
    got = bytearray()
    while len(got) < len(data):
        with contextlib.suppress(BlockingIOError):
            while True:
                got += ends.ours.recv(1 << 20)
        ends.port.flush()
    assert got == data
    assert ends.port._events == READ


def test_an_end_of_file_ends_the_agent_in_tests_only(loop: Loop, ends: Ends) -> None:
    ends.ours.close()
    ends.port._ready(READ)
    if ends.port._ends:
        assert loop.exit_status == 0
    else:
        assert loop.exit_status is None
        assert ends.port._events == 0
        assert loop._next_due() is not None


def test_a_host_that_is_away_is_looked_for_now_and_then_and_no_more_often(loop: Loop, clock: StoppedClock) -> None:
    """With output waiting and nobody there, every turn must not make another timer, nor any turn be without a wait."""
    ends = Ends(loop, ends=False)
    ends.ours.close()
    ends.output = [b"x"] * 1000
    for _ in range(5):
        for _ in range(10):
            ends.port.flush()
            ends.port._ready(READ)
        assert len(loop._timers) == 1
        assert ends.port._events == 0
        clock.now += 1
        loop._run_due()
    os.close(ends.fd)


def test_a_host_that_comes_back_is_heard(loop: Loop, clock: StoppedClock) -> None:
    ends = Ends(loop, ends=False)
    ends.ours.close()
    ends.port.flush()
    ends.port._ready(READ)
    back, theirs = socket.socketpair()
    os.dup2(theirs.fileno(), ends.fd)
    theirs.close()
    os.set_blocking(ends.fd, False)
    back.send(b"here again")
    clock.now += 1
    turn(loop)
    turn(loop)
    assert ends.received == b"here again"
    ends.output = [b"welcome"]
    ends.port.flush()
    assert back.recv(100) == b"welcome"
    back.close()
    os.close(ends.fd)
