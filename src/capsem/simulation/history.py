"""What clients were told, hence what has to be true.

Each client has in each VM a place of its own, which it alone changes: a tally in the guest's memory, a count in a file,
a text in another file, and marks in a third. One command adds one to the tally and to the count, and flushes: memory and
disk are in step. Another one adds a mark, and leaves the flush to whoever saves the machine: with memory, all marks are
there; without, some may be gone. A place is a set of states that are possible by what the client was told; what it sees
makes the set smaller, and a set that becomes empty is a violation.

An operation of which nobody knows the outcome is pending: a part of every state from there on, it may come to pass once,
whenever it likes, or never. One that was acknowledged has happened exactly once.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

PENDING_MOST = 4


class Add(NamedTuple):
    """The command that adds one to both numbers."""

    id: int


class Write(NamedTuple):
    """A text that is written."""

    id: int
    text: str


class Mark(NamedTuple):
    """The command that adds a mark."""

    id: int


Own = Add | Write | Mark  # what a client does with its place


class Rest(NamedTuple):
    """What is left of an `Add` that has changed the tally."""

    id: int
    half: bool = True


class Possible(NamedTuple):
    """One state that a place may be in."""

    tally: int = 0  # in memory
    sum: int = 0  # in a file on disk
    text: str | None = None
    marks: int = 0  # in a file of which the guest's page cache may know more than the disk
    fewest: int = 0  # so many of them are there in any case: the same number while memory was not lost
    flushed: int = 0  # so many are on disk in any case
    pending: frozenset[Own | Rest] = frozenset()

    def after(self, what: Own | Rest) -> list[Possible]:
        """What it may be while the operation comes to pass, and when it has."""
        left = self.pending - {what}
        if isinstance(what, Write):
            return [self._replace(text=what.text, pending=left)]
        if isinstance(what, Mark):
            return [self._replace(marks=self.marks + 1, fewest=self.fewest + 1, pending=left)]
        if isinstance(what, Rest):
            return [self._replace(sum=self.sum + 1, pending=left)]
        more = self._replace(tally=self.tally + 1, pending=left)
        return [more._replace(pending=left | {Rest(what.id)}), more._replace(sum=self.sum + 1)]

    def done(self, what: Own) -> Possible:
        """When it has come to pass."""
        return self.after(what)[-1]

    def without_memory(self) -> Possible:
        """When its machine has ended: what only the page cache knew may be gone."""
        return self._replace(tally=0, fewest=min(self.fewest, self.flushed))

    def with_marks(self, marks: int) -> Possible:
        """When so many are seen. Those that were not made since memory was lost have come from the disk."""
        return self._replace(marks=marks, fewest=marks, flushed=marks - (self.fewest - self.flushed))


START = frozenset({Possible()})
States = frozenset[Possible]


def closure(states: Iterable[Possible]) -> set[Possible]:
    """With all that may have come to pass meanwhile."""
    seen: set[Possible] = set()
    todo = list(states)
    while todo:
        state = todo.pop()
        if state not in seen:
            seen.add(state)
            for what in state.pending:
                todo += state.after(what)
    return seen


Places = dict[str, States]  # by client


@dataclass(eq=False)
class VmHistory:
    """What is known of one VM."""

    name: str
    persistent: bool = True
    places: Places = field(default_factory=dict)
    watchers: list[Places] = field(default_factory=list)  # copies in the making: they may be of any instant
    ahead: list[Places] = field(default_factory=list)  # of the watchers, those that it is being taken to
    checkpoints: dict[str, Places] = field(default_factory=dict)  # acknowledged, and not removed
    sure: bool = True  # it exists; else it may
    doomed: bool = False  # somebody has asked for its end, or for another name
    missed: bool = False  # the service said that there is none of that name
    changes: int = 0  # operations on the whole VM that began, and things done to it
    under_way: int = 0
    suspended: bool = False  # acknowledged, and nothing was done to it since

    def get(self, client: str) -> States:
        """The states of a client's place."""
        return self.places.get(client, START)

    def put(self, client: str, states: Iterable[Possible]) -> None:
        """What is possible now, or is what it is being taken to. May it be so in copies, too."""
        self.places[client] = frozenset(states).union(*(each.get(client, START) for each in self.ahead))
        for copy in self.watchers:
            copy[client] = copy.get(client, START) | self.places[client]

    def add(self, client: str, states: Iterable[Possible]) -> None:
        """What is possible beside what was."""
        self.put(client, self.get(client) | frozenset(states))

    def watch(self, copy: Places | None = None) -> Places:
        """Begin a copy: of the present, unless one is given."""
        copy = dict(self.places) if copy is None else dict(copy)
        self.watchers.append(copy)
        return copy

    def unwatch(self, copy: Places) -> Places:
        """It is made, or will not be."""
        self.ahead = [each for each in self.ahead if each is not copy]
        self.watchers = [each for each in self.watchers if each is not copy]
        return copy

    def may_lose_memory(self) -> None:
        """Something happened that may have ended its machine."""
        self.changes += 1
        self.suspended = False
        for client in list(self.places):
            self.add(client, (state.without_memory() for state in closure(self.get(client))))

    def taken_to(self, places: Places) -> Places:
        """It is being taken to what `places` say, and may come there at any time from now until `unwatch`: whatever is
        said of the present meanwhile says nothing about that."""
        self.ahead.append(self.watch(places))
        self.may_be(places)
        return self.ahead[-1]

    def may_be(self, places: Places) -> None:
        """Something happened that may have taken it to another state."""
        for client in {*places, *self.places}:
            self.add(client, places.get(client, START))

    # -- one client's operations

    def begin(self, client: str, what: Own) -> None:
        """An operation begins; from here on it may come to pass."""
        self.put(client, (state._replace(pending=state.pending | {what}) for state in self.get(client)))

    def refused(self, client: str, what: Own) -> None:
        """It is certain that it does not."""
        self.put(client, (state._replace(pending=state.pending - {what}) for state in self.get(client)))

    def added(self, client: str, what: Add, tally: int, count: int) -> bool:
        """It was acknowledged, with these sums; False: they cannot be."""
        return self._narrow(
            client, {each for each in self._done(client, what) if (each.tally, each.sum) == (tally, count)}
        )

    def marked(self, client: str, what: Mark, marks: int) -> bool:
        """It was acknowledged, with so many marks; False: that cannot be."""
        after = (each for each in self._done(client, what) if each.fewest <= marks <= each.marks)
        return self._narrow(client, {each.with_marks(marks) for each in after})

    def written(self, client: str, what: Write) -> None:
        """It was acknowledged."""
        self.put(client, self._done(client, what))

    def seen(self, client: str, text: str | None) -> bool:
        """That was read; False: it cannot be."""
        return self._narrow(client, {state for state in closure(self.get(client)) if state.text == text})

    def _done(self, client: str, what: Own) -> set[Possible]:
        """What may be, where it has come to pass."""
        return {state.done(what) for state in closure(self.get(client)) if what in state.pending}

    def _narrow(self, client: str, states: set[Possible]) -> bool:
        """Only these are possible; False, and all stays as it was: none is."""
        if states:
            self.put(client, states)
        return bool(states)

    def too_much_pending(self, client: str) -> bool:
        """Whether the client had better take another place."""
        return any(len(state.pending) > PENDING_MOST for state in self.get(client))
