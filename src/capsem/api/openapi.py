"""OPERATIONS as an OpenAPI document: GET /openapi.json, and `python -m capsem.api.openapi`.

What OpenAPI has no word for goes by extensions: `x-capsem-states` are the states of a VM in which an operation is
legal, `x-capsem-retry-safe` tells whether doing it twice is as good as once, `x-capsem-on-disconnect` what becomes of it
when its client hangs up, and `x-capsem-codes`, of an answer, which errors have that status.
"""

from __future__ import annotations

import inspect
import sys
from collections import defaultdict
from collections.abc import Iterator
from typing import Any, Final

import msgspec

from capsem.api.operation import BYTES, EVENTS, JSON, TEXT, Operation
from capsem.api.operations import OPERATIONS
from capsem.api.types import ErrorBody, OpenApiDocument
from capsem.model.errors import CapsemError, InvalidInput, MachineFailed, PayloadTooLarge
from capsem.model.ids import NAME_PATTERN

REVISION: Final = "3.1.0"
_AT: Final = "#/components/schemas/{name}"
_EVERYWHERE: Final = (CapsemError, MachineFailed)  # what every operation may answer

Json = dict[str, Any]


def document(version: str) -> OpenApiDocument:
    """The whole table; `version` is the service's."""
    paths: dict[str, Json] = defaultdict(dict)
    for operation in OPERATIONS.values():
        paths[operation.path][operation.method.lower()] = _operation(operation)
    return OpenApiDocument(
        openapi=REVISION,
        info={"title": "Capsem", "version": version, "description": "Linux machines for AI agents."},
        paths=dict(paths),
        components={"schemas": _schemas()},
    )


def _operation(operation: Operation) -> Json:
    found: Json = {
        "operationId": operation.name,
        "summary": operation.summary,
        "parameters": [*_path_parameters(operation), *_query_parameters(operation)],
        "responses": {"200": _answer(operation), **_errors(operation)},
        "x-capsem-retry-safe": operation.retry_safe,
        "x-capsem-on-disconnect": operation.on_disconnect.value,
    }
    if operation.legal is not None:
        found["x-capsem-states"] = sorted(operation.legal)
    if operation.request is not None and operation.takes == JSON:
        required = any(field.required for field in msgspec.structs.fields(_known(operation.request_type())))
        found["requestBody"] = {"required": required, "content": {JSON: {"schema": _ref(operation.request)}}}
    elif operation.takes != JSON:
        found["requestBody"] = {"required": True, "content": {operation.takes: {"schema": _BINARY}}}
    return found


_BINARY: Final[Json] = {"type": "string", "format": "binary"}


def _ref(name: str) -> Json:
    return {"$ref": _AT.format(name=name)}


def _known(kind: type[msgspec.Struct] | None) -> type[msgspec.Struct]:
    assert kind is not None
    return kind


def _answer(operation: Operation) -> Json:
    kind = operation.response_type()
    about = inspect.cleandoc(kind.__doc__ or "") if isinstance(kind, type) else operation.summary
    schema = _BINARY
    if operation.gives == JSON:
        [schema], _ = msgspec.json.schema_components([kind], ref_template=_AT)
    elif operation.gives in (TEXT, EVENTS):
        schema = {"type": "string"}
    # Whatever a guest's file looks like, its bytes are sent as that.
    media = "*/*" if operation.gives == BYTES else operation.gives
    return {"description": about, "content": {media: {"schema": schema}}}


def _errors(operation: Operation) -> dict[str, Json]:
    """By status: the codes that come with it."""
    kinds: dict[type[CapsemError], None] = dict.fromkeys((*operation.errors, *_EVERYWHERE))
    if operation.takes_id or operation.request or operation.query:
        kinds[InvalidInput] = None
    if operation.request:
        kinds[PayloadTooLarge] = None
    by_status: dict[str, list[str]] = defaultdict(list)
    for kind in kinds:
        by_status[str(kind.status)].append(kind.code)
    return {
        status: {
            "description": ", ".join(codes),
            "content": {JSON: {"schema": _ref(ErrorBody.__name__)}},
            "x-capsem-codes": codes,
        }
        for status, codes in sorted(by_status.items())
    }


def _path_parameters(operation: Operation) -> Iterator[Json]:
    if operation.takes_id:
        yield {
            "name": "id",
            "in": "path",
            "required": True,
            "description": "The id of a VM.",
            "schema": {"type": "string", "pattern": f"^{NAME_PATTERN}$"},
        }
    if operation.takes_name:
        schema = {"type": "string", "pattern": "^[^/]+$"}
        yield {"name": "name", "in": "path", "required": True, "schema": schema}


def _query_parameters(operation: Operation) -> Iterator[Json]:
    kind = operation.query_type()
    if kind is None:
        return
    schema = _components([kind])[kind.__name__]
    for name, of in schema["properties"].items():
        yield {"name": name, "in": "query", "required": name in schema["required"], "schema": _present(of)}


def _present(schema: Json) -> Json:
    """Without null: what is not there is left out of a query, there is no way to write it."""
    if "anyOf" not in schema:
        return schema
    kept = [each for each in schema["anyOf"] if each != {"type": "null"}]
    rest = {key: value for key, value in schema.items() if key not in ("anyOf", "default")}
    return {**rest, **(kept[0] if len(kept) == 1 else {"anyOf": kept})}


def _schemas() -> Json:
    kinds: dict[type[msgspec.Struct], None] = {ErrorBody: None}
    for operation in OPERATIONS.values():
        for kind in (operation.request_type(), operation.response_type() if operation.gives == JSON else None):
            if kind is not None:
                kinds[kind] = None
    return _components(list(kinds))


def _components(kinds: list[type[msgspec.Struct]]) -> Json:
    _, components = msgspec.json.schema_components(kinds, ref_template=_AT)
    for schema in components.values():
        if "description" in schema:
            schema["description"] = inspect.cleandoc(schema["description"])
    return components


if __name__ == "__main__":
    from capsem import __version__

    text = msgspec.json.format(msgspec.json.encode(document(__version__)), indent=2)
    sys.stdout.write(text.decode() + "\n")
