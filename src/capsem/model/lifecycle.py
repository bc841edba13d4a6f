"""The life of a VM as data. Everything that decides a VM's state is in this module; everything else calls `step`.

`TRANSITIONS` maps state -> event -> next state. What is not in it is illegal: `step` raises and changes nothing.
`INVARIANTS` says what is true in each state. `PUBLIC_STATUS` is what clients are shown. `recover` is what a service
that starts (or a sweep) makes of a recorded state, given what the kernel says about the VM's processes.
docs/lifecycle.md is generated from these tables by `python -m capsem.model.lifecycle`.
"""

from __future__ import annotations

from enum import StrEnum
from types import MappingProxyType
from typing import Final

from capsem.model.errors import WrongState


class State(StrEnum):
    """Where a VM is in its life."""

    CREATED = "created"
    STARTING = "starting"
    RUNNING = "running"
    STOPPING = "stopping"
    STOPPED = "stopped"
    SUSPENDING = "suspending"
    SUSPENDED = "suspended"
    RESUMING = "resuming"
    FAILED = "failed"
    DELETING = "deleting"
    DELETED = "deleted"


class Event(StrEnum):
    """What can happen to a VM. Verbs are requests; participles are facts."""

    START = "start"
    READY = "ready"
    STOP = "stop"
    EXITED = "exited"
    SUSPEND = "suspend"
    SUSPENDED = "suspended"
    RESUME = "resume"
    ABORTED = "aborted"
    ROLL_BACK = "roll back"
    FORGET = "forget"
    LOST = "lost"
    DELETE = "delete"
    DELETED = "deleted"


class Status(StrEnum):
    """The contract's public status."""

    RUNNING = "Running"
    STOPPED = "Stopped"
    SUSPENDED = "Suspended"
    DEFUNCT = "Defunct"


_REST: Final = MappingProxyType(
    {Event.START: State.STARTING, Event.ROLL_BACK: State.SUSPENDED, Event.DELETE: State.DELETING}
)

TRANSITIONS: Final = MappingProxyType(
    {
        State.CREATED: {**_REST},
        State.STARTING: {
            Event.READY: State.RUNNING,
            Event.STOP: State.STOPPING,
            Event.EXITED: State.STOPPED,
            Event.LOST: State.FAILED,
        },
        State.RUNNING: {
            Event.STOP: State.STOPPING,
            Event.SUSPEND: State.SUSPENDING,
            Event.EXITED: State.STOPPED,
            Event.LOST: State.FAILED,
        },
        State.STOPPING: {Event.EXITED: State.STOPPED, Event.LOST: State.FAILED},
        State.STOPPED: {**_REST},
        State.SUSPENDING: {
            Event.SUSPENDED: State.SUSPENDED,
            Event.ABORTED: State.RUNNING,
            Event.STOP: State.STOPPING,
            Event.EXITED: State.STOPPED,
            Event.LOST: State.FAILED,
        },
        State.SUSPENDED: {Event.RESUME: State.RESUMING, Event.FORGET: State.STOPPED, **_REST},
        State.RESUMING: {Event.READY: State.RUNNING, Event.ABORTED: State.SUSPENDED},
        State.FAILED: {**_REST},
        State.DELETING: {Event.DELETED: State.DELETED},
        State.DELETED: {},
    }
)

INVARIANTS: Final = MappingProxyType(
    {
        State.CREATED: "A record and a volume; no machine has run on it yet.",
        State.STARTING: "The supervisor holds the claim; the VMM may be alive; the guest has not said it is ready.",
        State.RUNNING: "The supervisor holds the claim; the VMM is alive; the handshake is done; `.ready` exists.",
        State.STOPPING: "The guest was asked to power off; a deadline runs; no new command is admitted.",
        State.STOPPED: "No process; no memory; the volume is intact; how the last run ended is recorded.",
        State.SUSPENDING: "The machine is being saved to the checkpoint `saving`; until that is committed it can go on.",
        State.SUSPENDED: "No process; `checkpoint` is committed and its layers are the volume's: nothing writes to them.",
        State.RESUMING: "A machine runs on a copy of `checkpoint`; nobody may use it until it has shown that it is well.",
        State.FAILED: "The last run ended without a word of its own; nothing runs; the volume is what the guest last flushed.",
        State.DELETING: "Files are being removed; doing it again is safe.",
        State.DELETED: "Nothing is left; the name is free.",
    }
)

PUBLIC_STATUS: Final = MappingProxyType(
    {
        State.CREATED: Status.STOPPED,
        State.STARTING: Status.RUNNING,
        State.RUNNING: Status.RUNNING,
        State.STOPPING: Status.RUNNING,
        State.STOPPED: Status.STOPPED,
        State.SUSPENDING: Status.RUNNING,
        State.SUSPENDED: Status.SUSPENDED,
        State.RESUMING: Status.SUSPENDED,
        State.FAILED: Status.DEFUNCT,
        State.DELETING: None,
        State.DELETED: None,
    }
)

# States in which a supervisor owns a VMM process, or is about to.
LIVE: Final = frozenset({State.STARTING, State.RUNNING, State.STOPPING, State.SUSPENDING, State.RESUMING})


def step(state: State, event: Event) -> State:
    """The state after `event`; raises WrongState when the table has no such move."""
    moves = TRANSITIONS[state]
    if event not in moves:
        legal = ", ".join(sorted(moves)) or "nothing"
        raise WrongState(f"cannot {event} a VM that is {state}", hint=f"from here: {legal}")
    return moves[event]


def recover(state: State, *, supervisor_alive: bool, same_host_boot: bool, saved: bool = False) -> State:
    """What a recorded state means now, for a service that looks at it from outside.

    `supervisor_alive` is whether somebody holds the VM's claim: then the record is theirs and stands as it is.
    With nobody there, a live state was lost with its process, unless the whole host went down meanwhile, which
    is no fault of the VM's: it is then Stopped. A resume that was cut short has changed nothing, and a suspend whose
    checkpoint was committed (`saved`) is done: the machine had stopped for good. An interrupted delete is to be run again.
    """
    if supervisor_alive or state not in LIVE:
        return state
    if state == State.RESUMING:
        return step(state, Event.ABORTED)
    if state == State.SUSPENDING and saved:
        return step(state, Event.SUSPENDED)
    return step(state, Event.LOST if same_host_boot else Event.EXITED)


def to_markdown() -> str:
    """docs/lifecycle.md: the diagram and the tables."""
    lines = [
        "# The life of a VM",
        "",
        "Generated from `capsem.model.lifecycle` by `make docs`; do not edit.",
        "",
        "```mermaid",
        "stateDiagram-v2",
        "    [*] --> created",
    ]
    lines += [f"    {state} --> {to}: {event}" for state, moves in TRANSITIONS.items() for event, to in moves.items()]
    lines += [
        "    deleted --> [*]",
        "```",
        "",
        "| state | shown as | what is true in it | events |",
        "|---|---|---|---|",
    ]
    for state, moves in TRANSITIONS.items():
        events = ", ".join(f"{event} -> {to}" for event, to in moves.items()) or "-"
        lines.append(f"| {state} | {PUBLIC_STATUS[state] or 'not listed'} | {INVARIANTS[state]} | {events} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    import sys

    sys.stdout.write(to_markdown())
