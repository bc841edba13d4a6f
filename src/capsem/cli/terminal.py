"""How things look: plain and stable text in a pipe; on a terminal also a word about what takes its time.

What comes from a guest is shown without control characters where it stands among words of ours.
"""

from __future__ import annotations

import contextlib
import re
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

PATIENCE: Final = 1.0  # seconds until there is a word about waiting

# Whole escape sequences (colours, cursor, titles), then whatever control characters are left.
_CONTROL = re.compile(
    r"\x1b\[[0-?]*[ -/]*[@-~]|\x1b\][^\x07\x1b]*(?:\x07|\x1b\\)|\x1b[ -/]*[0-~]|[\x00-\x08\x0b-\x1f\x7f-\x9f]"
)


def printable(text: str) -> str:
    """`text` without escape sequences and control characters, but with its newlines and tabs."""
    return _CONTROL.sub("", text)


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines with aligned columns, two spaces between them, none at the end."""
    everything = [header, *rows]
    widths = [max(len(row[column]) for row in everything) for column in range(len(header))]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in everything
    ]


def pool_line(pool: Mapping[str, Any] | None) -> str | None:
    """What there is to say of VMs that wait to be created, as `df` tells of them."""
    if pool is None:
        return None
    why = "; the host has too little memory for more" if pool.get("short") else ""
    return f"pool: {pool['ready']} of {pool['wanted']} ready, {size_text(pool['memory_bytes'])} of memory{why}"


def duration(seconds: int) -> str:
    """A length of time as one word: 42s, 5m03s, 2h05m, 3d04h."""
    minutes, seconds = divmod(max(0, seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days}d{hours:02}h"
    if hours:
        return f"{hours}h{minutes:02}m"
    return f"{minutes}m{seconds:02}s" if minutes else f"{seconds}s"


def memory(mib: int) -> str:
    """An amount of memory as one word: 512M, 4G, 1.5G."""
    return f"{mib}M" if mib < 1024 else f"{mib / 1024:.4g}G"


@contextlib.contextmanager
def waiting(what: str) -> Iterator[None]:
    """Say on standard error, if that is a terminal, what is being waited for and for how long; gone when it is over."""
    if not sys.stderr.isatty():
        yield
        return
    line = Line()
    over = threading.Event()

    def tick() -> None:
        seconds = 0
        while not over.wait(PATIENCE):
            seconds += 1
            line.show(f"{what} ... {seconds} s")

    ticker = threading.Thread(target=tick, name="waiting", daemon=True)
    ticker.start()
    try:
        yield
    finally:
        over.set()
        ticker.join()
        line.clear()


class Line:
    """One line on a terminal's standard error that is written over and over, without any control sequence."""

    def __init__(self) -> None:
        self._width = 0

    def show(self, text: str) -> None:
        """Put `text` in the place of what stands there."""
        sys.stderr.write("\r" + text.ljust(self._width))
        sys.stderr.flush()
        self._width = len(text)

    def clear(self) -> None:
        """Leave nothing behind."""
        if self._width:
            sys.stderr.write("\r" + " " * self._width + "\r")
            sys.stderr.flush()
            self._width = 0


def size_text(size: float) -> str:
    """Bytes for people, in four characters or so."""
    for unit in "BKMG":
        if size < 1024 or unit == "G":
            break
        size /= 1024
    return f"{size:.4g}{unit}"
