"""Medians and a plain table."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Row:
    """One line: ours, the floor where there is one, and peers that can do it; milliseconds, or the unit in the name."""

    name: str
    ours: Sequence[float]
    floor: Sequence[float] = ()
    target: str = ""
    peers: Mapping[str, Sequence[float]] = field(default_factory=dict)

    @property
    def ratio(self) -> float | None:
        """Ours by the floor, of medians."""
        return statistics.median(self.ours) / statistics.median(self.floor) if self.floor else None

    def to_json(self) -> dict[str, object]:
        """All figures."""
        peers = {who: rounded(times) for who, times in self.peers.items()}
        return {
            "name": self.name,
            "ours": rounded(self.ours),
            "floor": rounded(self.floor),
            "target": self.target,
            "peers": peers,
        }

    @classmethod
    def from_json(cls, row: Mapping[str, Any]) -> Row:
        """As it was written."""
        return cls(**row)

    def cells(self) -> list[str]:
        ratio = "-" if self.ratio is None else f"{self.ratio:.2f}"
        peers = "; ".join(f"{name} {spread(times)}" for name, times in self.peers.items())
        return [self.name, spread(self.ours), spread(self.floor) if self.floor else "-", ratio, self.target, peers]


def rounded(values: Sequence[float]) -> list[float]:
    """To what a clock can tell."""
    return [round(value, 2) for value in values]


def spread(values: Sequence[float]) -> str:
    """Median (minimum to maximum)."""
    digits = 0 if statistics.median(values) >= 100 else 1
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f}-{max(values):.{digits}f})"


def show(rows: Sequence[Row]) -> str:
    """All rows, aligned."""
    lines = [["", "ours", "floor", "ratio", "to reach", "peers"], *(row.cells() for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )
