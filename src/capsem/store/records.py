"""VM records on disk. Whoever holds a VM's claim may write its record; everybody may read it."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from capsem.model.errors import Corrupt
from capsem.model.vm import VmRecord, record_from_json
from capsem.store import durable
from capsem.store.layout import Layout, SessionDir

SIZE_LIMIT = 64 * 1024 * 1024  # far more than the largest environment as JSON


def read(session: SessionDir) -> VmRecord:
    """Raises FileNotFoundError, Corrupt."""
    if session.record.stat().st_size > SIZE_LIMIT:
        raise Corrupt(f"{session.record} is too large for a VM record")
    return record_from_json(session.record.read_bytes(), source=str(session.record))


def write(session: SessionDir, record: VmRecord, *, lasting: bool = True) -> None:
    """Replace the record, durably unless it is about to be removed. Raises OSError."""
    durable.write(session.record, record.to_json(), lasting=lasting)


def stage(session: SessionDir, record: VmRecord) -> durable.Staged:
    """What the record is to be, if what is under way succeeds; others may be written meanwhile. Raises OSError."""
    return durable.Staged(session.record, record.to_json(), name="-next")


def sweep(session: SessionDir) -> None:
    """Remove what an earlier holder of the claim was about to write when it was killed; for who holds it now. Raises
    OSError."""
    for path in session.path.glob(f"{durable.TEMPORARY}{session.record.name}.*"):
        path.unlink(missing_ok=True)


def sessions(layout: Layout) -> list[SessionDir]:
    """All session directories with a record, of VMs that ran or may run; kept failures are not among them."""
    found = []
    for parent in (layout.persistent, layout.sessions):
        for path in sorted(parent.iterdir()) if parent.is_dir() else ():
            session = SessionDir(path)
            if path.is_dir() and not path.is_symlink() and "-failed-" not in path.name and session.record.is_file():
                found.append(session)
    return found


def registry(records: Iterable[tuple[VmRecord, Path]]) -> bytes:
    """The contract's index of persistent VMs (interface.md 1.5), for tools that read it; nothing of ours does."""
    vms = {}
    for record, path in records:
        entry = {
            "name": record.id,
            "ram_mb": record.spec.ram_mb,
            "cpus": record.spec.cpus,
            "base_version": record.image_digest,
            "created_at": str(int(record.created_at)),
            "session_dir": str(path),
            "forked_from": record.forked_from,
            "description": record.description,
            "suspended": False,
            "defunct": record.state == "failed",
            "last_error": record.last_error,
        }
        vms[record.id] = {key: value for key, value in entry.items() if value is not None}
    return json.dumps({"vms": vms}, indent=1).encode()
