"""What goes wrong, and when: a plan that is written down in one line, and plays the same again.

    CAPSEM_SIM="tolerant seed=7 save-fails@2 lying-fsync=0.1 faults=0.01"

    tolerant      operations of different machines may overlap: no hazard (see host)
    seed=N        where chances come from, together with the VM's id and the layer that it runs on; 0 by default
    FAULT@N       that fault strikes the N-th time that it can on this host, and not again
    FAULT=P       it strikes each time with probability P
    faults=P      every fault does
    host=DIR      the host that the machines share; /tmp/capsem-sim-<uid> by default

In a test, a `Plan` is made by hand: `Plan(chances={SAVE_FAILS: 0.5})`.
"""

from __future__ import annotations

import os
import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from capsem.hypervisor.sim.host import SimHost
from capsem.model.errors import InvalidInput

START_FAILS, RESTORE_FAILS, SAVE_FAILS = "start-fails", "restore-fails", "save-fails"
RESTORE_HANGS = "restore-hangs"  # the machine runs, its guest never says a word
DIES = "dies-in-handshake"  # the guest's kernel panics once it was told who it is
CUT = "cut"  # the guest's agent dies in the middle of a frame, and begins anew
DUPLICATE = "duplicate"  # a message comes twice
STALE = "stale"  # bytes of the epoch before come when the next one has been announced
GARBAGE = "garbage"  # bytes that are no frame
DISK_FULL = "disk-full"  # of the host, when the guest writes: the machine stands still until it is tried again
SAVE_FULL = "save-full"  # of the host, when the machine is saved
SLOW_FSYNC = "slow-fsync"  # the guest's flush takes longer than anybody waits for it
LYING_FSYNC = "lying-fsync"  # what the guest was told is on disk is lost if the machine dies
FAULTS: Final = (
    START_FAILS,
    RESTORE_FAILS,
    SAVE_FAILS,
    RESTORE_HANGS,
    DIES,
    CUT,
    DUPLICATE,
    STALE,
    GARBAGE,
    DISK_FULL,
    SAVE_FULL,
    SLOW_FSYNC,
    LYING_FSYNC,
)


def default_host() -> Path:
    """The directory of this user's simulated host: the same for every service, whatever its home."""
    return Path(f"/tmp/capsem-sim-{os.getuid()}")  # noqa: S108 - shared by all homes of one user; mode 0700


@dataclass(frozen=True)
class Plan:
    """See the module."""

    tolerant: bool = False
    seed: int = 0
    chances: Mapping[str, float] = field(default_factory=dict)
    nth: Mapping[str, int] = field(default_factory=dict)
    host: Path | None = None

    @classmethod
    def parse(cls, text: str) -> Plan:
        """Read the one line. Raises InvalidInput."""
        tolerant, seed, host = False, 0, None
        chances: dict[str, float] = {}
        nth: dict[str, int] = {}
        for word in text.split():
            name, equals, value = word.partition("=")
            fault, at, number = word.partition("@")
            try:
                if word == "tolerant":
                    tolerant = True
                elif name == "seed" and equals:
                    seed = int(value)
                elif name == "host" and value:
                    host = Path(value)
                elif name == "faults" and equals:
                    chances = {**dict.fromkeys(FAULTS, _chance(value)), **chances}
                elif name in FAULTS and equals:
                    chances[name] = _chance(value)
                elif fault in FAULTS and at and int(number) > 0:
                    nth[fault] = int(number)
                else:
                    raise ValueError(word)
            except ValueError:
                raise InvalidInput(
                    f"CAPSEM_SIM: {word!r} makes no sense",
                    hint=f"it may say: tolerant, seed=N, host=DIR, faults=P, and FAULT=P or FAULT@N of {', '.join(FAULTS)}",
                ) from None
        return cls(tolerant, seed, chances, nth, host)


def _chance(text: str) -> float:
    value = float(text)
    if not 0 <= value <= 1:
        raise ValueError(text)
    return value


class Dice:
    """A plan as one machine meets it."""

    def __init__(self, plan: Plan, host: SimHost, name: str) -> None:
        """`name` tells this run of this machine from all others."""
        self._plan = plan
        self._host = host
        self._random = random.Random(f"{plan.seed} {name}")  # noqa: S311 - to be repeated, not to be secret

    def strikes(self, fault: str) -> bool:
        """Whether a fault that can strike now does."""
        chance = self._plan.chances.get(fault, 0.0)
        strikes = chance > 0 and self._random.random() < chance
        if fault in self._plan.nth:
            strikes |= self._host.count(fault) == self._plan.nth[fault]
        return strikes

    def below(self, bound: int) -> int:
        """A number from 0 up to `bound`, exclusive."""
        return self._random.randrange(bound)
