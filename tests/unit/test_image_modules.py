"""Which kernel modules are loaded, in which order."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from capsem.image import modules
from capsem.model.errors import Corrupt

DEP = """\
kernel/drivers/block/virtio_blk.ko.xz:
kernel/fs/erofs/erofs.ko.xz: kernel/lib/libcrc32c.ko.xz
kernel/lib/libcrc32c.ko.xz:
kernel/net/netfilter/nf_tables.ko.xz: kernel/net/netfilter/nfnetlink.ko.xz kernel/lib/libcrc32c.ko.xz
kernel/net/netfilter/nfnetlink.ko.xz:
kernel/drivers/char/hw_random/virtio-rng.ko.xz:
"""
BUILTIN = "kernel/fs/ext4/ext4.ko\nkernel/drivers/virtio/virtio_pci.ko\n"
TABLES = modules.parse(DEP, BUILTIN)
MARK = b"~Module signature appended~\n"


def test_needs_come_first_and_once() -> None:
    order = modules.load_order(TABLES, ["erofs", "nf_tables"])
    assert order == ["libcrc32c", "erofs", "nfnetlink", "nf_tables"]


def test_builtin_and_loaded_modules_are_passed_over() -> None:
    assert modules.load_order(TABLES, ["ext4", "virtio_pci", "nf_tables"], loaded=["libcrc32c"]) == [
        "nfnetlink",
        "nf_tables",
    ]


def test_dash_and_underscore_are_the_same() -> None:
    assert modules.load_order(TABLES, ["virtio_rng"]) == modules.load_order(TABLES, ["virtio-rng"]) == ["virtio_rng"]
    assert TABLES.files["virtio_rng"] == "kernel/drivers/char/hw_random/virtio-rng.ko.xz"


@pytest.mark.parametrize("path", ["a/virtio-rng.ko", "virtio_rng.ko.xz", "/x/virtio-rng.ko.zst"])
def test_module_name(path: str) -> None:
    assert modules.module_name(path) == "virtio_rng"


def test_unknown_modules_and_circles_are_refused() -> None:
    with pytest.raises(Corrupt, match="no module 'zfs'"):
        modules.load_order(TABLES, ["erofs", "zfs"])
    with pytest.raises(Corrupt, match="a -> b -> a"):
        modules.load_order(modules.parse("a.ko: b.ko\nb.ko: a.ko\n", ""), ["a"])


def test_damaged_tables_are_refused(tmp_path: Path) -> None:
    with pytest.raises(Corrupt):
        modules.parse("no colon here\n", "")
    with pytest.raises(Corrupt, match=r"modules\.dep"):
        modules.read(tmp_path)


@given(st.dictionaries(st.integers(0, 9), st.sets(st.integers(0, 9)), min_size=1))
def test_every_module_follows_what_it_needs(needs: dict[int, set[int]]) -> None:
    # A module may need only those with smaller numbers, so there are no circles.
    dep = "".join(f"m{n}.ko: {' '.join(f'm{o}.ko' for o in needs.get(n, ()) if o < n)}\n" for n in range(10))
    order = modules.load_order(modules.parse(dep, ""), [f"m{n}" for n in needs])
    place = {name: index for index, name in enumerate(order)}
    assert len(place) == len(order)
    for n in needs:
        assert all(place[f"m{other}"] < place[f"m{n}"] for other in needs[n] if other < n)


def test_signatures_are_cut_off_and_nothing_else() -> None:
    signed = b"ELF module" + b"s" * 300 + struct.pack(">8xI", 300) + MARK
    assert modules.strip_signature(signed) == b"ELF module"
    assert modules.strip_signature(b"ELF module") == b"ELF module"
    with pytest.raises(Corrupt):
        modules.strip_signature(struct.pack(">8xI", 300) + MARK)
