"""The host's end of a guest: the handshake as the host drives it, and calls to a guest that does not do its part."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Coroutine, Iterator
from typing import Any

import pytest

from capsem.control import guest as guest_module
from capsem.control import heartbeat as heartbeat_module
from capsem.control.guest import Guest, Identity, Restored
from capsem.control.heartbeat import Heartbeat
from capsem.model.errors import GuestFailed, Interrupted, TimedOut
from capsem.wire.decoder import FrameDecoder
from capsem.wire.events import EpochStarted, MessageReceived, Opened
from capsem.wire.frames import FIRST_NONCE, answer_to
from capsem.wire.messages import (
    PROTOCOL_VERSION,
    STDOUT,
    BootConfig,
    BootConfigDone,
    BootReady,
    Exec,
    FileRead,
    FileWritten,
    Ping,
    Pong,
    ReadFile,
    Ready,
    SetEnv,
    ShutdownRequest,
    SuspendRequest,
)
from capsem.wire.schema import Message
from capsem.wire.streams import Mux

NONCES = [bytes([first, *range(0x80, 0x8F)]) for first in range(0xC0, 0xD0)]


class StoppedClock:
    def time(self) -> float:
        return 1e9

    def monotonic(self) -> float:
        return 5.0

    boot_time = monotonic

    async def jumped(self) -> None:
        await asyncio.Event().wait()

    def boot_id(self) -> str:
        return "boot"


class Counter:
    """Randomness of which each piece is another."""

    def __init__(self) -> None:
        self.drawn = 0

    def token_bytes(self, size: int) -> bytes:
        self.drawn += 1
        return NONCES[self.drawn - 1][:size]

    def choose(self, words: Any) -> Any:
        return words[0]


class Bench(asyncio.Transport):
    """A host's end, its transport, and a guest of which every word is the test's."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        super().__init__()
        self.patch = patch
        self.entropy = Counter()
        self.guest = Guest(Identity("box", "host-name", {"A": "1", "B": "2"}), StoppedClock(), self.entropy)
        self.mux = Mux(FrameDecoder(FIRST_NONCE), initiator=False)
        self.inbox = bytearray()
        self.closed = False
        self.told: list[object] = []
        self.guest.channel.connection_made(self)

    def write(self, data: Any) -> None:
        self.inbox += data

    def is_closing(self) -> bool:
        return self.closed

    def close(self) -> None:
        self.closed = True
        self.guest.channel.connection_lost(None)

    def listen(self) -> list[Any]:
        """What the host said since: messages, requests as (stream, request), "epoch"."""
        data = bytes(self.inbox)
        self.inbox.clear()
        said: list[Any] = []
        for event in self.mux.receive(data):
            if isinstance(event, EpochStarted):
                said.append("answer" if event.answer else "epoch")
            elif isinstance(event, Opened):
                said.append((event.stream, event.message))
            elif isinstance(event, MessageReceived):
                said.append(event.message)
        return said

    def say(self, *messages: Message) -> None:
        for message in messages:
            self.mux.control(message)
        self.deliver()

    def deliver(self) -> None:
        while data := b"".join(self.mux.output()):
            self.guest.channel.data_received(data)

    def begin(self, nonce: bytes = FIRST_NONCE, **ready: Any) -> list[Any]:
        """The agent starts."""
        self.mux.decoder.arm(nonce)
        self.mux.begin_epoch(nonce)
        self.say(Ready(**{"protocol": PROTOCOL_VERSION, "agent": "1", "boot_id": "b", **ready}))
        return self.listen()

    def boot(self) -> bytes:
        """The whole handshake; returns the next nonce."""
        config = self.begin()[1]
        assert isinstance(config, BootConfig)
        nonce = bytes.fromhex(config.next_nonce)
        self.mux.decoder.arm(nonce)
        self.say(BootReady(epoch=config.epoch, clock_step=0.0))
        assert self.guest.is_ready
        return nonce


@contextlib.contextmanager
def logged(name: str) -> Iterator[list[str]]:
    """What is logged under a name, inside."""
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger(name).addHandler(handler)
    try:
        yield lines
    finally:
        logging.getLogger(name).removeHandler(handler)


