"""The routes by which whole checkpoints travel: what they take is in the query, and the bytes are the body."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine
from typing import Any, Final

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from capsem.api.codec import encode
from capsem.api.operations import Operation
from capsem.model.ids import check_name
from capsem.service.manager import Manager
from capsem.service.unread import leave_unread

CHECKPOINT_ROUTES: Final = frozenset({"export_checkpoint", "import_checkpoint"})
_CLIENT_GONE: Final = 499  # nobody will read it


class _Export(StreamingResponse):
    """However it ends, the checkpoint is let go of. An error in the middle breaks the connection: no length was said."""

    def __init__(self, pieces: AsyncGenerator[bytes, None]) -> None:
        super().__init__(pieces, media_type="application/octet-stream")
        self._pieces = pieces

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it."""
        async with contextlib.aclosing(self._pieces):
            await super().__call__(scope, receive, send)


async def _body(request: Request) -> AsyncIterator[bytes]:
    async for piece in request.stream():
        if piece:
            yield piece


def checkpoint_endpoint(
    operation: Operation, manager: Manager, error_response: Callable[[Exception, Operation], Response]
) -> Callable[[Request], Coroutine[Any, Any, Response]]:
    """The endpoint of one of CHECKPOINT_ROUTES; errors are answered, none are raised."""

    async def answer(request: Request) -> Response:
        query = request.query_params
        try:
            if operation.name == "export_checkpoint":
                vm_id = check_name(request.path_params["id"])
                return _Export(await manager.export_checkpoint(vm_id, query.get("checkpoint", "")))
            made = await manager.import_checkpoint(
                check_name(query.get("name", "")), _body(request), trust=query.get("trust", "") in ("1", "true")
            )
            return Response(encode(made), media_type="application/json")
        except ClientDisconnect:
            return Response(status_code=_CLIENT_GONE)
        except Exception as exc:  # noqa: BLE001  this is the edge: everything becomes an answer
            response = error_response(exc, operation)
            if operation.name == "import_checkpoint":
                leave_unread(response, request.headers)
            return response

    return answer
