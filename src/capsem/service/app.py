"""The HTTP face of the service: OPERATIONS as routes in front of a Manager.

Bodies are decoded and answers encoded here, and every error becomes a status with {"error": ...}; what a Manager does
is none of this module's business. A client that hangs up ends what it only waited for, and has no influence on a
lifecycle transition, which runs to its end on its own (see `OnDisconnect`; those still running are in
`app.state.transitions`, for a service that wants to let them finish).
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import math
from collections.abc import Awaitable, Callable, Coroutine
from types import MappingProxyType
from typing import Any, Final, TypeVar

import msgspec
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route

from capsem.api.codec import decode, decode_query, encode
from capsem.api.ledger_types import MAIN_ID
from capsem.api.operation import FINISH, TEXT, Operation
from capsem.api.operations import OPERATIONS
from capsem.api.types import SuccessResponse, VersionResponse
from capsem.model.errors import CapsemError, InvalidInput, NotFound, PayloadTooLarge, TimedOut, Unavailable, host_failed
from capsem.model.ids import check_name
from capsem.service.checkpoint_routes import CHECKPOINT_ROUTES, checkpoint_endpoint
from capsem.service.event_routes import EVENT_ROUTES, events_endpoint
from capsem.service.exec_stream import ExecStream
from capsem.service.file_routes import FILE_ROUTES, file_endpoint
from capsem.service.gate import VISIT, Visit
from capsem.service.manager import Manager
from capsem.service.traces import Traced
from capsem.service.unread import Lingering

T = TypeVar("T")
Handler = Callable[[Manager, str, Any], Awaitable[Any]]  # manager, id or name, request or query

log = logging.getLogger("capsem_service.http")

_OK: Final = SuccessResponse(success=True)
_CLIENT_GONE: Final = 499  # nobody will read it


async def _write_file(manager: Manager, vm_id: str, request: Any) -> SuccessResponse:
    await manager.write_file(vm_id, request)
    return _OK


async def _delete(manager: Manager, vm_id: str, _request: Any) -> SuccessResponse:
    await manager.delete(vm_id)
    return _OK


async def _remove_secret(manager: Manager, name: str, _request: Any) -> SuccessResponse:
    await manager.secrets.remove(name)
    return _OK


async def _remove_checkpoint(manager: Manager, vm_id: str, request: Any) -> SuccessResponse:
    await manager.remove_checkpoint(vm_id, request)
    return SuccessResponse(success=True)


async def _verify_checkpoint(manager: Manager, vm_id: str, request: Any) -> SuccessResponse:
    await manager.verify_checkpoint(vm_id, request)
    return SuccessResponse(success=True)


# All but `version` and `openapi`, which need no manager, `exec_stream` and `forward`, which are streams, and those whose
# bodies are no JSON: FILE_ROUTES, CHECKPOINT_ROUTES and EVENT_ROUTES.
HANDLERS: Final = MappingProxyType[str, Handler](
    {
        "provision": lambda manager, _id, request: manager.provision(request),
        "prepare": lambda manager, _id, request: manager.prepare(request),
        "list": lambda manager, _id, _request: manager.list(),
        "df": lambda manager, _id, _request: manager.df(),
        "info": lambda manager, vm_id, _request: manager.info(vm_id),
        "exec": lambda manager, vm_id, request: manager.execute(vm_id, request),
        "write_file": _write_file,
        "read_file": lambda manager, vm_id, request: manager.read_file(vm_id, request),
        "stop": lambda manager, vm_id, _request: manager.stop(vm_id),
        "resume": lambda manager, vm_id, request: manager.resume(vm_id, request),
        "suspend": lambda manager, vm_id, _request: manager.suspend(vm_id),
        "checkpoint": lambda manager, vm_id, request: manager.checkpoint(vm_id, request),
        "checkpoints": lambda manager, vm_id, _request: manager.checkpoints(vm_id),
        "remove_checkpoint": _remove_checkpoint,
        "verify_checkpoint": _verify_checkpoint,
        "rollback": lambda manager, vm_id, request: manager.rollback(vm_id, request),
        "policy": lambda manager, vm_id, request: manager.set_policy(vm_id, request),
        "delete": _delete,
        "run": lambda manager, _id, request: manager.run(request),
        "persist": lambda manager, vm_id, request: manager.persist(vm_id, request),
        "purge": lambda manager, _id, request: manager.purge(request),
        "fork": lambda manager, vm_id, request: manager.fork(vm_id, request),
        "jobs": lambda manager, vm_id, _request: manager.jobs(vm_id),
        "kill_job": lambda manager, vm_id, request: manager.kill_job(vm_id, request),
        "logs": lambda manager, vm_id, _request: manager.logs(vm_id),
        "inspect": lambda manager, vm_id, request: manager.observation.inspect(vm_id, request),
        "timeline": lambda manager, vm_id, query: manager.observation.timeline(vm_id, query),
        "history": lambda manager, vm_id, query: manager.observation.history(vm_id, query),
        "history_processes": lambda manager, vm_id, _request: manager.observation.history_processes(vm_id),
        "history_counts": lambda manager, vm_id, _request: manager.observation.history_counts(vm_id),
        "transcript": lambda manager, vm_id, query: manager.observation.transcript(vm_id, query),
        "stats": lambda manager, _id, _request: manager.observation.stats(),
        "triage": lambda manager, _id, query: manager.observation.triage(query),
        "panics": lambda manager, _id, query: manager.observation.panics(query),
        "host_logs": lambda manager, name, query: manager.observation.host_logs(name, query),
        "secrets": lambda manager, _id, _request: manager.secrets.list(),
        "set_secret": lambda manager, name, request: manager.secrets.set(name, request),
        "remove_secret": _remove_secret,
        "test_secret": lambda manager, name, _request: manager.secrets.test(name),
        "network": lambda manager, vm_id, _request: manager.network.show(vm_id),
        "set_network": lambda manager, vm_id, request: manager.network.set(vm_id, request),
        "network_allow": lambda manager, vm_id, request: manager.network.allow(vm_id, request),
        "network_deny": lambda manager, vm_id, request: manager.network.deny(vm_id, request),
        "network_log": lambda manager, vm_id, query: manager.network.log(vm_id, query),
        "network_learn": lambda manager, vm_id, request: manager.network.learn(vm_id, request),
        "network_check": lambda manager, _id, query: manager.network.check(query),
        "network_asks": lambda manager, _id, query: manager.asks.answered(query),
        "network_ca": lambda manager, _id, _request: manager.network.authority(),
        "rotate_network_ca": lambda manager, _id, _request: manager.network.authority(rotate=True),
        "service_logs": lambda manager, _id, _request: manager.host.service_log(),
        "trace": lambda manager, trace_id, _request: asyncio.to_thread(manager.traces.read, trace_id),
        "reload_config": lambda manager, _id, _request: manager.host.reload(),
        "settings": lambda manager, _id, _request: manager.host.settings(),
        "change_settings": lambda manager, _id, request: manager.host.change_settings(request),
        "lint_settings": lambda manager, _id, request: manager.host.lint_settings(request),
        "presets": lambda manager, _id, _request: manager.host.presets(),
        "use_preset": lambda manager, name, _request: manager.host.use_preset(name),
        "validate_key": lambda manager, _id, _request: manager.host.validate_key(),
        "setup_state": lambda manager, _id, _request: manager.host.setup_state(),
        "setup_detect": lambda manager, _id, _request: manager.host.detect(),
        "setup_complete": lambda manager, _id, _request: manager.host.setup_state(),
        "setup_retry": lambda manager, _id, _request: manager.host.setup_state(),
        "setup_assets": lambda manager, _id, _request: manager.host.assets(),
        "set_corp_config": lambda manager, _id, request: manager.host.set_corp_config(request),
        "policy_hooks": lambda manager, _id, _request: manager.host.policy_hooks(),
        "mcp_servers": lambda manager, _id, _request: manager.host.mcp_servers(),
        "mcp_tools": lambda manager, _id, _request: manager.host.mcp_tools(),
        "mcp_policy": lambda manager, _id, _request: manager.host.mcp_policy(),
        "refresh_tools": lambda manager, _id, _request: manager.host.refresh_tools(),
        "approve_tool": lambda manager, name, _request: manager.host.approve_tool(name),
        "call_tool": lambda manager, name, _request: manager.host.call_tool(name),
    }
)


def build_app(manager: Manager, version: str) -> Starlette:
    """The ASGI application that serves `manager`; `version` is what GET /version says."""
    transitions: set[asyncio.Task[Any]] = set()

    def endpoint(operation: Operation) -> Callable[[Request], Coroutine[Any, Any, Response]] | ExecStream:
        if operation.name in ("exec_stream", "forward"):
            return ExecStream(operation, manager, error_response)
        if operation.name in FILE_ROUTES:
            return file_endpoint(operation, manager, error_response)
        if operation.name in EVENT_ROUTES:
            return events_endpoint(operation, manager, error_response)
        if operation.name in CHECKPOINT_ROUTES:
            return checkpoint_endpoint(operation, manager, error_response)

        async def answer(request: Request) -> Response:
            try:
                if operation.name == "version":
                    return _json(200, encode(VersionResponse(version=version)))
                if operation.name == "openapi":
                    return _json(200, _openapi(version))
                vm_id = _checked_id(operation, request.path_params["id"]) if operation.takes_id else ""
                if operation.takes_name:
                    vm_id = request.path_params["name"]
                body = await _request_body(request, operation)
                if (query := operation.query_type()) is not None:
                    body = decode_query(query, request.query_params)
                work = HANDLERS[operation.name](manager, vm_id, body)
                result: Any = await _attend(request, operation, work, transitions)
                if operation.gives == TEXT:
                    return Response(result, media_type=TEXT)
                return _json(200, encode(result))
            except ClientDisconnect:
                return Response(status_code=_CLIENT_GONE)
            except Exception as exc:  # noqa: BLE001  this is the edge: everything becomes an answer
                return error_response(exc, operation)

        return answer

    # A path as the convertor lets a bad id, even an empty one, come as far as the check that says what is wrong
    # with it; hence the longer path first.
    ordered = sorted(OPERATIONS.values(), key=lambda operation: -operation.path.count("/"))
    app = Starlette(
        routes=[
            Route(operation.path.replace("{id}", "{id:path}"), endpoint(operation), methods=[operation.method])
            for operation in ordered
        ],
        exception_handlers={HTTPException: _routing_error},
    )
    app.router.redirect_slashes = False
    app.add_middleware(Traced, traces=manager.traces)
    app.add_middleware(Lingering)
    app.state.transitions = transitions
    return app


def _checked_id(operation: Operation, vm_id: str) -> str:
    """Raises InvalidInput."""
    return vm_id if operation.name == "inspect" and vm_id == MAIN_ID else check_name(vm_id)


@functools.cache
def _openapi(version: str) -> bytes:
    from capsem.api.openapi import document  # a daemon that nobody asks for it need not know how

    return encode(document(version))


def error_response(exc: Exception, operation: Operation) -> Response:
    """The answer that tells of an error; one that is not ours is logged with its traceback, and only there."""
    if not isinstance(exc, CapsemError):
        log.error("%s failed: %r", operation.name, exc, exc_info=exc)
        if isinstance(exc, OSError):
            exc = host_failed(f"{operation.name} failed", exc)
        else:
            exc = CapsemError("internal error in the service", hint="capsem's service.log has the details")
    elif exc.status >= 500 and not isinstance(exc, TimedOut):
        log.warning("%s: %s", operation.name, exc, extra={"fields": {"code": exc.code, "status": exc.status}})
    response = _json(exc.status, msgspec.json.encode(exc.to_dict()))
    if isinstance(exc, Unavailable):
        response.headers["Retry-After"] = str(max(1, math.ceil(exc.retry_after)))
    return response


def _json(status: int, body: bytes) -> Response:
    return Response(body, status, media_type="application/json")


async def _routing_error(request: Request, exc: Exception) -> Response:
    """No such route, or not by this method."""
    assert isinstance(exc, HTTPException)
    where = f"{request.method} {request.url.path[:200]}"
    error: CapsemError
    if exc.status_code == 405:
        error = InvalidInput(f"{where}: this route takes another method", hint="the header Allow says which")
    elif exc.status_code == 404:
        error = NotFound(f"{where}: there is no such route", hint="docs/http.md lists those there are")
    else:
        error = CapsemError(f"{where}: {exc.detail}")
    response = _json(exc.status_code, msgspec.json.encode(error.to_dict()))
    for key, value in (exc.headers or {}).items():
        response.headers[key] = value
    return response


async def _request_body(request: Request, operation: Operation) -> msgspec.Struct | None:
    """The decoded body; None where none is expected, whatever came. Raises InvalidInput, PayloadTooLarge, ClientDisconnect."""
    too_large = PayloadTooLarge(
        "the body is too large", hint=f"at most {operation.body_limit >> 10} KiB are taken by {operation.path}"
    )
    length = request.headers.get("content-length", "")
    if length.isdigit() and int(length) > operation.body_limit:
        raise too_large
    kind = operation.request_type()
    if kind is None:
        return None
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > operation.body_limit:
            raise too_large
    return decode(kind, bytes(body))


async def _attend(request: Request, operation: Operation, work: Awaitable[T], transitions: set[asyncio.Task[Any]]) -> T:
    """The outcome of `work`, unless the client hangs up first: then ClientDisconnect, with `work` cancelled and done
    cleaning up, or going on by itself, as the operation wants it.
    """
    visit = Visit()
    VISIT.set(visit)
    task: asyncio.Future[T] = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_hung_up(request))
    both: set[asyncio.Future[Any]] = {task, gone}
    try:
        await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return _with_wait(task.result(), visit)
        raise ClientDisconnect
    finally:
        gone.cancel()
        if not task.done():
            if operation.on_disconnect is FINISH:
                visit.leave()
                _let_finish(operation, task, transitions)
            else:
                task.cancel()
                await asyncio.wait({task})
                with contextlib.suppress(asyncio.CancelledError):
                    task.exception()  # looked at, so that nobody complains that it never was


def _with_wait(answer: T, visit: Visit) -> T:
    """The answer, with how long its operation had to wait at the gate, where it can say that."""
    waited = round(visit.waited * 1000, 1)
    if waited >= 1 and isinstance(answer, msgspec.Struct) and hasattr(answer, "waited_ms"):
        return msgspec.structs.replace(answer, waited_ms=waited)
    return answer


async def _hung_up(request: Request) -> None:
    """Returns when the client is gone; a body that nobody asked for is dropped meanwhile."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _let_finish(operation: Operation, task: asyncio.Future[Any], transitions: set[asyncio.Task[Any]]) -> None:
    assert isinstance(task, asyncio.Task)

    def finished(done: asyncio.Task[Any]) -> None:
        transitions.discard(done)
        if not done.cancelled() and (error := done.exception()) is not None:
            log.warning("%s, whose client had hung up, failed", operation.name, exc_info=error)

    transitions.add(task)
    task.add_done_callback(finished)
