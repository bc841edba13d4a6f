"""Traces of requests (capsem.tracing): a file for each in the run directory, the latest ones."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any, Final

from starlette.datastructures import Headers
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from capsem import tracing
from capsem.api.types import TraceResponse
from capsem.model.errors import CapsemError, InvalidInput, NotFound, host_failed

KEPT: Final = 16  # traces; older ones go
MOST: Final = 64 * 1024 * 1024  # bytes that are read of one

log = logging.getLogger("capsem_service.traces")


class Traces:
    """Those of one service."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def open(self, trace_id: str) -> tracing.Trace:
        """One more request for a trace, which is begun with the first. Raises InvalidInput, CapsemError (disk)."""
        path = self._path(trace_id)
        try:
            self._directory.mkdir(mode=0o700, exist_ok=True)
            if not path.exists():
                kept = sorted(self._directory.iterdir(), key=lambda each: each.stat().st_mtime)
                for old in kept[: -KEPT + 1 or None] if len(kept) >= KEPT else ():
                    old.unlink(missing_ok=True)
            return tracing.to_file(str(path), "capsem-service")
        except OSError as error:
            raise host_failed("the trace cannot be written", error) from error

    def read(self, trace_id: str) -> TraceResponse:
        """What was said so far. Raises InvalidInput, NotFound."""
        path = self._path(trace_id)
        try:
            with path.open("rb") as file:
                lines = file.read(MOST).splitlines()
        except FileNotFoundError as error:
            raise NotFound(f"there is no trace {trace_id}", hint=f"the latest {KEPT} are kept") from error
        return TraceResponse(events=[event for line in lines if (event := _event(line)) is not None])

    def _path(self, trace_id: str) -> Path:
        if not tracing.is_id(trace_id):
            raise InvalidInput(
                f"{trace_id[:80]!r} is no id of a trace", hint=f"it has {tracing.ID_LENGTH} hexadecimal digits"
            )
        return self._directory / f"{trace_id}.jsonl"


def _event(line: bytes) -> dict[str, Any] | None:
    try:
        event: dict[str, Any] = json.loads(line)
    except ValueError:  # cut off by a full disk
        return None
    return event


class Traced:
    """The application, each request in the trace that its header names."""

    def __init__(self, app: ASGIApp, traces: Traces) -> None:
        self._app = app
        self._traces = traces

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        wanted = Headers(scope=scope).get(tracing.HEADER) if scope["type"] == "http" else None
        if wanted is None:
            await self._app(scope, receive, send)
            return
        try:
            trace = self._traces.open(wanted)
        except CapsemError as error:
            body = json.dumps(error.to_dict())
            await Response(body, error.status, media_type="application/json")(scope, receive, send)
            return
        with tracing.tracing(trace), tracing.span(f"{scope['method']} {scope['path']}"):
            await self._app(scope, receive, send)
