"""What the SDK says to the service and makes of the answers, without any I/O: the same for both of its faces.

A `Call` is one request and how its answer is read; an `Exchange` carries it out, a `Conversation` carries out a command
whose output comes piece by piece. Both say what is `to_send`, `take` what came of the answer's body, and tell the outcome
once `answer.done`. A `Progress` is how far somebody is in a background command's output: it outlives connections, so
that a command can be followed across a suspend.
"""

from __future__ import annotations

import os
import posixpath
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Generic, Literal, TypeVar

import msgspec

from capsem.api import stream
from capsem.api.checkpoint_types import (
    CheckpointInfo,
    CheckpointResponse,
    CheckpointsResponse,
    RollbackResponse,
    SuspendResponse,
)
from capsem.api.exec_types import JobInfo, JobsResponse
from capsem.api.file_types import FileEntry, FilesResponse
from capsem.api.network_types import (
    AllowResponse,
    AskInfo,
    AsksResponse,
    CheckResponse,
    LearnResponse,
    NetworkInfo,
)
from capsem.api.operation import JSON
from capsem.api.vm_types import ListResponse, LogsResponse, SandboxInfo
from capsem.client import request
from capsem.client.exec_answer import ExecAnswer
from capsem.client.http import Answer, encode_chunk, encode_head
from capsem.egress.schema import PRESETS
from capsem.model.errors import InvalidInput, PayloadTooLarge
from capsem.sdk.types import Output, Result

T = TypeVar("T")

Command = str | Sequence[str]  # a line for bash, or words
Data = str | bytes
Network = str | Mapping[str, Any]  # a preset, the text of a policy file, or its table [network]

CONTENT_WITHIN: Final = 600.0  # seconds for the content of a file
GRACE: Final = 60.0  # seconds beyond a command's own limit until its end must have been told
KEPT: Final = 10 * 1024 * 1024  # bytes of each output that are held for a Result
_WORKSPACE: Final = "/root"


@dataclass(frozen=True)
class Call(Generic[T]):
    """One operation. `read` makes its result of the answer: of the JSON object, or of the bytes where it has no JSON."""

    operation: str
    read: Callable[[Any], T]
    vm_id: str | None = None
    body: Mapping[str, Any] = field(default_factory=dict)
    query: Mapping[str, str] = field(default_factory=dict)
    content: bytes | None = None

    @property
    def within(self) -> float | None:
        """How many seconds it may take when nobody says otherwise."""
        row = request.operation(self.operation)
        return CONTENT_WITHIN if row.answer_within is None and row.request is None else row.answer_within

    def encode(self) -> bytes:
        """The request."""
        row = request.operation(self.operation)
        if self.content is None and not self.query:
            return request.encode_request(row, self.vm_id, self.body)
        words = "&".join(f"{key}={request.quote(value)}" for key, value in self.query.items())
        content = self.content or b""
        headers = {"Content-Type": row.takes, "Content-Length": str(len(content))}
        return encode_head(row.method, f"{request.path_of(row, self.vm_id)}?{words}", headers) + content


class Exchange(Generic[T]):
    """One call on its way."""

    def __init__(self, call: Call[T]) -> None:
        self.answer = Answer()
        self.to_send = call.encode()
        self._call = call
        self._body = bytearray()

    def take(self, body: bytes) -> None:
        """Bytes of the answer's body."""
        self._body += body

    def outcome(self) -> T:
        """Once the answer is done. Raises the CapsemError that it tells of."""
        answer, body = self.answer, bytes(self._body)
        if request.operation(self._call.operation).gives == JSON:
            return self._call.read(request.decode_answer(answer.status, answer.headers, body))
        if answer.status != 200:
            raise request.decode_error(answer.status, answer.headers, body)
        return self._call.read(body)


