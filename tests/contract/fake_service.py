"""A service without VMs: a scripted Manager behind the real application, on a real uvicorn and a real Unix socket.

Also a program (`python fake_service.py --foreground [--uds-path PATH]`), for tests that start a service.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
import sys
import tempfile
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import uvicorn

from capsem.api import stream
from capsem.api.checkpoint_types import (
    CheckpointRequest,
    CheckpointResponse,
    CheckpointsResponse,
    OneCheckpointRequest,
    RollbackRequest,
    RollbackResponse,
    SuspendResponse,
)
from capsem.api.codec import encode
from capsem.api.exec_types import ExecRequest, ExecResponse, ExecResult, JobInfo, JobsResponse, RunRequest
from capsem.api.file_types import ReadFileRequest, ReadFileResponse, WriteFileRequest
from capsem.api.operation import unknown_vm
from capsem.api.operations import OPERATIONS
from capsem.api.usage_types import ImageUsage, PoolUsage, UsageResponse, VmUsage
from capsem.api.vm_types import (
    AssetHealth,
    ListResponse,
    LogsResponse,
    PrepareRequest,
    PrepareResponse,
    ProvisionRequest,
    ProvisionResponse,
    ResumeRequest,
    SandboxInfo,
    StopResponse,
)
from capsem.config import Settings
from capsem.egress.floor import floor
from capsem.egress.presets import Registry
from capsem.model.errors import AlreadyExists, LimitReached, TimedOut, Unavailable
from capsem.model.lifecycle import State, Status
from capsem.service.app import build_app
from capsem.service.asks import AskFeed
from capsem.service.fleet import Fleet
from capsem.service.host import Host
from capsem.service.ledgers import Ledgers
from capsem.service.network import Network
from capsem.service.policies import Policies
from capsem.service.protocol import Protocol
from capsem.service.secret_desk import SecretDesk
from capsem.service.secrets import Secrets
from capsem.service.traces import Traces
from capsem.store.layout import Layout
from capsem.system.real import real_system


class FakeManager:
    """Understands a few commands; remembers what it was asked, and what was cancelled."""

    def __init__(self) -> None:
        self.settle({"CAPSEM_HOME": tempfile.gettempdir()}, Path(tempfile.gettempdir()))
        self.states: dict[str, State] = {"box": State.RUNNING, "off": State.STOPPED, "broken": State.FAILED}
        self.requests: list[object] = []
        self.pool: PoolUsage | None = None
        self.commands: list[JobInfo] = []
        self.traces = Traces(Path(tempfile.mkdtemp()))
        self.files: dict[str, str] = {}
        self.started = threading.Event()
        self.cancelled = threading.Event()
        self.finished = threading.Event()
        self.go_on = threading.Event()  # for a transition that has begun
        self.go_on.set()
        self.consumed = 0

    def settle(
        self,
        environ: dict[str, str],
        home: Path,
        apply: Callable[[Settings], None] = lambda _settings: None,
        registries: tuple[Registry, ...] = (),
    ) -> None:
        """Have the real parts that are about the host, for one with these files and clients."""
        fleet = Fleet(real_system(), Layout(home), 10)  # of no VMs
        self.policies = Policies(environ, floor(lambda _address: False), lambda: registries)
        self.network = Network(fleet, self.policies, Ledgers(fleet, home / "main.db"), lambda: "medium")
        self.asks = AskFeed(fleet)
        self.secrets = SecretDesk(fleet, Secrets(environ, home, fleet.system.clock))
        self.host = Host(environ, home, self, self.policies, self.network, apply)

    def _require(self, operation: str, vm_id: str) -> State:
        if vm_id not in self.states:
            raise unknown_vm(vm_id)
        state = self.states[vm_id]
        OPERATIONS[operation].require(state, vm_id)
        return state

    async def _transition(self) -> None:
        self.started.set()
        while not self.go_on.is_set():
            await asyncio.sleep(0.005)
        self.finished.set()

    async def provision(self, request: ProvisionRequest) -> ProvisionResponse:
        self.requests.append(request)
        name = request.name or "calm-otter-tmp"
        if name in self.states:
            raise AlreadyExists(f"{name} already exists")
        if name == "full":
            raise LimitReached("10 VMs are running, the maximum")
        if name == "slow":
            await self._transition()
        self.states[name] = State.RUNNING
        return ProvisionResponse(id=name, uds_path=f"/run/{name}.sock")

    async def prepare(self, request: PrepareRequest) -> PrepareResponse:
        self.requests.append(request)
        return PrepareResponse(ready=False, making=True)

    async def list(self) -> ListResponse:
        boxes = [self._info(vm_id) for vm_id in self.states]
        return ListResponse(sandboxes=boxes, asset_health=AssetHealth(ready=True, version="1", missing=[]))

    async def df(self) -> UsageResponse:
        return UsageResponse(
            vms=[VmUsage(id="box", own_bytes=3 << 20, shared_bytes=5 << 20, session_bytes=4096)],
            images=[ImageUsage(name="default", digest="d" * 64, size_bytes=188 << 20, vms=["box"])],
            layers_bytes=9 << 20,
            unreferenced_bytes=1 << 20,
            failed_bytes=0,
            total_bytes=197 << 20,
            pool=self.pool,
        )

    async def info(self, vm_id: str) -> SandboxInfo:
        self._require("info", vm_id)
        return self._info(vm_id)

    def _info(self, vm_id: str) -> SandboxInfo:
        return {
            State.RUNNING: SandboxInfo(
                id=vm_id,
                name=vm_id,
                pid=4242,
                status=Status.RUNNING,
                persistent=True,
                ram_mb=512,
                cpus=1,
                uptime_secs=83,
            ),
            State.STOPPED: SandboxInfo(id=vm_id, name=vm_id, pid=0, status=Status.STOPPED, persistent=True),
            State.FAILED: SandboxInfo(
                id=vm_id,
                pid=0,
                status=Status.DEFUNCT,
                persistent=True,
                last_error="\x1b[31mkernel panic\x1b[0m\nthe end of its log\n\n",
            ),
        }[self.states[vm_id]]

    async def execute(self, vm_id: str, request: ExecRequest) -> ExecResponse:
        self.requests.append(request)
        self._require("exec", vm_id)
        out, err = bytearray(), bytearray()
        async for channel, data in self._command(request.command or "", None):
            if channel == stream.RESULT:
                result = json.loads(data)
                return ExecResponse(stdout=out.decode(), stderr=err.decode(), exit_code=result["exit_code"])
            (out if channel == stream.STDOUT else err).extend(data)
        raise AssertionError

    async def execute_stream(
        self, vm_id: str, request: ExecRequest, stdin: AsyncIterator[bytes] | None
    ) -> AsyncIterator[tuple[int, bytes]]:
        self.requests.append(request)
        self._require("exec", vm_id)
        async for item in self._command(request.command or "", stdin):
            yield item

    async def _command(self, command: str, stdin: AsyncIterator[bytes] | None) -> AsyncIterator[tuple[int, bytes]]:
        word, _, rest = command.partition(" ")
        code, truncated = 0, False
        if word == "echo":
            yield stream.STDOUT, rest.encode() + b"\n"
        elif word == "both":
            yield stream.STDOUT, b"out\n"
            yield stream.STDERR, b"err\n"
        elif word == "slow":
            yield stream.STDOUT, b"one\n"
            while not self.go_on.is_set():
                await asyncio.sleep(0.005)
            yield stream.STDOUT, b"two\n"
        elif word == "cat":
            yield stream.STDOUT, b""
            async for chunk in stdin or _nothing():
                yield stream.STDOUT, chunk
        elif word == "count":  # says nothing before the end of its input
            async for chunk in stdin or _nothing():
                self.consumed += len(chunk)
            yield stream.STDOUT, str(self.consumed).encode()
        elif word == "sleep":  # never reads, never ends
            if rest:
                yield stream.STDOUT, rest.encode()
            self.started.set()
            try:
                await asyncio.sleep(60)
            except asyncio.CancelledError:
                self.cancelled.set()
                raise
        elif word == "yes":
            self.started.set()
            try:
                while True:
                    yield stream.STDOUT, b"y\n" * 8192
                    await asyncio.sleep(0)
            finally:
                self.cancelled.set()
        elif word == "nap":
            await asyncio.sleep(1.5)
        elif word == "exit":
            code = int(rest)
        elif word == "timeout":
            yield stream.STDOUT, b"so far\n"
            raise TimedOut("timed out after 1s")
        elif word == "boom":
            raise RuntimeError("secret")
        elif word == "lateboom":
            yield stream.STDOUT, b"x"
            raise RuntimeError("secret")
        elif word == "cut":
            return
        elif word == "big":
            yield stream.STDOUT, b"z" * (3 * 1024 * 1024)
            truncated = True
        yield stream.RESULT, encode(ExecResult(exit_code=code, truncated=truncated))

    async def jobs(self, vm_id: str) -> JobsResponse:
        self._require("jobs", vm_id)
        ids, details = [each.id for each in self.commands], list(self.commands)
        return JobsResponse(jobs=ids, running=[each.id for each in details if each.running], details=details)

    async def write_file(self, vm_id: str, request: WriteFileRequest) -> None:
        self._require("write_file", vm_id)
        self.files[request.path] = request.content

    async def read_file(self, vm_id: str, request: ReadFileRequest) -> ReadFileResponse:
        self._require("read_file", vm_id)
        return ReadFileResponse(content=self.files[request.path])

    async def stop(self, vm_id: str) -> StopResponse:
        self._require("stop", vm_id)
        if vm_id == "slowstop":
            await self._transition()
        self.states[vm_id] = State.STOPPED
        return StopResponse(success=True, persistent=True)

    async def suspend(self, vm_id: str) -> SuspendResponse:
        self._require("suspend", vm_id)
        self.states[vm_id] = State.SUSPENDED
        return SuspendResponse(success=True, checkpoint="c" * 32, bytes=4096, pause_ms=2.5, synced=True)

    async def checkpoint(self, vm_id: str, request: CheckpointRequest) -> CheckpointResponse:
        self._require("checkpoint", vm_id)
        return CheckpointResponse(id="c" * 32, bytes=4096, pause_ms=2.5, synced=True)

    async def checkpoints(self, vm_id: str) -> CheckpointsResponse:
        self._require("checkpoints", vm_id)
        return CheckpointsResponse(checkpoints=[])

    async def remove_checkpoint(self, vm_id: str, request: OneCheckpointRequest) -> None:
        self._require("remove_checkpoint", vm_id)

    async def verify_checkpoint(self, vm_id: str, request: OneCheckpointRequest) -> None:
        self._require("verify_checkpoint", vm_id)

    async def rollback(self, vm_id: str, request: RollbackRequest) -> RollbackResponse:
        self._require("rollback", vm_id)
        return RollbackResponse(success=True, checkpoint=request.checkpoint)

    async def resume(self, name: str, request: ResumeRequest) -> ProvisionResponse:
        if name == "busy":
            raise Unavailable("try later", retry_after=2.5)
        self._require("resume", name)
        self.states[name] = State.RUNNING
        return ProvisionResponse(id=name, uds_path="")

    async def delete(self, vm_id: str) -> None:
        self._require("delete", vm_id)
        del self.states[vm_id]

    async def run(self, request: RunRequest) -> ExecResponse:
        self.requests.append(request)
        self.states["run"] = State.RUNNING
        try:
            return await self.execute("run", ExecRequest(command=request.command))
        finally:
            del self.states["run"]

    async def logs(self, vm_id: str) -> LogsResponse:
        self._require("logs", vm_id)
        return LogsResponse(logs="Linux version 6\nready\n", process_logs="started\nended\n")


async def _nothing() -> AsyncIterator[bytes]:
    return
    yield b""


class FakeService:
    """The running service."""

    def __init__(self, manager: FakeManager, path: Path) -> None:
        self.manager = manager
        self.path = path
        self.app = build_app(manager, "1.2.3")
        self._server = uvicorn.Server(
            uvicorn.Config(
                self.app,
                uds=str(path),
                http=Protocol,
                loop="asyncio",
                log_config=None,
                access_log=False,
                lifespan="off",
            )
        )
        self._thread = threading.Thread(target=self._server.run)

    def start(self) -> None:
        self._thread.start()
        deadline = time.monotonic() + 10
        while not self._server.started:
            assert time.monotonic() < deadline
            time.sleep(0.005)

    def stop(self) -> None:
        self._server.should_exit = True
        self._thread.join(10)
        assert not self._thread.is_alive()

    def raw(self, data: bytes) -> bytes:
        """What comes back for these bytes, to the end of the connection."""
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(10)
            connection.connect(str(self.path))
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                connection.sendall(data)
            answer = b""
            with contextlib.suppress(ConnectionResetError):
                while piece := connection.recv(65536):
                    answer += piece
            return answer

    def request(
        self, method: str, path: str, body: bytes = b"", headers: str = ""
    ) -> tuple[int, dict[str, object], str]:
        """Status, JSON body and head of an answer."""
        head = (
            f"{method} {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: {len(body)}\r\n{headers}\r\n"
        )
        answered, _, content = self.raw(head.encode() + body).partition(b"\r\n\r\n")
        return int(answered.split()[1]), json.loads(content), answered.decode()


@contextlib.contextmanager
def fake_service() -> Iterator[FakeService]:
    with tempfile.TemporaryDirectory(prefix="capsem-") as directory:
        service = FakeService(FakeManager(), Path(directory) / "service.sock")
        service.start()
        try:
            yield service
        finally:
            service.stop()


def main() -> None:
    run_dir = Path(os.environ["CAPSEM_RUN_DIR"])
    path = Path(sys.argv[sys.argv.index("--uds-path") + 1]) if "--uds-path" in sys.argv else run_dir / "service.sock"
    if os.environ.get("FAKE_SERVICE_FAILS"):
        sys.exit("no image\ncannot go on")
    time.sleep(float(os.environ.get("FAKE_SERVICE_DELAY", "0")))
    for name in ("pid", "service.pid"):
        (run_dir / name).write_text(str(os.getpid()))
    (run_dir / "argv").write_text(json.dumps(sys.argv[1:]))
    uvicorn.run(build_app(FakeManager(), "1.2.3"), uds=str(path), log_config=None, lifespan="off")


if __name__ == "__main__":
    main()
