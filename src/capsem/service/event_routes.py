"""The route that tells what happens, for as long as its client stays."""

from __future__ import annotations

from typing import Final

from starlette.requests import Request
from starlette.responses import Response

from capsem.api.codec import decode_query
from capsem.api.network_types import AsksQuery
from capsem.api.operation import EVENTS, Operation
from capsem.service.manager import Manager
from capsem.service.streamed import Endpoint, ErrorResponse, Streamed, streamed_endpoint

EVENT_ROUTES: Final = frozenset({"network_events"})


def events_endpoint(operation: Operation, manager: Manager, error_response: ErrorResponse) -> Endpoint:
    """The endpoint of one of EVENT_ROUTES; errors before the first event are answered, none are raised."""

    async def follow(request: Request) -> Response:
        query = decode_query(AsksQuery, request.query_params)
        return Streamed(manager.asks.follow(query.id), EVENTS, {"Cache-Control": "no-store"})

    return streamed_endpoint(operation, follow, error_response)
