"""The routes under /files: what they take is in the query, and a file's bytes travel as the body, piece by piece."""

from __future__ import annotations

import re
from types import MappingProxyType
from typing import Final

from starlette.requests import Request
from starlette.responses import Response

from capsem.api.codec import encode
from capsem.api.operations import Operation
from capsem.model.errors import InvalidInput
from capsem.model.ids import check_name
from capsem.service.manager import Manager
from capsem.service.streamed import Endpoint, ErrorResponse, Streamed, pieces_of, streamed_endpoint

_NAME: Final = re.compile(r"[^A-Za-z0-9._-]")


async def _list(manager: Manager, vm_id: str, request: Request) -> Response:
    text = request.query_params.get("depth", "1")
    if not re.fullmatch(r"[0-9]{1,6}", text):
        raise InvalidInput(f"depth: {text[:80]!r} is not a number", hint="1 to 6")
    listed = await manager.list_files(vm_id, request.query_params.get("path", ""), int(text))
    return Response(encode(listed), media_type="application/json")


async def _get(manager: Manager, vm_id: str, request: Request) -> Response:
    query = request.query_params
    whole = query.get("whole", "") in ("1", "true")  # ours: without the contract's limit, for `capsem cp`
    content = await manager.get_file(vm_id, query.get("path", ""), whole=whole)
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
    query = request.query_params
    mode = query.get("mode", "644")  # ours: the contract knows no other
    if not re.fullmatch(r"[0-7]{3}", mode):
        raise InvalidInput(f"mode: {mode[:80]!r} is no file mode", hint="three octal digits, such as 755")
    written = await manager.put_file(vm_id, query.get("path", ""), pieces_of(request), mode=int(mode, 8))
    return Response(encode(written), media_type="application/json")


_CALLS: Final = MappingProxyType({"list_files": _list, "get_file": _get, "put_file": _put})
FILE_ROUTES: Final = frozenset(_CALLS)


def file_endpoint(operation: Operation, manager: Manager, error_response: ErrorResponse) -> Endpoint:
    """The endpoint of one of FILE_ROUTES; errors are answered, none are raised."""
    call = _CALLS[operation.name]

    async def answer(request: Request) -> Response:
        return await call(manager, check_name(request.path_params["id"]), request)

    return streamed_endpoint(operation, answer, error_response, uploads=operation.name == "put_file")
