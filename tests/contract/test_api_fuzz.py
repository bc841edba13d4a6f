"""Requests made from our own OpenAPI document, sound and unsound, to a service whose machines are simulated: an answer as
the document has it or one typed error, and a refusal changes nothing."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import logging
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode

import msgspec
import pytest
import schemathesis
import uvicorn
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.errors import Unsatisfiable
from sim_world import SimWorld, sim_world

from capsem.api.openapi import document
from capsem.api.operation import EVENTS
from capsem.api.operations import OPERATIONS as TABLE
from capsem.api.stream import CONTENT_TYPE
from capsem.model.errors import BY_CODE
from capsem.service.app import build_app

SCHEMA = schemathesis.openapi.from_dict(msgspec.to_builtins(document("1.2.3")))
OPERATIONS = [found.ok() for found in SCHEMA.get_all_operations()]
EXAMPLES = 4  # of each operation, sound ones and as many unsound
# A machine that boots each time, streams of frames, which tests/unit/test_api_stream.py spoils, and of events, without an end.
LEFT_OUT = {"run"} | {row.name for row in TABLE.values() if row.takes == CONTENT_TYPE or row.gives == EVENTS}
MODES = {"positive": schemathesis.GenerationMode.POSITIVE, "negative": schemathesis.GenerationMode.NEGATIVE}


class Connection(http.client.HTTPConnection):
    """To a Unix socket."""

    def __init__(self, path: Path) -> None:
        super().__init__("localhost", timeout=60)
        self._path = str(path)

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._path)


class Service:
    """A running one, as a client sees it."""

    def __init__(self, world: SimWorld, path: Path) -> None:
        self.world = world
        self.path = path

    def ask(self, method: str, path: str, body: bytes | None, headers: dict[str, str]) -> tuple[int, str, bytes]:
        """Status, media type and body of the answer."""
        connection = Connection(self.path)
        with contextlib.closing(connection):
            connection.request(method, path, body, headers)
            answer = connection.getresponse()
            return answer.status, answer.headers.get("Content-Type", ""), answer.read()

    def records(self) -> dict[str, bytes]:
        """All that a VM is."""
        layout = self.world.layout
        return {
            str(path.relative_to(layout.run_dir)): path.read_bytes()
            for parent in (layout.persistent, layout.sessions)
            for path in parent.glob("*/vm.json")
        }


@contextlib.asynccontextmanager
async def served(root: Path) -> Any:
    async with sim_world(root, plan="tolerant") as world:
        await world.create("box")
        path = root / "service.sock"
        server = uvicorn.Server(
            uvicorn.Config(build_app(world.handlers, "1.2.3"), uds=str(path), log_config=None, lifespan="off")
        )
        serving = asyncio.create_task(server.serve())
        while not server.started:
            await asyncio.sleep(0.01)
        try:
            yield Service(world, path)
        finally:
            server.should_exit = True
            await serving


@contextlib.contextmanager
def complaints() -> Iterator[list[logging.LogRecord]]:
    """What is logged with a traceback: a request must never get that far."""
    found: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = lambda record: found.append(record) if record.exc_info else None  # type: ignore[method-assign]
    logging.getLogger().addHandler(handler)
    try:
        yield found
    finally:
        logging.getLogger().removeHandler(handler)


def sent(case: Any, vm_id: str | None) -> tuple[str, str, bytes | None, dict[str, str]]:
    """A generated case as a request; `vm_id` is who is meant, for requests that would mean nobody."""
    given_path = dict(case.path_parameters or {})
    if vm_id is not None and "id" in given_path:
        given_path["id"] = vm_id
    path = case.path
    for name, value in given_path.items():
        path = path.replace("{" + name + "}", quote(str(value), safe=""))
    if case.query:
        path += "?" + urlencode({name: str(value) for name, value in case.query.items()})
    headers = {"Content-Type": case.media_type} if case.media_type else {}
    if isinstance(case.body, bytes):
        return case.method.upper(), path, case.body, headers
    if case.body is None or type(case.body).__name__ == "NotSet":
        return case.method.upper(), path, None, headers
    return case.method.upper(), path, json.dumps(case.body).encode(errors="replace"), headers


def judge(service: Service, operation: Any, request: tuple[str, str, bytes | None, dict[str, str]]) -> None:
    before = service.records()
    with complaints() as found:
        status, kind, body = service.ask(*request)
    assert not found, found[0].getMessage()
    documented = {int(each) for each in operation.definition.raw["responses"] if each.isdigit()}
    if status < 400:
        assert status in documented
        if kind == "application/json":
            json.loads(body)
        return
    told = json.loads(body)
    assert set(told) >= {"error", "code"}
    assert told["code"] in BY_CODE
    assert "internal error" not in told["error"]
    assert "Traceback" not in told["error"]
    if status in (400, 404, 405, 413, 422):
        assert service.records() == before, "it was refused, and done"


def attack(service: Service, operation: Any, mode: str) -> int:
    """Ask for one operation in many ways; returns in how many."""
    asked = 0

    @settings(
        max_examples=EXAMPLES, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck)
    )
    @given(case=operation.as_strategy(generation_mode=MODES[mode]), vm_id=st.sampled_from(["box", None]))
    def one(case: Any, vm_id: str | None) -> None:
        nonlocal asked
        asked += 1
        judge(service, operation, sent(case, vm_id))

    with contextlib.suppress(Unsatisfiable):  # nothing about an operation without parameters can be unsound
        one()
    return asked


@pytest.mark.parametrize("mode", MODES)
def test_every_operation(tmp_path: Path, mode: str) -> None:
    def all_of_them(service: Service) -> int:
        asked = sum(
            attack(service, each, mode) for each in OPERATIONS if each.definition.raw["operationId"] not in LEFT_OUT
        )
        assert service.ask("GET", "/list", None, {})[0] == 200
        return asked

    async def run() -> int:
        async with served(tmp_path) as service:
            return await asyncio.to_thread(all_of_them, service)

    assert asyncio.run(run()) >= 100
