"""The guest agent: an epoch's handshake, then each stream that the host opens handed to what serves it."""

from __future__ import annotations

import os
import time

from capsem.guest.capture import Capture
from capsem.guest.files import Lister, Reader, Refused, refusal
from capsem.guest.forward import Forwarder
from capsem.guest.freeze import Freezer
from capsem.guest.group import Group
from capsem.guest.health import Health
from capsem.guest.jobs import Jobs
from capsem.guest.loop import Loop, Timer
from capsem.guest.memory import Memory
from capsem.guest.port import Port
from capsem.guest.processes import Command
from capsem.guest.servant import Servant
from capsem.guest.spawner import Spawner
from capsem.guest.system import Bystander
from capsem.guest.terminal import TerminalCommand
from capsem.guest.writer import Rings, Temporary, Writer
from capsem.wire.decoder import FrameDecoder
from capsem.wire.environment import TRUST_ENV, env_problem
from capsem.wire.events import (
    Closed,
    CreditReceived,
    DataReceived,
    EndReceived,
    EpochStarted,
    Event,
    MessageReceived,
    Opened,
    ResetReceived,
)
from capsem.wire.frames import MAX_DATA, ProtocolError
from capsem.wire.handshake import DONE, GuestHandshake
from capsem.wire.messages import (
    PROTOCOL_VERSION,
    BootReady,
    Exec,
    Failed,
    Forget,
    Forgotten,
    Forward,
    Freeze,
    GoOn,
    Held,
    Hold,
    ListDir,
    Network,
    Ping,
    Pong,
    PowerOff,
    ReadFile,
    Ready,
    Reattach,
    Rename,
    ShutdownRequest,
    SuspendRequest,
    Sync,
    Synced,
    Terminal,
    WriteFile,
)
from capsem.wire.schema import Message
from capsem.wire.streams import Mux

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

VERSION = "1"
_NETWORK_TURN, _NETWORK_LIMIT = 0.02, 8.0  # seconds between looks whether connections are redirected, and of patience
# Seconds that the clock may differ from a Ping's before it is stepped. A ping may come late and so make the clock look
# ahead; one that is behind a time that has passed is wrong for sure.
_MAY_BE_AHEAD, _MAY_BE_BEHIND = 0.5, 0.05

# interface.md 6.2
BASE_ENV = {
    "HOME": "/root",
    "TERM": "xterm-256color",
    "PATH": "/opt/ai-clis/bin:/root/.local/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    "LANG": "C",
}


