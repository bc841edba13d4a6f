"""The routes under /files, and the one for a command's input: what they take is in the query, and bytes travel as the
body, piece by piece."""

from __future__ import annotations

import re
from types import MappingProxyType
from typing import Final

from starlette.requests import Request
from starlette.responses import Response

from capsem.api.codec import decode_query, encode
from capsem.api.exec_types import FeedJobQuery
from capsem.api.file_types import GetFileQuery, ListFilesQuery, PutFileQuery
from capsem.api.operation import Operation
from capsem.model.ids import check_name
from capsem.service.manager import Manager
from capsem.service.streamed import Endpoint, ErrorResponse, Streamed, pieces_of, streamed_endpoint

_NAME: Final = re.compile(r"[^A-Za-z0-9._-]")


async def _list(manager: Manager, vm_id: str, request: Request) -> Response:
    query = decode_query(ListFilesQuery, request.query_params)
    listed = await manager.list_files(vm_id, query.path, query.depth, exact=query.exact)
    return Response(encode(listed), media_type="application/json")


async def _get(manager: Manager, vm_id: str, request: Request) -> Response:
    query = decode_query(GetFileQuery, request.query_params)
    content = await manager.get_file(vm_id, query.path, whole=query.whole, exact=query.exact)
    headers = {
        "Content-Disposition": f'attachment; filename="{_NAME.sub("", content.name) or "file"}"',
        "X-Content-Type-Options": "nosniff",
    }
    if content.size is not None:
        headers["Content-Length"] = str(content.size)
    if content.mode is not None:
        headers["X-Capsem-Mode"] = f"{content.mode & 0o777:o}"
    return Streamed(content.pieces, content.mime, headers)


async def _put(manager: Manager, vm_id: str, request: Request) -> Response:
    query = decode_query(PutFileQuery, request.query_params)
    mode = int(query.mode, 8)
    written = await manager.put_file(vm_id, query.path, pieces_of(request), mode=mode, exact=query.exact)
    return Response(encode(written), media_type="application/json")


async def _feed(manager: Manager, vm_id: str, request: Request) -> Response:
    query = decode_query(FeedJobQuery, request.query_params)
    fed = await manager.feed_job(vm_id, query.job, pieces_of(request), end=query.end)
    return Response(encode(fed), media_type="application/json")


_CALLS: Final = MappingProxyType({"list_files": _list, "get_file": _get, "put_file": _put, "feed_job": _feed})
FILE_ROUTES: Final = frozenset(_CALLS)


def file_endpoint(operation: Operation, manager: Manager, error_response: ErrorResponse) -> Endpoint:
    """The endpoint of one of FILE_ROUTES; errors are answered, none are raised."""
    call = _CALLS[operation.name]

    async def answer(request: Request) -> Response:
        return await call(manager, check_name(request.path_params["id"]), request)

    return streamed_endpoint(operation, answer, error_response)
