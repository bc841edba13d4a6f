"""The real host end and the real agent, in one process, through everything that can happen to an epoch.

Agents die at any byte and are restarted, the host begins anew, garbage comes either way, what is under way arrives in
pieces of any size. Afterwards both ends fall silent in the same epoch, and a request is answered.
"""

from __future__ import annotations

import asyncio
import os
import random
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from capsem.control.guest import Guest, Identity
from capsem.guest.agent import Agent
from capsem.guest.memory import Memory
from capsem.guest.system import Bystander
from capsem.model.errors import NotFound
from capsem.wire.handshake import DONE
from capsem.wire.messages import ReadFile

QUIET_AFTER = 300  # turns; a healthy end needs some ten


class SeededEntropy:
    """Randomness that Hypothesis can repeat."""

    def __init__(self) -> None:
        self._random = random.Random(1)

    def token_bytes(self, size: int) -> bytes:
        return self._random.randbytes(size)

    def choose(self, words: Any) -> Any:
        return self._random.choice(words)


class StoppedClock:
    """Time that is the same in every repetition, to the digit."""

    def time(self) -> float:
        return 1e9

    def monotonic(self) -> float:
        return 1.0

    boot_time = monotonic

    def boot_id(self) -> str:
        return "boot"


class Still(Bystander):
    """So is what the agent makes of it."""

    def set_clock(self, now: float) -> float:
        return 0.0


class Wire(asyncio.Transport):
    """The host's transport: what it writes is under way to the guest."""

    def __init__(self) -> None:
        super().__init__()
        self.to_guest = bytearray()
        self.to_host = bytearray()

    def write(self, data: Any) -> None:
        self.to_guest += data

    def is_closing(self) -> bool:
        return False


class World:
    """Both ends and the bytes between them."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        (directory / "root").mkdir()
        self.wire = Wire()
        self.host = Guest(Identity("box", "box", {"A": "b"}), StoppedClock(), SeededEntropy())
        self.host.channel.connection_made(self.wire)
        self.port, self.other = socket.socketpair()
        self.agent = self._new_agent()

    def _new_agent(self) -> Agent:
        return Agent(
            self.port.fileno(),
            workspace=str(self.directory / "root"),
            memory=Memory(str(self.directory / "memory")),
            system=Still(),
            ends=True,
        )

    def _bury(self) -> None:
        loop = self.agent._loop
        os.close(loop._wake)
        os.close(self.agent._memory._fd)  # an agent keeps it as long as it lives
        loop._epoll.close()

    def close(self) -> None:
        self._bury()
        self.port.close()
        self.other.close()
        self.host.channel.connection_lost(None)

    # -- what can happen

    def agent_writes(self, size: int) -> None:
        data = b"".join(self.agent._mux.output())
        if data:
            # A write may be short: the rest follows, as Port sees to.
            self.wire.to_host += data

    def host_reads(self, size: int) -> None:
        data = bytes(self.wire.to_host[:size])
        del self.wire.to_host[:size]
        if data:
            self.host.channel.data_received(data)

    def agent_reads(self, size: int) -> None:
        data = bytearray(self.wire.to_guest[:size])
        del self.wire.to_guest[:size]
        if data:
            self.agent._receive(data, len(data))

    def agent_dies(self, size: int) -> None:
        """In the middle of a write, of which `size` bytes are out."""
        self.wire.to_host += b"".join(self.agent._mux.output())[:size]
        self._bury()
        self.agent = self._new_agent()

    def agent_dies_unheard(self, size: int) -> None:
        del size
        self._bury()
        self.agent = self._new_agent()

    def host_begins_anew(self, size: int) -> None:
        del size
        self.host._begin_epoch()

    def host_cannot_write(self, size: int) -> None:
        del size
        self.host.channel.pause_writing()

    def host_can_write(self, size: int) -> None:
        del size
        self.host.channel.resume_writing()

    def garbage_for_the_host(self, size: int) -> None:
        self.wire.to_host += b"\xff" * size

    def garbage_for_the_agent(self, size: int) -> None:
        self.wire.to_guest += b"\xff" * size

    def host_asks(self, size: int) -> None:
        if self.host.is_ready:
            self.host.channel.open(ReadFile(path="x" * size))

    # -- the end

    def fall_silent(self) -> None:
        self.host_can_write(0)
        for _ in range(QUIET_AFTER):
            while pieces := self.agent._mux.output():
                self.wire.to_host += b"".join(pieces)
            if not self.wire.to_host and not self.wire.to_guest:
                return
            self.host_reads(1 << 20)
            self.agent_reads(1 << 20)
        raise AssertionError("the two ends never fall silent")

    def check(self) -> None:
        """Both ends are in the same epoch, know the same nonce for the next, and serve."""
        assert self.host.is_ready
        assert self.agent._handshake.state == DONE
        assert self.agent._memory.epoch == self.host.epoch
        assert self.agent._memory.next_nonce == self.host._nonce
        asked = [self.host.channel.open(ReadFile(path="missing")) for _ in range(3)]
        self.fall_silent()
        for stream in asked:
            with pytest.raises(NotFound):
                stream.result().send(None)  # it must not have to wait
        assert self.host.channel.mux.streams == self.agent._mux.streams == 0


STEPS = [
    World.agent_writes,
    World.host_reads,
    World.agent_reads,
    World.agent_dies,
    World.agent_dies_unheard,
    World.host_begins_anew,
    World.host_cannot_write,
    World.host_can_write,
    World.host_asks,
]
GARBAGE = [World.garbage_for_the_host, World.garbage_for_the_agent]
SIZES = st.one_of(st.integers(1, 40), st.integers(1, 600), st.just(1 << 20))


def story(*steps: Any) -> list[tuple[Any, int]]:
    return [step if isinstance(step, tuple) else (step, 1 << 20) for step in steps]


@pytest.fixture(scope="module", autouse=True)
def quiet_agents_without_time() -> Iterator[None]:
    """The agent tells of garbage on its standard error, and the time in its messages."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("capsem.guest.agent.log", lambda _text: None)
        patch.setattr("capsem.guest.agent.time", StoppedClock())
        yield


