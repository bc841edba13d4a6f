"""The life of a VM: the tables agree with each other, and `step` with the tables."""

import itertools

import pytest

from capsem.model.errors import WrongState
from capsem.model.lifecycle import (
    INVARIANTS,
    LIVE,
    PUBLIC_STATUS,
    TRANSITIONS,
    Event,
    State,
    Status,
    recover,
    step,
    to_markdown,
)


def _reachable(start: State) -> set[State]:
    seen, todo = {start}, [start]
    while todo:
        for state in TRANSITIONS[todo.pop()].values():
            if state not in seen:
                seen.add(state)
                todo.append(state)
    return seen


def test_every_table_covers_every_state() -> None:
    for table in (TRANSITIONS, INVARIANTS, PUBLIC_STATUS):
        assert set(table) == set(State)
    assert all(INVARIANTS.values())


def test_every_event_and_every_state_is_used() -> None:
    assert {event for moves in TRANSITIONS.values() for event in moves} == set(Event)
    assert {state for moves in TRANSITIONS.values() for state in moves.values()} == set(State) - {State.CREATED}


def test_every_state_is_reachable_and_every_state_can_be_deleted() -> None:
    assert _reachable(State.CREATED) == set(State)
    for state in State:
        assert State.DELETED in _reachable(state)


def test_the_end_of_the_process_is_handled_in_exactly_the_live_states() -> None:
    """A resume alone ends without a trace: the VM is as suspended as before, not stopped, not lost."""
    for event in (Event.LOST, Event.EXITED):
        assert {state for state, moves in TRANSITIONS.items() if event in moves} == LIVE - {State.RESUMING}
    assert TRANSITIONS[State.RESUMING] == {Event.READY: State.RUNNING, Event.ABORTED: State.SUSPENDED}


def test_what_lives_is_shown_as_running_and_only_that() -> None:
    """But for a machine that is being resumed: it is nobody's to use before it has shown that it is well."""
    assert {state for state, status in PUBLIC_STATUS.items() if status is Status.RUNNING} == LIVE - {State.RESUMING}
    assert {state for state, status in PUBLIC_STATUS.items() if status is Status.SUSPENDED} == {
        State.SUSPENDED,
        State.RESUMING,
    }
    assert {state for state, status in PUBLIC_STATUS.items() if status is None} == {State.DELETING, State.DELETED}


def test_delete_is_never_possible_while_a_process_may_live() -> None:
    for state in LIVE:
        assert Event.DELETE not in TRANSITIONS[state]


@pytest.mark.parametrize(("state", "event"), list(itertools.product(State, Event)))
def test_step_follows_the_table_or_raises_and_changes_nothing(state: State, event: Event) -> None:
    before = {each: dict(moves) for each, moves in TRANSITIONS.items()}
    if event in TRANSITIONS[state]:
        assert step(state, event) is TRANSITIONS[state][event]
    else:
        with pytest.raises(WrongState) as caught:
            step(state, event)
        assert str(state) in caught.value.message
        assert str(event) in caught.value.message
        for legal in TRANSITIONS[state]:
            assert str(legal) in (caught.value.hint or "")
    assert {each: dict(moves) for each, moves in TRANSITIONS.items()} == before


def test_the_tables_cannot_be_changed() -> None:
    for table in (TRANSITIONS, INVARIANTS, PUBLIC_STATUS):
        with pytest.raises(TypeError):
            table[State.CREATED] = None  # type: ignore[index]


@pytest.mark.parametrize("state", State)
def test_recover_leaves_a_supervised_record_alone(state: State) -> None:
    for same in (True, False):
        assert recover(state, supervisor_alive=True, same_host_boot=same) is state


@pytest.mark.parametrize(
    ("state", "same_boot", "after_reboot"),
    [
        (State.CREATED, State.CREATED, State.CREATED),
        (State.STARTING, State.FAILED, State.STOPPED),
        (State.RUNNING, State.FAILED, State.STOPPED),
        (State.STOPPING, State.FAILED, State.STOPPED),
        (State.STOPPED, State.STOPPED, State.STOPPED),
        (State.SUSPENDING, State.FAILED, State.STOPPED),
        (State.SUSPENDED, State.SUSPENDED, State.SUSPENDED),
        (State.RESUMING, State.SUSPENDED, State.SUSPENDED),
        (State.FAILED, State.FAILED, State.FAILED),
        (State.DELETING, State.DELETING, State.DELETING),
        (State.DELETED, State.DELETED, State.DELETED),
    ],
)
def test_recover_of_an_ownerless_record(state: State, same_boot: State, after_reboot: State) -> None:
    assert recover(state, supervisor_alive=False, same_host_boot=True) is same_boot
    assert recover(state, supervisor_alive=False, same_host_boot=False) is after_reboot


@pytest.mark.parametrize("state", State)
def test_a_committed_checkpoint_completes_a_suspend_and_nothing_else(state: State) -> None:
    for same in (True, False):
        without = recover(state, supervisor_alive=False, same_host_boot=same)
        saved = recover(state, supervisor_alive=False, same_host_boot=same, saved=True)
        assert saved is (State.SUSPENDED if state is State.SUSPENDING else without)


def test_recovering_twice_is_recovering_once() -> None:
    for state, same in itertools.product(State, (True, False)):
        once = recover(state, supervisor_alive=False, same_host_boot=same)
        assert once not in LIVE
        assert recover(once, supervisor_alive=False, same_host_boot=same) is once


def test_the_document_names_every_state_move_and_invariant() -> None:
    lines = to_markdown().splitlines()
    for state, moves in TRANSITIONS.items():
        (row,) = [line for line in lines if line.startswith(f"| {state} |")]
        assert INVARIANTS[state] in row
        assert (PUBLIC_STATUS[state] or "not listed") in row
        for event, to in moves.items():
            assert f"{event} -> {to}" in row
            assert f"    {state} --> {to}: {event}" in lines
    assert sum(line.startswith("    ") and "-->" in line for line in lines) == 2 + sum(map(len, TRANSITIONS.values()))
