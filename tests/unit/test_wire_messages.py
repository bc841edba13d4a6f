"""Messages: each round trips, and whatever else comes is one typed error."""

import json

import pytest

from capsem.wire import messages
from capsem.wire.frames import MAX_MESSAGE, ProtocolError
from capsem.wire.messages import (
    CONTROL_MESSAGES,
    MESSAGES,
    RESERVED_STREAMS,
    STREAMS,
    BootConfig,
    BootReady,
    Exec,
    Exited,
    Failed,
    Ping,
    PowerOff,
    ReadFile,
    Ready,
    Signal,
    Sync,
    WriteFile,
)
from capsem.wire.schema import Message, decode_message, encode_message

# One of each kind at least; tests/property/test_wire_fuzz.py has every message with every value.
EXAMPLES: list[Message] = [
    Ready(protocol=1, agent="1", boot_id="b", epoch=3, restarts=2),
    BootConfig(protocol=1, vm_id="v", hostname="h", epoch=1, time=1.5, next_nonce="00" * 16, timezone="Europe/Paris"),
    messages.SetEnv(name="A", value="ü\n\"'\\\x01\u2028😀"),
    messages.BootConfigDone(),
    BootReady(epoch=1, clock_step=-0.25, timings={"ready": 1.25, "whole": 2}),
    Ping(id=1, time=1e9),
    messages.Pong(id=1),
    PowerOff(grace=0.5),
    messages.ShutdownRequest(),
    messages.SuspendRequest(),
    Failed(code="not_found", message="m", hint="h"),
    Exec(job="j", command="echo", env={"A": "b"}, cwd="/", timeout=0.5, stdin=True),
    Signal(number=15),
    Exited(exit_code=1, signal=9, timed_out=True, duration=0.1),
    ReadFile(path="x", limit=10),
    messages.FileRead(size=1, mode=0o644),
    WriteFile(path="x", mode=0o600),
    messages.FileWritten(size=3),
    Sync(),
    messages.Synced(duration=0.1),
    messages.Freeze(limit=0.5),
    messages.Frozen(),
    messages.Thaw(),
    messages.Thawed(duration=0.1, expired=True),
    messages.Rename(vm_id="v", hostname="h"),
]


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: example.tag)
def test_round_trip(example: Message) -> None:
    assert decode_message(encode_message(example), MESSAGES) == example


def test_defaults_are_not_sent() -> None:
    for message in (Exec(job="j", command="c"), Exec(job="j", command="c", env={}, cwd=None, stdin=False)):
        assert json.loads(encode_message(message)) == {"t": "exec", "job": "j", "command": "c"}
        assert decode_message(encode_message(message), MESSAGES) == message


def test_lone_surrogates_travel() -> None:
    """A file name that is not UTF-8 is a string with lone surrogates in Python."""
    message = ReadFile(path="caf\udce9")
    assert decode_message(encode_message(message), MESSAGES) == message


def test_tags_are_unique_and_none_is_reserved() -> None:
    assert len({cls.tag for cls in MESSAGES.values()}) == len(MESSAGES)
    assert all(cls.tag == tag for tag, cls in MESSAGES.items())
    assert not set(RESERVED_STREAMS) & set(MESSAGES)


def test_the_tables_agree() -> None:
    on_streams = {*STREAMS, *STREAMS.values(), Signal, Failed}
    assert not on_streams & set(CONTROL_MESSAGES.values())
    assert on_streams | set(CONTROL_MESSAGES.values()) <= set(MESSAGES.values())
    assert not set(STREAMS) & {*STREAMS.values(), Failed}


def test_unknown_keys_are_ignored() -> None:
    assert decode_message(
        b'{"t":"pong","id":1,"new":{"deep":[1]},"__class__":1,"tag":"x","self":2}', MESSAGES
    ) == messages.Pong(id=1)


def test_messages_are_not_hashable_and_differ_by_type() -> None:
    assert Ping(id=1) != messages.Pong(id=1)
    with pytest.raises(TypeError):
        hash(Ping(id=1))


def test_a_representation_is_short_even_of_a_large_message() -> None:
    assert len(repr(Exec(job="j", command="x" * 10**6))) < 300


