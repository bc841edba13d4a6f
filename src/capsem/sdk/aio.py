"""`capsem.AsyncSandbox`: as `capsem.sdk.sync`, for asyncio. The same methods, awaited; the same core behind them.

A call that is cancelled hangs up: the service then ends what was only waited for, a command too, and finishes what
changes a VM.
"""

from __future__ import annotations

import asyncio
import builtins
import contextlib
import os
import signal
import socket
from collections.abc import AsyncIterator, Mapping, Sequence
from types import TracebackType
from typing import TypeVar

from capsem.api.checkpoint_types import CheckpointInfo, CheckpointResponse, RollbackResponse, SuspendResponse
from capsem.api.exec_types import JobInfo
from capsem.api.file_types import FileEntry
from capsem.api.vm_types import LogsResponse, SandboxInfo
from capsem.client.exec_answer import BrokenOff
from capsem.client.forward import Forwarding
from capsem.client.http import Answer, BadAnswer
from capsem.client.sync import Client
from capsem.model.errors import NotFound
from capsem.sdk import core
from capsem.sdk.aio_network import AsyncNetwork
from capsem.sdk.core import Call, Command, Conversation, Data, Exchange, Progress
from capsem.sdk.sync import default_client, download_file, too_slow, upload_file
from capsem.sdk.types import Output, Result

T = TypeVar("T")

_RECEIVE = 256 * 1024


class Transport:
    """Carries out exchanges and conversations, each on a connection of its own."""

    def __init__(self, client: Client | None) -> None:
        self.client = client or default_client()

    async def call(self, call: Call[T], timeout: float | None = None) -> T:
        """The outcome of a call. Raises TimedOut after `timeout` seconds, or those that the operation is given."""
        exchange = Exchange(call)
        limit = timeout if timeout is not None else call.within
        try:
            async with asyncio.timeout(limit), _connected(self.client) as connection:
                await _send(connection, exchange.to_send)
                while not exchange.answer.done:
                    exchange.take(await _receive(connection, exchange.answer))
        except TimeoutError as error:
            raise too_slow(limit) from error
        return exchange.outcome()

    async def follow(self, conversation: Conversation, timeout: float | None = None) -> AsyncIterator[Output]:
        """The output of a command as it comes. Closing it hangs up. Raises what ended the command, or TimedOut."""
        deadline = None if timeout is None else asyncio.get_running_loop().time() + timeout
        async with _connected(self.client) as connection:
            while not conversation.answer.done:
                # Around each step: a time-out must not strike while somebody else has a piece of output in his hands.
                try:
                    async with asyncio.timeout_at(deadline):
                        await _send(connection, conversation.to_send())
                        body = await _receive(connection, conversation.answer)
                except TimeoutError as error:
                    raise too_slow(timeout) from error
                for piece in conversation.take(body):
                    yield piece
        conversation.outcome()


@contextlib.asynccontextmanager
async def _connected(client: Client) -> AsyncIterator[socket.socket]:
    """A connection for one request, made on a thread: it may have to start the service."""
    connecting = asyncio.ensure_future(asyncio.to_thread(client.connect))
    try:
        connection = await asyncio.shield(connecting)
    except asyncio.CancelledError:
        connecting.add_done_callback(_close)
        raise
    with connection:
        connection.setblocking(False)
        yield connection


def _close(connecting: asyncio.Future[socket.socket]) -> None:
    if not connecting.cancelled() and connecting.exception() is None:
        connecting.result().close()


async def _send(connection: socket.socket, data: bytes) -> None:
    # A service that refuses answers and closes before it has read everything: the answer is there.
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        await asyncio.get_running_loop().sock_sendall(connection, data)


