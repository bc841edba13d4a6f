"""From an operation to the request's bytes, and from the answer's to its result or a CapsemError; no I/O.

Bodies are plain dicts, of the shape that `api.types` describes: the command line has no time to import msgspec. Who
wants types makes them of the dicts, `msgspec.convert(answer, operation.response_type())`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from capsem.api.operation import Operation
from capsem.api.operations import OPERATIONS
from capsem.api.stream import CONTENT_TYPE
from capsem.client.http import encode_head
from capsem.model.errors import CapsemError, Interrupted, Unavailable, from_dict


def operation(name: str) -> Operation:
    """The row of the table; an unknown name is the caller's mistake (KeyError)."""
    return OPERATIONS[name]


def path_of(row: Operation, vm_id: str | None, query: Mapping[str, str] | None = None) -> str:
    """The path of the request with its query, percent-encoded. `vm_id` is the id, or the name, that stands in the path;
    ValueError if it is missing, or is one too many.
    """
    wanted = row.takes_id or row.takes_name
    if wanted != (vm_id is not None):
        raise ValueError(f"{row.name} {'needs an id' if wanted else 'takes no id'}")
    path = row.path if vm_id is None else row.path.replace("{id}", quote(vm_id)).replace("{name}", quote(vm_id))
    words = "&".join(f"{key}={quote(value)}" for key, value in (query or {}).items())
    return f"{path}?{words}" if words else path


def quote(text: str) -> str:
    """Percent-encoding; `urllib.parse` is slow to import."""
    kept = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_.~"
    return "".join(chr(byte) if byte in kept else f"%{byte:02X}" for byte in text.encode(errors="surrogateescape"))


def encode_request(
    row: Operation,
    vm_id: str | None,
    body: Mapping[str, Any] | None,
    query: Mapping[str, str] | None = None,
    more: Mapping[str, str] = MappingProxyType({}),
) -> bytes:
    """The whole request. Keys whose value is None are left out of the body; `more` are headers."""
    data = encode_body(body)
    headers = {"Content-Type": "application/json", "Content-Length": str(len(data)), **more}
    return encode_head(row.method, path_of(row, vm_id, query), headers) + data


def encode_body(body: Mapping[str, Any] | None) -> bytes:
    """A JSON object without its None values."""
    return json.dumps({key: value for key, value in (body or {}).items() if value is not None}).encode()


def encode_stream_head(row: Operation, vm_id: str | None, more: Mapping[str, str] = MappingProxyType({})) -> bytes:
    """The head of a request whose body is a stream of chunks; `more` are headers."""
    headers = {"Content-Type": CONTENT_TYPE, "Transfer-Encoding": "chunked", **more}
    return encode_head(row.method, path_of(row, vm_id), headers)


def decode_answer(status: int, headers: Mapping[str, str], body: bytes) -> dict[str, Any]:
    """The answer's JSON object. Raises the CapsemError that it tells of, Interrupted if it makes no sense."""
    if 200 <= status < 300:
        return decode_object(body)
    raise decode_error(status, headers, body)


def decode_object(body: bytes) -> dict[str, Any]:
    """A JSON object. Raises Interrupted: the service did something, but what it said about it is lost."""
    try:
        answer = json.loads(body)
    except (ValueError, RecursionError) as exc:
        raise Interrupted(f"the service's answer is no JSON: {body[:80]!r}") from exc
    if not isinstance(answer, dict):
        raise Interrupted(f"the service's answer is no JSON object: {body[:80]!r}")
    return answer


def decode_error(status: int, headers: Mapping[str, str], body: bytes) -> CapsemError:
    """The error that an answer with an error's status tells of, also one that is not from our service."""
    try:
        told = json.loads(body)
    except (ValueError, RecursionError):
        told = None
    if not isinstance(told, dict):
        told = {"error": f"the service answered with status {status}"}
    error = from_dict(told)
    if isinstance(error, Unavailable) and headers.get("retry-after", "").isdecimal():
        error.retry_after = float(headers["retry-after"])
    return error