DEEP = 100_000


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"{",
        b"\xff\xfe\xfd",
        b"\x00" * 8,
        b"[]",
        b"null",
        b'"ping"',
        b"1",
        b"{}",
        b'{"t":null}',
        b'{"t":1}',
        b'{"t":["ping"]}',
        b'{"t":{"a":1}}',
        b'{"t":"no-such-message"}',
        b'{"t":"egress"}',
        b'{"t":"ping"}',
        b'{"t":"ping","id":null}',
        b'{"t":"ping","id":"1"}',
        b'{"t":"ping","id":1.0}',
        b'{"t":"ping","id":true}',
        b'{"t":"ping","id":1,"time":"now"}',
        b'{"t":"ping","id":1,"time":NaN}',
        b'{"t":"ping","id":1,"time":Infinity}',
        b'{"t":"ping","id":1,"time":-Infinity}',
        b'{"t":"ping","id":1,"time":1e999}',
        b'{"t":"ping","id":1,"time":-1e999}',
        b'{"t":"ping","id":1,"time":1' + b"0" * 400 + b"}",
        b'{"t":"ping","id":' + b"9" * 5000 + b"}",
        b'{"t":"ping","id":' + b"9" * 400 + b"}",
        b'{"t":"ping","id":9223372036854775808}',
        b'{"t":"ping","id":1}x',
        b'{"t":"ping","id":1,"unknown":NaN}',
        b'{"t":"ping","id":1,"time":false}',
        b'{"t":"exec","job":"j","command":["echo"]}',
        b'{"t":"exec","job":"j","command":"c","env":{"A":1}}',
        b'{"t":"exec","job":"j","command":"c","env":[]}',
        b'{"t":"exec","job":"j","command":"c","stdin":1}',
        b'{"t":"exec","job":"j","command":"c","timeout":true}',
        b'{"t":"boot-ready","epoch":1,"clock_step":0,"timings":{"a":"b"}}',
        b'{"t":"boot-ready","epoch":1,"clock_step":0,"timings":{"a":1e999}}',
        b'{"t":"exited","exit_code":0,"duration":1e400}',
        b"[" * DEEP,
        b'{"t":' * DEEP,
        b'{"t":' + b"[" * DEEP + b"]" * DEEP + b"}",
        b'{"t":"ping","id":' + b"[" * DEEP + b"]" * DEEP + b"}",
        '{"t":"ping","id":1}'.encode("utf-32")[:-2],
    ],
    ids=range(46),
)
def test_anything_else_is_a_protocol_error(payload: bytes) -> None:
    with pytest.raises(ProtocolError) as caught:
        decode_message(payload, MESSAGES)
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize("place", [b'{"t":%s}', b'{"t":"ping","id":%s}', b'{"t":"pong","id":1,"x":%s}'])
def test_nesting_near_the_recursion_limit_is_no_other_error(place: bytes) -> None:
    for depth in (*range(150, 1050, 7), *range(940, 1002)):
        payload = place % (b"[" * depth + b"]" * depth)
        try:
            assert decode_message(payload, MESSAGES) == messages.Pong(id=1)
        except ProtocolError:
            continue


def test_only_the_given_messages_are_known() -> None:
    with pytest.raises(ProtocolError, match="ping"):
        decode_message(encode_message(Ping(id=1)), {"pong": messages.Pong})


@pytest.mark.parametrize(
    "make",
    [
        lambda: Exec(job="j", command="c", timeout=float("nan")),
        lambda: Exec(job="j", command="c", timeout=float("inf")),
        lambda: Exec(job="j", command=b"bytes"),  # type: ignore[arg-type]
        lambda: Exec(job="j"),  # type: ignore[call-arg]
        lambda: Ping(id=1 << 63),
        lambda: PowerOff(grace=None),  # type: ignore[arg-type]
    ],
    ids=range(6),
)
def test_what_could_not_be_decoded_cannot_be_made(make) -> None:  # type: ignore[no-untyped-def]
    """Else this end would send what the other takes for garbage, at the price of every stream."""
    with pytest.raises(ProtocolError):
        make()


def test_a_field_that_does_not_exist_is_our_own_mistake() -> None:
    with pytest.raises(TypeError, match="speed"):
        Ping(id=1, speed=2)  # type: ignore[call-arg]


def test_a_message_over_the_frame_limit_is_refused() -> None:
    fits = MAX_MESSAGE - len(encode_message(Exec(job="j", command="")))
    assert len(encode_message(Exec(job="j", command="x" * fits))) == MAX_MESSAGE
    for command in ("x" * (fits + 1), "ü" * (fits // 6 + 1)):
        with pytest.raises(ProtocolError, match="exec"):
            encode_message(Exec(job="j", command=command))


def test_extreme_but_legal_numbers_travel() -> None:
    for number in (0, -1, (1 << 63) - 1, -(1 << 63)):
        assert decode_message(encode_message(messages.Pong(id=number)), MESSAGES) == messages.Pong(id=number)
    for number in (0.0, -0.0, 5e-324, 1.7976931348623157e308):
        assert decode_message(encode_message(PowerOff(grace=number)), MESSAGES) == PowerOff(grace=number)
