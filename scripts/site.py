"""Hooks of mkdocs: the life of a VM is drawn from its table, as a picture that needs no script from elsewhere, and pages
that nobody has given a place are listed at the end."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from capsem.model.lifecycle import TRANSITIONS, State

_PLACES = {
    State.CREATED: (0, 0),
    State.STARTING: (1, 0),
    State.RUNNING: (2, 0),
    State.STOPPING: (3, 0),
    State.STOPPED: (4, 0),
    State.RESUMING: (1, 1),
    State.SUSPENDING: (3, 1),
    State.SUSPENDED: (2, 2),
    State.FAILED: (4, 2),
    State.DELETING: (0, 2),
    State.DELETED: (0, 3),
}
_STEP, _WIDTH, _HEIGHT = (200, 120), 104, 34


def _center(state: State) -> tuple[float, float]:
    column, row = _PLACES[state]
    return 70 + column * _STEP[0], 40 + row * _STEP[1]


def _edge(source: State, target: State, label: str) -> str:
    """A curve from border to border, bent to its left, so that the way back is another one."""
    (x, y), (u, v) = _center(source), _center(target)
    if source is target:
        return f'<text x="{x}" y="{y + 32}">({label})</text>'
    dx, dy = u - x, v - y
    length = (dx * dx + dy * dy) ** 0.5
    bend = 26 + length / 30
    cx, cy = (x + u) / 2 + dy / length * bend, (y + v) / 2 - dx / length * bend
    ends = []
    for ex, ey in ((x, y), (u, v)):
        tx, ty = cx - ex, cy - ey
        scale = min(_WIDTH / 2 / abs(tx) if tx else 9, _HEIGHT / 2 / abs(ty) if ty else 9)
        ends.append((ex + tx * scale, ey + ty * scale))
    (ax, ay), (bx, by) = ends
    lx, ly = (x + u) / 2 + dy / length * bend / 2, (y + v) / 2 - dx / length * bend / 2
    path = f'<path d="M{ax:.0f},{ay:.0f} Q{cx:.0f},{cy:.0f} {bx:.0f},{by:.0f}" marker-end="url(#tip)"/>'
    return path + f'<text x="{lx:.0f}" y="{ly:.0f}">{label}</text>'


def diagram() -> str:
    """The picture, as SVG."""
    labels: dict[tuple[State, State], list[str]] = defaultdict(list)
    for source, events in TRANSITIONS.items():
        for event, target in events.items():
            labels[source, target].append(str(event))
    parts = [_edge(source, target, ", ".join(words)) for (source, target), words in labels.items()]
    for state in State:
        x, y = _center(state)
        parts.append(
            f'<rect x="{x - _WIDTH / 2}" y="{y - _HEIGHT / 2}" width="{_WIDTH}" height="{_HEIGHT}" rx="8"/>'
            f'<text class="state" x="{x}" y="{y + 5}">{state}</text>'
        )
    style = (
        "rect{fill:none;stroke:currentColor}path{fill:none;stroke:currentColor;opacity:.45}"
        "text{font-size:11px;text-anchor:middle;fill:currentColor}.state{font-size:14px;font-weight:bold}"
    )
    tip = '<marker id="tip" markerWidth="8" markerHeight="8" refX="7" refY="4" orient="auto"><path d="M0,0 L8,4 L0,8"/></marker>'
    return (
        '<svg viewBox="0 0 940 440" role="img" aria-label="The life of a VM" xmlns="http://www.w3.org/2000/svg">'
        f"<style>{style}</style><defs>{tip}</defs>{''.join(parts)}</svg>"
    )


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Called by mkdocs for each page."""
    markdown = markdown.replace("<!-- lifecycle diagram -->", diagram())
    return re.sub(r"```mermaid\n.*?```", lambda _found: diagram(), markdown, flags=re.DOTALL)


def on_config(config: Any) -> Any:
    """Called by mkdocs once."""
    root = Path(config["docs_dir"])
    placed = set(_pages(config["nav"]))
    others = sorted(page.relative_to(root).as_posix() for page in root.rglob("*.md"))
    decisions = [{"Decisions": [page for page in others if page.startswith("decisions/")]}]
    config["nav"] += [page for page in others if page not in placed and not page.startswith("decisions/")] + decisions
    return config


def _pages(nav: Any) -> Iterator[str]:
    if isinstance(nav, str):
        yield nav
    else:
        for each in nav.values() if isinstance(nav, dict) else nav:
            yield from _pages(each)