def live_through(steps: list[tuple[Any, int]]) -> None:
    async def life() -> None:
        with tempfile.TemporaryDirectory() as directory:
            world = World(Path(directory))
            try:
                for step, size in steps:
                    step(world, size)
                world.fall_silent()
                world.check()
            finally:
                world.close()

    asyncio.run(life())


BOOT = [World.agent_writes, World.host_reads, World.agent_reads, World.agent_writes, World.host_reads]


def test_a_plain_boot() -> None:
    live_through(story(*BOOT))


@settings(max_examples=150)
@given(st.lists(st.tuples(st.sampled_from(STEPS), SIZES), max_size=30))
# The agent dies twice before the host has heard of it: two offers are under way, and the first is taken.
@example(story(World.agent_writes, World.agent_dies_unheard, World.agent_writes, World.host_reads))
# The offer is taken, its confirmation is lost with the agent.
@example(story(World.agent_writes, World.host_reads, World.agent_reads, World.agent_dies_unheard))
@example(story(World.agent_writes, World.host_reads, World.agent_reads, World.agent_dies_unheard) * 3)
# Both begin at once.
@example(story(*BOOT, World.agent_dies, World.host_begins_anew))
# The agent confirms while the host begins anew.
@example(story(World.agent_writes, World.host_reads, World.agent_reads, World.agent_writes, World.host_begins_anew))
def test_they_always_find_each_other(steps: list[tuple[Any, int]]) -> None:
    live_through(steps)


@settings(max_examples=150)
@given(st.lists(st.tuples(st.sampled_from([*STEPS, *GARBAGE]), SIZES.filter(lambda size: size <= 600)), max_size=30))
@example(story(*BOOT, (World.garbage_for_the_agent, 30)))
@example(story(*BOOT, (World.garbage_for_the_host, 30)))
@example(story(*BOOT, (World.garbage_for_the_host, 30), (World.garbage_for_the_agent, 30)))
# Garbage before the agent's confirmation arrives: the host knows one nonce, the agent the next.
@example(story(World.agent_writes, World.host_reads, World.agent_reads, (World.garbage_for_the_host, 30)))
# ... and after the new epoch began the agent dies, having read nothing.
@example(
    story(
        *(World.agent_writes, World.host_reads, World.agent_reads, (World.garbage_for_the_host, 30)),
        *(World.agent_writes, World.host_reads, World.agent_reads, World.agent_writes, World.host_reads),
        *(World.agent_dies_unheard, World.agent_writes, World.host_reads),
    )
)
def test_they_find_each_other_through_garbage(steps: list[tuple[Any, int]]) -> None:
    live_through(steps)
