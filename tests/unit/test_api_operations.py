"""The table of operations against itself, the lifecycle and the types."""

from __future__ import annotations

import typing

import msgspec
import pytest

from capsem.api.operation import OnDisconnect
from capsem.api.operations import OPERATIONS
from capsem.model.errors import CapsemError, NotFound, NotRunning, Unavailable, WrongState
from capsem.model.lifecycle import LIVE, PUBLIC_STATUS, State
from capsem.service.app import HANDLERS
from capsem.service.checkpoint_routes import CHECKPOINT_ROUTES
from capsem.service.event_routes import EVENT_ROUTES
from capsem.service.file_routes import FILE_ROUTES

OF_A_VM = [operation for operation in OPERATIONS.values() if operation.legal is not None]


def test_names_and_routes_are_unique() -> None:
    assert [operation.name for operation in OPERATIONS.values()] == list(OPERATIONS)
    assert len({(operation.method, operation.path) for operation in OPERATIONS.values()}) == len(OPERATIONS)


@pytest.mark.parametrize("operation", OPERATIONS.values(), ids=list(OPERATIONS))
def test_rows_are_whole(operation) -> None:  # type: ignore[no-untyped-def]
    kind = operation.response_type()
    assert all(issubclass(part, msgspec.Struct) for part in typing.get_args(kind) or (kind,))
    assert (operation.query_type() is None) == (operation.query is None)
    assert operation.request is None or operation.query is None  # a handler is handed one of them
    assert (operation.request_type() is None) == (operation.request is None)
    assert operation.takes_id == (operation.legal is not None)
    assert operation.summary
    assert operation.body_limit <= 16 * 1024 * 1024
    if operation.method == "GET":
        assert operation.retry_safe
        assert operation.on_disconnect is OnDisconnect.ABANDON
    apart = {"version", "openapi", "exec_stream", "forward", *FILE_ROUTES, *CHECKPOINT_ROUTES, *EVENT_ROUTES}
    if operation.name not in apart:
        assert operation.name in HANDLERS


@pytest.mark.parametrize("operation", OF_A_VM, ids=lambda operation: operation.name)
@pytest.mark.parametrize("state", list(State))
def test_every_state_has_an_answer(operation, state: State) -> None:  # type: ignore[no-untyped-def]
    refusal = operation.refusal(state)
    if refusal is None:
        operation.require(state, "box")
        return
    assert refusal in operation.errors
    with pytest.raises(refusal, match="box") as caught:
        operation.require(state, "box")
    assert caught.value.hint
    if PUBLIC_STATUS[state] is None:
        assert refusal is NotFound
    if state == State.FAILED and refusal is WrongState:
        assert "box is defunct" in caught.value.message, "as `list` calls it"


def test_what_the_contract_says_about_states() -> None:
    def code(name: str, state: State) -> type[CapsemError] | None:
        return OPERATIONS[name].refusal(state)

    for name in ("read_file", "list_files", "get_file"):
        assert {code(name, state) for state in (State.CREATED, State.RUNNING, State.STOPPED, State.FAILED)} == {None}
    assert code("put_file", State.STOPPED) is code("get_file", State.STOPPING) is WrongState
    for name in ("exec", "exec_stream", "write_file", "stop"):
        assert code(name, State.STOPPED) is NotRunning
        assert code(name, State.FAILED) is NotRunning
        assert code(name, State.STARTING) is None  # it waits until the guest is ready
    assert code("exec", State.STOPPING) is NotRunning
    assert code("resume", State.RUNNING) is None
    assert code("resume", State.STOPPING) is Unavailable
    assert all(code("info", state) is None for state in LIVE)
    # Every state has a way out.
    assert all(code("delete", state) is None for state in State if state is not State.DELETED)
    assert code("delete", State.DELETED) is NotFound
    assert OPERATIONS["exec"].refusal(State.DELETING) is NotFound


def test_operations_not_about_a_vm_are_legal_whatever_it_does() -> None:
    assert OPERATIONS["list"].refusal(State.DELETED) is None
