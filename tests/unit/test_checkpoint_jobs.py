"""The jobs of a checkpoint are a part of it like any other: in the manifest, with a digest that is checked."""

from __future__ import annotations

from pathlib import Path

import pytest

from capsem.model.checkpoint import Checkpoint, Kind, checkpoint_from_json
from capsem.model.errors import Corrupt
from capsem.store.checkpoints import CheckpointStore, describe
from capsem.store.jobs import encode
from capsem.store.layout import Layout

ID = "a" * 32


def made(layout: Layout) -> CheckpointStore:
    layout.create()
    store = CheckpointStore(layout)
    draft = store.prepare(ID)
    draft.files.jobs.write_bytes(encode([]))
    checkpoint = Checkpoint(
        id=ID,
        vm_id="box",
        kind=Kind.MANUAL,
        created_at=1.0,
        creator="1",
        layers=(),
        disk_mb=1,
        image="default",
        image_digest="d" * 64,
        hardware=1,
        cpus=1,
        ram_mb=512,
        jobs=describe(draft.files.jobs),
    )
    store.commit(draft, checkpoint)
    return store


def test_the_manifest_names_them(tmp_path: Path) -> None:
    store = made(Layout(tmp_path / "run"))
    checkpoint, files = store.open(ID)
    assert checkpoint.jobs == describe(files.jobs)
    assert checkpoint_from_json(checkpoint.to_json(), source="here") == checkpoint


@pytest.mark.parametrize("what", ["changed", "gone"])
def test_others_are_refused(tmp_path: Path, what: str) -> None:
    store = made(Layout(tmp_path / "run"))
    jobs = Layout(tmp_path / "run").checkpoint(ID).jobs
    if what == "changed":
        jobs.write_bytes(jobs.read_bytes() + b" ")
    else:
        jobs.unlink()
    with pytest.raises(Corrupt, match=r"jobs\.state"):
        store.open(ID)
