"""Byte streams between simulated processes: in order, and otherwise as late and in as many pieces as the seed wants."""

from __future__ import annotations

import asyncio
import errno
import os
import random
from collections import deque
from pathlib import Path
from typing import Any

from capsem.simulation.loop import SimLoop, current
from capsem.simulation.process import Process
from capsem.system import ProtocolFactory

QUICK, LATE = 0.001, 1.5  # seconds
LATE_CHANCE = 0.003


def process_now() -> Process:
    """The process that runs."""
    process = current.get()
    assert isinstance(process, Process)
    return process


class End(asyncio.Transport):
    """One end of a stream."""

    def __init__(self, network: SimNetwork, peer: End | None = None) -> None:
        super().__init__()
        self._network = network
        self._peer = peer
        self._process: Process | None = None
        self._protocol: asyncio.Protocol | None = None
        self._inbox: deque[bytes | None] = deque()  # None: the end
        self._closing = self._lost = False
        self.may_break = False
        if peer is not None:
            peer.join(self)

    def join(self, peer: End) -> None:
        """The other end is there."""
        self._peer = peer

    def attach(self, process: Process, protocol: asyncio.Protocol) -> None:
        """From here on it is that process's, and what has come is handed to `protocol`."""
        self._process, self._protocol = process, protocol
        self._network.ends[self] = None
        process.on_buried.append(self._die)
        protocol.connection_made(self)
        for _ in self._inbox:
            self._schedule()

    def write(self, data: Any) -> None:
        """See asyncio.WriteTransport."""
        if data and not self._closing and self._peer is not None and not (self._process and self._process.dead):
            self._peer.deliver(bytes(data))

    def deliver(self, data: bytes | None) -> None:
        """From the peer: bytes, or that there are no more."""
        if not self._lost:
            self._inbox.append(data)
            if self._process is not None:
                self._schedule()

    def _schedule(self) -> None:
        process, loop, dice = self._process, self._network.loop, self._network.dice
        assert process is not None
        chance = dice.random()
        if chance < 0.5:
            loop.call_soon(self._take, context=process.context())
        else:
            limit = LATE if chance > 1 - LATE_CHANCE else QUICK
            loop.call_later(dice.random() * limit, self._take, context=process.context())

    def _take(self) -> None:
        if self._lost or not self._inbox:
            return
        data = self._inbox.popleft()
        if data is None:
            self._lose()
            return
        if len(data) > 1 and self._network.dice.random() < 0.1:
            cut = self._network.dice.randrange(1, len(data))
            self._inbox.appendleft(data[cut:])
            data = data[:cut]
            self._schedule()
        assert self._protocol is not None
        self._protocol.data_received(data)

    def is_closing(self) -> bool:
        """See asyncio.BaseTransport."""
        return self._closing

    def close(self) -> None:
        """See asyncio.BaseTransport."""
        if not self._closing and not (self._process and self._process.dead):
            self._closing = True
            if self._peer is not None:
                self._peer.deliver(None)
            if self._process is not None:
                self._network.loop.call_soon(self._lose, context=self._process.context())

    def abort(self) -> None:
        """See asyncio.WriteTransport."""
        self.close()

    def _lose(self) -> None:
        if self._lost:
            return
        if not self._closing:
            self._closing = True
            if self._peer is not None:
                self._peer.deliver(None)
        self._forget()
        if self._protocol is not None:
            self._protocol.connection_lost(None)

    def cut(self) -> None:
        """The connection breaks: what is on its way is lost, and both ends learn of it, each in its time."""
        for end in (self, self._peer):
            if end is not None:
                end.break_off()

    def break_off(self) -> None:
        """Nothing that was on its way comes, and nothing more goes out."""
        if not self._lost:
            self._inbox.clear()
            self.deliver(None)
            self._closing = True

    def _forget(self) -> None:
        self._lost = True
        self._network.ends.pop(self, None)

    def _die(self) -> None:
        if not self._lost:
            self._forget()
            if not self._closing and self._peer is not None:
                self._peer.deliver(None)
            self._closing = True


class SimListener:
    """A bound socket: a file that stands for it, known by its inode."""

    def __init__(self, network: SimNetwork, process: Process, inode: int, factory: ProtocolFactory) -> None:
        self.process = process
        self.factory = factory
        self._network = network
        self._inode = inode

    def close(self) -> None:
        """See Listener."""
        self._network.listeners.pop(self._inode, None)


class SimNetwork:
    """See capsem.system.Network."""

    def __init__(self, loop: SimLoop, dice: random.Random) -> None:
        self.loop = loop
        self.dice = dice
        self.listeners: dict[int, SimListener] = {}
        self.ends: dict[End, None] = {}  # those that are open

    def pair(self) -> tuple[End, End]:
        """Two connected endpoints, for `attach`."""
        first = End(self)
        return first, End(self, first)

    async def attach(self, endpoint: Any, factory: ProtocolFactory) -> asyncio.Transport:
        """See Network."""
        assert isinstance(endpoint, End)
        endpoint.attach(process_now(), factory())
        return endpoint

    async def connect(self, path: Path, factory: ProtocolFactory) -> asyncio.Transport:
        """See Network."""
        inode = path.stat().st_ino
        await asyncio.sleep(self.dice.random() * QUICK)
        listener = self.listeners.get(inode)
        if listener is None or listener.process.dead:
            raise ConnectionRefusedError(errno.ECONNREFUSED, os.strerror(errno.ECONNREFUSED))
        near, far = self.pair()
        near.may_break = True
        loop = self.loop
        loop.call_soon(lambda: far.attach(listener.process, listener.factory()), context=listener.process.context())
        near.attach(process_now(), factory())
        return near

    async def listen(self, path: Path, factory: ProtocolFactory) -> SimListener:
        """See Network."""
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        inode = os.fstat(fd).st_ino
        os.close(fd)
        listener = self.listeners[inode] = SimListener(self, process_now(), inode, factory)
        return listener
