"""The routes by which whole checkpoints travel: what they take is in the query, and the bytes are the body."""

from __future__ import annotations

from typing import Final

from starlette.requests import Request
from starlette.responses import Response

from capsem.api.checkpoint_types import ExportQuery, ImportQuery
from capsem.api.codec import decode_query, encode
from capsem.api.operation import Operation
from capsem.model.ids import check_name
from capsem.service.manager import Manager
from capsem.service.streamed import Endpoint, ErrorResponse, Streamed, pieces_of, streamed_endpoint

CHECKPOINT_ROUTES: Final = frozenset({"export_checkpoint", "import_checkpoint"})


def checkpoint_endpoint(operation: Operation, manager: Manager, error_response: ErrorResponse) -> Endpoint:
    """The endpoint of one of CHECKPOINT_ROUTES; errors are answered, none are raised.

    An error in the middle of an export breaks the connection: no length was said.
    """

    async def export(request: Request) -> Response:
        vm_id = check_name(request.path_params["id"])
        query = decode_query(ExportQuery, request.query_params)
        pieces = await manager.export_checkpoint(vm_id, query.checkpoint)
        return Streamed(pieces, "application/octet-stream")

    async def take_in(request: Request) -> Response:
        query = decode_query(ImportQuery, request.query_params)
        made = await manager.import_checkpoint(query.name, pieces_of(request), trust=query.trust)
        return Response(encode(made), media_type="application/json")

    return streamed_endpoint(operation, take_in if operation.name == "import_checkpoint" else export, error_response)
