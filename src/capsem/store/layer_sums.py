"""Checksums of frozen layers: so that `verify` finds a flipped bit in a volume too.

They are made after the commit, not for it: reading a layer takes a second a gigabyte, which no suspend should wait for.
What was damaged before its checksum was made is not found; a layer's header is in the manifest, from the first instant.
A layer that checkpoints share is read once. Beside `<id>.qcow2` stands `<id>.sum`: JSON with size and SHA-256.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Final

from capsem.model.errors import Corrupt
from capsem.store import durable

_CHUNK: Final = 4 << 20  # bytes


def write(layer: Path, target: Path, cancelled: Callable[[], bool] = lambda: False) -> bool:
    """Make the checksum of a layer to which nothing writes any more; False when it was cancelled. Raises OSError."""
    found = _read(layer, cancelled)
    if found is None:
        return False
    durable.write(target, json.dumps(found).encode() + b"\n")
    if not layer.exists():  # removed meanwhile, and its checksum before this one was there
        target.unlink(missing_ok=True)
    return True


def check(layer: Path, target: Path) -> None:
    """Hold a layer against its checksum. Raises Corrupt, FileNotFoundError (there is none yet), OSError."""
    try:
        expected = json.loads(target.read_bytes())
    except (ValueError, RecursionError) as error:
        raise Corrupt(f"{target} is no checksum", hint="remove it, if the layer is to be trusted as it is") from error
    if _read(layer) != expected:
        raise Corrupt(f"{layer} is not what was frozen: its data has changed", hint="restore it from a backup")


def _read(layer: Path, cancelled: Callable[[], bool] = lambda: False) -> dict[str, object] | None:
    digest, size = hashlib.sha256(), 0
    fd = os.open(layer, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        while data := os.read(fd, _CHUNK):
            if cancelled():
                return None
            digest.update(data)
            size += len(data)
    finally:
        os.close(fd)
    return {"size": size, "sha256": digest.hexdigest()}
