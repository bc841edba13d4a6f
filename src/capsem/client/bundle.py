"""A bug report: what a maintainer wants to know, in one file, without secrets.

The values of VMs' environment variables are replaced by ***, in the records and wherever else they turn up in a log,
and so are those of the caller's variables whose names sound secret. Symbolic links are never followed, neither files
nor directories, and nothing is read but the ends of logs and the records.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import stat
import sys
import tarfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

from capsem import __version__
from capsem.client.health import Check
from capsem.config import Paths
from capsem.image import manifest as manifests
from capsem.image.catalog import Catalog
from capsem.model.errors import CapsemError
from capsem.store import durable

TAIL: Final = 256 * 1024  # bytes of each log
RECORD_LIMIT: Final = 64 * 1024 * 1024
HIDDEN: Final = "***"
TOP: Final = "capsem-report"
# Shorter ones would blank out half of a log, and are no secrets.
SHORTEST_SECRET: Final = 4
SOUNDS_SECRET: Final = re.compile(r"KEY|TOKEN|SECRET|PASS|CREDENTIAL|AUTH|COOKIE", re.IGNORECASE)
SERVICE_LOGS: Final = ("service.log", "service-start.log")
VM_LOGS: Final = ("process.log", "serial.log")
_DIRECTORY: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


def write(path: Path, paths: Paths, environ: Mapping[str, str], checks: Sequence[Check]) -> None:
    """Write the report to `path` (mode 0600), in place of what is there. Raises OSError."""
    durable.write(path, collect(paths, environ, checks))


def collect(paths: Paths, environ: Mapping[str, str], checks: Sequence[Check]) -> bytes:
    """The report, a compressed tar archive. What cannot be read is left out."""
    logs: dict[str, bytes] = {}
    records: dict[str, dict[str, Any] | str] = {}
    with _opened(paths.run_text, None) as run:
        if run is not None:
            for name in SERVICE_LOGS:
                _take(logs, name, name, run)
            for kind in ("persistent", "sessions"):
                for vm, session in _sessions(kind, run):
                    for name in VM_LOGS:
                        _take(logs, f"{kind}/{vm}/{name}", name, session)
                    with contextlib.suppress(OSError):
                        records[f"{kind}/{vm}/vm.json"] = _record(_read(session, "vm.json", RECORD_LIMIT))
    secrets = _secrets(environ, records.values())
    files: dict[str, bytes] = {"doctor.json": _json([asdict(check) for check in checks])}
    files["versions.json"] = _json(_versions())
    files |= {name: _json(_without_env(record)) for name, record in records.items()}
    files |= logs
    with contextlib.suppress(CapsemError, OSError):
        image = Catalog.from_environment(environ).find()
        files["image-manifest.json"] = (image.directory / manifests.NAME).read_bytes()
    return _packed({name: _hide(data, secrets) for name, data in files.items()})


def _record(data: bytes) -> dict[str, Any] | str:
    """The record, or why there is none to show: what cannot be read cannot be cleaned of secrets either."""
    try:
        body = json.loads(data)
    except (ValueError, RecursionError):
        return "not JSON"
    return body if isinstance(body, dict) else "not a JSON object"


def _without_env(record: dict[str, Any] | str) -> dict[str, Any] | str:
    if isinstance(record, str):
        return record
    spec = record.get("spec")
    if not isinstance(spec, dict):
        return "a record without a specification"
    env = spec.get("env")
    hidden = dict.fromkeys(env, HIDDEN) if isinstance(env, dict) else HIDDEN
    return {**record, "spec": {**spec, "env": hidden}}


def _secrets(environ: Mapping[str, str], records: Iterable[dict[str, Any] | str]) -> list[bytes]:
    """What must not be in the report, longest first, as it stands in a log and as it stands in JSON."""
    values = {value for key, value in environ.items() if SOUNDS_SECRET.search(key)}
    for record in records:
        spec = record.get("spec") if isinstance(record, dict) else None
        env = spec.get("env") if isinstance(spec, dict) else None
        values |= {value for value in env.values() if isinstance(value, str)} if isinstance(env, dict) else set()
    found: set[bytes] = set()
    for value in values:
        for text in (value, *value.splitlines()):
            if len(text.strip()) >= SHORTEST_SECRET:
                quoted = (json.dumps(text)[1:-1], json.dumps(text, ensure_ascii=False)[1:-1])
                found |= {each.encode(errors="surrogateescape") for each in (text, *quoted)}
    return sorted(found, key=len, reverse=True)


def _hide(data: bytes, secrets: Sequence[bytes]) -> bytes:
    for secret in secrets:
        data = data.replace(secret, HIDDEN.encode())
    return data


def _versions() -> dict[str, Any]:
    release = ""
    with contextlib.suppress(OSError):
        release = Path("/etc/os-release").read_text(encoding="utf-8", errors="replace")
    name = re.search(r'^PRETTY_NAME="?([^"\n]*)', release, re.MULTILINE)
    system = os.uname()
    return {
        "capsem": __version__,
        "python": sys.version,
        "kernel": f"{system.sysname} {system.release} {system.machine}",
        "distribution": name.group(1) if name else "",
        "written_at": int(time.time()),
    }


# -- reading without following links


@contextlib.contextmanager
def _opened(name: str, parent: int | None) -> Iterator[int | None]:
    """A descriptor of a directory that is no link; None when there is none."""
    try:
        fd = os.open(name, _DIRECTORY, dir_fd=parent)
    except OSError:
        yield None
        return
    try:
        yield fd
    finally:
        os.close(fd)


def _sessions(kind: str, run: int) -> Iterator[tuple[str, int]]:
    with _opened(kind, run) as parent:
        names = [] if parent is None else [entry.name for entry in os.scandir(parent)]
        for vm in sorted(names):
            with _opened(vm, parent) as session:
                if session is not None:
                    yield vm, session


def _take(logs: dict[str, bytes], name: str, file: str, directory: int) -> None:
    with contextlib.suppress(OSError):
        logs[name] = _read(directory, file, TAIL)


def _read(directory: int, name: str, limit: int) -> bytes:
    """The last `limit` bytes of a plain file. Raises OSError."""
    # A pipe would otherwise be waited for.
    fd = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=directory)
    with os.fdopen(fd, "rb") as file:
        info = os.fstat(fd)
        if not stat.S_ISREG(info.st_mode):
            raise OSError(f"{name} is no plain file")
        file.seek(max(0, info.st_size - limit))
        return file.read(limit)


def _json(value: object) -> bytes:
    return json.dumps(value, indent=1).encode() + b"\n"


def _packed(files: Mapping[str, bytes]) -> bytes:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as archive:
        for name, data in files.items():
            info = tarfile.TarInfo(f"{TOP}/{name}")
            info.size, info.mode, info.mtime = len(data), 0o600, int(time.time())
            archive.addfile(info, io.BytesIO(data))
    return packed.getvalue()
