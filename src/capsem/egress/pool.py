"""Connections to origins that a VM shares: how many there are, and which of them can be used again.

They belong to an epoch of a VM, as the whole of the pool does: nothing of it crosses a suspend or a fork.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Final

from capsem.egress.dial import DialError, Dialled, Target
from capsem.egress.peer import Peer
from capsem.egress.tls import TlsStream

LIMIT: Final = 64
PATIENCE: Final = 30.0  # seconds of waiting for a place
_IDLE: Final = 60.0  # seconds


class Upstream(Peer):
    """A connection to an origin on which one request at a time is made. `used` counts those that were.
    `proxied`: it goes by way of a proxy of the host's, whose address says nothing of the origin."""

    def __init__(self, target: Target, dialled: Dialled, *, proxied: bool = False) -> None:
        super().__init__(dialled.stream, dialled.received)
        self.proxied = proxied
        self.target = target
        self.dialled = dialled
        self.used = 0
        self.since = 0.0  # when it was put back, seconds

    def quiet(self) -> bool:
        """Whether the origin has said nothing since its last answer: an answer to no question is not to be the next one's."""
        socket = self.dialled.socket
        if self.rest():
            return False
        if isinstance(self.stream, TlsStream) and socket.waiting:
            return self.stream.digest() and not socket.ended
        return not socket.waiting and not socket.ended


class Pool:
    """At most `limit` connections, used or idle. Who waits for one is served in order."""

    def __init__(self, limit: int = LIMIT) -> None:
        self._limit = limit
        self._open: set[Upstream] = set()
        self._idle: dict[Target, deque[Upstream]] = {}
        self._promised = 0  # places of connections that are being made
        self._waiting: deque[asyncio.Future[None]] = deque()

    def take(self, target: Target) -> Upstream | None:
        """An idle connection there that is still good, the last used first."""
        idle = self._idle.get(target)
        now = asyncio.get_running_loop().time()
        while idle:
            upstream = idle.pop()
            if now - upstream.since < _IDLE and upstream.quiet():
                return upstream
            self.drop(upstream)
        self._idle.pop(target, None)
        return None

    async def reserve(self) -> Callable[[Upstream | None], None]:
        """A place for a connection that is about to be made: the caller says in the end which it was, None for none. Raises
        DialError when there is none for long."""
        if self._promised + len(self._open) >= self._limit and not self._evict():
            waiter = asyncio.get_running_loop().create_future()
            self._waiting.append(waiter)
            try:
                async with asyncio.timeout(PATIENCE):
                    await waiter  # the place comes with it
            except TimeoutError as error:
                raise DialError(f"all {self._limit} connections of this VM are in use", 503) from error
            except BaseException:
                if waiter.done() and not waiter.cancelled():
                    self._promised -= 1
                    self._hand_on()
                raise
        else:
            self._promised += 1

        def filled(upstream: Upstream | None) -> None:
            self._promised -= 1
            if upstream is not None:
                self._open.add(upstream)
            else:
                self._hand_on()

        return filled

    def put(self, upstream: Upstream) -> None:
        """It can be used again."""
        if upstream not in self._open:
            return
        upstream.since = asyncio.get_running_loop().time()
        self._idle.setdefault(upstream.target, deque()).append(upstream)
        if self._waiting:
            self._evict()
            self._hand_on()

    def drop(self, upstream: Upstream) -> None:
        """It cannot."""
        upstream.stream.abort()
        if upstream in self._open:
            self._open.discard(upstream)
            self._hand_on()

    def forget_idle(self) -> None:
        """Use no connection again that is idle now."""
        while self._evict():
            self._hand_on()

    def _evict(self) -> bool:
        """Close the idle connection that was not used for longest; False if none is idle."""
        oldest = min((idle[0] for idle in self._idle.values() if idle), key=lambda each: each.since, default=None)
        if oldest is None:
            return False
        self._idle[oldest.target].popleft()
        if not self._idle[oldest.target]:
            del self._idle[oldest.target]
        self._open.discard(oldest)
        oldest.stream.abort()
        return True

    def _hand_on(self) -> None:
        while self._waiting and self._promised + len(self._open) < self._limit:
            waiter = self._waiting.popleft()
            if not waiter.done():
                self._promised += 1
                waiter.set_result(None)

    def close(self) -> None:
        """Break every connection."""
        for upstream in self._open:
            upstream.stream.abort()
        self._open.clear()
        self._idle.clear()