def in_loop(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[[pytest.MonkeyPatch], None]:
    def run(monkeypatch: pytest.MonkeyPatch) -> None:
        async def main() -> None:
            bench = Bench(monkeypatch)
            try:
                await test(bench)
            finally:
                bench.guest._stop_watchdog()

        asyncio.run(main())

    run.__name__, run.__doc__ = test.__name__, test.__doc__
    return run


@in_loop
async def test_a_handshake(bench: Bench) -> None:
    guest = bench.guest
    ready: list[bool] = []
    guest.on_ready = ready.append
    waiting = asyncio.ensure_future(guest.wait_ready(60))
    answer, config, *rest = bench.begin(boot_id="of this boot", restarts=4)
    assert answer == "answer"
    assert config == BootConfig(
        protocol=PROTOCOL_VERSION, vm_id="box", hostname="host-name", epoch=1, time=1e9, next_nonce=NONCES[0].hex()
    )
    assert rest == [SetEnv(name="A", value="1"), SetEnv(name="B", value="2"), BootConfigDone()]
    assert (guest.boot_id, guest.restarts, guest.is_ready) == ("of this boot", 4, False)
    bench.say(BootReady(epoch=1, clock_step=0.25))
    await waiting
    assert guest.is_ready
    assert guest.boot_ready is not None
    assert guest.boot_ready.clock_step == 0.25
    assert ready == [True]
    assert guest._watchdog is None


@in_loop
async def test_nobody_gets_into_a_restored_machine_that_is_not_well(bench: Bench) -> None:
    for problems in ([], ["the volume cannot be written"]):
        guest = bench.guest = Guest(
            Identity("box", "box", {}), StoppedClock(), Counter(), Restored(3, FIRST_NONCE, "mark")
        )
        guest.channel.connection_made(bench)
        guest._control(Ready(protocol=PROTOCOL_VERSION, agent="1", boot_id="b"))
        guest._control(BootReady(epoch=4, clock_step=0.0, problems=problems))
        assert guest.is_ready is not bool(problems)
        if problems:
            with pytest.raises(GuestFailed, match="not well: the volume cannot be written"):
                await guest.wait_ready(60)


@in_loop
async def test_an_offer_that_may_have_been_taken_is_repeated(bench: Bench) -> None:
    """An agent that dies over and over: it knows the present nonce or the one next, and no other is ever offered."""
    offers = [bench.begin()[1] for _ in range(5)]
    assert [offer.epoch for offer in offers] == [1, 2, 3, 4, 5]
    assert {offer.next_nonce for offer in offers} == {NONCES[0].hex()}
    assert bench.entropy.drawn == 1
    offer = bench.begin(NONCES[0])[1]  # it was taken, and the agent died before it said so
    assert offer.next_nonce == NONCES[1].hex()
    bench.say(BootReady(epoch=6, clock_step=0.0))
    assert bench.guest.is_ready


@in_loop
async def test_a_confirmation_of_an_older_offer_is_not_one_of_this(bench: Bench) -> None:
    bench.begin()
    bench.begin()
    bench.say(BootReady(epoch=1, clock_step=0.0))
    assert not bench.guest.is_ready
    bench.say(BootReady(epoch=2, clock_step=0.0))
    assert bench.guest.is_ready


@in_loop
async def test_a_handshake_that_hangs_is_begun_again(bench: Bench) -> None:
    """And the confirmation that comes too late is of the old epoch, not an error in the new one."""
    bench.patch.setattr(guest_module, "HANDSHAKE_LIMIT", 0.0)
    bench.begin()
    while not bench.inbox:
        await asyncio.sleep(0)
    assert bytes(bench.inbox) == FIRST_NONCE
    bench.say(BootReady(epoch=1, clock_step=0.0))
    assert bytes(bench.inbox) == FIRST_NONCE
    bench.patch.setattr(guest_module, "HANDSHAKE_LIMIT", 60.0)
    assert bench.listen() == ["epoch"]
    bench.say(Ready(protocol=PROTOCOL_VERSION, agent="1", boot_id="b"))
    config, *_rest = bench.listen()
    assert config.epoch == 2
    bench.say(BootReady(epoch=2, clock_step=0.0))
    assert bench.guest.is_ready


@in_loop
async def test_once_done_the_old_nonce_is_worth_nothing(bench: Bench) -> None:
    nonce = bench.boot()
    assert nonce != FIRST_NONCE
    bench.inbox.clear()
    bench.guest.channel.data_received(FIRST_NONCE)
    assert not bench.guest.is_ready
    assert bytes(bench.inbox) == nonce


@in_loop
async def test_another_version_is_refused_and_not_tried_for_ever(bench: Bench) -> None:
    waiting = asyncio.ensure_future(bench.guest.wait_ready(60))
    bench.begin(protocol=PROTOCOL_VERSION + 1)
    assert bench.closed
    with pytest.raises(GuestFailed, match=f"protocol {PROTOCOL_VERSION + 1}, this host {PROTOCOL_VERSION}") as caught:
        await waiting
    assert caught.value.hint
    assert bench.guest.epoch == 0


@in_loop
async def test_garbage_ends_streams_and_begins_anew(bench: Bench) -> None:
    nonce = bench.boot()
    stream = bench.guest.execute(Exec(job="j", command="c"))
    bench.inbox.clear()
    bench.guest.channel.data_received(b"\xff" * 50)
    with pytest.raises(Interrupted, match="garbage"):
        await stream.result()
    assert not bench.guest.is_ready
    assert bytes(bench.inbox) == nonce
    bench.guest.channel.data_received(b"\xff" * 5000)
    assert bytes(bench.inbox) == nonce
    bench.mux.decoder.arm(nonce)
    assert bench.listen() == ["epoch"]
    bench.guest.channel.data_received(answer_to(nonce))
    assert bench.guest.channel.mux.streams == 0


@in_loop
async def test_waiting_has_an_end(bench: Bench) -> None:
    with pytest.raises(TimedOut):
        await bench.guest.wait_ready(0)
    bench.close()
    with pytest.raises(Interrupted):
        await bench.guest.wait_ready(60)


@in_loop
async def test_pings(bench: Bench) -> None:
    bench.boot()
    bench.listen()
    asking = [asyncio.ensure_future(bench.guest.ping(60)) for _ in range(2)]
    await asyncio.sleep(0)
    assert bench.listen() == [Ping(id=1, time=1e9), Ping(id=2, time=1e9)]
    bench.say(Pong(id=2), Pong(id=2), Pong(id=99))
    await asking[1]
    assert not asking[0].done()
    bench.say(Pong(id=1))
    assert await asking[0] == 0.0
    with pytest.raises(TimedOut):
        await bench.guest.ping(0)
    bench.say(Pong(id=3))
    assert bench.guest._pings == {}
    bench.say(Ping(id=7))
    assert bench.listen()[-1] == Pong(id=7)


@in_loop
async def test_a_guest_that_asks_and_does_not_listen_is_not_remembered(bench: Bench) -> None:
    bench.boot()
    bench.listen()
    bench.guest.channel.pause_writing()
    bench.say(*(Ping(id=number) for number in range(10_000)))
    bench.guest.channel.resume_writing()
    assert bench.listen() == []
    bench.say(Ping(id=7))
    assert bench.listen() == [Pong(id=7)]


class Hours(StoppedClock):
    """A clock of a host that can be put to sleep, or be told another time."""

    def __init__(self) -> None:
        self.awake, self.asleep, self.offset = 5.0, 0.0, 1e9
        self.jump = asyncio.Event()

    def monotonic(self) -> float:
        return self.awake

    def boot_time(self) -> float:
        return self.awake + self.asleep

    def time(self) -> float:
        return self.boot_time() + self.offset

    async def jumped(self) -> None:
        await self.jump.wait()
        self.jump.clear()


def heart(bench: Bench) -> tuple[Hours, Heartbeat, list[bool], asyncio.Future[None]]:
    """A beating heart; its guest is ready."""
    bench.boot()
    bench.listen()
    clock, changes = Hours(), list[bool]()
    bench.guest._clock = clock
    heartbeat = Heartbeat(bench.guest, clock, lambda: changes.append(heartbeat.silent))
    return clock, heartbeat, changes, asyncio.ensure_future(heartbeat.run())


async def pinged(bench: Bench) -> Ping:
    while not (said := bench.listen()):
        await asyncio.sleep(0)
    [ping] = said
    assert isinstance(ping, Ping)
    return ping


@in_loop
async def test_a_guest_is_told_the_time_when_its_host_wakes_up(bench: Bench) -> None:
    clock, _, changes, beating = heart(bench)
    with logged("capsem_process.heartbeat") as lines:
        for asleep, offset, says in (
            (3600.0, 0.0, ["the host slept 3600 s"]),
            (0.0, -30.0, ["the host's clock was set -30.0 s"]),
            (7200.0, 60.0, ["the host slept 7200 s", "the host's clock was set +60.0 s"]),
            (0.5, 0.4, []),
        ):
            await asyncio.sleep(0)
            clock.asleep += asleep
            clock.offset += offset
            clock.jump.set()
            ping = await pinged(bench)
            assert ping.time == clock.time()
            bench.say(Pong(id=ping.id))
            assert lines == says
            lines.clear()
    assert changes == []
    bench.close()
    await beating


@in_loop
async def test_silence_is_told_and_ends(bench: Bench) -> None:
    bench.patch.setattr(heartbeat_module, "PERIOD", 0.0)
    clock, heartbeat, changes, beating = heart(bench)
    for _ in range(3):
        await pinged(bench)
    assert changes == []
    clock.asleep += 1000  # nobody can answer then
    await pinged(bench)
    assert changes == []
    clock.awake += heartbeat_module.SILENCE
    while not changes:
        await pinged(bench)
    assert heartbeat.silent
    bench.patch.setattr(heartbeat_module, "PERIOD", 60.0)
    bench.listen()
    clock.jump.set()
    bench.say(Pong(id=(await pinged(bench)).id))
    while len(changes) == 1:
        await asyncio.sleep(0)
    assert changes == [True, False]
    assert not beating.done()
    bench.close()
    clock.jump.set()
    await beating


@in_loop
async def test_requests_of_the_guest_are_passed_on(bench: Bench) -> None:
    bench.boot()
    asked: list[Message] = []
    bench.guest.on_request = asked.append
    bench.say(ShutdownRequest(), SuspendRequest())
    assert asked == [ShutdownRequest(), SuspendRequest()]


@in_loop
async def test_a_file_of_another_size_than_said_is_not_taken_for_it(bench: Bench) -> None:
    bench.boot()
    bench.listen()
    reading = asyncio.ensure_future(bench.guest.read_file("x", 100))
    await asyncio.sleep(0)
    ((stream, request),) = bench.listen()
    assert request == ReadFile(path="x", limit=100)
    bench.mux.send(stream, STDOUT, b"abc")
    bench.mux.close(stream, FileRead(size=4, mode=0o644))
    bench.deliver()
    with pytest.raises(GuestFailed, match="3 bytes of 4"):
        await reading


@in_loop
async def test_a_call_that_ends_early_gives_its_stream_up(bench: Bench) -> None:
    bench.boot()
    bench.listen()
    with pytest.raises(TimedOut):
        await bench.guest.quiesce(0, "a" * 32)
    writing = asyncio.ensure_future(bench.guest.write_file("x", bytes(1 << 20)))
    for _ in range(3):
        await asyncio.sleep(0)
    writing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await writing
    assert bench.guest.channel.mux.streams == 0
    bench.listen()
    assert bench.mux.streams == 0


@in_loop
async def test_a_result_of_the_wrong_kind_is_garbage(bench: Bench) -> None:
    bench.boot()
    bench.listen()
    reading = asyncio.ensure_future(bench.guest.read_file("x", 100))
    await asyncio.sleep(0)
    ((stream, _request),) = bench.listen()
    bench.mux.close(stream, FileWritten(size=0))
    bench.deliver()
    with pytest.raises(Interrupted, match="garbage"):
        await reading
    assert not bench.guest.is_ready
