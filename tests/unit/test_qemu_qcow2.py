"""Our qcow2 writer and the identity that layers carry. That QEMU agrees is shown in tests/vm."""

from __future__ import annotations

import contextlib
import os
import stat
import struct
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from capsem.hypervisor.qemu.qcow2 import CLUSTER, Identity, create_layer, header, read_identity
from capsem.model.errors import Corrupt

ID = "0123456789abcdef0123456789abcdef"


def test_a_layer_says_whose_it_is(tmp_path: Path) -> None:
    path = tmp_path / "layer"
    create_layer(path, size_mb=16 * 1024, vm_id="box", layer_id=ID)
    assert read_identity(path) == Identity("box", ID)
    info = path.stat()
    assert stat.S_IMODE(info.st_mode) == 0o600
    assert info.st_size == 4 * CLUSTER
    assert info.st_blocks * 512 <= 4 * CLUSTER


def test_the_umask_does_not_matter(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        create_layer(tmp_path / "layer", size_mb=1, vm_id="box", layer_id=ID)
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "layer").stat().st_mode) == 0o600


def test_an_existing_file_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "layer"
    path.write_bytes(b"precious")
    with pytest.raises(FileExistsError):
        create_layer(path, size_mb=1, vm_id="box", layer_id=ID)
    assert path.read_bytes() == b"precious"


def test_a_failure_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(OSError, match="No space"):
        create_layer(tmp_path / "layer", size_mb=1, vm_id="box", layer_id=ID)
    assert list(tmp_path.iterdir()) == []


def test_no_backing_name_is_ever_written() -> None:
    assert struct.unpack_from(">QI", header(1 << 30, Identity("box", ID)), 8) == (0, 0)


@pytest.mark.parametrize(
    "content",
    [b"", b"QFI\xfb", bytes(CLUSTER), b"QFI\xfb\0\0\0\2" + bytes(4096), header(1 << 20, Identity("v", ID))[:112]],
)
def test_other_files_are_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "layer"
    path.write_bytes(content)
    with pytest.raises(Corrupt) as caught:
        read_identity(path)
    assert str(path) in caught.value.message
    assert caught.value.hint


@given(place=st.integers(0, 400), value=st.integers(0, 255), tail=st.binary(max_size=64))
@example(place=103, value=0, tail=b"")
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_any_damage_gives_an_identity_or_one_error(tmp_path: Path, place: int, value: int, tail: bytes) -> None:
    content = bytearray(header(1 << 30, Identity("box", ID)) + tail)
    content[place % len(content)] = value
    path = tmp_path / "damaged"
    path.write_bytes(content)
    with contextlib.suppress(Corrupt):
        assert isinstance(read_identity(path), Identity)


@given(content=st.binary(max_size=600))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_any_bytes_after_the_magic(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "any"
    path.write_bytes(b"QFI\xfb\0\0\0\3" + content)
    with pytest.raises(Corrupt):
        read_identity(path)
