"""How far back to look: "30m", "1h", "7d", "300s", or an instant as RFC 3339 has it."""

from __future__ import annotations

import re
from datetime import UTC, datetime

from capsem.model.errors import InvalidInput

_SPAN = re.compile(r"([0-9]{1,9})([smhd])\Z")
_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400}
# The + of an offset that was not percent-encoded arrives as a space.
_OFFSET = re.compile(r" (\d\d:\d\d)\Z")


def parse_since(text: str, now: float) -> float:
    """Seconds since 1970; `now` is the same. Raises InvalidInput."""
    span = _SPAN.match(text)
    if span:
        return max(0.0, now - int(span[1]) * _SECONDS[span[2]])
    try:
        instant = datetime.fromisoformat(_OFFSET.sub(r"+\1", text.upper()))
        seconds = (instant if instant.tzinfo else instant.replace(tzinfo=UTC)).timestamp()
    except (ValueError, OverflowError):
        seconds = None
    if seconds is None or "T" not in text.upper() or seconds < 0:
        raise InvalidInput(
            f"since: {text[:80]!r} is neither a span nor an instant", hint="such as 30m, 1h, 7d or 2026-05-01T12:00:00Z"
        )
    return seconds
