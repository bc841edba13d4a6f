"""Every stream that a guest opens comes in here: its first bytes tell what it speaks, and policy what becomes of it."""

from __future__ import annotations

import asyncio
import logging
from typing import Final

from capsem.egress.admit import Admission
from capsem.egress.connected import Connected
from capsem.egress.dial import Dialer
from capsem.egress.door import Door
from capsem.egress.events import NetEvent, Recorder
from capsem.egress.lookups import Lookups
from capsem.egress.mint import Minter
from capsem.egress.names import NameTable
from capsem.egress.parts import Asker, Broker, Judge, Taps
from capsem.egress.pool import Pool
from capsem.egress.resolve import Resolver
from capsem.egress.stream import GuestStream
from capsem.system import Clock

STREAMS: Final = 512

log = logging.getLogger("capsem.egress")


class Egress:
    """The way out of one VM, for one of its epochs. `close` ends the epoch: nothing of it is used in the next.

    `minter` makes certificates, `clock` tells the time for the record. Without `asker` what must be asked is denied; without
    `broker` there are no secrets, without `taps` nobody listens in. `names` may come from a checkpoint.
    """

    def __init__(
        self,
        *,
        judge: Judge,
        resolver: Resolver,
        dialer: Dialer,
        minter: Minter,
        recorder: Recorder,
        clock: Clock,
        asker: Asker | None = None,
        broker: Broker | None = None,
        taps: Taps | None = None,
        names: NameTable | None = None,
    ) -> None:
        admission = Admission(judge, asker, resolver)
        self._door = Door(admission, dialer, Pool(), broker, taps, recorder, clock)
        self._minter = minter
        self._names = NameTable() if names is None else names
        self._lookups = Lookups(self._door, resolver, self._names)
        self._serving: set[asyncio.Task[object]] = set()
        self._closed = False

    async def serve(self, stream: GuestStream) -> None:
        """Carry a stream to its end, whatever comes of it. Raises nothing but CancelledError, which `close` causes."""
        if self._closed or len(self._serving) >= STREAMS:
            self._refuse(stream, "the epoch is over" if self._closed else f"{STREAMS} streams are open already")
            return
        if not 0 < stream.connection.port < 65536:
            self._refuse(stream, f"there is no port {stream.connection.port}")
            return
        task = asyncio.current_task()
        assert task is not None
        self._serving.add(task)
        try:
            await Connected(self._door, self._minter, self._names, stream).serve()
        except ConnectionError:
            pass  # it is recorded where it is known what it means
        except Exception:
            log.exception("a stream is reset: an error of ours")
        finally:
            self._serving.discard(task)
            stream.abort()

    async def resolve(self, query: bytes, process: str | None = None) -> bytes:
        """The answer to a guest's question of DNS, a datagram each; b"" where there is none to give. `process` is a label for
        the record. Raises nothing."""
        return b"" if self._closed else await self._lookups.answer(query, process)

    def _refuse(self, stream: GuestStream, why: str) -> None:
        connection = stream.connection
        event = NetEvent(self._door.clock.time(), None, connection.port, process_name=connection.process, error=why)
        self._door.recorder.net(event)
        stream.abort()

    def reload(self, judge: Judge | None = None, dialer: Dialer | None = None) -> None:
        """Another policy holds from now on (or the judge has changed by itself). Connections go on, and their next requests are
        judged by it; those whose bytes pass unread are cut when it does not allow them any more. `dialer` makes the new
        connections, for other authorities, client certificates or proxies: no idle one is used again then."""
        admission = self._door.admission
        if judge is not None:
            admission.judge = judge
        if dialer is not None:
            self._door.dialer = dialer
            self._door.pool.forget_idle()
        for splice, allowed in list(self._door.splices.items()):
            if not allowed(admission.judge):
                splice.cut("a new policy does not allow it")

    async def close(self) -> None:
        """The epoch is over: every stream is reset, and recorded as interrupted."""
        self._closed = True
        serving = list(self._serving)
        for task in serving:
            task.cancel()
        await asyncio.gather(*serving, return_exceptions=True)
        self._door.pool.close()
        await asyncio.sleep(0)  # the event loop closes what was aborted
