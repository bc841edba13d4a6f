"""What the host knows of a VM: the files that it must have, and what its memory must hold.

An operation that was acknowledged has happened. One that failed or was cut off may have: then the host knows several
states, one of which the VM must be in, and learns which when it looks; and of a file that it was about to write it knows
nothing any more.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Final, NamedTuple

Piece = tuple[str, int]  # a word, and how many bytes of it, line after line
UNKNOWN: Final = "unknown"


class Seen(NamedTuple):
    """What a guest says that it has: of each file something that tells its content; complaints of its kernel; `wrong`
    is what it found wrong by itself."""

    memory: str
    files: dict[str, str]
    log: str
    wrong: str = ""


@dataclass(frozen=True, slots=True)
class State:
    """One state of a VM. `memory`: None when nothing was put there yet."""

    files: dict[str, tuple[Piece, ...]]
    memory: str | None = None


class Truth:
    """The states in which a VM may be: usually one."""

    def __init__(self, *states: State) -> None:
        self.states = list(states) or [State({})]
        self.unsure = 0  # looks whose answers were lost

    @property
    def certain(self) -> State | None:
        """The state, if there is but one."""
        return self.states[0] if len(self.states) == 1 and not self.unsure else None

    def copy(self) -> Truth:
        """For a VM that begins as this one is."""
        other = Truth(*self.states)
        other.unsure = self.unsure
        return other

    def maybe(self, *states: State) -> None:
        """The VM may also be in one of these."""
        self.states += states

    def wrote(self, name: str, piece: Piece, *, append: bool) -> None:
        """A write was acknowledged."""
        self._change(name, lambda before: (*before, piece) if append else (piece,))

    def removed(self, name: str) -> None:
        """So was a removal. Or nothing is known of the file any more."""
        self.states = [
            replace(state, files={each: what for each, what in state.files.items() if each != name})
            for state in self.states
        ]

    def _change(self, name: str, change: Callable[[tuple[Piece, ...]], tuple[Piece, ...]]) -> None:
        self.states = [
            replace(state, files={**state.files, name: change(state.files.get(name, ()))}) for state in self.states
        ]

    def booted(self, memory: str | None) -> None:
        """The guest has booted: its files are there, its memory is new."""
        self.states = [replace(state, memory=memory) for state in self.states]
        self.unsure = 0

    def names(self) -> list[str]:
        """All files that there may be."""
        return sorted({name for state in self.states for name in state.files})

    def hold_against(
        self,
        seen: Seen,
        digest: Callable[[tuple[Piece, ...]], str],
        follows: Callable[[str, str, int], bool],
        *,
        memory: bool = True,
    ) -> str | None:
        """Learn from what a guest has; returns what is wrong with it: None when it is as it must be.

        `digest` is of a file's content as the guest would tell it, `follows(before, now, lost)` whether memory is what
        it must be after so many lost looks. Without `memory` that is not judged.
        """
        wrong = [seen.wrong] if seen.wrong else []
        for state in [] if wrong else self.states:
            complaint = _differs(state, seen, digest)
            judged = memory and complaint is None and state.memory is not None
            if judged and not follows(state.memory or "", seen.memory, self.unsure):
                complaint = f"memory was {state.memory!r} and is {seen.memory!r}"
            if complaint is None:
                self.states, self.unsure = [replace(state, memory=seen.memory)], 0
                return None
            wrong.append(complaint)
        return "; nor: ".join(dict.fromkeys(wrong))


def _differs(state: State, seen: Seen, digest: Callable[[tuple[Piece, ...]], str]) -> str | None:
    for name, pieces in state.files.items():
        found = seen.files.get(name)
        if found is None:
            return f"file {name} is gone"
        if found != digest(pieces):
            return f"file {name} has another content"
    return None
