"""The cpio archive: what goes in comes out, the same bytes every time."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from capsem.image.initramfs import Entry, character_device, directory, file, for_guest, pack, parse
from capsem.model.errors import Corrupt

names = st.text(st.characters(codec="utf-8", exclude_characters="/\0"), min_size=1, max_size=8).filter(
    lambda name: name not in {".", ".."}
)
entries = st.dictionaries(names, st.builds(file, st.binary(max_size=40), st.integers(0, 0o777)), max_size=8)


@given(entries)
def test_what_goes_in_comes_out_in_order(tree: dict[str, Entry]) -> None:
    assert list(parse(pack(tree))) == sorted(tree.items())


def test_order_of_entries_does_not_matter() -> None:
    one = {"b": file(b"2"), "a": directory(), "a/x": file(b"1")}
    assert pack(one) == pack(dict(reversed(one.items())))


def test_parents_are_added_before_their_children() -> None:
    assert [path for path, _ in parse(pack({"modules/net/dummy.ko": file(b"")}))] == [
        "modules",
        "modules/net",
        "modules/net/dummy.ko",
    ]


def test_header_of_the_kernel_documentation() -> None:
    # Documentation/driver-api/early-userspace/buffer-format.rst: 110 bytes of ASCII, name and data padded to 4.
    archive = pack({"init": file(b"hello", 0o755)})
    assert archive[:6] == b"070701"
    assert archive[14:22] == b"000081ED"  # mode
    assert archive[54:62] == b"00000005"  # size
    assert archive[110:116] == b"init\0\0"
    assert archive[116:124] == b"hello\0\0\0"
    assert len(archive) % 512 == 0


def test_device_keeps_its_numbers() -> None:
    [(path, entry)] = [
        each for each in parse(pack({"dev/console": character_device(5, 1)})) if each[0] == "dev/console"
    ]
    assert (path, entry.device, entry.mode) == ("dev/console", (5, 1), 0o020600)


def test_the_guest_loads_modules_in_the_given_order() -> None:
    archive = for_guest(init=b"#!", mounts=b"", busybox=b"ELF", modules={"zz": b"1", "aa": b"2"})
    found = dict(parse(archive))
    assert found["modules/order"].data == b"zz\naa\n"
    assert found["modules/zz.ko"].data == b"1"
    assert found["init"].mode & 0o111


@pytest.mark.parametrize("cut", [0, 50, 113, 400])
def test_damaged_archives_are_refused(cut: int) -> None:
    archive = pack({"a": file(bytes(300)), "b": file(b"x")})
    with pytest.raises(Corrupt):
        list(parse(archive[:cut]))


@given(st.binary(max_size=300))
def test_garbage_gives_one_kind_of_error(data: bytes) -> None:
    with pytest.raises(Corrupt):
        list(parse(data))
