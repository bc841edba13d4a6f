"""QMP against a scripted peer on a socket pair."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from capsem.hypervisor.qemu import qmp
from capsem.hypervisor.qemu.qmp import Event, Monitor
from capsem.model.errors import MachineFailed

GREETING = {"QMP": {"version": {"qemu": {"major": 7, "minor": 2, "micro": 22}, "package": ""}, "capabilities": ["oob"]}}


class Peer:
    """QEMU's end: answers from a table, remembers what it was asked."""

    def __init__(self, sock: socket.socket, answers: dict[str, Any]) -> None:
        self.sock = sock
        self.answers = answers
        self.asked: list[dict[str, Any]] = []

    async def say(self, *messages: Any) -> None:
        for message in messages:
            data = message if isinstance(message, bytes) else json.dumps(message).encode() + b"\r\n"
            await asyncio.get_running_loop().sock_sendall(self.sock, data)

    async def _next_request(self, reader: asyncio.StreamReader) -> dict[str, Any] | None:
        """The client ends its messages with nothing at all: a request is what parses."""
        data = b""
        while chunk := await reader.read(1):
            data += chunk
            with contextlib.suppress(ValueError):
                return dict(json.loads(data))
        return None

    async def serve(self) -> None:
        await self.say(GREETING)
        reader, writer = await asyncio.open_connection(sock=self.sock)
        while request := await self._next_request(reader):
            self.asked.append(request)
            answer = self.answers.get(request["execute"], {"return": {}})
            if answer is None:
                continue
            if answer == "hang up":
                break
            writer.write(json.dumps({**answer, "id": request.get("id")}).encode() + b"\r\n")
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()


def talk(answers: dict[str, Any], script: Callable[[Monitor, Peer], Awaitable[None]]) -> list[Event]:
    """Open a session with a peer and run the script in it; returns the events that were told."""
    events: list[Event] = []

    async def main() -> None:
        ours, theirs = socket.socketpair()
        for each in (ours, theirs):
            each.setblocking(False)
        peer = Peer(theirs, answers)
        serving = asyncio.create_task(peer.serve())
        monitor = Monitor(events.append)
        await monitor.open(ours, 5)
        try:
            await script(monitor, peer)
        finally:
            await monitor.close()
            await serving

    asyncio.run(main())
    return events


def test_commands_and_version() -> None:
    async def script(monitor: Monitor, peer: Peer) -> None:
        assert monitor.version == "7.2.22"
        await monitor.cont()
        await monitor.stop()
        assert await monitor.status() == "paused"
        await monitor.execute("getfd", fd_name="x")
        assert [each["execute"] for each in peer.asked] == ["qmp_capabilities", "cont", "stop", "query-status", "getfd"]
        assert peer.asked[-1]["arguments"] == {"fd-name": "x"}

    talk({"query-status": {"return": {"status": "paused", "running": False}}}, script)


def test_a_refusal_is_a_failed_machine() -> None:
    async def script(monitor: Monitor, _: Peer) -> None:
        with pytest.raises(MachineFailed, match="no such thing") as caught:
            await monitor.cont()
        assert caught.value.hint
        assert monitor.connected

    talk({"cont": {"error": {"class": "GenericError", "desc": "no such thing"}}}, script)


def test_a_missed_deadline_is_a_failed_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    hung: list[str] = []

    async def script(monitor: Monitor, _: Peer) -> None:
        monitor.on_hung = hung.append
        monkeypatch.setattr(qmp, "COMMAND_LIMIT", 0.01)
        with pytest.raises(MachineFailed, match="within"):
            await monitor.cont()
        assert hung == ["QEMU did not answer 'cont' within 0.01 s"]

    talk({"cont": None}, script)


def test_a_lost_connection_is_a_failed_machine() -> None:
    async def script(monitor: Monitor, _: Peer) -> None:
        with pytest.raises(MachineFailed):
            await monitor.cont()
        await monitor.closed()
        assert not monitor.connected
        with pytest.raises(MachineFailed):
            await monitor.stop()

    talk({"cont": "hang up"}, script)


def test_quit_may_be_answered_by_silence() -> None:
    async def script(monitor: Monitor, _: Peer) -> None:
        await monitor.quit()
        await monitor.closed()

    talk({"quit": "hang up"}, script)


def test_events_are_told_in_order_and_not_kept() -> None:
    async def script(monitor: Monitor, peer: Peer) -> None:
        for n in range(50):
            await peer.say(
                {"event": "RTC_CHANGE", "data": {"offset": n}, "timestamp": {"seconds": 0, "microseconds": 0}}
            )
        await peer.say({"event": "STOP", "timestamp": {"seconds": 0, "microseconds": 0}})
        await monitor.cont()
        for listener in monitor._client._listeners:
            assert not listener.history
            assert listener.empty()

    events = talk({}, script)
    assert [each.data.get("offset") for each in events[:50]] == list(range(50))
    assert events[50:] == [Event("STOP", {})]


def test_silence_instead_of_a_greeting() -> None:
    async def main() -> None:
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        with theirs, pytest.raises(MachineFailed, match="did not answer"):
            await Monitor(lambda _: None).open(ours, 0.01)

    asyncio.run(main())


async def open_and_cont(monitor: Monitor, sock: socket.socket) -> None:
    await monitor.open(sock, 5)
    await monitor.cont()


@given(garbage=st.binary(min_size=1, max_size=200), greeted=st.booleans())
@settings(deadline=None, max_examples=60)
def test_garbage_gives_one_error(garbage: bytes, greeted: bool) -> None:
    async def main() -> None:
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        monitor = Monitor(lambda _: None)
        with theirs:
            if greeted:
                theirs.sendall(json.dumps(GREETING).encode() + b"\r\n" + b'{"return": {}}\r\n')
            theirs.sendall(garbage + b"\r\n")
            theirs.shutdown(socket.SHUT_WR)
            with pytest.raises(MachineFailed):
                await open_and_cont(monitor, ours)
            await monitor.close()

    asyncio.run(main())
