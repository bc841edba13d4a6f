"""The handshake: both ends' tables, and what does not belong in them."""

import pytest

from capsem.wire.frames import ProtocolError
from capsem.wire.handshake import DONE, OFFERED, WAITING, GuestHandshake, HostHandshake
from capsem.wire.messages import (
    MESSAGES,
    OLDEST_PROTOCOL,
    PROTOCOL_VERSION,
    BootConfig,
    BootConfigDone,
    BootReady,
    Ping,
    Ready,
    SetEnv,
    largest_data,
)
from capsem.wire.schema import Message, decode_message, encode_message

NONCE = bytes(range(0x80, 0x90))


def ready(protocol: int = PROTOCOL_VERSION) -> Ready:
    return Ready(protocol=protocol, agent="1", boot_id="b")


def config(protocol: int = PROTOCOL_VERSION, nonce: str = NONCE.hex(), epoch: int = 1) -> BootConfig:
    return BootConfig(protocol=protocol, vm_id="v", hostname="h", epoch=epoch, time=0.0, next_nonce=nonce)


def boot_ready(epoch: int = 1) -> BootReady:
    return BootReady(epoch=epoch, clock_step=0.0)


SET_ENV = SetEnv(name="A", value="b")
OTHERS: list[Message] = [Ping(id=1)]


def host_in(state: str) -> HostHandshake:
    host = HostHandshake()
    if state != WAITING:
        host.receive(ready())
        host.offer(config(), {})
    if state == DONE:
        host.receive(boot_ready())
    assert host.state == state
    return host


def guest_in(state: str) -> GuestHandshake:
    guest = GuestHandshake()
    if state != WAITING:
        assert not guest.receive(config())
    if state == DONE:
        assert guest.receive(BootConfigDone())
    assert guest.state == state
    return guest


def test_the_two_ends_agree() -> None:
    host, guest = HostHandshake(), GuestHandshake()
    host.receive(ready())
    assert host.ready is not None
    env = {"A": "1", "B": "ü"}
    *first, last = host.offer(config(), env)
    for message in first:
        assert not guest.receive(decode_message(encode_message(message), MESSAGES))
    assert guest.receive(decode_message(encode_message(last), MESSAGES))
    assert (guest.env, guest.next_nonce, guest.state) == (env, NONCE, DONE)
    assert guest.config == config()
    assert host.state == OFFERED
    host.receive(boot_ready())
    assert host.state == DONE
    assert host.boot_ready == boot_ready()


@pytest.mark.parametrize(
    ("state", "message", "after"),
    [
        (WAITING, ready(), WAITING),  # the host then offers, when it has something to offer
        (WAITING, boot_ready(), None),
        (WAITING, config(), None),
        (WAITING, SET_ENV, None),
        (WAITING, BootConfigDone(), None),
        (OFFERED, boot_ready(), DONE),
        (OFFERED, ready(), None),
        (OFFERED, config(), None),
        (OFFERED, SET_ENV, None),
        (OFFERED, BootConfigDone(), None),
        (DONE, ready(), None),
        (DONE, boot_ready(), None),
        (DONE, config(), None),
        (DONE, SET_ENV, None),
        (DONE, BootConfigDone(), None),
    ],
    ids=str,
)
def test_the_hosts_table(state: str, message: Message, after: str | None) -> None:
    host = host_in(state)
    if after is None:
        with pytest.raises(ProtocolError) as caught:
            host.receive(message)
        assert message.tag in str(caught.value)
        assert state in str(caught.value)
    else:
        host.receive(message)
    assert host.state == (after or state)


@pytest.mark.parametrize(
    ("state", "message", "after"),
    [
        (WAITING, config(), OFFERED),
        (WAITING, SET_ENV, None),
        (WAITING, BootConfigDone(), None),
        (WAITING, ready(), None),
        (WAITING, boot_ready(), None),
        (OFFERED, SET_ENV, OFFERED),
        (OFFERED, BootConfigDone(), DONE),
        (OFFERED, config(), None),
        (OFFERED, ready(), None),
        (OFFERED, boot_ready(), None),
        (DONE, config(), None),
        (DONE, SET_ENV, None),
        (DONE, BootConfigDone(), None),
        (DONE, ready(), None),
        (DONE, boot_ready(), None),
    ],
    ids=str,
)
def test_the_guests_table(state: str, message: Message, after: str | None) -> None:
    guest = guest_in(state)
    if after is None:
        with pytest.raises(ProtocolError) as caught:
            guest.receive(message)
        assert message.tag in str(caught.value)
        assert state in str(caught.value)
    else:
        assert guest.receive(message) is (after == DONE)
    assert guest.state == (after or state)


@pytest.mark.parametrize(
    "tag", sorted(set(MESSAGES) - {"ready", "boot-config", "set-env", "boot-config-done", "boot-ready"})
)
def test_messages_of_other_business_never_move_a_handshake(tag: str) -> None:
    message = MESSAGES[tag].__new__(MESSAGES[tag])
    for state in (WAITING, OFFERED, DONE):
        for end in (host_in(state), guest_in(state)):
            with pytest.raises(ProtocolError):
                end.receive(message)
            assert end.state == state


def test_the_host_speaks_the_version_before_and_the_guest_only_its_own() -> None:
    """A restored guest's agent is as old as its checkpoint."""
    host = HostHandshake()
    host.receive(ready(OLDEST_PROTOCOL))
    assert host.ready == ready(OLDEST_PROTOCOL)
    with pytest.raises(ProtocolError):
        GuestHandshake().receive(config(OLDEST_PROTOCOL))
    assert largest_data(OLDEST_PROTOCOL) < largest_data(PROTOCOL_VERSION)


@pytest.mark.parametrize("other", [0, PROTOCOL_VERSION + 1, -1])
def test_another_protocol_version_is_refused_and_both_are_named(other: int) -> None:
    host = HostHandshake()
    with pytest.raises(ProtocolError) as caught:
        host.receive(ready(other))
    assert str(other) in str(caught.value)
    assert str(PROTOCOL_VERSION) in str(caught.value)
    assert host.ready is None
    guest = GuestHandshake()
    with pytest.raises(ProtocolError) as caught:
        guest.receive(config(other))
    assert str(other) in str(caught.value)
    assert str(PROTOCOL_VERSION) in str(caught.value)
    assert guest.state == WAITING


@pytest.mark.parametrize(
    "nonce", ["", "00", "zz" * 16, "ü" * 32, NONCE.hex()[:-1], NONCE.hex() + "00", "0a" * 16], ids=range(7)
)
def test_a_bad_nonce_is_refused(nonce: str) -> None:
    guest = GuestHandshake()
    with pytest.raises(ProtocolError, match="nonce"):
        guest.receive(config(nonce=nonce))
    assert guest.state == WAITING


def test_a_boot_ready_of_another_offer_is_not_the_answer_to_this_one() -> None:
    """It was under way when the agent died; the agent that runs now has another epoch to confirm."""
    host = HostHandshake()
    host.receive(ready())
    host.offer(config(epoch=7), {})
    host.receive(boot_ready(6))
    assert host.state == OFFERED
    assert host.boot_ready is None
    host.receive(boot_ready(7))
    assert host.state == DONE


def test_the_environment_of_an_epoch_replaces_the_last_ones() -> None:
    guest = GuestHandshake()
    guest.receive(config())
    guest.receive(SET_ENV)
    guest.receive(SetEnv(name="A", value="later"))
    assert guest.env == {"A": "later"}
    assert GuestHandshake().env == {}
