"""Merging frozen layers, on layers made by us. That QEMU agrees is shown in tests/property."""

from __future__ import annotations

import errno
import itertools
import os
import resource
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from capsem.hypervisor.qemu import merge as merging
from capsem.hypervisor.qemu.merge import Cancelled, lay_out, merge
from capsem.hypervisor.qemu.qcow2 import CLUSTER, Identity, create_layer, read_identity
from capsem.hypervisor.qemu.qcow2_map import COPIED, SLOTS, ZEROES, Kind, LayerMap
from capsem.model.errors import Corrupt
from layer_files import L1_OFFSET, read_layer, write_layer

ID = "0123456789abcdef0123456789abcdef"
OTHER = "fedcba9876543210fedcba9876543210"
SIZE_MB = 1025  # three L2 tables, the last one for a single MiB
CLUSTERS = SIZE_MB << 20 >> 16

# Few clusters, so that layers meet: at both ends of each L2 table.
numbers = st.sampled_from([0, 1, 2, 3, SLOTS - 1, SLOTS, SLOTS + 1, 2 * SLOTS - 1, 2 * SLOTS, CLUSTERS - 1])
contents = st.dictionaries(numbers, st.none() | st.integers(0, 255), max_size=8)


def layers_of(directory: Path, *contents: dict[int, int | None]) -> list[Path]:
    paths = [directory / f"layer-{place}" for place in range(len(contents))]
    for path, content in zip(paths, contents, strict=True):
        write_layer(path, content, size_mb=SIZE_MB, layer_id=ID)
    return paths


@given(layers=st.lists(contents, min_size=1, max_size=5))
@settings(deadline=None, max_examples=60)
def test_for_each_cluster_the_topmost_layer_that_knows_it_decides(layers: list[dict[int, int | None]]) -> None:
    with TemporaryDirectory() as name:
        paths = layers_of(Path(name), *layers)
        before = [path.read_bytes() for path in paths]
        target = Path(name, "target")
        done = merge(paths, target, vm_id="other", layer_id=OTHER)
        expected: dict[int, int | None] = {}
        for content in layers:
            expected |= content
        assert read_layer(target) == expected
        assert list(read_layer(target)) == sorted(expected)
        assert [path.read_bytes() for path in paths] == before
        assert read_identity(target) == Identity("other", OTHER)
        data = sum(byte is not None for byte in expected.values())
        assert done.copied_bytes == data * CLUSTER
        assert done.file_bytes == target.stat().st_size
        with LayerMap(target) as layer:
            assert layer.allocated_bytes() == data * CLUSTER
            assert layer.size == SIZE_MB << 20


def test_the_new_file_is_private_and_must_not_exist(tmp_path: Path) -> None:
    paths = layers_of(tmp_path, {0: 1}, {1: 2})
    target = tmp_path / "target"
    before = os.umask(0)
    try:
        merge(paths, target, vm_id="box", layer_id=OTHER)
    finally:
        os.umask(before)
    assert stat.S_IMODE(target.stat().st_mode) == 0o600
    content = target.read_bytes()
    with pytest.raises(FileExistsError):
        merge(paths[:1], target, vm_id="box", layer_id=OTHER)
    assert target.read_bytes() == content


def test_a_file_that_ends_within_its_last_cluster_reads_as_zeros_from_there(tmp_path: Path) -> None:
    (path,) = layers_of(tmp_path, {5: 7})
    os.truncate(path, path.stat().st_size - CLUSTER + 1000)
    target = tmp_path / "target"
    merge([path], target, vm_id="box", layer_id=OTHER)
    with LayerMap(target) as layer:
        ((number, kind, host),) = layer.clusters()
        assert (number, kind) == (5, Kind.DATA)
        assert os.pread(layer.fd, CLUSTER, host) == b"\7" * 1000 + bytes(CLUSTER - 1000)


os_copy = merging._in_kernel


