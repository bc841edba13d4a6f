"""The simulated guest's agent: the wire protocol as `capsem.guest.agent` speaks it, on a machine that is a script."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import cast

from capsem.guest.files import Refused, refusal
from capsem.hypervisor.sim import plan
from capsem.hypervisor.sim.filesystem import WORKSPACE, Board, FileSystem, workspace_path
from capsem.hypervisor.sim.jobs import Jobs
from capsem.hypervisor.sim.memory import Memory
from capsem.hypervisor.sim.plan import Dice
from capsem.hypervisor.sim.timers import Alarm, Timers
from capsem.hypervisor.sim.volume import Disk, File
from capsem.wire import frames
from capsem.wire.decoder import FrameDecoder
from capsem.wire.events import (
    CreditReceived,
    DataReceived,
    EndReceived,
    EpochStarted,
    Event,
    MessageReceived,
    Opened,
    ResetReceived,
)
from capsem.wire.frames import ProtocolError
from capsem.wire.handshake import DONE, GuestHandshake
from capsem.wire.messages import (
    PROTOCOL_VERSION,
    STDIN,
    STDOUT,
    BootReady,
    DirListed,
    Exec,
    Failed,
    FileFound,
    FileRead,
    FileWritten,
    Forget,
    Forgotten,
    Freeze,
    Frozen,
    GoOn,
    Held,
    Hold,
    ListDir,
    Ping,
    Pong,
    PowerOff,
    ReadFile,
    Ready,
    Reattach,
    Rename,
    Signal,
    Sync,
    Synced,
    Thaw,
    Thawed,
    WriteFile,
)
from capsem.wire.schema import Message
from capsem.wire.streams import Mux

BOOT = 0.02  # seconds of guest time from the first instruction to the agent's first word
EXAMINATION = 0.01  # and for it to look whether all is well
CLOCK_MAY_DIFFER = 0.05
AGENT = "sim"


class Guest(asyncio.Protocol):
    """One guest; `run` and `pause` are its machine's."""

    def __init__(self, memory: Memory, disk: Disk, board: Board, dice: Dice, *, restored: bool) -> None:
        self.memory = memory
        self.timers = Timers(memory.uptime)
        self.files = FileSystem(memory, disk, board, dice, self.timers)
        self._board = board
        self._dice = dice
        self._restored = restored
        self._hangs = restored and dice.strikes(plan.RESTORE_HANGS)
        self._begun = False
        self._transport: asyncio.Transport | None = None
        self._unread = b""
        self._jobs = Jobs(memory, self.files, self.timers, ask=self._ask, flush=self.flush)
        self._uploads: dict[int, bytearray] = {}
        self._thaws: dict[int, Callable[[bool], None]] = {}
        self._held_too_long: Alarm | None = None
        self._connect()

    def _connect(self) -> None:
        """What an agent has when it starts."""
        self._mux = Mux(FrameDecoder(bytes.fromhex(self.memory.next_nonce)), initiator=False)
        self._handshake = GuestHandshake()
        self._jobs.connect(self._mux)
        self._uploads.clear()

    # -- the machine's

    def run(self) -> None:
        """The vCPUs run."""
        self.timers.run()
        if not self._begun:
            self._begun = True
            if self._restored:
                self._jobs.wake()
            else:
                self._board.print("capsem: simulated guest starting")
                self.timers.after(BOOT, self._begin_epoch)
        self.files.go_on()
        data, self._unread = self._unread, b""
        self._receive(data)

    def pause(self) -> None:
        """They stand still."""
        self.timers.pause()
        self.memory.uptime = self.timers.now

    # -- asyncio.Protocol: the control channel

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """See asyncio.Protocol."""
        self._transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        """See asyncio.Protocol. What comes while the machine stands still waits in the channel."""
        if self.timers.running:
            self._receive(data)
        else:
            self._unread += data

    def hang_up(self) -> None:
        """The machine is gone."""
        self.timers.pause()
        if self._transport is not None:
            self._transport.abort()

    def _receive(self, data: bytes) -> None:
        if self._hangs:
            return
        left: bytes | None = data
        while left is not None:
            try:
                for event in self._mux.receive(left):
                    self._dispatch(event)
                left = None
            except ProtocolError:
                self._begin_epoch()
                left = b""
        self.flush()

    def flush(self) -> None:
        """Hand everything to the host."""
        while self.timers.running and self._transport is not None and (data := b"".join(self._mux.output())):
            if self._handshake.state == DONE and self._dice.strikes(plan.CUT):
                self._transport.write(data[: self._dice.below(len(data))])
                self._restart()
            elif self._handshake.state == DONE and self._dice.strikes(plan.GARBAGE):
                self._transport.write(data + bytes(self._dice.below(256) for _ in range(40)))
            else:
                self._transport.write(data)

    def _restart(self) -> None:
        """The agent has died: PID 1 starts another one."""
        self.memory.restarts += 1
        self._jobs.forget_all()
        self._connect()
        self._begin_epoch()

    # -- epochs

    def _begin_epoch(self) -> None:
        self._mux.begin_epoch(bytes.fromhex(self.memory.next_nonce))
        self._handshake = GuestHandshake()
        self._send_ready()
        self.flush()

    def _send_ready(self) -> None:
        memory = self.memory
        self._mux.control(
            Ready(
                protocol=PROTOCOL_VERSION,
                agent=AGENT,
                boot_id=memory.boot_id,
                epoch=memory.epoch,
                restarts=memory.restarts,
            )
        )

    def _epoch_started(self, event: EpochStarted) -> None:
        if self._dice.strikes(plan.STALE) and self._transport is not None:
            old = frames.encode(frames.DATA, 1, STDOUT, b"of the epoch before")
            self._transport.write(old + old[: self._dice.below(len(old))])
        self._jobs.connect(self._mux)
        self._uploads.clear()
        for thaw in list(self._thaws.values()):
            thaw(False)
        self._handshake = GuestHandshake()
        if not event.answer:
            self._send_ready()

    def _configured(self) -> None:
        config, handshake, memory = self._handshake.config, self._handshake, self.memory
        assert config is not None
        if self._dice.strikes(plan.DIES):
            self._board.panic()
            return
        step = self._set_clock(config.time)
        memory.machine_id, memory.token = config.machine_id or memory.machine_id, config.token or memory.token
        memory.hostname = config.hostname
        memory.env = {"CAPSEM_VM_ID": config.vm_id, "CAPSEM_VM_NAME": config.vm_id, **handshake.env}
        memory.epoch, memory.next_nonce = config.epoch, handshake.next_nonce.hex()
        self._mux.decoder.arm(handshake.next_nonce)
        resumed, mark = config.resumed, config.mark

        def answer() -> None:
            if self._handshake is not handshake:  # the host did not wait for it, and began anew
                return
            problems = self.files.examine(mark) if resumed else []
            held = self._let_go()
            ready = BootReady(
                epoch=config.epoch,
                clock_step=step,
                timings={"ready": self.timers.now},
                problems=problems,
                reseeded=resumed and config.entropy is not None,
                held=held,
            )
            for _ in range(2 if self._dice.strikes(plan.DUPLICATE) else 1):
                self._mux.control(ready)
            self.flush()
            self._board.ready()

        self.timers.after(EXAMINATION if resumed else 0.0, answer)

    def _set_clock(self, now: float) -> float:
        """Step the wall clock if it is off; returns by how many seconds."""
        step = now - (self.memory.wall + self.timers.now)
        if abs(step) <= CLOCK_MAY_DIFFER:
            return 0.0
        self.memory.wall += step
        return step

    # -- events

    def _dispatch(self, event: Event) -> None:
        if isinstance(event, EpochStarted):
            self._epoch_started(event)
        elif isinstance(event, Opened):
            if self._handshake.state != DONE:
                raise ProtocolError(f"{event.message.tag} before the handshake")
            self._open(event.stream, event.message)
        elif isinstance(event, MessageReceived):
            if event.stream:
                self._message(event.stream, event.message)
            else:
                self._control(event.message)
        elif isinstance(event, DataReceived):
            self._uploads.get(event.stream, bytearray()).extend(event.data)
            self._mux.consumed(event.stream, event.channel, len(event.data))
        elif isinstance(event, CreditReceived):
            self._jobs.credit(event.stream, event.channel)
        elif isinstance(event, EndReceived):
            if event.stream in self._uploads and event.channel == STDIN:
                self._written(event.stream)
        elif isinstance(event, ResetReceived):
            self._uploads.pop(event.stream, None)
            self._jobs.give_up(event.stream)
            if event.stream in self._thaws:
                self._thaws[event.stream](False)

    def _message(self, stream: int, message: Message) -> None:
        if isinstance(message, Signal):
            self._jobs.signal(stream, message.number)
        elif isinstance(message, Thaw) and stream in self._thaws:
            self._thaws[stream](False)

    def _control(self, message: Message) -> None:
        if isinstance(message, Ping):
            if message.time is not None:
                self._set_clock(message.time)
            for _ in range(2 if self._dice.strikes(plan.DUPLICATE) else 1):
                self._mux.control(Pong(id=message.id))
        elif isinstance(message, Pong):
            pass
        elif isinstance(message, Rename) and self._handshake.state == DONE:
            self.memory.hostname = message.hostname
            self.memory.env |= {"CAPSEM_VM_ID": message.vm_id, "CAPSEM_VM_NAME": message.vm_id}
        elif isinstance(message, GoOn):
            self._let_go()
        elif isinstance(message, PowerOff) and self._handshake.state == DONE:
            self._let_go()
            self.files.sync(lambda _error: self._board.power_off())
        elif self._handshake.receive(message):
            self._configured()

    def _ask(self, message: Message) -> None:
        if self._handshake.state == DONE:
            self._mux.control(message)
            self.flush()

    # -- requests

    def _open(self, stream: int, request: Message) -> None:
        try:
            self._start(stream, request)
        except (Refused, OSError, ValueError) as error:
            self._mux.close(stream, refusal(error, getattr(request, "path", "request")))

    def _start(self, stream: int, request: Message) -> None:
        if isinstance(request, Exec):
            self._jobs.start(stream, request, self.memory.env)
        elif isinstance(request, Reattach):
            self._jobs.reattach(stream, request)
        elif isinstance(request, Forget):
            self._jobs.forget(request.job)
            self._mux.close(stream, Forgotten())
        elif isinstance(request, ReadFile):
            self._read(stream, request)
        elif isinstance(request, WriteFile):
            workspace_path(request.path)
            self._uploads[stream] = bytearray()
        elif isinstance(request, ListDir):
            self._list(stream, request)
        elif isinstance(request, Sync):
            began = self.timers.now
            self.files.mark(
                request.mark,
                lambda error: self._synced(stream, request, self.timers.now - began, error),
            )
        elif isinstance(request, Hold):
            self._hold(request.limit)
            self._mux.close(stream, Held(frozen=True))
        elif isinstance(request, Freeze):
            self._freeze(stream, request.limit)
        else:
            self._mux.close(stream, Failed(code="unsupported", message=f"this agent does not serve {request.tag}"))

    def _close(self, stream: int, result: Message) -> None:
        self._mux.close(stream, result)
        self.flush()

    def _read(self, stream: int, request: ReadFile) -> None:
        file = self.files.get(workspace_path(request.path))
        size = len(file.data)
        if request.limit is not None and size > request.limit:
            raise Refused(
                "payload_too_large",
                f"{request.path}: {size} bytes, more than {request.limit}",
                "copy it with `capsem cp`",
            )
        if request.announce:
            self._mux.message(stream, FileFound(size=size, mode=file.mode))
        self._mux.send(stream, STDOUT, file.data)
        self._mux.close(stream, FileRead(size=size, mode=file.mode))

    def _written(self, stream: int) -> None:
        request, data = self._mux.request(stream), bytes(self._uploads.pop(stream))
        assert isinstance(request, WriteFile)
        file = File(data, request.mode & 0o777, int(self.memory.wall + self.timers.now))
        path = workspace_path(request.path)

        def then(error: OSError | None) -> None:
            self._close(stream, refusal(error, request.path) if error else FileWritten(size=len(data)))

        self.files.put(path, file)
        self.files.sync(then)

    def _list(self, stream: int, request: ListDir) -> None:
        top = WORKSPACE if request.path in ("", ".", "/root") else workspace_path(request.path)
        found: dict[str, list[object]] = {}
        for path in self.files.names():
            if path.startswith(f"{top}/"):
                parts = path[len(top) + 1 :].split("/")
                for depth in range(1, min(len(parts), request.depth) + 1):
                    name, file = "/".join(parts[:depth]), self.files.get(path)
                    is_file = depth == len(parts)
                    found[name] = [name, "file" if is_file else "directory", len(file.data) * is_file, file.mtime]
        if not found and top != WORKSPACE:
            raise Refused("not_found", f"{request.path}: no such file or directory")
        self._mux.send(stream, STDOUT, json.dumps(list(found.values())).encode())
        self._mux.close(stream, DirListed(entries=len(found)))

    def _synced(self, stream: int, request: Sync, duration: float, error: OSError | None) -> None:
        holds = request.hold is not None and error is None and self._mux.request(stream) is not None
        if request.hold is not None and holds:
            self._hold(request.hold)
        done = Synced(duration=duration, frozen=True if holds else None)
        self._close(stream, refusal(error, "the volume") if error else done)

    def _hold(self, limit: float) -> None:
        self._let_go()
        self.memory.held = True
        self._held_too_long = self.timers.after(limit, self._let_go_late)

    def _let_go_late(self) -> None:
        self._let_go()

    def _let_go(self) -> bool:
        if self._held_too_long is not None:
            self._held_too_long.cancel()
            self._held_too_long = None
        held, self.memory.held = self.memory.held, False
        if held:
            self._jobs.wake()
        return held

    def _freeze(self, stream: int, limit: float) -> None:
        began = self.timers.now

        def thaw(expired: bool) -> None:
            alarm.cancel()
            del self._thaws[stream]
            self.files.go_on()
            self._close(stream, Thawed(duration=self.timers.now - began, expired=expired))

        def frozen(error: OSError | None) -> None:
            if error is not None:
                self._close(stream, refusal(error, "the volume"))
            elif self._mux.request(stream) is not None:
                self.files.freeze()
                self._thaws[stream] = thaw
                self._mux.message(stream, Frozen())
                self.flush()

        alarm = self.timers.after(limit, lambda: thaw(True) if stream in self._thaws else None)
        self.files.sync(frozen)