class Conversation:
    """A command on its way: a new one, or one that is followed."""

    def __init__(self, vm_id: str, body: Mapping[str, Any], data: bytes = b"") -> None:
        """`body` is an ExecRequest, `data` the command's standard input."""
        self._heard = ExecAnswer()
        self._data = memoryview(data)
        self._credit = stream.WINDOW
        self._closed = False
        head = request.encode_stream_head(request.operation("exec_stream"), vm_id)
        self._head = head + encode_chunk(stream.encode(stream.REQUEST, request.encode_body(body)))

    def to_send(self) -> bytes:
        """What may be sent now: at first the request, then as much input as there is credit for."""
        parts = [self._head]
        self._head = b""
        self._credit += self._heard.new_credit()
        while self._data and self._credit:
            piece = self._data[: min(self._credit, stream.CHUNK)]
            self._data = self._data[len(piece) :]
            self._credit -= len(piece)
            parts.append(encode_chunk(stream.encode(stream.STDIN, piece)))
        if not self._data and not self._closed:
            self._closed = True
            parts.append(encode_chunk(b""))
        return b"".join(parts)

    @property
    def answer(self) -> Answer:
        """What takes the bytes of the connection."""
        return self._heard.answer

    def take(self, body: bytes) -> Iterator[Output]:
        """Bytes of the answer's body; yields the output in them, and is to be iterated to its end. Raises the CapsemError
        that ended the command."""
        for channel, payload in self._heard.take(body):
            if payload:
                yield Output("stdout" if channel == stream.STDOUT else "stderr", payload)

    def outcome(self) -> dict[str, Any]:
        """The ExecResult, once the answer is done. Raises what the service refused it with, or Interrupted."""
        return self._heard.outcome()


class Progress:
    """How far somebody has come in the output of a command, and how that ended."""

    def __init__(self, vm_id: str, job: str) -> None:
        self.vm_id = vm_id
        self.job = job
        self.result: Result | None = None
        self._seen = {"stdout": 0, "stderr": 0}
        self._kept = {"stdout": bytearray(), "stderr": bytearray()}
        self._dropped = False

    def follow(self, *, wait: bool) -> Conversation:
        """To go on from here: to the command's end, or as far as it has come. The command outlives it."""
        return Conversation(self.vm_id, {"job": self.job, "offsets": dict(self._seen), "wait": wait, "keep": True})

    def take(self, piece: Output) -> None:
        """It has come."""
        self._seen[piece.channel] += len(piece.data)
        kept = self._kept[piece.channel]
        kept += piece.data
        if len(kept) > KEPT:
            del kept[: len(kept) - KEPT]
            self._dropped = True

    def end(self, ended: Mapping[str, Any]) -> Result | None:
        """What a conversation ended with; None while the command runs."""
        if ended.get("running"):
            return None
        truncated = self._dropped or bool(ended.get("truncated"))
        self.result = Result.of(
            bytes(self._kept["stdout"]), bytes(self._kept["stderr"]), {**ended, "truncated": truncated, "job": self.job}
        )
        return self.result


def collect(pieces: Sequence[Output], ended: Mapping[str, Any]) -> Result:
    """The result of a command whose output has all come."""
    out = {"stdout": bytearray(), "stderr": bytearray()}
    for piece in pieces:
        out[piece.channel] += piece.data
    return Result.of(bytes(out["stdout"]), bytes(out["stderr"]), ended)


def command_body(
    command: Command, *, cwd: str | None, env: Mapping[str, str] | None, timeout: float | None
) -> dict[str, Any]:
    """An ExecRequest, with an id of its own under which the run can be found again."""
    return {
        "command": line(command),
        "cwd": cwd,
        "env": dict(env) if env else None,
        "timeout_secs": timeout,
        "job": os.urandom(8).hex(),
    }


def line(command: Command) -> str:
    """As bash takes it: a text is one already, words are quoted."""
    return command if isinstance(command, str) else shlex.join(command)


def encoded(data: Data) -> bytes:
    """A text as UTF-8."""
    return data.encode() if isinstance(data, str) else data


