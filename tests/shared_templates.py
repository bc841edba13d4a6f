"""Templates that the services of one test run share: each new home is given those that an earlier one made."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from capsem.store.layout import Layout

place: Path | None = None  # set by the conftest; None: nothing is shared


@contextlib.contextmanager
def _alone(directory: Path) -> Iterator[None]:
    directory.mkdir(exist_ok=True)
    with (directory / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _put(source: Path, target: Path) -> None:
    """By link where it can be: nothing ever writes to a template's memory."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
        target.chmod(0o600)


def give(run_dir: Path) -> None:
    """Before a service starts in `run_dir`."""
    if place is None:
        return
    layout = Layout(run_dir)
    layout.create()
    with _alone(place):
        for template in (each for each in place.iterdir() if each.is_dir()):
            target = layout.checkpoint(template.name).path
            if not target.exists():
                target.mkdir(mode=0o700)
                for file in template.glob("*.*"):
                    if file.suffix == ".qcow2":
                        shutil.copy2(file, layout.layers)
                    else:
                        _put(file, target / file.name)


def take(run_dir: Path) -> None:
    """After it has ended: keep what it has made."""
    if place is None:
        return
    layout = Layout(run_dir)
    with _alone(place):
        for directory in layout.checkpoints.iterdir() if layout.checkpoints.exists() else ():
            manifest = directory / "manifest.json"
            kept = place / directory.name
            if kept.exists() or not manifest.exists():
                continue
            body = json.loads(manifest.read_text())["body"]
            if body["kind"] == "template":
                kept.mkdir()
                for file in directory.glob("*.*"):
                    _put(file, kept / file.name)
                for layer in body["layers"]:
                    shutil.copy2(layout.layer(layer["id"]), kept)
