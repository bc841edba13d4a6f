"""Two kinds of picture as SVG, small enough to write by hand: they need no library, and diffs of them can be read."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import NamedTuple

WIDTH, LABELS, RIGHT, STEP, TOP = 860, 330, 60, 22, 46
COLOURS = ("#3f51b5", "#e65100", "#2e7d32")


class Dot(NamedTuple):
    """A median, and what it lies between."""

    name: str
    median: float
    low: float
    high: float


def _document(width: int, height: int, title: str, parts: Sequence[str]) -> str:
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}">',
            '<g font-family="sans-serif" font-size="12" fill="#333">',
            f"<title>{escape(title)}</title>",
            f'<rect width="{width}" height="{height}" fill="#fff"/>',
            _text(width / 2, 20, title, "middle", 14),
            *parts,
            "</g></svg>\n",
        ]
    )


def _text(x: float, y: float, text: str, anchor: str = "start", size: int = 12) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}">{escape(text)}</text>'


def _line(x: float, y: float, to_x: float, to_y: float, colour: str, width: float = 1) -> str:
    return f'<path d="M{x:.1f} {y:.1f}L{to_x:.1f} {to_y:.1f}" stroke="{colour}" stroke-width="{width}" fill="none"/>'


def ratios(title: str, dots: Sequence[Dot]) -> str:
    """One row for each, on a logarithmic axis where 1 is the floor."""
    marks = [
        mark for mark in (0.2, 0.5, 1, 1.5, 2, 3, 5, 10, 20, 50, 100) if mark <= max(dot.high for dot in dots) * 1.5
    ]
    first = min(0.5, *(dot.low for dot in dots))
    span = math.log(marks[-1] / first)

    def at(value: float) -> float:
        return LABELS + math.log(max(value, first) / first) / span * (WIDTH - LABELS - RIGHT)

    bottom, parts = TOP + STEP * len(dots), []
    for mark in marks:
        if mark >= first:
            parts.append(_line(at(mark), TOP - 8, at(mark), bottom, "#333" if mark == 1 else "#ddd"))
            parts.append(_text(at(mark), bottom + 16, f"{mark:g} x", "middle"))
    for number, dot in enumerate(dots):
        y = TOP + STEP * number + STEP / 2
        parts.append(_text(LABELS - 10, y + 4, dot.name, "end"))
        parts.append(_line(at(dot.low), y, at(dot.high), y, COLOURS[0], 2))
        parts.append(f'<circle cx="{at(dot.median):.1f}" cy="{y:.1f}" r="5" fill="{COLOURS[0]}"/>')
        parts.append(_text(at(dot.high) + 8, y + 4, f"{dot.median:.2f}"))
    return _document(WIDTH, bottom + 30, title, parts)


def lines(title: str, below: str, beside: str, series: Mapping[str, Sequence[tuple[float, float]]]) -> str:
    """Points joined by lines, both axes from 0; `below` and `beside` say what they are."""
    width, height, left, bottom = 560, 320, 70, 260
    most_x = max(x for points in series.values() for x, _ in points) or 1
    most_y = max(y for points in series.values() for _, y in points) * 1.1 or 1

    def place(x: float, y: float) -> tuple[float, float]:
        return left + x / most_x * (width - left - 40), bottom - y / most_y * (bottom - 50)

    parts = [_line(*place(0, 0), *place(most_x, 0), "#333"), _line(*place(0, 0), *place(0, most_y), "#333")]
    marks = sorted({x for points in series.values() for x, _ in points})
    parts += [_text(place(x, 0)[0], bottom + 18, f"{x:g}", "middle") for x in marks]
    for quarter in range(1, 5):
        y = most_y * quarter / 4
        parts += [
            _line(*place(0, y), *place(most_x, y), "#ddd"),
            _text(left - 8, place(0, y)[1] + 4, f"{y:.0f}", "end"),
        ]
    parts += [_text(width / 2, bottom + 38, below, "middle"), _text(left, 42, beside, "middle")]
    for (name, points), colour in zip(series.items(), COLOURS, strict=False):
        places = [place(*point) for point in points]
        path = "L".join(f"{x:.1f} {y:.1f}" for x, y in places)
        parts.append(f'<path d="M{path}" stroke="{colour}" stroke-width="2" fill="none"/>')
        parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{colour}"/>' for x, y in places]
        parts.append(
            f'<text x="{places[-1][0]:.1f}" y="{places[-1][1] - 9:.1f}" text-anchor="end" fill="{colour}">{name}</text>'
        )
    return _document(width, height, title, parts)