def workspace_path(path: str) -> str:
    """A path in the workspace, relative to it; one that is absolute has to lead there. Raises InvalidInput."""
    try:
        path.encode()
    except UnicodeEncodeError as error:
        raise InvalidInput(f"{path[:80]!a} cannot be sent: {error.reason}", hint="`exec` reaches such names") from error
    plain = posixpath.normpath(path) if path else "."
    if plain == _WORKSPACE or plain == ".":
        return ""
    if plain.startswith(_WORKSPACE + "/"):
        return plain[len(_WORKSPACE) + 1 :]
    if plain.startswith(("/", "..")):
        raise InvalidInput(
            f"{path[:80]!r} is not in the workspace", hint=f"files are below {_WORKSPACE}; `exec` reaches the others"
        )
    return plain


def network_body(network: Network | None) -> dict[str, Any] | None:
    """A NetworkRequest; a text that is no preset is a policy."""
    if network is None:
        return None
    if isinstance(network, str):
        return {"preset": network} if network in PRESETS else {"policy": network}
    return {"policy": dict(network)}


# -- calls


def _typed(kind: type[T]) -> Callable[[Any], T]:
    return lambda answer: msgspec.convert(answer, kind)


def _nothing(_answer: object) -> None:
    return None


def provision(  # noqa: D103
    name: str | None,
    *,
    persistent: bool | None,
    ram_mb: int | None,
    cpus: int | None,
    disk_mb: int | None,
    env: Mapping[str, str] | None,
    secrets: Sequence[str],
    profile: str | None,
    source: str | None,
    network: Network | None,
) -> Call[str]:
    body = {
        "name": name,
        "persistent": name is not None if persistent is None else persistent,
        "ram_mb": ram_mb,
        "cpus": cpus,
        "disk_mb": disk_mb,
        "env": dict(env) if env else None,
        "secrets": ([secrets] if isinstance(secrets, str) else [*secrets]) or None,
        "profile": profile,
        "from": source,
        "network": network_body(network),
    }
    return Call("provision", lambda answer: str(answer["id"]), body=body)


def run(  # noqa: D103
    command: Command,
    *,
    timeout: float | None,
    ram_mb: int | None,
    cpus: int | None,
    env: Mapping[str, str] | None,
    profile: str | None,
    network: Network | None,
) -> Call[Result]:
    body = {
        "command": line(command),
        "timeout_secs": timeout,
        "ram_mb": ram_mb,
        "cpus": cpus,
        "env": dict(env) if env else None,
        "profile": profile,
        "network": network_body(network),
    }
    return Call(
        "run", lambda answer: Result.of(answer["stdout"].encode(), answer["stderr"].encode(), answer), body=body
    )


def everything() -> Call[list[SandboxInfo]]:  # noqa: D103
    return Call("list", lambda answer: msgspec.convert(answer, ListResponse).sandboxes)


def info(vm_id: str) -> Call[SandboxInfo]:  # noqa: D103
    return Call("info", _typed(SandboxInfo), vm_id)


def logs(vm_id: str) -> Call[LogsResponse]:  # noqa: D103
    return Call("logs", _typed(LogsResponse), vm_id)


def resume(vm_id: str, *, cold: bool = False) -> Call[str]:  # noqa: D103
    return Call("resume", lambda answer: str(answer["id"]), vm_id, {"cold": cold})


def suspend(vm_id: str) -> Call[SuspendResponse]:  # noqa: D103
    return Call("suspend", _typed(SuspendResponse), vm_id)


def plain(operation: Literal["stop", "delete"], vm_id: str) -> Call[None]:  # noqa: D103
    return Call(operation, _nothing, vm_id)


def persist(vm_id: str, name: str) -> Call[str]:  # noqa: D103
    return Call("persist", lambda answer: str(answer["name"]), vm_id, {"name": name})


def fork(  # noqa: D103
    vm_id: str, name: str, *, count: int, live: bool, checkpoint: str | None, inherit_secrets: bool
) -> Call[list[str]]:
    body = {
        "name": name,
        "live": live,
        "count": count,
        "checkpoint": checkpoint,
        "inherit_secrets": inherit_secrets or None,
    }
    return Call("fork", lambda answer: list(answer.get("names") or [answer["name"]]), vm_id, body)


def checkpoint(vm_id: str, message: str | None) -> Call[CheckpointResponse]:  # noqa: D103
    return Call("checkpoint", _typed(CheckpointResponse), vm_id, {"message": message})


