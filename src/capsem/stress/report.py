"""What came of a stress test: counts, latencies, and every anomaly with the logs of its moment."""

from __future__ import annotations

import contextlib
import json
import math
import shutil
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Final

from capsem.model import fingerprints
from capsem.model.errors import CapsemError
from capsem.stress.hosts import Service
from capsem.stress.options import Options

LOG_BYTES: Final = 4 << 20  # of each log, its end, that become evidence
PERCENTILES: Final = (50, 95, 99)


@dataclass(frozen=True, slots=True)
class Anomaly:
    """Something that must not be. `fingerprints`: the known failures whose signs were found."""

    kind: str  # lost, failed, left over, sign
    vm: str
    what: str
    fingerprints: tuple[str, ...]
    evidence: str  # a directory


@dataclass(slots=True)
class Totals:
    """Counts so far."""

    cycles: int = 0
    checks: int = 0
    writes: int = 0
    restarts: int = 0
    refused: Counter[str] = field(default_factory=Counter)  # by operation: it was not the moment, as clients are told


class Report:
    """May be told things by many threads."""

    def __init__(self, options: Options, evidence: Path) -> None:
        self.options = options
        self.totals = Totals()
        self.anomalies: list[Anomaly] = []
        self.interrupted = False
        self._evidence = evidence
        self._took: defaultdict[str, list[float]] = defaultdict(list)
        self._lock = threading.Lock()
        self._began = time.monotonic()
        self._seen: set[tuple[str, str]] = set()  # VM and fingerprint that were told of

    @property
    def seconds(self) -> float:
        """Since the beginning."""
        return time.monotonic() - self._began

    @contextlib.contextmanager
    def timed(self, operation: str) -> Iterator[None]:
        """Measure an operation that succeeds; count one that is refused. What it raises passes."""
        began = time.monotonic()
        try:
            yield
        except CapsemError:
            with self._lock:
                self.totals.refused[operation] += 1
            raise
        with self._lock:
            self._took[operation].append(time.monotonic() - began)

    def count(self, **more: int) -> None:
        """Add to the totals."""
        with self._lock:
            for name, number in more.items():
                setattr(self.totals, name, getattr(self.totals, name) + number)

    def anomaly(self, kind: str, service: Service, vm: str, what: str, log: str = "") -> None:
        """Something is wrong with a VM: keep its logs, and `log`, and look in them for signs of known failures."""
        with self._lock:
            number = len(self.anomalies) + 1
            place = self._evidence / f"{number:03}-{vm or 'service'}"
            place.mkdir(parents=True, exist_ok=True)
            (place / "what.txt").write_text(f"{kind}: {vm}: {what}\n")
            (place / "guest-kernel.txt").write_text(log)
            for path in service.logs(vm or None):
                _copy_end(path, place / f"{path.parent.name}-{path.name}")
            names = tuple(dict.fromkeys(found.fingerprint.name for found in _signs(what, log, *_texts(place))))
            self._seen |= {(vm, name) for name in names}
            self.anomalies.append(Anomaly(kind, vm, what, names, str(place)))

    def look_for_signs(self, service: Service, vm: str) -> None:
        """Signs of known failures in the logs of a VM, whatever its operations say."""
        for path in service.logs(vm):
            if path.parent.name == vm and path.suffix == ".log":
                for found in fingerprints.find(path.read_text(errors="replace")):
                    if (vm, found.fingerprint.name) not in self._seen:
                        self.anomaly("sign", service, vm, f"{path.name}: {found.line}")

    # -- telling

    @property
    def clean(self) -> bool:
        """Whether nothing was wrong."""
        return not self.anomalies

    def latencies(self) -> dict[str, dict[str, float]]:
        """By operation: count, percentiles (nearest rank) and longest, in seconds."""
        with self._lock:
            taken = {operation: sorted(times) for operation, times in sorted(self._took.items())}
        return {
            operation: {
                "count": len(times),
                **{f"p{each}": round(times[math.ceil(each / 100 * len(times)) - 1], 3) for each in PERCENTILES},
                "max": round(times[-1], 3),
            }
            for operation, times in taken.items()
        }

    def to_dict(self, services: list[Service]) -> dict[str, Any]:
        """The report as data."""
        return {
            "clean": self.clean,
            "interrupted": self.interrupted,
            "seconds": round(self.seconds, 1),
            "options": asdict(self.options),
            "totals": {**asdict(replace(self.totals, refused=Counter())), "refused": dict(self.totals.refused)},
            "operations": self.latencies(),
            "faults": [each for service in services for each in service.faults],
            "anomalies": [asdict(each) for each in self.anomalies],
        }

    def lines(self, services: list[Service]) -> list[str]:
        """The report for people."""
        totals, options = self.totals, self.options
        shown = [f"{'operation':<16}{'count':>7}{'refused':>9}{'p50':>9}{'p95':>9}{'p99':>9}{'max':>9}"]
        figures = self.latencies()
        for operation in sorted({*figures, *totals.refused}):
            row = figures.get(operation, {"count": 0, "p50": 0, "p95": 0, "p99": 0, "max": 0})
            times = "".join(f"{row[each] * 1000:>6.0f} ms" for each in ("p50", "p95", "p99", "max"))
            shown.append(f"{operation:<16}{row['count']:>7}{totals.refused[operation]:>9}{times}")
        injected = sum(len(service.faults) for service in services)
        shown += [
            "",
            (
                f"{totals.cycles} cycles of suspend, resume and check, {totals.checks} checks, {totals.writes} writes in "
                f"{self.seconds:.0f} s; {options.services} service(s), {options.vms} VM(s) each, {options.clients} clients, "
                f"{options.hypervisor}{'' if options.gate else ' without the gate'}, seed {options.seed}"
            ),
        ]
        if options.faults:
            shown.append(
                f"{injected} faults were made to happen; the service was started again {totals.restarts} times"
            )
        if self.interrupted:
            shown.append("interrupted: this is how far it came")
        for each in self.anomalies:
            signs = f" [{', '.join(each.fingerprints)}]" if each.fingerprints else ""
            shown += [f"ANOMALY {each.kind}: {each.vm}: {each.what[:300]}{signs}", f"        evidence: {each.evidence}"]
        for fingerprint in fingerprints.FINGERPRINTS:
            if any(fingerprint.name in each.fingerprints for each in self.anomalies):
                shown.append(f"{fingerprint.name}: {fingerprint.meaning}")
        shown.append("nothing was lost" if self.clean else f"{len(self.anomalies)} anomalies")
        return shown

    def progress(self) -> str:
        """One line."""
        totals = self.totals
        return (
            f"{self.seconds:5.0f} s  {totals.cycles} cycles  {totals.checks} checks  {totals.writes} writes  "
            f"{sum(len(each) for each in list(self._took.values()))} operations  {len(self.anomalies)} anomalies"
        )

    def keep(self, services: list[Service]) -> None:
        """Write the report beside the evidence."""
        text = json.dumps(self.to_dict(services), indent=2)
        (self._evidence / "report.json").write_text(text)


def _copy_end(source: Path, target: Path) -> None:
    with contextlib.suppress(OSError):  # gone meanwhile
        if source.stat().st_size <= LOG_BYTES:
            shutil.copyfile(source, target)
            return
        with source.open("rb") as file:
            file.seek(-LOG_BYTES, 2)
            target.write_bytes(file.read())


def _texts(place: Path) -> list[str]:
    return [path.read_text(errors="replace") for path in sorted(place.glob("*.log")) if "service.log" not in path.name]


def _signs(*texts: str) -> Iterator[fingerprints.Match]:
    for text in texts:
        yield from fingerprints.find(text)