async def _receive(connection: socket.socket, answer: Answer) -> bytes:
    """Wait for bytes and return those of the answer's body. Raises Interrupted."""
    try:
        data = await asyncio.get_running_loop().sock_recv(connection, _RECEIVE)
        if data:
            return answer.feed(data)
        answer.eof()
    except (BadAnswer, ConnectionError) as error:
        raise BrokenOff(
            f"the service went away, or broke its answer off: {error}", hint="`capsem list` shows whether the VM runs"
        ) from error
    return b""


class AsyncSandbox:
    """A VM. `id` is its name, or the one it was given.

    `AsyncSandbox.create()` makes one, `AsyncSandbox.connect(id)` finds one. As a context manager it deletes a VM that is not
    persistent when the block is left, however that happens; a persistent one, made with a name, stays as it is.

    Every method takes `timeout`, in seconds: what takes longer raises TimedOut. Without it the limits of the table of
    operations hold. All errors are CapsemErrors with a `message` and a `hint`. Safe to use from several threads.
    """

    def __init__(self, id: str, *, client: Client | None = None, keep: bool = True) -> None:  # noqa: A002
        """A handle on a VM that is there, without asking whether it is. With `keep` leaving the `with` deletes nothing."""
        self.id = id
        self.network = AsyncNetwork(self)
        self.files = AsyncFiles(self)
        self._keep = keep
        self._transport = Transport(client)

    def __repr__(self) -> str:
        return f"<AsyncSandbox {self.id}>"

    async def __aenter__(self) -> AsyncSandbox:
        return self

    async def __aexit__(
        self, _kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        if not self._keep:
            with contextlib.suppress(NotFound):  # it is gone, as it was to be
                await self.delete()

    # -- making and finding

    @classmethod
    async def create(
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
    ) -> AsyncSandbox:
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
        made = await Transport(client).call(call, timeout)
        return cls(made, client=client, keep=bool(call.body["persistent"]))

    @classmethod
    async def connect(cls, id: str, *, client: Client | None = None, timeout: float | None = None) -> AsyncSandbox:  # noqa: A002
        """A VM that is there, running: one that is suspended or stopped is resumed. Raises NotFound."""
        return cls(await Transport(client).call(core.resume(id), timeout), client=client)

    @classmethod
    async def list(cls, *, client: Client | None = None, timeout: float | None = None) -> builtins.list[SandboxInfo]:
        """Every VM: those that run, and the persistent ones that do not."""
        return await Transport(client).call(core.everything(), timeout)

    @classmethod
    async def run(
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
        return await Transport(client).call(call)

    # -- commands

    async def exec(
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
        result = core.collect(
            [piece async for piece in self._transport.follow(conversation, limit)], conversation.outcome()
        )
        return result.check() if check else result

    async def spawn(
        self,
        command: Command,
        *,
        stdin: bool = False,
        cwd: str | None = None,
        env: Mapping[str, str] | None = None,
        time_limit: float | None = None,
        timeout: float | None = None,
    ) -> AsyncProcess:
        """Start a command in the background; with `stdin` it can be written to. It outlives this program.

        After `time_limit` seconds it is killed; `timeout` is for the start alone.
        """
        body = core.command_body(command, cwd=cwd, env=env, timeout=time_limit)
        return AsyncProcess(
            self._transport, await self._transport.call(core.spawn(self.id, body, stdin=stdin), timeout)
        )

    def process(self, job: str) -> AsyncProcess:
        """A command by its id, whoever started it."""
        return AsyncProcess(self._transport, Progress(self.id, job))

    async def processes(self, *, timeout: float | None = None) -> builtins.list[JobInfo]:
        """The commands of this VM, oldest first: those that run, and those that ended not long ago."""
        return await self._transport.call(core.jobs(self.id), timeout)

    # -- lifecycle

    async def info(self, *, timeout: float | None = None) -> SandboxInfo:
        """How it is: status, sizes, and what can be done with it now."""
        return await self._transport.call(core.info(self.id), timeout)

    async def logs(self, *, timeout: float | None = None) -> LogsResponse:
        """The guest's console and the supervisor's log."""
        return await self._transport.call(core.logs(self.id), timeout)

    async def forward(self, port: int, *, local_port: int = 0, host: str = "127.0.0.1") -> Forwarding:
        """A port of this computer that leads to TCP port `port` in the VM; the answer's `address` says which.

        `local_port` 0 chooses one. It stays when the VM is suspended or stopped: connections break, and what connects after
        the resume gets through again. Leave the answer's `with`, or `close` it, to listen no more; threads of its own carry
        the connections. Raises NotFound, MachineFailed (the port cannot be had).
        """
        await self.info()  # no listener for a VM that there is not
        forwarding = Forwarding(self._transport.client, self.id, port, host=host, port=local_port)
        forwarding.start()
        return forwarding

    async def suspend(self, *, timeout: float | None = None) -> SuspendResponse:
        """Save it, memory and all, and end its processes on this host. Commands go on after the resume."""
        return await self._transport.call(core.suspend(self.id), timeout)

    async def resume(self, *, cold: bool = False, timeout: float | None = None) -> None:
        """Start it where it was; with `cold`, or when it was stopped, from its disk. Nothing happens to one that runs."""
        await self._transport.call(core.resume(self.id, cold=cold), timeout)

    async def stop(self, *, timeout: float | None = None) -> None:
        """Power it off. One that is not persistent is destroyed."""
        await self._transport.call(core.plain("stop", self.id), timeout)

    async def delete(self, *, timeout: float | None = None) -> None:
        """Destroy it and all its data."""
        await self._transport.call(core.plain("delete", self.id), timeout)

    async def persist(self, name: str, *, timeout: float | None = None) -> None:
        """Keep it under a name, which is its `id` from here on; leaving the `with` then deletes nothing."""
        self.id = await self._transport.call(core.persist(self.id, name), timeout)
        self._keep = True

    # -- copies and instants

    async def fork(
        self,
        name: str,
        *,
        live: bool = True,
        checkpoint: str | None = None,
        inherit_secrets: bool = False,
        timeout: float | None = None,
    ) -> AsyncSandbox:
        """A copy of it that runs on by itself, memory and all; without `live` a stopped one, of the disk alone.

        With `checkpoint` a copy of that instant instead of the present. Copies are persistent. With `inherit_secrets` it is
        lent what its source was lent.
        """
        (made,) = await self._transport.call(
            core.fork(self.id, name, count=1, live=live, checkpoint=checkpoint, inherit_secrets=inherit_secrets),
            timeout,
        )
        return AsyncSandbox(made, client=self._transport.client)

    async def fork_many(
        self,
        name: str,
        count: int,
        *,
        checkpoint: str | None = None,
        inherit_secrets: bool = False,
        timeout: float | None = None,
    ) -> builtins.list[AsyncSandbox]:
        """So many live copies, all of one instant: name-1, name-2 and so on."""
        made = await self._transport.call(
            core.fork(self.id, name, count=count, live=True, checkpoint=checkpoint, inherit_secrets=inherit_secrets),
            timeout,
        )
        return [AsyncSandbox(each, client=self._transport.client) for each in made]

    async def checkpoint(self, message: str | None = None, *, timeout: float | None = None) -> CheckpointResponse:
        """Keep this instant, disk and memory, to go back to; it goes on running."""
        return await self._transport.call(core.checkpoint(self.id, message), timeout)

    async def checkpoints(self, *, timeout: float | None = None) -> builtins.list[CheckpointInfo]:
        """Its checkpoints, oldest first."""
        return await self._transport.call(core.checkpoints(self.id), timeout)

    async def rollback(self, checkpoint: str, *, save: bool = True, timeout: float | None = None) -> RollbackResponse:
        """Go back to a checkpoint, by its id or its first digits; the present is kept as another one unless `save` is false."""
        return await self._transport.call(core.rollback(self.id, checkpoint, save=save), timeout)


class AsyncProcess:
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
        return f"<AsyncProcess {self.job} in {self._progress.vm_id}>"

    async def __aenter__(self) -> AsyncProcess:
        return self

    async def __aexit__(
        self, _kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        if self._progress.result is None:
            await self.kill()

    def __aiter__(self) -> AsyncIterator[Output]:
        return self._follow(wait=True, timeout=None)

    async def _follow(self, *, wait: bool, timeout: float | None) -> AsyncIterator[Output]:
        if self._progress.result is not None:
            return
        conversation = self._progress.follow(wait=wait)
        async for piece in self._transport.follow(conversation, timeout):
            self._progress.take(piece)
            yield piece
        self._progress.end(conversation.outcome())

    async def poll(self, *, timeout: float | None = 30.0) -> Result | None:
        """How it ended, with all output this handle has had and the rest of it; None while it runs."""
        async for _piece in self._follow(wait=False, timeout=timeout):
            pass
        return self._progress.result

    async def wait(self, timeout: float | None = None) -> Result:
        """Wait for its end. Raises TimedOut after `timeout` seconds, and the command goes on."""
        async for _piece in self._follow(wait=True, timeout=timeout):
            pass
        assert self._progress.result is not None
        return self._progress.result

    async def write(self, data: Data, *, timeout: float | None = None) -> None:
        """Hand it standard input, at its pace. Raises WrongState when it takes none."""
        await self._transport.call(core.feed(self._progress, core.encoded(data), end=False), timeout)

    async def close_stdin(self, *, timeout: float | None = None) -> None:
        """Tell it that its input ends here."""
        await self._transport.call(core.feed(self._progress, b"", end=True), timeout)

    async def kill(self, signal: int = signal.SIGKILL, *, timeout: float | None = None) -> bool:
        """Send a signal to all its processes; False when it had ended."""
        return await self._transport.call(core.kill(self._progress, int(signal)), timeout)


class AsyncFiles:
    """The files of a VM's workspace, /root; paths are relative to it, or begin with /root/.

    They can be read whether the VM runs or not, and written while it does. What is written is durable in the guest on
    return.
    """

    def __init__(self, box: AsyncSandbox) -> None:
        self._box = box

    async def read(self, path: str, *, timeout: float | None = None) -> bytes:
        """What is in a file. Raises NotFound."""
        return await self._call(core.read_file(self._box.id, path), timeout)

    async def read_text(self, path: str, *, timeout: float | None = None) -> str:
        """What is in a file, as UTF-8. Raises NotFound, UnicodeDecodeError."""
        return (await self.read(path, timeout=timeout)).decode()

    async def write(self, path: str, data: Data, *, mode: int = 0o644, timeout: float | None = None) -> None:
        """Replace a file, at once or not at all; missing directories are made."""
        await self._call(core.write_file(self._box.id, path, core.encoded(data), mode), timeout)

    async def list(self, path: str = "", *, depth: int = 1, timeout: float | None = None) -> builtins.list[FileEntry]:
        """What is in a directory, `depth` levels of it, 1 to 6."""
        return await self._call(core.list_files(self._box.id, path, depth), timeout)

    async def upload(self, local: str | os.PathLike[str], path: str, *, timeout: float | None = None) -> None:
        """Copy a file of this host into the VM, of any size, with its mode. Raises TimedOut after `timeout` seconds."""
        await asyncio.to_thread(upload_file, self._client, self._box.id, local, path, timeout)

    async def download(self, path: str, local: str | os.PathLike[str], *, timeout: float | None = None) -> None:
        """Copy a file of the VM to this host, of any size, with its mode; an old file stays until the new one is whole.
        Raises TimedOut after `timeout` seconds."""
        await asyncio.to_thread(download_file, self._client, self._box.id, path, local, timeout)

    @property
    def _client(self) -> Client:
        return self._box._transport.client  # noqa: SLF001

    async def _call(self, call: Call[T], timeout: float | None) -> T:
        return await self._box._transport.call(call, timeout)  # noqa: SLF001
