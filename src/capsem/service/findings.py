"""What the logs of this host tell: panics, errors, slow operations, known symptoms. Reads the ends of files; decides nothing.

Ours are JSON lines (capsem.log). What is none, in a supervisor's log, was written by an interpreter that died, or by
the VMM. A guest's console has no times of its own: a panic there is dated by the file.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Final, NamedTuple

from capsem.api.ledger_types import Finding, HostTriage, Suspect
from capsem.ledger.schema import iso
from capsem.model.fingerprints import FINGERPRINTS, TROUBLES, Fingerprint, find
from capsem.store.lines import read_tail

LOOK: Final = 1024 * 1024  # bytes of each log
SLOW: Final = 1000.0  # ms
MESSAGE: Final = 2000  # characters
KEPT: Final = 200  # findings of a kind, whatever is asked for

_GUEST_PANIC: Final = re.compile(r"Kernel panic - not syncing[^\r\n]*")
_DIED: Final = re.compile(
    r"^(?:Traceback \(most recent call last\)|Fatal Python error|Segmentation fault)", re.MULTILINE
)
_NUMBERS: Final = re.compile(r"[0-9a-f]{8,}|\d+(?:\.\d+)?")
_SCORES: Final = {"panic": 80, "error": 40, "command": 20, "slow": 10}
_MUST_NOT_BE: Final = 95  # the score of a fingerprint
_TROUBLE: Final = 85


class Source(NamedTuple):
    """A log: a program's, or a VM's console."""

    path: Path
    vm: str | None = None
    console: bool = False


def look(sources: Iterable[Source], since: float) -> HostTriage:
    """Everything since then (seconds since 1970), newest first. Blocks."""
    panics: list[Finding] = []
    errors: list[Finding] = []
    slow: list[Finding] = []
    start = iso(since)
    for source in sources:
        try:
            changed = source.path.stat().st_mtime
        except FileNotFoundError:
            continue
        if changed < since:
            continue
        text = read_tail(source.path, LOOK)
        if source.console:
            panics += (_finding(iso(changed), source, match[0]) for match in _GUEST_PANIC.finditer(text))
            continue
        panics += (_finding(iso(changed), source, text[match.start() :]) for match in _DIED.finditer(text))
        for line in _lines(text):
            if line["timestamp"] < start:
                continue
            fields = line.get("fields")
            duration = fields.get("duration_ms") if isinstance(fields, dict) else None
            kind = panics if line.get("exception") else errors if line.get("level") == "ERROR" else None
            if kind is not None:
                kind.append(_told(source, line, None))
            if isinstance(duration, (int, float)) and duration >= SLOW:
                slow.append(_told(source, line, float(duration)))
    return HostTriage(panics=_newest(panics), errors=_newest(errors), slow_ops=_newest(slow))


def _newest(findings: list[Finding]) -> list[Finding]:
    return sorted(findings, key=lambda each: each.timestamp, reverse=True)[:KEPT]


def _lines(text: str) -> Iterator[dict[str, Any]]:
    for text_line in text.splitlines():
        if text_line.startswith("{"):
            try:
                line = json.loads(text_line)
            except (ValueError, RecursionError):
                continue
            if isinstance(line, dict) and isinstance(line.get("timestamp"), str):
                yield line


def _told(source: Source, line: dict[str, Any], duration: float | None) -> Finding:
    exception = line.get("exception")
    return _finding(
        line["timestamp"],
        source,
        str(line.get("message", "")),
        target=str(line["target"]) if line.get("target") else None,
        exception=str(exception)[-MESSAGE:] if exception else None,
        duration=duration,
    )


def _finding(
    timestamp: str,
    source: Source,
    message: str,
    *,
    target: str | None = None,
    exception: str | None = None,
    duration: float | None = None,
) -> Finding:
    known = _known(f"{message}\n{exception or ''}")
    return Finding(
        timestamp=timestamp,
        source=source.path.name,
        message=message[:MESSAGE],
        target=target,
        vm=source.vm,
        duration_ms=duration,
        exception=exception,
        fingerprint=known.name if known else None,
        cause=known.meaning if known else None,
        hint=known.hint if known else None,
    )


def rank(found: HostTriage, commands: Iterable[tuple[str, str]] = ()) -> list[Suspect]:
    """Groups of findings that are alike, what matters most first. `commands` are (command, how it failed)."""
    groups: dict[tuple[str, str], list[tuple[str, Fingerprint | None]]] = {}
    for kind, findings in (("panic", found.panics), ("error", found.errors), ("slow", found.slow_ops)):
        for each in findings:
            known = _known(f"{each.message}\n{each.exception or ''}")
            alike = known.name if known else _NUMBERS.sub("#", each.message[:200])
            groups.setdefault((kind, alike), []).append((each.message, known))
    for command, how in commands:
        known = _known(how)
        shown = f"{command[:100]}: {how[:200]}"
        groups.setdefault(("command", known.name if known else command), []).append((shown, known))
    suspects = [_suspect(kind, members) for (kind, _), members in groups.items()]
    return sorted(suspects, key=lambda each: (-each.score, -each.count, each.summary))


def _suspect(kind: str, members: list[tuple[str, Fingerprint | None]]) -> Suspect:
    message, known = members[0]
    score = _SCORES[kind] if known is None else _MUST_NOT_BE if known in FINGERPRINTS else _TROUBLE
    return Suspect(
        score=score,
        kind=kind,
        count=len(members),
        summary=(message.splitlines() or [""])[0][:300],
        fingerprint=known.name if known else None,
        hint=known.hint if known else None,
    )


def _known(text: str) -> Fingerprint | None:
    return next((each.fingerprint for each in find(text, (*TROUBLES, *FINGERPRINTS))), None)
