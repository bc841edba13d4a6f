"""What becomes of a VM as time goes by, if its owner wants that: all of it is off unless asked for.

idle      nobody has used it for so long: it is suspended. A command that runs, and whoever follows one or moves
          files, uses it; what the VM does by itself does not count.
ttl       it has run for so long: it is stopped, or, if it is not persistent, deleted. Counted from each start.
every     so often a checkpoint is made of it while it runs. Of these `automatic` checkpoints the newest `keep` stay,
          and none that is older than `age`; no other kind is ever removed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from enum import StrEnum
from typing import Any, Final

from capsem.model.errors import InvalidInput

SHORTEST: Final = 1.0  # seconds
LONGEST: Final = 10 * 365 * 86400.0
KEEP: Final = 10  # automatic checkpoints, when nothing was said
MOST_KEPT: Final = 1000


class Due(StrEnum):
    """What it is time for."""

    END = "end"
    SUSPEND = "suspend"
    CHECKPOINT = "checkpoint"


@dataclass(frozen=True, slots=True)
class Policy:
    """Seconds, and how many checkpoints; None is off. Raises InvalidInput when a number is out of bounds."""

    idle_secs: float | None = None
    ttl_secs: float | None = None
    checkpoint_every_secs: float | None = None
    checkpoint_keep: int | None = None
    checkpoint_age_secs: float | None = None

    def __post_init__(self) -> None:
        for name, value in self.to_dict().items():
            low, high = (1, MOST_KEPT) if name == "checkpoint_keep" else (SHORTEST, LONGEST)
            if not low <= value <= high:
                raise InvalidInput(f"policy: {name} is {value:g}", hint=f"choose {low:g} to {high:g}, or 0 for off")

    def to_dict(self) -> dict[str, float]:
        """What is on."""
        return {each.name: value for each in fields(self) if (value := getattr(self, each.name)) is not None}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Policy:
        """The opposite; what this version does not know is left out. Raises InvalidInput, TypeError."""
        known = {each.name: values[each.name] for each in fields(cls) if values.get(each.name)}
        if "checkpoint_keep" in known:
            known["checkpoint_keep"] = int(known["checkpoint_keep"])
        return cls(**known)

    def changed(self, values: Mapping[str, float | None]) -> Policy:
        """With other values: None leaves one as it is, 0 turns it off. Raises InvalidInput."""
        return Policy.from_dict(self.to_dict() | {name: value for name, value in values.items() if value is not None})

    def require(self, *, persistent: bool) -> None:
        """Raises InvalidInput for what only a persistent VM can have."""
        if not persistent and (self.idle_secs or self.checkpoint_every_secs):
            raise InvalidInput(
                "policy: only a persistent VM can be suspended or have checkpoints", hint="give the VM a name"
            )

    def decide(
        self, now: float, started_at: float, made: Iterable[float], idle: float | None
    ) -> tuple[Due | None, float]:
        """What a running VM is due for, the most final first; and in how many seconds to ask again, if nothing is.

        Times are seconds since 1970; `made`: when its automatic checkpoints were; `idle`: for how many seconds nobody has
        used the VM, None if that is not known.
        """
        left: list[tuple[float, Due]] = []
        if self.ttl_secs is not None:
            left.append((started_at + self.ttl_secs - now, Due.END))
        if self.idle_secs is not None and idle is not None:
            left.append((self.idle_secs - idle, Due.SUSPEND))
        if (every := self.checkpoint_every_secs) is not None:
            # What is dated later than now is from before the clock was set back, and nobody knows how long ago that was.
            since = max((each for each in (started_at, *made) if each <= now), default=0.0)
            left.append((since + every - now, Due.CHECKPOINT))
        for seconds, due in left:
            if seconds <= 0:
                return due, 0.0
        return None, min((seconds for seconds, _ in left), default=LONGEST)

    def superfluous(self, made: Mapping[str, float], now: float) -> list[str]:
        """Of a VM's automatic checkpoints, id -> when it was made, those that need not stay; oldest first.

        Those that are dated later than now count as the oldest: the clock was set back since they were made.
        """
        oldest_first = sorted(made, key=lambda each: (made[each] <= now, made[each]))
        kept = oldest_first[-(self.checkpoint_keep or KEEP) :]
        age = self.checkpoint_age_secs
        return [each for each in oldest_first if each not in kept or (age is not None and now - made[each] > age)]


OFF: Final = Policy()
