"""Logging: JSON lines with targets, written by one capped and rotating writer. Imports `capsem.tracing` alone of ours.

A line is an object with `timestamp` (ISO 8601, UTC), `level`, `target`, `message`, and where there are any `fields`
(an object) and `exception` (a traceback). A target is a logger's name: the program's, such as "capsem_service", and
below it the part that speaks, such as "capsem_service.http".

`trace` marks a piece of work with a pair of lines, so that the one that never ended, or took its time, is found:

    with trace("suspend.write_memory", log, pages=222): ...     # also `async with`
        -> suspend.write_memory.started, then .complete or .failed, with duration_ms; and a span where a trace is wanted

Levels come from RUST_LOG or else CAPSEM_LOG, as in "debug" or "info,capsem_service.http=debug"; "capsem" means all
programs. What cannot be understood there is ignored: harnesses set all sorts of things.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Final

from capsem.tracing import span

TARGETS: Final = ("capsem", "capsem_service", "capsem_process", "capsem_mcp")
MAX_BYTES: Final = 10 * 1024 * 1024
FILES: Final = 3

_OFF: Final = logging.CRITICAL + 10
_LEVELS: Final = {
    "trace": logging.DEBUG,
    "debug": logging.DEBUG,
    "info": logging.INFO,
    "warn": logging.WARNING,
    "warning": logging.WARNING,
    "error": logging.ERROR,
    "off": _OFF,
}
_NAMES: Final = {logging.WARNING: "WARN", logging.CRITICAL: "ERROR"}


def setup(environ: Mapping[str, str], path: Path | None = None) -> None:
    """Send the log of this process to the file `path`, rotated, or else to standard error; sets the levels.

    May be called again: the last call counts. Raises OSError if the file cannot be opened.
    """
    handler: logging.Handler = logging.StreamHandler() if path is None else RotatingHandler(path)
    handler.setFormatter(JsonFormatter())
    root = logging.getLogger()
    for old in list(root.handlers):
        root.removeHandler(old)
        old.close()
    root.addHandler(handler)
    root.setLevel(logging.WARNING)  # libraries speak up when something is wrong, and else keep quiet
    for target, level in levels(environ).items():
        logging.getLogger(target).setLevel(level)


def levels(environ: Mapping[str, str]) -> dict[str, int]:
    """Logger name -> level, as RUST_LOG or CAPSEM_LOG ask for; without them, info for every program."""
    found = dict.fromkeys(TARGETS, logging.INFO)
    for directive in (environ.get("RUST_LOG") or environ.get("CAPSEM_LOG") or "").split(","):
        target, _, word = directive.strip().rpartition("=")
        level = _LEVELS.get(word.strip().lower())
        if level is None:
            continue
        target = target.strip().replace("::", ".")
        found.update(dict.fromkeys(TARGETS if target in ("", "capsem") else (target,), level))
    return found


class JsonFormatter(logging.Formatter):
    """One record as one line of JSON."""

    def format(self, record: logging.LogRecord) -> str:
        """The line, without its end."""
        line: dict[str, Any] = {
            "timestamp": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="microseconds")[:-6] + "Z",
            "level": _NAMES.get(record.levelno, record.levelname),
            "target": record.name,
            "message": record.getMessage(),
        }
        fields = getattr(record, "fields", None)
        if fields:
            line["fields"] = fields
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


class RotatingHandler(logging.Handler):
    """Appends lines to a file of mode 0600; when it is full it becomes `.1`, that one `.2`, and the oldest goes."""

    def __init__(self, path: Path, *, max_bytes: int = MAX_BYTES, files: int = FILES) -> None:
        super().__init__()
        self._path = path
        self._max_bytes = max_bytes
        self._files = files
        self._fd = -1
        self._size = 0
        self._open()

    def emit(self, record: logging.LogRecord) -> None:
        """Write the record; a disk that is full loses lines, never the program."""
        try:
            data = self.format(record).encode() + b"\n"
            if self._size and self._size + len(data) > self._max_bytes:
                self._rotate()
            self._size += os.write(self._fd, data)
        except OSError:  # most likely a full disk, on which a complaint would be lost as well
            return
        except Exception:  # noqa: BLE001  a log line is not worth failing for; logging counts them
            self.handleError(record)

    def close(self) -> None:
        """Close the file."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
        super().close()

    def _open(self) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW
        self._fd = os.open(self._path, flags, 0o600)
        self._size = os.fstat(self._fd).st_size

    def _rotate(self) -> None:
        names = [self._path, *(self._path.with_name(f"{self._path.name}.{n}") for n in range(1, self._files))]
        for older, newer in zip(reversed(names), reversed(names[:-1]), strict=False):
            if newer.exists():
                os.replace(newer, older)
        before = self._fd
        self._open()
        os.close(before)


class trace:  # noqa: N801  it is used as a statement
    """Log that `name` has started, and that it is complete or has failed; see the module.

    `fields` go into each line; more can be added by `with trace(...) as t: t.fields["pages"] = n`. The start is logged
    at debug level, the end at `level`, a failure (with the error, which passes on) as a warning.
    """

    def __init__(
        self,
        name: str,
        log: logging.Logger | None = None,
        *,
        level: int = logging.INFO,
        clock: Callable[[], float] = time.monotonic,
        **fields: Any,
    ) -> None:
        self.name = name
        self.fields = fields
        self._log = log or logging.getLogger(TARGETS[0])
        self._level = level
        self._clock = clock
        self._began = 0.0
        self._span = span(name)

    def __enter__(self) -> trace:
        self._began = self._clock()
        self._span.__enter__()
        self._log.debug("%s.started", self.name, extra={"fields": dict(self.fields)})
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _traceback: TracebackType | None
    ) -> None:
        self._span.__exit__(kind)
        fields = {**self.fields, "duration_ms": round((self._clock() - self._began) * 1000, 3)}
        if error is None:
            self._log.log(self._level, "%s.complete", self.name, extra={"fields": fields})
        else:
            self._log.warning("%s.failed", self.name, extra={"fields": {**fields, "error": repr(error)}})

    async def __aenter__(self) -> trace:
        return self.__enter__()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.__exit__(kind, error, traceback)
