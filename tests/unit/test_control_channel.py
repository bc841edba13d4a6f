"""A connection driven by asyncio: streams as coroutines, and every way in which they end."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

import pytest

from capsem.control.channel import Channel, Stream
from capsem.model.errors import GuestFailed, Interrupted, InvalidInput, NotFound
from capsem.supervisor.server import relay
from capsem.wire import frames
from capsem.wire.decoder import FrameDecoder
from capsem.wire.frames import FIRST_NONCE, ProtocolError, encode
from capsem.wire.messages import (
    STDERR,
    STDIN,
    STDOUT,
    Exec,
    Exited,
    Failed,
    FileWritten,
    Ping,
    ReadFile,
    Signal,
    WriteFile,
)
from capsem.wire.schema import Message, encode_message
from capsem.wire.streams import WINDOW, Mux

EXEC = Exec(job="j", command="c", stdin=True)


class Wire(asyncio.Transport):
    """What is written to it arrives at the peer when the test says so."""

    def __init__(self) -> None:
        super().__init__()
        self.written = bytearray()
        self.closed = False

    def write(self, data: Any) -> None:
        assert not self.closed
        self.written += data

    def is_closing(self) -> bool:
        return self.closed

    def close(self) -> None:
        self.closed = True


class Two:
    """Both ends of a connection."""

    def __init__(self) -> None:
        self.wires = [Wire(), Wire()]
        self.client, self.server = (
            Channel(Mux(FrameDecoder(FIRST_NONCE, hunting=False), initiator=initiator)) for initiator in (True, False)
        )
        self.served: list[Stream] = []
        self.server.on_open = self.served.append
        self.client.connection_made(self.wires[0])
        self.server.connection_made(self.wires[1])

    def carry(self) -> None:
        while self.wires[0].written or self.wires[1].written:
            for wire, peer in zip(self.wires, (self.server, self.client), strict=True):
                data = bytes(wire.written)
                wire.written.clear()
                if data:
                    peer.data_received(data)

    def open(self, request: Message = EXEC) -> tuple[Stream, Stream]:
        ours = self.client.open(request)
        self.carry()
        return ours, self.served.pop()


def in_loop(test: Callable[[Two], Coroutine[Any, Any, None]]) -> Callable[[], None]:
    def run() -> None:
        async def main() -> None:
            await test(Two())

        asyncio.run(main())

    run.__name__, run.__doc__ = test.__name__, test.__doc__
    return run


async def waits(what: Awaitable[Any]) -> asyncio.Task[Any]:
    """`what` as a task that has run as far as it can, and has not ended."""
    task = asyncio.ensure_future(what)
    for _ in range(5):
        await asyncio.sleep(0)
    assert not task.done()
    return task  # type: ignore[return-value]


@in_loop
async def test_a_request_its_data_and_its_result(two: Two) -> None:
    ours, theirs = two.open()
    assert theirs.request == EXEC
    reading = await waits(ours.read(STDOUT))
    await theirs.write(STDOUT, b"out")
    await theirs.write(STDERR, b"err")
    await ours.write(STDIN, b"in")
    ours.end(STDIN)
    two.carry()
    assert await reading == b"out"
    assert await ours.read(STDERR) == b"err"
    assert (await theirs.read(STDIN), await theirs.read(STDIN)) == (b"in", b"")
    result = await waits(ours.result())
    theirs.close(Exited(exit_code=3))
    two.carry()
    assert await result == Exited(exit_code=3)
    assert ours.over
    assert await ours.read(STDOUT) == b""
    assert two.client._streams == two.server._streams == {}


@in_loop
async def test_what_came_before_the_end_can_still_be_read_after_it(two: Two) -> None:
    ours, theirs = two.open()
    await theirs.write(STDOUT, b"last words")
    theirs.close(Exited(exit_code=0))
    two.carry()
    assert ours.over
    assert await ours.read(STDOUT) == b"last words"
    assert await ours.read(STDOUT) == b""


@in_loop
async def test_writing_waits_for_credit_and_reading_gives_it(two: Two) -> None:
    ours, theirs = two.open()
    data = bytes(range(256)) * (3 * WINDOW // 256)
    writing = await waits(ours.write(STDIN, data))
    got = bytearray()
    while len(got) < len(data):
        two.carry()
        got += await theirs.read(STDIN)
        two.carry()
        await asyncio.sleep(0)
    await writing
    assert got == data


@in_loop
async def test_a_transport_that_is_full_is_not_written_to(two: Two) -> None:
    ours, _ = two.open()
    two.client.pause_writing()
    await ours.write(STDIN, b"kept")
    two.client.control(Ping(id=1))
    assert not two.wires[0].written
    two.client.resume_writing()
    assert two.wires[0].written


@in_loop
async def test_failed_becomes_the_error_that_it_names(two: Two) -> None:
    for failed, error in (
        (Failed(code="not_found", message="no such file", hint="look"), NotFound),
        (Failed(code="guest_failed", message="broken"), GuestFailed),
        (Failed(code="from the future", message="?"), Exception),
    ):
        ours, theirs = two.open()
        theirs.close(failed)
        two.carry()
        with pytest.raises(error, match=failed.message.replace("?", r"\?")) as caught:
            await ours.result()
        assert caught.value.hint == failed.hint  # type: ignore[attr-defined]


@in_loop
async def test_giving_up_wakes_everybody_on_both_sides(two: Two) -> None:
    for giver in (0, 1):
        streams = two.open()
        waiting = [
            await waits(call)
            for stream in streams
            for call in (stream.read(STDOUT), stream.write(STDIN, bytes(2 * WINDOW)), stream.result())
        ]
        streams[giver].reset()
        two.carry()
        for read, write, result in (waiting[:3], waiting[3:]):
            assert await read == b""
            await write
            with pytest.raises(Interrupted):
                await result
        assert two.client._streams == two.server._streams == {}
        assert two.client.mux.streams == two.server.mux.streams == 0


@in_loop
async def test_giving_up_twice_or_after_the_end_is_nothing(two: Two) -> None:
    ours, theirs = two.open()
    theirs.close(Exited(exit_code=0))
    two.carry()
    ours.reset()
    two.client.flush()
    assert not two.wires[0].written
    assert await ours.result() == Exited(exit_code=0)


@in_loop
async def test_messages_on_a_stream_reach_its_handler(two: Two) -> None:
    ours, theirs = two.open()
    told: list[Message] = []
    theirs.on_message = told.append
    ours.send(Signal(number=15))
    two.carry()
    assert told == [Signal(number=15)]


@in_loop
async def test_a_lost_connection_ends_every_stream(two: Two) -> None:
    ours, _ = two.open()
    lost: list[bool] = []
    two.client.on_lost = lambda: lost.append(True)
    waiting = await waits(ours.result())
    reading = await waits(ours.read(STDOUT))
    two.client.connection_lost(None)
    with pytest.raises(Interrupted):
        await waiting
    assert await reading == b""
    assert lost == [True]
    assert not two.client.connected
    with pytest.raises(Interrupted):
        two.client.open(EXEC)
    ours.reset()
    two.client.control(Ping(id=1))


@in_loop
async def test_hanging_up_refuses_what_comes_after(two: Two) -> None:
    two.client.hang_up()
    with pytest.raises(Interrupted):
        two.client.open(EXEC)
    two.client.control(Ping(id=1))
    assert not two.wires[0].written


@in_loop
async def test_a_request_that_is_too_large_is_the_callers_mistake(two: Two) -> None:
    with pytest.raises(InvalidInput):
        two.client.open(Exec(job="j", command="x" * frames.MAX_MESSAGE))
    assert two.client._streams == {}
    two.open()


@in_loop
async def test_streams_that_nobody_serves_are_given_up_at_once(two: Two) -> None:
    """A guest that opens many must not fill the host's memory with what it sends on them."""
    for number in range(1, 200):
        stream = 2 * number
        two.client.data_received(
            encode(frames.OPEN, stream, payload=encode_message(ReadFile(path="x")))
            + encode(frames.DATA, stream, STDIN, bytes(30_000))
        )
    assert two.client._streams == {}
    assert two.client.mux.streams == 0
    answers = list(FrameDecoder(hunting=False).feed(two.wires[0].written))
    assert {frame.kind for frame in answers if isinstance(frame, frames.Frame)} == {frames.RESET}