def test_whole_runs_are_copied_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lower, upper = layers_of(tmp_path, dict.fromkeys(range(100), 1), dict.fromkeys(range(40, 60), 2))
    calls = []
    monkeypatch.setattr(merging, "_in_kernel", lambda *args: calls.append(args[-1]) or os_copy(*args))
    merge([lower, upper], tmp_path / "target", vm_id="box", layer_id=OTHER)
    assert [count // CLUSTER for count in calls] == [40, 20, 40]


def test_runs_are_copied_in_pieces_of_any_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(merging, "PIECE", 100_000)
    monkeypatch.setattr(merging, "SYNC_EVERY", 150_000)
    content = {number: number for number in range(8)}
    paths = layers_of(tmp_path, content)
    merge(paths, tmp_path / "target", vm_id="box", layer_id=OTHER)
    assert read_layer(tmp_path / "target") == content


def test_without_the_kernels_copy_the_result_is_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = layers_of(tmp_path, {0: 1, 1: 2, 9000: 3}, {1: 4, 2: None})
    merge(paths, tmp_path / "one", vm_id="box", layer_id=OTHER)

    def unknown(*_: object) -> int:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(merging, "_in_kernel", unknown)
    merge(paths, tmp_path / "other", vm_id="box", layer_id=OTHER)
    assert (tmp_path / "other").read_bytes() == (tmp_path / "one").read_bytes()


def test_whenever_it_is_cancelled_nothing_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(merging, "PIECE", CLUSTER)
    paths = layers_of(tmp_path, {0: 1, 1: 2, 9000: 3}, {1: 4, 2: None})
    target = tmp_path / "target"

    def at(number: int) -> Callable[[], bool]:
        looks = itertools.count(1)
        return lambda: next(looks) == number

    for number in range(1, 8):  # before each of two tables, twice, and each of three clusters
        with pytest.raises(Cancelled):
            merge(paths, target, vm_id="box", layer_id=OTHER, cancelled=at(number))
        assert sorted(tmp_path.iterdir()) == paths
    merge(paths, target, vm_id="box", layer_id=OTHER, cancelled=at(8))
    assert read_layer(target) == {0: 1, 1: 4, 2: None, 9000: 3}


def test_a_file_that_is_not_complete_is_no_layer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a crash at any moment would leave is looked at whenever `cancelled` is asked."""
    monkeypatch.setattr(merging, "PIECE", CLUSTER)
    paths = layers_of(tmp_path, {0: 1, 1: 2, 9000: 3})
    target = tmp_path / "target"
    seen = []

    def look() -> bool:
        if target.exists():
            with pytest.raises(Corrupt):
                read_identity(target)
            seen.append(target.stat().st_size)
        return False

    merge(paths, target, vm_id="box", layer_id=OTHER, cancelled=look)
    assert len(set(seen)) > 1


@contextmanager
def files_no_longer_than(size: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("clusters", [0, 1, 4, 5, 6, 7, 20])
def test_when_the_disk_refuses_half_way_nothing_is_left(tmp_path: Path, clusters: int) -> None:
    paths = layers_of(tmp_path, dict.fromkeys(range(20), 1), {30: None})
    with files_no_longer_than(clusters * CLUSTER), pytest.raises(OSError, match="File too large"):
        merge(paths, tmp_path / "target", vm_id="box", layer_id=OTHER)
    assert sorted(tmp_path.iterdir()) == paths


def test_a_full_disk_is_seen_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(merging, "RESERVE", 1 << 62)
    paths = layers_of(tmp_path, {0: 1})
    with pytest.raises(OSError, match="free are") as caught:
        merge(paths, tmp_path / "target", vm_id="box", layer_id=OTHER)
    assert caught.value.errno == errno.ENOSPC
    assert sorted(tmp_path.iterdir()) == paths


def test_layers_of_different_disks_do_not_go_together(tmp_path: Path) -> None:
    create_layer(tmp_path / "a", size_mb=1, vm_id="box", layer_id=ID)
    create_layer(tmp_path / "b", size_mb=2, vm_id="box", layer_id=OTHER)
    with pytest.raises(Corrupt, match="its disk has"):
        merge([tmp_path / "a", tmp_path / "b"], tmp_path / "target", vm_id="box", layer_id=OTHER)
    assert not (tmp_path / "target").exists()


L2 = 4 * CLUSTER  # where write_layer puts the first L2 table
DATA = 5 * CLUSTER  # and the first cluster of data


@pytest.mark.parametrize(
    ("place", "value", "what"),
    [
        (20, 15, "features"),  # cluster bits, with the upper half of the size
        (32, 1 << 32, "features"),  # encryption
        (60, 1 << 32, "features"),  # an internal snapshot
        (72, 1, "features"),  # dirty
        (72, 16, "features"),  # subclusters
        (24, 17 << 40, "its disk has"),
        (24, (1025 << 20) + 1, "its disk has"),
        (24, 512, "much longer"),
        (24, 1 << 40, "L1 table"),  # more than the L1 table has entries for
        (40, 0, "L1 table"),
        (40, 3 * CLUSTER + 8, "L1 table"),
        (40, 1 << 63, "L1 table"),
        (L1_OFFSET, COPIED, "L1 tables"),
        (L1_OFFSET, L2 | 1, "L1 tables"),
        (L1_OFFSET, L2 | 1 << 62, "L1 tables"),
        (L1_OFFSET, L2 + 512, "L1 tables"),
        (L1_OFFSET, 7 * CLUSTER, "L1 tables"),  # just behind the file's end
        (L1_OFFSET, L1_OFFSET, "L1 tables"),  # the L1 table itself
        (L1_OFFSET + 8, L2 | COPIED, "L1 tables"),  # twice the same
        (L1_OFFSET + 8, DATA | COPIED, "L1 tables"),  # data
        (L2, COPIED, "L2 tables"),
        (L2, DATA | 1 << 62, "L2 tables"),  # compressed
        (L2, DATA | 2, "L2 tables"),
        (L2, DATA + 512, "L2 tables"),
        (L2, 7 * CLUSTER, "L2 tables"),
        (L2, L2 | COPIED, "L2 tables"),
        (L2 + 16, DATA | COPIED, "L2 tables"),  # twice the same
    ],
)
def test_damaged_layers_are_refused(tmp_path: Path, place: int, value: int, what: str) -> None:
    (path,) = layers_of(tmp_path, {0: 1, 1: 2})
    assert path.stat().st_size == 7 * CLUSTER
    with path.open("r+b") as file:
        file.seek(place)
        file.write(value.to_bytes(8, "big"))
        file.truncate(max(7 * CLUSTER, (2 << 30) if what == "much longer" else 0))
    with pytest.raises(Corrupt, match=what) as caught:
        merge([path], tmp_path / "target", vm_id="box", layer_id=OTHER)
    assert caught.value.hint
    assert sorted(tmp_path.iterdir()) == [path]


def test_a_zero_cluster_may_keep_its_place(tmp_path: Path) -> None:
    (path,) = layers_of(tmp_path, {0: 1})
    with path.open("r+b") as file:
        file.seek(L2)
        file.write((DATA | COPIED | ZEROES).to_bytes(8, "big"))
    merge([path], tmp_path / "target", vm_id="box", layer_id=OTHER)
    assert read_layer(tmp_path / "target") == {0: None}
    assert (tmp_path / "target").stat().st_size == 5 * CLUSTER


def test_only_regular_files_are_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(Corrupt, match="regular"):
        LayerMap(tmp_path / "fifo")
    os.symlink("fifo", tmp_path / "link")
    with pytest.raises(OSError, match="symbolic"):
        LayerMap(tmp_path / "link")


@given(size=st.integers(1, 16 << 40), tables=st.integers(0, 1 << 15), data=st.integers(0, 1 << 28))
def test_every_cluster_of_a_plan_has_a_refcount(size: int, tables: int, data: int) -> None:
    plan = lay_out(size, tables, data)
    blocks = plan.l1 - plan.refcount_blocks
    assert blocks * merging.REFCOUNTS >= plan.total > (blocks - 1) * merging.REFCOUNTS
    assert (plan.refcount_blocks - 1) * SLOTS >= blocks > (plan.refcount_blocks - 2) * SLOTS
    assert (plan.l2 - plan.l1) * CLUSTER * SLOTS * CLUSTER // 8 >= size
    assert (plan.data - plan.l2, plan.total - plan.data) == (tables, data)
