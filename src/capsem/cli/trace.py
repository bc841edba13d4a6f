"""`capsem --trace FILE`: what this command had done, by all processes that took part, for chrome://tracing or Perfetto."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from typing import TextIO

from capsem import __version__, tracing
from capsem.cli.context import Context
from capsem.model.errors import CapsemError


def begin(path: str, context: Context) -> Callable[[], None]:
    """Trace what is done from here on, and from the start of this process; returns what writes the file at the end.

    Raises OSError when it cannot be written.
    """
    file = open(path, "w", encoding="utf-8")  # noqa: PTH123, SIM115  closed when it is written
    own: list[tracing.Event] = []
    trace = tracing.Trace(own.append, "capsem", os.urandom(tracing.ID_LENGTH // 2).hex())
    trace.add("start the program, import", tracing.process_began(), tracing.now())
    tracing.follow(trace)

    def end() -> None:
        tracing.follow(None)
        try:
            others = context.client(start=False).call("trace", vm_id=trace.name)["events"]
        except CapsemError:  # it was asked for nothing, or is gone: what we know ourselves is still worth having
            others = []
        with file:
            _write(file, [*own, *others])

    return end


def _write(file: TextIO, events: list[tracing.Event]) -> None:
    """With time beginning at the first thing that was done."""
    first = min((event["ts"] for event in events if event["ph"] != tracing.NAMES), default=0.0)
    for event in events:
        event["ts"] = 0.0 if event["ph"] == tracing.NAMES else event["ts"] - first
    json.dump({"traceEvents": events, "displayTimeUnit": "ms", "otherData": {"capsem": __version__}}, file)