@in_loop
async def test_garbage_hangs_up_unless_somebody_knows_better(two: Two) -> None:
    two.client.data_received(b"\xff" * 50)
    assert two.wires[0].closed


@in_loop
async def test_a_handler_that_finds_nonsense_is_garbage_too(two: Two) -> None:
    garbage: list[str] = []

    def refuse(message: Message) -> None:
        raise ProtocolError(f"unexpected {message.tag}")

    two.client.on_control = refuse
    two.client.on_garbage = lambda error: garbage.append(str(error))
    two.server.control(Ping(id=1))
    two.server.control(Ping(id=2))
    two.carry()
    assert garbage == ["unexpected ping"]


@in_loop
async def test_a_new_epoch_interrupts_streams_before_it_is_told(two: Two) -> None:
    ours, _ = two.open()
    order: list[str] = []
    two.client.on_epoch = lambda _event: order.append(f"epoch, over: {ours.over}")
    two.server.mux.begin_epoch(FIRST_NONCE)
    two.server.flush()
    two.carry()
    assert order == ["epoch, over: True"]
    with pytest.raises(Interrupted):
        await ours.result()
    two.server.drop_streams(Interrupted("gone"))
    ours, theirs = two.open()
    assert (ours.id, theirs.id) == (1, 1)


@in_loop
async def test_garbage_and_a_new_epoch_in_one_piece(two: Two) -> None:
    """Both ends give up at once: the peer's marker must not be lost with what it came with."""
    two.client.on_garbage = lambda _error: two.client.mux.begin_epoch(FIRST_NONCE)
    epochs: list[bool] = []
    two.client.on_epoch = lambda event: epochs.append(event.answer)
    nonsense = encode(frames.CONTROL, payload=b"{}") + encode(frames.CONTROL, payload=encode_message(Ping(id=1)))
    two.client.data_received(nonsense + FIRST_NONCE)
    assert epochs == [False]


