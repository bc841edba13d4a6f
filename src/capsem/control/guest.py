"""The guest agent's services as coroutines, and the host's end of the handshake."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass

from capsem import tracing
from capsem.control.channel import Channel, Stream, limited
from capsem.model.errors import GuestFailed, Interrupted, TimedOut
from capsem.system import Clock, Entropy
from capsem.wire.decoder import FrameDecoder
from capsem.wire.events import EpochStarted
from capsem.wire.frames import FIRST_NONCE, ProtocolError, make_nonce
from capsem.wire.handshake import DONE, OFFERED, WAITING, HostHandshake, VersionMismatch
from capsem.wire.messages import (
    STDIN,
    STDOUT,
    BootConfig,
    BootReady,
    Exec,
    FileRead,
    FileWritten,
    Freeze,
    GoOn,
    Held,
    Hold,
    Network,
    Ping,
    Pong,
    PowerOff,
    ReadFile,
    Ready,
    Rename,
    ShutdownRequest,
    SuspendRequest,
    Sync,
    Synced,
    Terminal,
    Thaw,
    Thawed,
    WriteFile,
    largest_data,
)
from capsem.wire.schema import Message
from capsem.wire.streams import Mux

_ENTROPY = 64  # bytes for a restored guest's kernel
HANDSHAKE_LIMIT = 10.0  # seconds until a handshake that hangs is begun again
FILE_LIMIT = 30.0  # seconds for a file operation
HELD_AT_MOST = 10.0  # seconds of guest time after which what is held for a checkpoint goes on by itself

log = logging.getLogger("capsem_process.guest")


@dataclass(frozen=True, slots=True)
class Identity:
    """Who the guest is told to be."""

    vm_id: str
    hostname: str
    env: Mapping[str, str]
    machine_id: str | None = None
    token: str | None = None


@dataclass(frozen=True, slots=True)
class Restored:
    """Where the guest of a restored machine stands: the epoch it has completed, the nonce that it waits for, and the
    mark that its memory and its volume should carry, None when it was not left there for sure. `frozen`: its commands
    were held still."""

    epoch: int
    nonce: bytes
    mark: str | None
    frozen: bool = False


class Guest:
    """The host's end of one machine's control channel."""

    def __init__(self, identity: Identity, clock: Clock, entropy: Entropy, restored: Restored | None = None) -> None:
        self.identity = identity
        self.epoch = restored.epoch if restored else 0
        self.boot_id = ""
        self.restarts = 0
        self.on_request: Callable[[Message], None] = lambda _message: None  # ShutdownRequest, SuspendRequest
        self.on_ready: Callable[[bool], None] = lambda _ready: None
        self.on_epoch: Callable[[], None] = lambda: None  # what the guest had open is gone
        self._clock = clock
        self._entropy = entropy
        self._restored = restored
        self._nonce = restored.nonce if restored else FIRST_NONCE
        self._next_nonce = b""
        self._handshake = HostHandshake()
        self._ready = asyncio.Event()
        self._changed = asyncio.Event()  # ready or lost: worth looking again
        self._watchdog: asyncio.TimerHandle | None = None
        self._lost = False
        self._holding = False  # its commands, for a checkpoint
        self._refused: GuestFailed | None = None
        self._offered = 0  # when the handshake's data was sent, see capsem.tracing
        self._pings: dict[int, asyncio.Future[None]] = {}
        self._ping_id = 0
        self.boot_ready: BootReady | None = None
        self.channel = Channel(Mux(FrameDecoder(self._nonce), initiator=True))
        self.channel.on_control = self._control
        self._network = False
        self._authority: str | None = None
        self.channel.on_epoch = self._epoch_started
        self.channel.on_garbage = self._garbage
        self.channel.on_lost = self._connection_lost
        if restored:  # the guest does not know that time has passed: the first word is ours
            self.channel.mux.begin_epoch(self._nonce)

    # -- epochs

    def _epoch_started(self, event: EpochStarted) -> None:
        if event.nonce == self._next_nonce:  # the guest has taken it, though its word of that was lost
            self._nonce, self._next_nonce = self._next_nonce, b""
        self._handshake = HostHandshake()
        self._holding = False  # the handshake's end lets them go
        self.on_epoch()
        self._set_ready(False)

    def _garbage(self, error: ProtocolError) -> None:
        if isinstance(error, VersionMismatch):
            log.error("hanging up: %s", error)
            self._refused = GuestFailed(str(error), hint="rebuild the image: capsem image build --force")
            self.channel.hang_up()
            return
        log.error("garbage from the guest agent, beginning a new epoch: %s", error)
        self._set_ready(False)
        self.channel.drop_streams(Interrupted("the guest agent sent garbage"))
        self._begin_epoch()

    def _begin_epoch(self) -> None:
        self._handshake = HostHandshake()
        self.channel.mux.begin_epoch(self._nonce)
        self.channel.flush()

    def _control(self, message: Message) -> None:
        if isinstance(message, Ping):
            if not self.channel.blocked:  # a guest that asks and does not listen is not answered, nor remembered
                self.channel.control(Pong(id=message.id))
        elif isinstance(message, Pong):
            waiting = self._pings.pop(message.id, None)
            if waiting is not None and not waiting.done():
                waiting.set_result(None)
        elif isinstance(message, (ShutdownRequest, SuspendRequest)):
            self.on_request(message)
        else:
            self._handshake.receive(message)
            if self._handshake.state == WAITING and isinstance(message, Ready):
                self._offer(message)
            elif self._handshake.state == DONE:
                self._finish()

    def _offer(self, ready: Ready) -> None:
        self.boot_id, self.restarts = ready.boot_id, ready.restarts
        self.channel.mux.largest = largest_data(ready.protocol)
        self.epoch += 1
        self._offered = tracing.now()
        # Until the guest has confirmed, its agent may die knowing the present nonce or the next. So there is but one
        # next at a time: an offer that may or may not have been taken is repeated, not replaced.
        self._next_nonce = self._next_nonce or make_nonce(self._entropy.token_bytes)
        self.channel.mux.decoder.arm(self._nonce, self._next_nonce)
        config = BootConfig(
            protocol=ready.protocol,
            vm_id=self.identity.vm_id,
            hostname=self.identity.hostname,
            epoch=self.epoch,
            time=self._clock.time(),
            next_nonce=self._next_nonce.hex(),
            machine_id=self.identity.machine_id,
            token=self.identity.token,
            resumed=self._restored is not None,
            mark=self._restored.mark if self._restored else None,
            entropy=self._entropy.token_bytes(_ENTROPY).hex() if self._restored else None,
            network=self._network,
            authority=self._authority,
        )
        for message in self._handshake.offer(config, dict(self.identity.env)):
            self.channel.mux.control(message)
        self._stop_watchdog()
        self._watchdog = asyncio.get_running_loop().call_later(HANDSHAKE_LIMIT, self._handshake_hangs)

    def _stop_watchdog(self) -> None:
        if self._watchdog is not None:
            self._watchdog.cancel()
            self._watchdog = None

    def _finish(self) -> None:
        self._stop_watchdog()
        self.boot_ready = self._handshake.boot_ready
        assert self.boot_ready is not None
        self._trace_handshake(self.boot_ready.timings)
        for warning in self.boot_ready.warnings:
            log.warning("the restored guest: %s", warning)
        if self._restored and self.boot_ready.problems:
            self._refused = GuestFailed(
                f"the restored machine is not well: {'; '.join(self.boot_ready.problems)}",
                hint="the checkpoint is untouched",
            )
            self.channel.hang_up()
            return
        if self._restored and self._restored.frozen and not self.boot_ready.held:
            log.warning("programs of the restored guest ran before it was told who it is")
        self._restored = None
        self._nonce, self._next_nonce = self._next_nonce, b""
        self.channel.mux.decoder.arm(self._nonce)
        self._set_ready(True)

    def _notify(self) -> None:
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    def _set_ready(self, ready: bool) -> None:
        self._notify()
        if ready != self._ready.is_set():
            (self._ready.set if ready else self._ready.clear)()
            self.on_ready(ready)

    def _connection_lost(self) -> None:
        self._lost = True
        self._stop_watchdog()
        self._set_ready(False)
        for waiting in self._pings.values():
            if not waiting.done():
                waiting.set_exception(Interrupted("the machine is gone"))
        self._pings.clear()

    # -- for the supervisor

    @property
    def is_lost(self) -> bool:
        """Whether the connection is gone, and the machine with it."""
        return self._lost

    @property
    def is_ready(self) -> bool:
        """Whether the handshake of the present epoch is done."""
        return self._ready.is_set()

    async def wait_ready(self, limit: float) -> None:
        """Wait until the handshake is done and no checkpoint is being taken, at most `limit` seconds.

        Raises TimedOut, Interrupted (connection lost), GuestFailed (the agent is of another version).
        """
        try:
            async with asyncio.timeout(limit):
                while not self._ready.is_set() or self._holding:
                    if self._lost:
                        raise self._refused or Interrupted("the machine ended before its guest was ready")
                    await self._changed.wait()
        except TimeoutError:
            raise TimedOut(
                f"the guest was not ready after {limit:.0f} s", hint="`capsem logs` shows its console"
            ) from None

    def _handshake_hangs(self) -> None:
        if self._handshake.state == OFFERED:
            log.warning("the handshake hangs; beginning it again")
            self._begin_epoch()

    async def ping(self, limit: float) -> float:
        """Round trip in seconds; carries the time to the guest. Raises TimedOut, Interrupted."""
        if self._lost:
            raise Interrupted("the machine is gone")
        self._ping_id += 1
        waiting = asyncio.get_running_loop().create_future()
        self._pings[self._ping_id] = waiting
        began = self._clock.monotonic()
        self.channel.control(Ping(id=self._ping_id, time=self._clock.time()))
        try:
            async with asyncio.timeout(limit):
                await waiting
        except TimeoutError:
            raise TimedOut(f"the guest agent did not answer within {limit:.0f} s") from None
        finally:
            self._pings.pop(self._ping_id, None)
        return self._clock.monotonic() - began

    def execute(self, request: Exec | Terminal) -> Stream:
        """Start a command; read its stream. Raises Interrupted, InvalidInput."""
        return self.channel.open(request)

    def power_off(self, grace: float) -> None:
        """Ask the guest to end; the machine's end is the answer."""
        self.channel.control(PowerOff(grace=grace))

    def rename(self, identity: Identity) -> None:
        """The VM has another name from here on."""
        self.identity = identity
        self.channel.control(Rename(vm_id=identity.vm_id, hostname=identity.hostname))

    async def become(self, identity: Identity, limit: float) -> None:
        """Be another VM from here on: identity and environment are handed over in a new epoch, which ends all streams.

        Raises TimedOut, Interrupted: who the guest thinks it is, is not known then.
        """
        self.identity = identity
        self._set_ready(False)
        self._begin_epoch()
        await self.wait_ready(limit)

    def serve_streams(self, opened: Callable[[Stream], None]) -> None:
        """Hand every stream that the guest opens to `opened`; until then they are reset."""
        self.channel.on_open = opened

    def set_network(self, *, on: bool) -> None:
        """Have the guest carry connections of its programs, or refuse them; now, and in every handshake to come."""
        self._network = on
        if self.is_ready and self.captures:
            self.channel.control(Network(on=on))

    def set_authority(self, certificate: str | None) -> None:
        """The authority (PEM) that programs in the guest are to trust, from the next handshake on."""
        self._authority = certificate

    @property
    def captures(self) -> bool:
        """Whether its agent can carry connections: those of older images cannot."""
        return self.boot_ready is not None and self.boot_ready.captures

    @contextlib.asynccontextmanager
    async def frozen(self, limit: float) -> AsyncIterator[None]:
        """All writes to the volume are held inside. Raises GuestFailed when the guest did not hold them to the end."""
        stream = self.channel.open(Freeze(limit=limit))
        held = asyncio.get_running_loop().create_future()
        stream.on_message = lambda message: None if held.done() else held.set_result(message)
        async with limited(stream, "freezing the volume", limit * 3):
            ending = asyncio.ensure_future(stream.result())
            await asyncio.wait((held, ending), return_when=asyncio.FIRST_COMPLETED)
            if not held.done():
                result = await ending
                raise GuestFailed(f"the volume could not be frozen: {result}")
            try:
                yield
            finally:
                stream.send(Thaw())
                thawed = await ending
        assert isinstance(thawed, Thawed)
        if thawed.expired:
            raise GuestFailed(f"the guest thawed its volume after {thawed.duration:.1f} s, before all was done")

    async def read_file(self, path: str, limit: int) -> tuple[bytes, FileRead]:
        """A file's content, up to `limit` bytes. Raises what the guest says; TimedOut."""
        stream = self.channel.open(ReadFile(path=path, limit=limit))
        async with limited(stream, f"reading {path}", FILE_LIMIT):
            content = bytearray()
            while data := await stream.read(STDOUT):
                content += data
            result = await stream.result()
        assert isinstance(result, FileRead)
        if result.size != len(content):
            raise GuestFailed(f"{path}: got {len(content)} bytes of {result.size}")
        return bytes(content), result

    async def write_file(self, path: str, data: bytes, mode: int = 0o644) -> int:
        """Write a file; it is durable in the guest on return. Raises what the guest says; TimedOut."""
        stream = self.channel.open(WriteFile(path=path, mode=mode))
        async with limited(stream, f"writing {path}", FILE_LIMIT):
            await stream.write(STDIN, data)
            stream.end(STDIN)
            result = await stream.result()
        assert isinstance(result, FileWritten)
        return result.size

    def did(self, what: str, seconds: float) -> None:
        """Where a trace is wanted: the guest has just said that it did something for so long."""
        if (trace := tracing.active()) is not None:
            ended = tracing.now()
            trace.add(what, ended - int(seconds * 1e9), ended, guest=f"guest of {self.identity.vm_id}")

    def _trace_handshake(self, timings: Mapping[str, float]) -> None:
        """The handshake, and what the guest says of its part; its last word was spoken about when we hear it."""
        if (trace := tracing.active()) is None:
            return
        ended, name = tracing.now(), f"guest of {self.identity.vm_id}"
        trace.add("handshake", self._offered, ended)
        steps = sorted(timings.items(), key=lambda step: step[1])
        for (_, began), (what, until) in itertools.pairwise(steps):
            ago = steps[-1][1] - until
            done = ended - int(ago * 1e9)
            trace.add(f"until {what}", done - int((until - began) * 1e9), done, guest=name)

    @property
    def next_nonce(self) -> bytes:
        """What begins the next epoch: both ends know it once the guest is ready."""
        return self._nonce

    async def quiesce(self, limit: float, mark: str) -> bool | None:
        """Flush the guest's file systems, `mark` included, and hold the processes of all commands still; whether they are,
        None from an agent that does one at a time: then `hold`. Raises TimedOut, Interrupted, and what the guest says.

        However this ends, nobody is let in until `go_on`; whoever gives it up lets go after that.
        """
        self._holding = True
        stream = self.channel.open(Sync(mark=mark, hold=HELD_AT_MOST))
        async with limited(stream, "sync", limit):
            result = await stream.result()
        assert isinstance(result, Synced)
        return result.frozen

    async def hold(self, limit: float) -> bool:
        """Hold the processes of all commands still; whether they are. Raises TimedOut, Interrupted, Unsupported.

        However this ends, nobody is let in until `go_on`.
        """
        self._holding = True
        stream = self.channel.open(Hold(limit=HELD_AT_MOST))
        async with limited(stream, "holding the commands still", limit):
            result = await stream.result()
        assert isinstance(result, Held)
        return result.frozen

    def go_on(self) -> None:
        """Let go what `hold` holds; nothing happens when it holds nothing."""
        if self._holding:
            self._holding = False
            if not self._lost:
                self.channel.control(GoOn())
            self._notify()
