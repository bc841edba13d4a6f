"""No image is removed that a VM needs, whichever run directory it is in, and old ones do not pile up."""

from __future__ import annotations

import os
import stat
import threading
from pathlib import Path

import pytest
from test_image_catalog import add, add_vm

from capsem.image import users
from capsem.image.catalog import Catalog
from capsem.model.errors import WrongState
from capsem.store import durable


@pytest.fixture
def images(tmp_path: Path) -> Path:
    return tmp_path / "images"


def names(images: Path) -> set[str]:
    return {path.name for path in images.iterdir()} - {users.DIRECTORY}


def test_what_is_neither_current_nor_needed_goes(tmp_path: Path, images: Path) -> None:
    gone, kept, current = (add(images, content=content) for content in (b"1", b"2", b"3"))
    other = add(images, "code", content=b"4")
    add(images, "code", content=b"5")
    add_vm(tmp_path / "run", "vm", kept.digest)
    catalog = Catalog([images], images)
    assert catalog.prune(tmp_path / "run", name="default") == [gone]
    assert catalog.prune(tmp_path / "run") == [other]
    assert catalog.prune(tmp_path / "run") == []
    assert catalog.find() == current
    assert catalog.find_digest(kept.digest) == kept


def test_damaged_images_go_too_unless_a_vm_needs_them(tmp_path: Path, images: Path) -> None:
    gone, kept, _ = (add(images, content=content) for content in (b"1", b"2", b"3"))
    for image in (gone, kept):
        (image.directory / "manifest.json").write_bytes(b"{")
    add_vm(tmp_path / "run", "vm", kept.digest)
    assert Catalog([images], images).prune(tmp_path / "run") == []
    assert not gone.directory.exists()
    assert kept.directory.exists()


def test_other_things_in_the_directory_stay(tmp_path: Path, images: Path) -> None:
    add(images)
    for name in ("cache", "mine", "default-0123", "x86_64"):
        (images / name).mkdir()
    before = names(images)
    assert Catalog([images], images).prune(tmp_path / "run") == []
    assert names(images) == before
    assert Catalog([tmp_path / "none"], tmp_path / "none").prune(tmp_path / "run") == []


def test_vms_of_other_run_directories_count_as_long_as_those_are_there(tmp_path: Path, images: Path) -> None:
    old, _ = add(images, content=b"1"), add(images, content=b"2")
    catalog = Catalog([images], images)
    with catalog.taken(old.directory.name, tmp_path / "theirs") as image:
        add_vm(tmp_path / "theirs", "vm", image.digest)
    assert catalog.prune(tmp_path / "mine") == []
    with pytest.raises(WrongState, match=f"in use by vm .in {tmp_path}/theirs"):
        catalog.remove(old.directory.name, tmp_path / "mine")
    assert old.directory.exists()
    durable.remove_tree(tmp_path / "theirs")
    assert catalog.prune(tmp_path / "mine") == [old]
    assert list((images / users.DIRECTORY).iterdir()) == []


def test_what_cannot_be_read_may_need_everything(tmp_path: Path, images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old, _ = add(images, content=b"1"), add(images, content=b"2")
    catalog = Catalog([images], images)
    session = add_vm(tmp_path / "run", "vm", "0" * 64)
    session.record.write_bytes(b"{")
    with pytest.raises(WrongState, match="vm may need the image"):
        catalog.prune(tmp_path / "run")
    durable.remove_tree(session.path)
    # A run directory of somebody else, though root could read it.
    catalog.declare(tmp_path / "run")
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    with pytest.raises(WrongState, match="not yours to read"):
        catalog.prune(tmp_path / "mine")
    assert old.directory.exists()


def test_everybody_may_tell_that_they_use_images_and_nobody_that_others_do_not(tmp_path: Path, images: Path) -> None:
    images.mkdir()
    before = os.umask(0o077)
    try:
        users.register(images, tmp_path / "run")
    finally:
        os.umask(before)
    assert stat.S_IMODE((images / users.DIRECTORY).stat().st_mode) == 0o1777
    users.register(images, tmp_path / "run")
    [link] = (images / users.DIRECTORY).iterdir()
    assert link.readlink() == tmp_path / "run"
    users.register(tmp_path / "none", tmp_path / "run")
    assert not (tmp_path / "none").exists()


def test_nothing_is_removed_while_a_vm_is_being_made(tmp_path: Path, images: Path) -> None:
    old = add(images, content=b"1")
    catalog = Catalog([images], images)
    removed: list[object] = []
    pruning = threading.Thread(target=lambda: removed.extend(catalog.prune(tmp_path / "run")))
    with catalog.taken("default", tmp_path / "run") as image:
        add(images, content=b"2")
        pruning.start()
        pruning.join(0.2)
        assert pruning.is_alive()
        add_vm(tmp_path / "run", "vm", image.digest)
    pruning.join()
    assert removed == []
    assert old.directory.exists()