@in_loop
async def test_a_channel_that_is_held_says_nothing_and_takes_everything(two: Two) -> None:
    ours, theirs = two.open()
    two.client.hold()
    await ours.write(STDIN, b"waits")
    ours.send(Signal(number=15))
    two.client.control(Ping(id=1))
    await theirs.write(STDOUT, bytes(WINDOW))
    two.carry()
    size = 0
    while size < WINDOW:  # which earns the peer credit
        size += len(await ours.read(STDOUT))
    assert not two.wires[0].written
    assert two.server.mux.confirmed(theirs.id, STDOUT) == 0
    two.client.release()
    two.carry()
    assert await theirs.read(STDIN) == b"waits"
    assert WINDOW // 2 <= two.server.mux.confirmed(theirs.id, STDOUT) <= size


@in_loop
async def test_what_broke_off_is_not_handed_on_as_whole(two: Two) -> None:
    """Half an upload must not become a file: neither of one who gives up, nor of one who is gone."""
    beyond = Two()
    for lose in (lambda stream: stream.reset(), lambda _stream: two.server.connection_lost(None)):
        ours, middle = two.open(WriteFile(path="a"))
        target = beyond.client.open(WriteFile(path="a"))
        beyond.carry()
        [theirs] = beyond.served
        beyond.served.clear()
        relaying = await waits(relay(middle, target))
        await ours.write(STDIN, b"half")
        two.carry()
        await waits(relaying)
        beyond.carry()
        assert await theirs.read(STDIN) == b"half"
        lose(ours)
        two.carry()
        with pytest.raises(InvalidInput, match="given up"):
            await relaying
        beyond.carry()
        with pytest.raises(Interrupted):
            await theirs.result()
        assert not theirs.ended(STDIN)


@in_loop
async def test_what_is_whole_is_handed_on_with_its_end(two: Two) -> None:
    beyond = Two()
    ours, middle = two.open(WriteFile(path="a"))
    target = beyond.client.open(WriteFile(path="a"))
    beyond.carry()
    [theirs] = beyond.served
    relaying = await waits(relay(middle, target))
    await ours.write(STDIN, b"all")
    ours.end(STDIN)
    two.carry()
    await waits(relaying)
    beyond.carry()
    assert await theirs.read(STDIN) == b"all"
    assert await theirs.read(STDIN) == b""
    assert theirs.ended(STDIN)
    theirs.close(FileWritten(size=3))
    beyond.carry()
    assert await relaying == FileWritten(size=3)
