"""The OpenAPI document, the table that it is made from, and the routes that the service has, are one thing."""

from __future__ import annotations

import re
from typing import Any

import msgspec
import pytest
import schemathesis
from starlette.routing import Route

from capsem.api.openapi import document
from capsem.api.operation import JSON
from capsem.api.operations import OPERATIONS
from capsem.model.errors import BY_CODE
from capsem.service.app import build_app
from contract.fake_service import FakeManager

DOCUMENT: dict[str, Any] = msgspec.to_builtins(document("1.2.3"))


def _operations() -> dict[str, dict[str, Any]]:
    return {
        f"{method.upper()} {path}": operation
        for path, methods in DOCUMENT["paths"].items()
        for method, operation in methods.items()
    }


def test_it_is_valid_openapi() -> None:
    schemathesis.openapi.from_dict(DOCUMENT).validate()


def test_the_table_the_document_and_the_application_have_the_same_routes() -> None:
    table = {f"{row.method} {row.path}": row.name for row in OPERATIONS.values()}
    assert {where: operation["operationId"] for where, operation in _operations().items()} == table
    routes = [route for route in build_app(FakeManager(), "1.2.3").routes if isinstance(route, Route)]  # type: ignore[arg-type]
    served = {
        f"{method} {route.path.replace('{id:path}', '{id}')}"
        for route in routes
        for method in (route.methods or set()) - {"HEAD"}
    }
    assert served == set(table)


@pytest.mark.parametrize("row", OPERATIONS.values(), ids=list(OPERATIONS))
def test_an_operation_is_told_whole(row) -> None:  # type: ignore[no-untyped-def]
    operation = _operations()[f"{row.method} {row.path}"]
    assert operation["x-capsem-retry-safe"] is row.retry_safe
    assert operation.get("x-capsem-states") == (None if row.legal is None else sorted(row.legal))
    codes = {code for answer in operation["responses"].values() for code in answer.get("x-capsem-codes", ())}
    assert codes >= {error.code for error in row.errors}
    for status, answer in operation["responses"].items():
        assert all(str(BY_CODE[code].status) == status for code in answer.get("x-capsem-codes", ()))
    assert ("requestBody" in operation) == (row.request is not None or row.takes != JSON)
    names = {parameter["name"] for parameter in operation["parameters"]}
    assert names >= set(re.findall(r"[?&](\w+)=", row.summary))
    in_path = {parameter["name"] for parameter in operation["parameters"] if parameter["in"] == "path"}
    assert ("id" in in_path) == row.takes_id


def test_every_reference_leads_somewhere() -> None:
    found = set(re.findall(r'"#/components/schemas/(\w+)"', msgspec.json.encode(DOCUMENT).decode()))
    assert found <= set(DOCUMENT["components"]["schemas"])
    assert "ErrorBody" in found


def test_rules_that_the_code_checks_are_told_too() -> None:
    provision = DOCUMENT["components"]["schemas"]["ProvisionRequest"]["properties"]
    [name, _null] = provision["name"]["anyOf"]
    assert re.match(name["pattern"], "box-1")
    assert not re.match(name["pattern"], "-box")
    [cpus, _null] = provision["cpus"]["anyOf"]
    assert (cpus["minimum"], cpus["maximum"]) == (1, 8)