def checkpoints(vm_id: str) -> Call[list[CheckpointInfo]]:  # noqa: D103
    return Call("checkpoints", lambda answer: msgspec.convert(answer, CheckpointsResponse).checkpoints, vm_id)


def rollback(vm_id: str, to: str, *, save: bool) -> Call[RollbackResponse]:  # noqa: D103
    return Call("rollback", _typed(RollbackResponse), vm_id, {"checkpoint": to, "save": save})


def spawn(vm_id: str, body: Mapping[str, Any], *, stdin: bool) -> Call[Progress]:  # noqa: D103
    background = {**body, "wait": False, "stdin": stdin}
    return Call("exec", lambda answer: Progress(vm_id, answer["job"]), vm_id, background)


def jobs(vm_id: str) -> Call[list[JobInfo]]:  # noqa: D103
    return Call("jobs", lambda answer: msgspec.convert(answer, JobsResponse).details, vm_id)


def kill(at: Progress, signal: int) -> Call[bool]:  # noqa: D103
    return Call("kill_job", lambda answer: bool(answer["running"]), at.vm_id, {"job": at.job, "signal": signal})


def feed(at: Progress, data: bytes, *, end: bool) -> Call[None]:  # noqa: D103
    query = {"job": at.job, **({"end": "1"} if end else {})}
    return Call("feed_job", _nothing, at.vm_id, query=query, content=data)


def read_file(vm_id: str, path: str) -> Call[bytes]:  # noqa: D103
    return Call("get_file", bytes, vm_id, query={"path": workspace_path(path), "whole": "1", "exact": "1"})


def write_file(vm_id: str, path: str, data: bytes, mode: int) -> Call[None]:  # noqa: D103
    if len(data) > 1 << 31:
        raise PayloadTooLarge("the content is too long for memory", hint="upload it from a file")
    query = {"path": workspace_path(path), "mode": f"{mode & 0o777:03o}", "exact": "1"}
    return Call("put_file", _nothing, vm_id, query=query, content=data)


def network_info(vm_id: str) -> Call[NetworkInfo]:  # noqa: D103
    return Call("network", _typed(NetworkInfo), vm_id)


def set_network(vm_id: str, network: Network) -> Call[NetworkInfo]:  # noqa: D103
    return Call("set_network", _typed(NetworkInfo), vm_id, network_body(network) or {})


def allow(vm_id: str, body: Mapping[str, Any]) -> Call[AllowResponse]:  # noqa: D103
    return Call("network_allow", _typed(AllowResponse), vm_id, body)


def deny(vm_id: str, body: Mapping[str, Any]) -> Call[AllowResponse]:  # noqa: D103
    return Call("network_deny", _typed(AllowResponse), vm_id, body)


def check(vm_id: str, url: str, method: str) -> Call[CheckResponse]:  # noqa: D103
    return Call("network_check", _typed(CheckResponse), query={"id": vm_id, "url": url, "method": method})


def asks(vm_id: str) -> Call[list[AskInfo]]:  # noqa: D103
    return Call("network_asks", lambda answer: msgspec.convert(answer, AsksResponse).asks, query={"id": vm_id})


def network_log(vm_id: str, query: Mapping[str, str | int | None]) -> Call[list[dict[str, Any]]]:  # noqa: D103
    given = {key: str(value) for key, value in query.items() if value is not None}
    return Call("network_log", lambda answer: list(answer["events"]), vm_id, query=given)


def learn(vm_id: str, action: str, *, paths: bool = False, since: str | None = None) -> Call[LearnResponse]:  # noqa: D103
    return Call("network_learn", _typed(LearnResponse), vm_id, {"action": action, "paths": paths, "since": since})


def list_files(vm_id: str, path: str, depth: int) -> Call[list[FileEntry]]:  # noqa: D103
    query = {"path": workspace_path(path), "depth": str(depth), "exact": "1"}
    return Call("list_files", lambda answer: msgspec.convert(answer, FilesResponse).entries, vm_id, query=query)
