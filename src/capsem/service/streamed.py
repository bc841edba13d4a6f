"""What the routes share whose bodies travel piece by piece, either way."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Coroutine, Mapping
from typing import Any, Final

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from capsem.api.operation import Operation
from capsem.model.errors import CapsemError

ErrorResponse = Callable[[Exception, Operation], Response]
Endpoint = Callable[[Request], Coroutine[Any, Any, Response]]

_CLIENT_GONE: Final = 499  # nobody will read it

log = logging.getLogger("capsem_service.http")


class Streamed(StreamingResponse):
    """However it ends, the pieces are closed: whoever makes them stops."""

    def __init__(
        self,
        pieces: AsyncGenerator[bytes | memoryview, None] | AsyncGenerator[bytes, None],
        media_type: str,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(pieces, headers=headers)
        self.headers["Content-Type"] = media_type  # as it is: nobody here knows the charset of a guest's text
        self._pieces = pieces

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it."""
        try:
            async with contextlib.aclosing(self._pieces):
                await super().__call__(scope, receive, send)
        except CapsemError as error:
            log.warning("an answer broke off: %s", error)
            raise  # so that the connection is closed in the middle: who reads it knows by that that it is not whole


async def pieces_of(request: Request) -> AsyncIterator[bytes]:
    """The body, as it comes. Raises ClientDisconnect."""
    async for piece in request.stream():
        if piece:
            yield piece


def unexpected(record: logging.LogRecord) -> bool:
    """A filter for the log of the web server: not what has broken an answer off, which `Streamed` has told."""
    return record.exc_info is None or not isinstance(record.exc_info[1], CapsemError)


def streamed_endpoint(
    operation: Operation,
    call: Callable[[Request], Awaitable[Response]],
    error_response: ErrorResponse,
) -> Endpoint:
    """An endpoint that answers errors and raises none."""

    async def answer(request: Request) -> Response:
        try:
            return await call(request)
        except ClientDisconnect:
            return Response(status_code=_CLIENT_GONE)
        except Exception as exc:  # noqa: BLE001  this is the edge: everything becomes an answer
            return error_response(exc, operation)

    return answer