class Agent:
    """Speaks with the host over one port, for as long as the guest runs."""

    def __init__(self, fd: int, *, workspace: str, memory: Memory, system: Bystander, ends: bool) -> None:
        """Announce an epoch on `fd`. `ends`: an end of file on it means that the agent is done (tests)."""
        self._loop = Loop()
        self._workspace = workspace
        self._memory = memory
        self._system = system
        self._health = Health(system.volume)
        self._group = Group(system.groups)
        self._spawner = Spawner(self._group)
        self._held_too_long: Timer | None = None
        self._mux = Mux(FrameDecoder(memory.next_nonce), initiator=False)
        self._mux.largest = MAX_DATA  # a host that speaks this version takes it
        self._handshake = GuestHandshake()
        self._env = dict(BASE_ENV)
        self._servants: dict[int, Servant] = {}
        self._jobs = Jobs()
        self._awaiting_network: Timer | None = None
        self._capture = Capture(self._loop, self._mux, system, self._servants.__setitem__, self._finished)
        self._connections_reset = 0
        self._buffer = memoryview(bytearray(MAX_DATA))
        self._rings = Rings()
        self._temporary = Temporary(memory.directory)
        decoder = self._mux.decoder
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
            self._boot_id = file.read().strip()
        self._port = Port(self._loop, fd, self._receive, self._mux.output, missing=lambda: decoder.missing, ends=ends)
        system.install(self._loop, self._requested)
        self._begin_epoch()

    def run(self) -> int:
        """Serve until told to power off; returns the exit status for PID 1."""
        return self._loop.run(self._turn)

    def _turn(self) -> None:
        self._port.flush()
        self._capture.turn()

    # -- epochs

    def _begin_epoch(self) -> None:
        self._mux.begin_epoch(self._memory.next_nonce)
        self._abandon_connections()
        self._expect_handshake()
        self._send_ready()

    def _send_ready(self) -> None:
        self._mux.control(
            Ready(
                protocol=PROTOCOL_VERSION,
                agent=VERSION,
                boot_id=self._boot_id,
                epoch=self._memory.epoch,
                restarts=self._memory.starts - 1,
            )
        )

    def _expect_handshake(self) -> None:
        self._handshake = GuestHandshake()
        if self._awaiting_network is not None:
            self._awaiting_network.cancel()
            self._awaiting_network = None

    def _epoch_started(self, event: EpochStarted) -> None:
        self._abandon_connections()
        for servant in self._servants.values():
            servant.orphaned()
        self._servants.clear()
        self._stop_waiting_to_go_on()  # it may be another machine by now: its handshake comes first
        self._expect_handshake()
        if not event.answer:
            self._send_ready()

    def _abandon_connections(self) -> None:
        """Of the epoch that is over: before anything else, so that no program waits for what will not come."""
        self._connections_reset += self._capture.abandon()

    def _configured(self) -> None:
        """The handshake's data is complete: become what it says."""
        config, began = self._handshake.config, time.monotonic()
        assert config is not None
        step = self._system.set_clock(config.time)
        reseeded = bool(config.entropy) and self._system.reseed(bytes.fromhex(config.entropy or ""))
        self._system.set_identity(config.machine_id, config.token)
        self._system.set_hostname(config.hostname)
        env = {name: value for name, value in self._handshake.env.items() if not env_problem(name, value)}
        self._env = {
            **BASE_ENV,
            **self._trusting(config.authority),
            **({"TZ": config.timezone} if config.timezone else {}),
            "CAPSEM_VM_ID": config.vm_id,
            "CAPSEM_VM_NAME": config.vm_id,
            **env,
        }
        self._memory.epoch = config.epoch
        self._memory.next_nonce = self._handshake.next_nonce
        self._memory.save()
        self._mux.decoder.arm(self._handshake.next_nonce)
        if not config.resumed:
            self._let_go()
            self._report(step, {}, until=began + _NETWORK_LIMIT)
            return
        # On the loop's thread, though a volume that is not well may never answer: then this machine is of no use, the
        # host has a limit, and nothing but this handshake is to be answered.
        taken = time.monotonic()
        problems, warnings = self._health.examine(config.mark)
        ready = time.monotonic()
        held = self._let_go()
        timings = {"configured": began, "taken": taken, "ready": ready, "released": time.monotonic()}
        self._report(step, timings, problems=problems, warnings=warnings, reseeded=reseeded, held=held)

    def _trusting(self, authority: str | None) -> dict[str, str]:
        """Have programs trust the host's authority; what tells them to."""
        if authority is None:
            return {}
        try:
            self._system.trust(authority)
        except OSError as error:  # its owner has made the bundle something else: all but TLS works
            log(f"programs do not trust the host's authority: {error}")
        return TRUST_ENV

    def _report(self, step: float, timings: dict[str, float], *, until: float = 0.0, **health: Any) -> None:
        """Say that everything is in place. The first time after a boot, redirection of connections may be about to be, and
        what is run now could not connect: then a little later, but not after `until`."""
        config, now = self._handshake.config, time.monotonic()
        assert config is not None
        if config.network and now < until and not self._system.network_ready():
            self._awaiting_network = self._loop.after(
                _NETWORK_TURN, lambda: self._report(step, timings, until=until, **health)
            )
            return
        reset, self._connections_reset = self._connections_reset, 0
        self._mux.control(
            BootReady(
                epoch=config.epoch,
                clock_step=step,
                timings=timings or {"ready": now},
                written=self._written(),
                captures=self._system.captures,
                reset=reset,
                **health,
            )
        )
        self._capture.set_open(config.network and self._system.captures)

    def _written(self) -> dict[str, float]:
        written, self._system.written = self._system.written, {}
        return written

    # -- events

    def _receive(self, buffer: bytearray, size: int) -> None:
        left: bytearray | bytes | None = buffer
        while left is not None:
            try:
                for event in self._mux.receive(left, size):
                    self._dispatch(event)
                left = None
            except ProtocolError as error:
                # The way out of garbage, for both ends: a new epoch, from the nonce that only it can have.
                log(f"protocol error: {error}; beginning a new epoch")
                self._begin_epoch()
                left, size = b"", 0  # the host's own way out may be in what came with it

    def _dispatch(self, event: Event) -> None:
        if isinstance(event, EpochStarted):
            self._epoch_started(event)
        elif not event.stream:
            assert isinstance(event, MessageReceived)
            self._control(event.message)
        elif isinstance(event, Opened):
            self._open(event.stream, event.message)
        else:
            servant = self._servants.get(event.stream)
            if servant is None:
                pass
            elif event.stream % 2:
                self._guarded(event.stream, lambda: self._serve(servant, event))
            else:  # ours: there is nobody to tell of what goes wrong but the program, which is told by the connection
                self._serve(servant, event)

    def _serve(self, servant: Servant, event: Event) -> None:
        if isinstance(event, DataReceived):
            servant.feed(event.data)
        elif isinstance(event, CreditReceived):
            servant.credit(event.channel)
        elif isinstance(event, EndReceived):
            servant.feed_end()
        elif isinstance(event, ResetReceived):
            self._servants.pop(event.stream, None)
            servant.cancelled()
        elif isinstance(event, Closed):
            self._servants.pop(event.stream, None)
            servant.closed(event.message)
        elif isinstance(event, MessageReceived):
            servant.message(event.message)

    def _guarded(self, stream: int, call: Callable[[], None], path: str = "") -> None:
        """A request that fails closes its stream with the reason, and nothing else happens."""
        try:
            call()
        except (Refused, OSError, ValueError, OverflowError) as error:
            servant = self._servants.pop(stream, None)
            if servant is not None:
                servant.cancelled()
            request = self._mux.request(stream)
            self._mux.close(stream, refusal(error, path or getattr(request, "path", "request")))

    def _control(self, message: Message) -> None:
        if isinstance(message, Ping):
            if message.time is not None and not -_MAY_BE_BEHIND <= time.time() - message.time <= _MAY_BE_AHEAD:
                self._system.set_clock(message.time)
            self._mux.control(Pong(id=message.id))
        elif isinstance(message, Pong):
            pass
        elif isinstance(message, Rename) and self._handshake.state == DONE:
            self._system.set_hostname(message.hostname)
            self._env |= {"CAPSEM_VM_ID": message.vm_id, "CAPSEM_VM_NAME": message.vm_id}
        elif isinstance(message, Network) and self._handshake.state == DONE:
            self._capture.set_open(message.on and self._system.captures)
        elif isinstance(message, GoOn):
            self._let_go()
        elif isinstance(message, PowerOff) and self._handshake.state == DONE:
            self._let_go()
            self._system.power_off(self._loop, message.grace)
        elif self._handshake.receive(message):
            self._configured()

    def _requested(self, action: str) -> None:
        """Somebody in the guest wrote to the lifecycle FIFO."""
        if self._handshake.state == DONE and action in ("shutdown", "suspend"):
            self._mux.control(ShutdownRequest() if action == "shutdown" else SuspendRequest())

    # -- requests

    def _open(self, stream: int, request: Message) -> None:
        if self._handshake.state != DONE:
            raise ProtocolError(f"{request.tag} before the handshake")
        self._guarded(stream, lambda: self._start(stream, request))

    def _start(self, stream: int, request: Message) -> None:
        if isinstance(request, (Exec, Terminal)):
            self._servants[stream] = self._command(stream, request)
        elif isinstance(request, Reattach):
            command = self._jobs.find(request.job)
            offsets = command.place(request)
            self._servants[stream] = command
            command.attach(stream, offsets)
        elif isinstance(request, Forget):
            self._jobs.forget(request.job)
            self._mux.close(stream, Forgotten())
        elif isinstance(request, Forward):
            self._servants[stream] = Forwarder(self._loop, self._mux, stream, request, self._finished)
        elif isinstance(request, ReadFile):
            self._servants[stream] = Reader(self._mux, stream, request, self._workspace, self._buffer, self._finished)
        elif isinstance(request, WriteFile):
            self._servants[stream] = Writer(
                self._loop, self._mux, stream, request, self._workspace, self._rings, self._temporary, self._finished
            )
        elif isinstance(request, ListDir):
            self._servants[stream] = Lister(self._loop, self._mux, stream, request, self._workspace, self._finished)
        elif isinstance(request, Freeze):
            freezer = Freezer(self._loop, self._mux, stream, request.limit, self._system.volume, self._finished)
            self._servants[stream] = freezer
        elif isinstance(request, Sync):
            self._sync(stream, request)
        elif isinstance(request, Hold):
            self._hold(request.limit, lambda frozen: self._mux.close(stream, Held(frozen=frozen)))
        else:
            self._mux.close(stream, Failed(code="unsupported", message=f"this agent does not serve {request.tag}"))

    def _sync(self, stream: int, request: Sync) -> None:
        began, mark, limit = time.monotonic(), request.mark, request.hold

        def synced(error: Exception | None) -> None:
            duration = time.monotonic() - began
            if error:
                self._mux.close(stream, refusal(error, "the volume"))
            elif limit is None or self._mux.request(stream) is None:  # whoever gave it up may have let go already
                self._mux.close(stream, Synced(duration=duration))
            else:
                self._hold(limit, lambda frozen: self._mux.close(stream, Synced(duration=duration, frozen=frozen)))

        self._loop.offload(lambda: self._health.sync(mark), synced)

    def _hold(self, limit: float, then: Callable[[bool], None]) -> None:
        self._let_go()
        self._group.hold()
        # While the machine stands still its clock does too: this counts what of `limit` it was awake for.
        self._held_too_long = self._loop.after(limit, self._let_go)

        self._loop.offload(self._group.freeze, lambda frozen: then(frozen is True))

    def _let_go(self) -> bool:
        self._stop_waiting_to_go_on()
        return self._group.let_go()

    def _stop_waiting_to_go_on(self) -> None:
        if self._held_too_long is not None:
            self._held_too_long.cancel()
            self._held_too_long = None

    def _command(self, stream: int, request: Exec | Terminal) -> Command:
        self._jobs.check_new(request.job)
        for name, value in request.env.items():
            if problem := env_problem(name, value):
                raise Refused("invalid_input", problem)
        if "\0" in request.command:
            raise Refused("invalid_input", "the command contains NUL")
        if self._group.held:
            raise Refused("unavailable", "a checkpoint is being made: nothing is started now")
        cwd = request.cwd or self._workspace
        if not os.path.isdir(cwd):
            raise Refused("invalid_input", f"working directory {cwd}: no such directory")
        kind = Command if isinstance(request, Exec) else TerminalCommand
        command = kind(
            self._loop,
            self._mux,
            stream,
            request,
            {**self._env, **request.env},
            cwd,
            self._spawner,
            self._jobs.ended,
            self._finished,
        )
        self._jobs.started(command)
        return command

    def _finished(self, stream: int) -> None:
        self._servants.pop(stream, None)


def log(text: str) -> None:
    """A line on standard error, which is the guest's console."""
    os.write(2, f"capsem-agent: {text}\n".encode(errors="replace"))
