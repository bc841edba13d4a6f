"""`capsem.Sandbox`: a VM, and what can be done with it. Every method blocks until it is done."""

from __future__ import annotations

import builtins
import contextlib
import os
import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TypeVar

from capsem.api.checkpoint_types import CheckpointInfo, CheckpointResponse, RollbackResponse, SuspendResponse
from capsem.api.exec_types import JobInfo
from capsem.api.file_types import FileEntry
from capsem.api.vm_types import LogsResponse, SandboxInfo
from capsem.client.forward import Forwarding
from capsem.client.sync import Client, receive
from capsem.client.transfer import Download, upload
from capsem.config import Paths
from capsem.model.errors import NotFound, TimedOut
from capsem.sdk import core
from capsem.sdk.core import Call, Command, Conversation, Data, Exchange, Progress
from capsem.sdk.network import Network
from capsem.sdk.types import Output, Result

T = TypeVar("T")


def default_client() -> Client:
    """A client of this user's service, as CAPSEM_HOME and its like say; it starts the service when none runs."""
    paths = Paths.from_environment(os.environ)

    def start() -> None:
        from capsem.client.service import start as start_service

        start_service(paths, os.environ)

    return Client(paths.socket, start=start)


class Transport:
    """Carries out exchanges and conversations, each on a connection of its own; for several threads at once."""

    def __init__(self, client: Client | None) -> None:
        self.client = client or default_client()

    def call(self, call: Call[T], timeout: float | None = None) -> T:
        """The outcome of a call. Raises TimedOut after `timeout` seconds, or those that the operation is given."""
        exchange = Exchange(call)
        limit = _Limit(timeout if timeout is not None else call.within)
        with self.client.connect() as connection, limit:
            connection.settimeout(limit.left())
            # A service that refuses answers and closes before it has read everything: the answer is there.
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                connection.sendall(exchange.to_send)
            while not exchange.answer.done:
                exchange.take(receive(connection, exchange.answer, limit.left()))
            return exchange.outcome()

    def follow(self, conversation: Conversation, timeout: float | None = None) -> Iterator[Output]:
        """The output of a command as it comes. Closing it hangs up. Raises what ended the command, or TimedOut."""
        limit = _Limit(timeout)
        with self.client.connect() as connection, limit:
            while not conversation.answer.done:
                connection.settimeout(limit.left())
                with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # it has ended; how is there to read
                    connection.sendall(conversation.to_send())
                yield from conversation.take(receive(connection, conversation.answer, limit.left()))
        conversation.outcome()


class _Limit:
    """So many seconds from now; what takes longer becomes TimedOut."""

    def __init__(self, seconds: float | None) -> None:
        self._seconds = seconds
        self._deadline = None if seconds is None else time.monotonic() + seconds

    def left(self) -> float | None:
        return None if self._deadline is None else max(0.001, self._deadline - time.monotonic())

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, _kind: type[BaseException] | None, error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        if isinstance(error, TimeoutError) and not isinstance(error, TimedOut):
            raise too_slow(self._seconds) from error


def too_slow(seconds: float | None) -> TimedOut:
    """The error of a caller whose patience is at its end."""
    return TimedOut(
        f"not done within {seconds:g} s", hint="what was begun may go on: look how things stand before you repeat it"
    )


