"""Medians and a plain table."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Row:
    """One line: ours, and the floor where there is one, in milliseconds (or the unit in the name)."""

    name: str
    ours: Sequence[float]
    floor: Sequence[float] = ()
    target: str = ""

    def cells(self) -> list[str]:
        ratio = f"{statistics.median(self.ours) / statistics.median(self.floor):.2f}" if self.floor else "-"
        return [self.name, spread(self.ours), spread(self.floor) if self.floor else "-", ratio, self.target]


def spread(values: Sequence[float]) -> str:
    """Median (minimum to maximum)."""
    digits = 0 if statistics.median(values) >= 100 else 1
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f}-{max(values):.{digits}f})"


def show(rows: Sequence[Row]) -> str:
    """All rows, aligned."""
    lines = [["", "ours", "floor", "ratio", "to reach"], *(row.cells() for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(5)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )
