"""Two ends that begin epochs whenever they like, and die: they settle in one epoch, and fall silent.

Streams are opened when all is settled, as the handshake sees to (test_wire_reconnect.py has it all together).
"""

from __future__ import annotations

from hypothesis import example, given, settings
from hypothesis import strategies as st

from capsem.wire.events import EpochStarted, MessageReceived, Opened
from capsem.wire.frames import FIRST_NONCE, ProtocolError
from capsem.wire.messages import Exec, Ping, Pong, Sync
from wire_pair import End, new_mux


class Peer(End):
    """An end that behaves: pings are answered, and garbage is answered by a new epoch."""

    def __init__(self, *, initiator: bool) -> None:
        super().__init__(new_mux(initiator=initiator, hunting=True))
        self.initiator = initiator
        self.begun = 0
        self.epochs = 0
        self.pongs: list[int] = []
        self.requests: list[str] = []

    def begin(self) -> None:
        self.begun += 1
        self.mux.begin_epoch(FIRST_NONCE)

    def die(self, written: int) -> None:
        """In the middle of a write; what comes after it begins anew."""
        self.peer.inbox += b"".join(self.mux.output())[:written]
        self.mux = new_mux(initiator=self.initiator, hunting=True)
        self.begin()

    def read(self, size: int) -> None:
        left: bytes | None = bytes(self.inbox[:size])
        del self.inbox[:size]
        while left is not None:
            try:
                for event in self.mux.receive(left):
                    if isinstance(event, EpochStarted):
                        self.epochs += 1
                    elif isinstance(event, Opened):
                        self.requests.append(event.message.tag)
                    elif isinstance(event, MessageReceived) and isinstance(event.message, Ping):
                        self.mux.control(Pong(id=event.message.id))
                    elif isinstance(event, MessageReceived) and isinstance(event.message, Pong):
                        self.pongs.append(event.message.id)
                left = None
            except ProtocolError:
                self.begin()
                left = b""

    def ping(self) -> None:
        self.mux.control(Ping(id=0))


def couple() -> tuple[Peer, Peer]:
    host, guest = Peer(initiator=True), Peer(initiator=False)
    host.peer, guest.peer = guest, host
    return host, guest


def fall_silent(host: Peer, guest: Peer) -> None:
    for _ in range(100):
        if not host.send() + guest.send() and not host.inbox and not guest.inbox:
            return
        host.read(1 << 20)
        guest.read(1 << 20)
    raise AssertionError(f"no end of it: {host.begun} and {guest.begun} epochs begun")


def shake_hands(host: Peer, guest: Peer) -> None:
    """They hear each other, or the host begins anew when it has waited long enough, as it does in a handshake.

    What an end that died has cut off may lie in the other's decoder: the marker that was to follow is forgotten when the
    peer's own arrives first, and an answer to the earlier life comes after that. Then what is said is taken for the rest,
    or for garbage.
    """
    begun = host.begun + guest.begun
    host.pongs, guest.pongs = [], []
    host.ping()
    guest.ping()
    fall_silent(host, guest)
    assert host.begun + guest.begun <= begun + 1
    if not host.pongs == guest.pongs == [0]:
        host.begin()
        fall_silent(host, guest)


def check(host: Peer, guest: Peer) -> None:
    """They are in the same epoch: what one says the other understands, with numbers that begin anew."""
    for end, request in ((host, Exec(job="j", command="c")), (guest, Sync())):
        epochs, begun = end.peer.epochs, host.begun + guest.begun  # type: ignore[attr-defined]
        end.peer.requests.clear()  # type: ignore[attr-defined]
        end.pongs.clear()
        end.mux.control(Ping(id=7))
        end.mux.open(request)
        fall_silent(host, guest)
        assert end.pongs == [7]
        assert end.peer.requests == [request.tag]  # type: ignore[attr-defined]
        assert (end.peer.epochs, host.begun + guest.begun) == (epochs, begun)  # type: ignore[attr-defined]


amounts = st.one_of(st.integers(1, 40), st.just(1 << 20))
steps = st.tuples(st.sampled_from(["begin", "die", "send", "read", "read", "ping"]), st.booleans(), amounts)


@settings(max_examples=250)
@given(st.lists(steps, max_size=40))
@example([("begin", True, 1), ("begin", False, 1)])
@example([("begin", True, 1), ("begin", False, 1), ("send", True, 1), ("send", False, 1), ("die", False, 1)])
@example([("begin", False, 1), ("die", False, 9), ("die", False, 1 << 20), ("begin", True, 1), ("die", True, 3)])
# What one has cut off as it died, in the middle of a frame and of a marker, is followed by none of its own.
@example(
    [
        ("ping", False, 21),
        ("begin", True, 1),
        ("die", False, 33),
        ("send", True, 1),
        ("read", True, 33),
        ("send", True, 1 << 20),
        ("read", False, 37),
    ]
)
@example(
    [
        ("die", True, 1),
        ("die", True, 18),
        ("send", False, 36),
        ("read", True, 1 << 20),
        ("send", True, 1 << 20),
        ("die", False, 1 << 20),
        ("die", False, 8),
        ("read", False, 1 << 20),
    ]
)
def test_they_settle_in_the_same_epoch(steps: list[tuple[str, bool, int]]) -> None:
    host, guest = couple()
    guest.begin()
    for step, of_host, amount in steps:
        end = host if of_host else guest
        if step == "begin":
            end.begin()
        elif step == "die":
            end.die(amount)
        elif step == "send":
            end.send(amount)
        elif step == "read":
            end.read(amount)
        else:
            end.ping()
    fall_silent(host, guest)
    shake_hands(host, guest)
    check(host, guest)


@settings(max_examples=100)
@given(st.lists(st.tuples(st.booleans(), amounts), max_size=60), st.booleans(), st.booleans(), amounts)
def test_both_begin_at_once_and_one_dies(
    schedule: list[tuple[bool, int]], dies: bool, host_dies: bool, written: int
) -> None:
    """Without other traffic there is next to nothing to disagree about.

    An end that dies in the middle of a marker is taken for garbage at worst: one more epoch.
    """
    host, guest = couple()
    host.begin()
    guest.begin()
    for turn, (of_host, amount) in enumerate(schedule):
        if dies and turn == len(schedule) // 2:
            (host if host_dies else guest).die(written)
        end = host if of_host else guest
        end.send(1)
        end.read(amount)
    fall_silent(host, guest)
    assert host.begun + guest.begun <= 2 + 2 * dies
    check(host, guest)