class Sandbox:
    """A VM. `id` is its name, or the one it was given.

    `Sandbox.create()` makes one, `Sandbox.connect(id)` finds one. As a context manager it deletes a VM that is not
    persistent when the block is left, however that happens; a persistent one, made with a name, stays as it is.

    Every method takes `timeout`, in seconds: what takes longer raises TimedOut. Without it the limits of the table of
    operations hold. All errors are CapsemErrors with a `message` and a `hint`. Safe to use from several threads.
    """

    def __init__(self, id: str, *, client: Client | None = None, keep: bool = True) -> None:  # noqa: A002
        """A handle on a VM that is there, without asking whether it is. With `keep` leaving the `with` deletes nothing."""
        self.id = id
        self.network = Network(self)
        self.files = Files(self)
        self._keep = keep
        self._transport = Transport(client)

    def __repr__(self) -> str:
        return f"<Sandbox {self.id}>"

    def __enter__(self) -> Sandbox:
        return self

    def __exit__(
        self, _kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        if not self._keep:
            with contextlib.suppress(NotFound):  # it is gone, as it was to be
                self.delete()

    # -- making and finding

    @classmethod
    def create(
        cls,
        name: str | None = None,
        *,
        persistent: bool | None = None,
        ram_mb: int | None = None,
        cpus: int | None = None,
        disk_mb: int | None = None,
        env: Mapping[str, str] | None = None,
        secrets: Sequence[str] = (),
        profile: str | None = None,
        source: str | None = None,
        network: core.Network | None = None,
        client: Client | None = None,
        timeout: float | None = None,
    ) -> Sandbox:
        """Make a VM and boot it. With a name it is persistent unless `persistent` says otherwise.

        `network` is what it may reach: a preset (off, high, medium, open-with-floor), the text of a policy file, or its
        table [network]; that of the settings unless given. `secrets` are names of keys that it may use and never sees
        (`capsem secret`). `profile` names the image, `source` a persistent VM whose disk is copied, `env` is for all its
        commands. Sizes are in MiB.

        Raises AlreadyExists, InvalidInput, LimitReached, HostNotReady; NotFound for a secret.
        """
        call = core.provision(
            name,
            persistent=persistent,
            ram_mb=ram_mb,
            cpus=cpus,
            disk_mb=disk_mb,
            env=env,
            secrets=secrets,
            profile=profile,
            source=source,
            network=network,
        )
        made = Transport(client).call(call, timeout)
        return cls(made, client=client, keep=bool(call.body["persistent"]))

    @classmethod
    def connect(cls, id: str, *, client: Client | None = None, timeout: float | None = None) -> Sandbox:  # noqa: A002
        """A VM that is there, running: one that is suspended or stopped is resumed. Raises NotFound."""
        return cls(Transport(client).call(core.resume(id), timeout), client=client)

    @classmethod
    def list(cls, *, client: Client | None = None, timeout: float | None = None) -> builtins.list[SandboxInfo]:
        """Every VM: those that run, and the persistent ones that do not."""
        return Transport(client).call(core.everything(), timeout)

    @classmethod
    def run(
        cls,
        command: Command,
        *,
        timeout: float | None = None,
        ram_mb: int | None = None,
        cpus: int | None = None,
        env: Mapping[str, str] | None = None,
        profile: str | None = None,
        network: core.Network | None = None,
        client: Client | None = None,
    ) -> Result:
        """Run a command in a VM that is made for it and destroyed after it. `timeout` is the command's own limit."""
        call = core.run(command, timeout=timeout, ram_mb=ram_mb, cpus=cpus, env=env, profile=profile, network=network)
        return Transport(client).call(call)

    # -- commands

    def exec(
        self,
        command: Command,
        *,
        input: Data = b"",  # noqa: A002
        cwd: str | None = None,
        env: Mapping[str, str] | None = None,
        timeout: float | None = None,
        check: bool = False,
    ) -> Result:
        """Run a command to its end: a line for bash, or a list of words. `input` is its standard input.

        After `timeout` seconds the command is killed and TimedOut raised. With `check` an exit code other than 0 raises
        CommandFailed. When the VM is suspended meanwhile: Interrupted, whose `job` is for `process`, after the resume.
        """
        body = core.command_body(command, cwd=cwd, env=env, timeout=timeout)
        conversation = Conversation(self.id, body, core.encoded(input))
        limit = None if timeout is None else timeout + core.GRACE
        result = core.collect([*self._transport.follow(conversation, limit)], conversation.outcome())
        return result.check() if check else result

    def spawn(
        self,
        command: Command,
        *,
        stdin: bool = False,
        cwd: str | None = None,
        env: Mapping[str, str] | None = None,
        time_limit: float | None = None,
        timeout: float | None = None,
    ) -> Process:
        """Start a command in the background; with `stdin` it can be written to. It outlives this program.

        After `time_limit` seconds it is killed; `timeout` is for the start alone.
        """
        body = core.command_body(command, cwd=cwd, env=env, timeout=time_limit)
        return Process(self._transport, self._transport.call(core.spawn(self.id, body, stdin=stdin), timeout))

    def process(self, job: str) -> Process:
        """A command by its id, whoever started it."""
        return Process(self._transport, Progress(self.id, job))

    def processes(self, *, timeout: float | None = None) -> builtins.list[JobInfo]:
        """The commands of this VM, oldest first: those that run, and those that ended not long ago."""
        return self._transport.call(core.jobs(self.id), timeout)

    # -- lifecycle

    def info(self, *, timeout: float | None = None) -> SandboxInfo:
        """How it is: status, sizes, and what can be done with it now."""
        return self._transport.call(core.info(self.id), timeout)

    def logs(self, *, timeout: float | None = None) -> LogsResponse:
        """The guest's console and the supervisor's log."""
        return self._transport.call(core.logs(self.id), timeout)

    def forward(self, port: int, *, local_port: int = 0, host: str = "127.0.0.1") -> Forwarding:
        """A port of this computer that leads to TCP port `port` in the VM; the answer's `address` says which.

        `local_port` 0 chooses one. It stays when the VM is suspended or stopped: connections break, and what connects after
        the resume gets through again. Leave the answer's `with`, or `close` it, to listen no more; threads of its own carry
        the connections. Raises NotFound, MachineFailed (the port cannot be had).
        """
        self.info()  # no listener for a VM that there is not
        forwarding = Forwarding(self._transport.client, self.id, port, host=host, port=local_port)
        forwarding.start()
        return forwarding

    def suspend(self, *, timeout: float | None = None) -> SuspendResponse:
        """Save it, memory and all, and end its processes on this host. Commands go on after the resume."""
        return self._transport.call(core.suspend(self.id), timeout)

    def resume(self, *, cold: bool = False, timeout: float | None = None) -> None:
        """Start it where it was; with `cold`, or when it was stopped, from its disk. Nothing happens to one that runs."""
        self._transport.call(core.resume(self.id, cold=cold), timeout)

    def stop(self, *, timeout: float | None = None) -> None:
        """Power it off. One that is not persistent is destroyed."""
        self._transport.call(core.plain("stop", self.id), timeout)

    def delete(self, *, timeout: float | None = None) -> None:
        """Destroy it and all its data."""
        self._transport.call(core.plain("delete", self.id), timeout)

    def persist(self, name: str, *, timeout: float | None = None) -> None:
        """Keep it under a name, which is its `id` from here on; leaving the `with` then deletes nothing."""
        self.id = self._transport.call(core.persist(self.id, name), timeout)
        self._keep = True

    # -- copies and instants

    def fork(
        self,
        name: str,
        *,
        live: bool = True,
        checkpoint: str | None = None,
        inherit_secrets: bool = False,
        timeout: float | None = None,
    ) -> Sandbox:
        """A copy of it that runs on by itself, memory and all; without `live` a stopped one, of the disk alone.

        With `checkpoint` a copy of that instant instead of the present. Copies are persistent. With `inherit_secrets` it is
        lent what its source was lent.
        """
        (made,) = self._transport.call(
            core.fork(self.id, name, count=1, live=live, checkpoint=checkpoint, inherit_secrets=inherit_secrets),
            timeout,
        )
        return Sandbox(made, client=self._transport.client)

    def fork_many(
        self,
        name: str,
        count: int,
        *,
        checkpoint: str | None = None,
        inherit_secrets: bool = False,
        timeout: float | None = None,
    ) -> builtins.list[Sandbox]:
        """So many live copies, all of one instant: name-1, name-2 and so on."""
        made = self._transport.call(
            core.fork(self.id, name, count=count, live=True, checkpoint=checkpoint, inherit_secrets=inherit_secrets),
            timeout,
        )
        return [Sandbox(each, client=self._transport.client) for each in made]

    def checkpoint(self, message: str | None = None, *, timeout: float | None = None) -> CheckpointResponse:
        """Keep this instant, disk and memory, to go back to; it goes on running."""
        return self._transport.call(core.checkpoint(self.id, message), timeout)

    def checkpoints(self, *, timeout: float | None = None) -> builtins.list[CheckpointInfo]:
        """Its checkpoints, oldest first."""
        return self._transport.call(core.checkpoints(self.id), timeout)

    def rollback(self, checkpoint: str, *, save: bool = True, timeout: float | None = None) -> RollbackResponse:
        """Go back to a checkpoint, by its id or its first digits; the present is kept as another one unless `save` is false."""
        return self._transport.call(core.rollback(self.id, checkpoint, save=save), timeout)


class Process:
    """A command in the background. `job` is its id.

    Iterating yields its output as it comes, from where this handle was, to the command's end. When the VM is suspended
    meanwhile, Interrupted is raised; after the resume whatever was under way can be called again, and goes on where it
    was. As a context manager it kills a command that still runs when the block is left.
    """

    def __init__(self, transport: Transport, progress: Progress) -> None:
        self._transport = transport
        self._progress = progress

    @property
    def job(self) -> str:
        """Its id in the VM."""
        return self._progress.job

    def __repr__(self) -> str:
        return f"<Process {self.job} in {self._progress.vm_id}>"

    def __enter__(self) -> Process:
        return self

    def __exit__(
        self, _kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        if self._progress.result is None:
            self.kill()

    def __iter__(self) -> Iterator[Output]:
        return self._follow(wait=True, timeout=None)

    def _follow(self, *, wait: bool, timeout: float | None) -> Iterator[Output]:
        if self._progress.result is not None:
            return
        conversation = self._progress.follow(wait=wait)
        for piece in self._transport.follow(conversation, timeout):
            self._progress.take(piece)
            yield piece
        self._progress.end(conversation.outcome())

    def poll(self, *, timeout: float | None = 30.0) -> Result | None:
        """How it ended, with all output this handle has had and the rest of it; None while it runs."""
        for _piece in self._follow(wait=False, timeout=timeout):
            pass
        return self._progress.result

    def wait(self, timeout: float | None = None) -> Result:
        """Wait for its end. Raises TimedOut after `timeout` seconds, and the command goes on."""
        for _piece in self._follow(wait=True, timeout=timeout):
            pass
        assert self._progress.result is not None
        return self._progress.result

    def write(self, data: Data, *, timeout: float | None = None) -> None:
        """Hand it standard input, at its pace. Raises WrongState when it takes none."""
        self._transport.call(core.feed(self._progress, core.encoded(data), end=False), timeout)

    def close_stdin(self, *, timeout: float | None = None) -> None:
        """Tell it that its input ends here."""
        self._transport.call(core.feed(self._progress, b"", end=True), timeout)

    def kill(self, signal: int = signal.SIGKILL, *, timeout: float | None = None) -> bool:
        """Send a signal to all its processes; False when it had ended."""
        return self._transport.call(core.kill(self._progress, int(signal)), timeout)


class Files:
    """The files of a VM's workspace, /root; paths are relative to it, or begin with /root/.

    They can be read whether the VM runs or not, and written while it does. What is written is durable in the guest on
    return.
    """

    def __init__(self, box: Sandbox) -> None:
        self._box = box

    def read(self, path: str, *, timeout: float | None = None) -> bytes:
        """What is in a file. Raises NotFound."""
        return self._call(core.read_file(self._box.id, path), timeout)

    def read_text(self, path: str, *, timeout: float | None = None) -> str:
        """What is in a file, as UTF-8. Raises NotFound, UnicodeDecodeError."""
        return self.read(path, timeout=timeout).decode()

    def write(self, path: str, data: Data, *, mode: int = 0o644, timeout: float | None = None) -> None:
        """Replace a file, at once or not at all; missing directories are made."""
        self._call(core.write_file(self._box.id, path, core.encoded(data), mode), timeout)

    def list(self, path: str = "", *, depth: int = 1, timeout: float | None = None) -> builtins.list[FileEntry]:
        """What is in a directory, `depth` levels of it, 1 to 6."""
        return self._call(core.list_files(self._box.id, path, depth), timeout)

    def upload(self, local: str | os.PathLike[str], path: str, *, timeout: float | None = None) -> None:
        """Copy a file of this host into the VM, of any size, with its mode. Raises TimedOut after `timeout` seconds."""
        upload_file(self._client, self._box.id, local, path, timeout)

    def download(self, path: str, local: str | os.PathLike[str], *, timeout: float | None = None) -> None:
        """Copy a file of the VM to this host, of any size, with its mode; an old file stays until the new one is whole.
        Raises TimedOut after `timeout` seconds."""
        download_file(self._client, self._box.id, path, local, timeout)

    @property
    def _client(self) -> Client:
        return self._box._transport.client  # noqa: SLF001

    def _call(self, call: Call[T], timeout: float | None) -> T:
        return self._box._transport.call(call, timeout)  # noqa: SLF001


def upload_file(
    client: Client, vm_id: str, local: str | os.PathLike[str], path: str, timeout: float | None = None
) -> None:
    """See Files.upload."""
    with Path(local).open("rb") as file:
        status, to = os.fstat(file.fileno()), core.workspace_path(path)
        upload(client, vm_id, to, file.fileno(), status.st_size, status.st_mode, timeout=timeout)


def download_file(
    client: Client, vm_id: str, path: str, local: str | os.PathLike[str], timeout: float | None = None
) -> None:
    """See Files.download."""
    target = Path(local)
    incoming = Download(client, vm_id, core.workspace_path(path), timeout)
    part = target.with_name(f".{target.name[:200]}.{os.urandom(4).hex()}")
    try:
        with part.open("xb") as file:
            for piece in incoming:
                file.write(piece)
            if incoming.mode is not None:
                os.fchmod(file.fileno(), incoming.mode)
        part.replace(target)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    finally:
        incoming.close()
