"""One operation of the service, and the words that rows of the table of operations are made of.

An operation names its HTTP method and path, the types of its request, of its query and of its answer (by name: the
command line reads the table and has no time to import msgspec), the errors that a caller should expect, and the states
of a VM in which it is legal. In any other state it is refused with `otherwise`; a VM that is being deleted is gone for
everyone, so there it is NotFound.

`retry_safe`: doing it twice is as good as once. `on_disconnect`: what becomes of it when the client hangs up; a
lifecycle transition is FINISHed, what somebody only waits for is ABANDONed. `answer_within` is how many seconds a
client should wait for the answer, None for as long as it takes. `body_limit` is in bytes.
"""

from __future__ import annotations

from collections.abc import Iterable
from enum import Enum
from typing import TYPE_CHECKING, Final, NamedTuple

from capsem.model.errors import (
    CapsemError,
    Corrupt,
    GuestFailed,
    HostNotReady,
    Interrupted,
    LimitReached,
    MachineFailed,
    NotFound,
    NotRunning,
    TimedOut,
    Unavailable,
    WrongState,
)
from capsem.model.ids import NAME_LIMIT
from capsem.model.lifecycle import State

if TYPE_CHECKING:
    import msgspec

JSON_LIMIT: Final = 1024 * 1024
FILE_LIMIT: Final = 4 * 1024 * 1024  # 512 KiB of text, were every character escaped as \u00xx
ENV_LIMIT: Final = 12 * 1024 * 1024  # an environment, of which JSON may make six bytes for one

JSON: Final = "application/json"
BYTES: Final = "application/octet-stream"
TEXT: Final = "text/plain"
EVENTS: Final = "text/event-stream"

QUICK: Final = 30.0
FILE_CALL: Final = 120.0  # waiting for the guest to be ready, then the operation
TRANSITION: Final = 240.0  # waiting for its turn, one try, another try


class OnDisconnect(Enum):
    """What becomes of an operation whose client hangs up."""

    ABANDON = "abandon"
    FINISH = "finish"


ABANDON, FINISH = OnDisconnect.ABANDON, OnDisconnect.FINISH

GONE: Final = frozenset({State.DELETING, State.DELETED})
KNOWN: Final = frozenset(State) - GONE
AWAKE: Final = frozenset({State.STARTING, State.RUNNING, State.RESUMING})
BUSY: Final = frozenset({State.STOPPING, State.SUSPENDING})
# A suspend that is under way is waited for, and then the VM is at rest; nobody says when one that stops will be.
RESTABLE: Final = KNOWN - {State.STOPPING}
READABLE: Final = KNOWN - BUSY  # running, or with a volume that nobody writes to


class Operation(NamedTuple):
    """One row of the table; see the module."""

    name: str
    method: str
    path: str
    summary: str
    response: str
    request: str | None = None
    query: str | None = None
    errors: tuple[type[CapsemError], ...] = ()
    legal: frozenset[State] | None = None  # None: not about one VM
    otherwise: type[CapsemError] = NotRunning
    retry_safe: bool = False
    on_disconnect: OnDisconnect = ABANDON
    answer_within: float | None = QUICK
    body_limit: int = JSON_LIMIT
    takes: str = JSON  # the media type of the request's body
    gives: str = JSON  # and of the answer's

    @property
    def takes_name(self) -> bool:
        """Whether the path holds a name of something other than a VM."""
        return "{name}" in self.path

    @property
    def takes_id(self) -> bool:
        """Whether the path holds a VM's id."""
        return "{id}" in self.path

    def request_type(self) -> type[msgspec.Struct] | None:
        """The type of the request's body, None if it has none."""
        return None if self.request is None else _type(self.request)

    def query_type(self) -> type[msgspec.Struct] | None:
        """The type of what the query may hold, None if that is nothing."""
        return None if self.query is None else _type(self.query)

    def response_type(self) -> type[msgspec.Struct]:
        """The type of the answer; of some it is a list."""
        return _type(self.response)

    def refusal(self, state: State) -> type[CapsemError] | None:
        """The error that answers this operation in `state`; None if it is legal there."""
        if self.legal is None or state in self.legal:
            return None
        return NotFound if state in GONE else self.otherwise

    def require(self, state: State, vm_id: str) -> None:
        """Check that the VM may be asked for this in `state`. Raises what `refusal` says, with a hint."""
        refusal = self.refusal(state)
        if refusal is None:
            return
        if refusal is NotFound:
            raise unknown_vm(vm_id)
        if refusal is NotRunning:
            raise NotRunning(f"{vm_id} is not running", hint=f"capsem resume {vm_id}")
        if refusal is WrongState:  # for what could be done of a VM that does not run, but is not
            what = "its files can be written while it runs, and read also when it has stopped"
            shown = "defunct" if state == State.FAILED else state  # the word that `list` has for it
            raise WrongState(f"{vm_id} is {shown}: {what}", hint=f"capsem resume {vm_id}")
        raise refusal(f"{vm_id} is {state}: cannot {self.name} it now", hint="try again in a moment")


def unknown_vm(vm_id: str, known: Iterable[str] = ()) -> NotFound:
    """The error for an id that no VM has; the hint tells the nearest of those `known`, if one is near."""
    from difflib import get_close_matches  # here, as nothing else in the command line needs it

    near = get_close_matches(vm_id, list(known), n=1) if len(vm_id) <= NAME_LIMIT else []
    meant = f"did you mean {near[0]}? " if near else ""
    return NotFound(f"no VM is called {vm_id}", hint=f"{meant}capsem list shows those there are")


def _type(name: str) -> type[msgspec.Struct]:
    from capsem.api import (
        checkpoint_types,
        exec_types,
        file_types,
        host_types,
        ledger_types,
        network_types,
        secret_types,
        types,
        usage_types,
        vm_types,
    )

    modules = (
        vm_types,
        exec_types,
        file_types,
        checkpoint_types,
        usage_types,
        ledger_types,
        network_types,
        secret_types,
        host_types,
        types,
    )
    for module in modules:
        if name in vars(module):
            found: type[msgspec.Struct] = vars(module)[name]
            return found
    raise LookupError(name)


BOOT: Final = (LimitReached, HostNotReady, MachineFailed, Corrupt, Unavailable)
GUEST: Final = (NotFound, NotRunning, GuestFailed, Interrupted, TimedOut)
