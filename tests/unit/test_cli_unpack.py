"""Archives made to get out of the directory they are unpacked into, or to hurt in it."""

from __future__ import annotations

import io
import os
import stat
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from capsem.cli.unpack import stays_inside, unpack
from capsem.model.errors import GuestFailed

Entry = tuple[str, bytes, str, int, bytes]  # name, type, link target, mode, content


def entry(name: str, kind: bytes = tarfile.REGTYPE, *, link: str = "", mode: int = 0o644, data: bytes = b"") -> Entry:
    return name, kind, link, mode, data


def packed(*entries: Entry) -> bytes:
    text = io.BytesIO()
    with tarfile.open(fileobj=text, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for name, kind, link, mode, data in entries:
            info = tarfile.TarInfo(name)
            info.type, info.linkname, info.mode, info.size = kind, link, mode, len(data)
            archive.addfile(info, io.BytesIO(data))
    return text.getvalue()


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Path]:
    """The directory, beside something that must not be touched."""
    (tmp_path / "beside").write_text("untouched")
    (tmp_path / "in").mkdir()
    yield tmp_path / "in"
    assert (tmp_path / "beside").read_text() == "untouched"
    assert {each.name for each in tmp_path.iterdir()} == {"beside", "in"}
    for each in (tmp_path / "in").rglob("*"):
        assert each.resolve().is_relative_to((tmp_path / "in").resolve()) or not each.exists(), each


def made(place: Path) -> set[str]:
    return {str(each.relative_to(place)) for each in place.rglob("*")}


@pytest.mark.parametrize(
    "name", ["/etc/x", "//x", "../beside", "a/../../beside", "..", "a/..", "./../beside", "a/b/../../../beside"]
)
@pytest.mark.parametrize("kind", [tarfile.REGTYPE, tarfile.DIRTYPE])
def test_names_that_lead_out_end_it(place: Path, name: str, kind: bytes) -> None:
    with pytest.raises(GuestFailed, match="outside"):
        unpack(io.BytesIO(packed(entry(name, kind, data=b"x" * (kind == tarfile.REGTYPE)))), place)


@pytest.mark.parametrize("link", ["..", "../beside", "/etc", "a/../../beside", "/", "./..", ""])
def test_links_that_lead_out_are_left_out(place: Path, link: str) -> None:
    text = packed(entry("link", tarfile.SYMTYPE, link=link), entry("file", data=b"x"))
    assert ["link: a link" in line for line in unpack(io.BytesIO(text), place)] == [True]
    assert made(place) == {"file"}


def test_a_file_through_a_link_of_the_archive_is_not_written_there(place: Path) -> None:
    """The link comes first in the archive, and last on the disk."""
    for link in ("../", "..", "/tmp", "sub"):
        text = packed(
            entry("sub", tarfile.DIRTYPE), entry("link", tarfile.SYMTYPE, link=link), entry("link/beside", data=b"evil")
        )
        target = place / f"t-{abs(hash(link))}"
        target.mkdir()
        if link == "sub":  # harmless by itself, but its name is taken by what went through it
            with pytest.raises(FileExistsError):
                unpack(io.BytesIO(text), target)
        else:
            unpack(io.BytesIO(text), target)
        assert (target / "link/beside").read_bytes() == b"evil"
        assert not (target / "link").is_symlink()
        assert not (target / "sub/beside").exists()


def test_links_that_lead_out_together_are_left_out(place: Path) -> None:
    """a -> b/c, b/c -> ..: each of them inside, and the second one step higher than it looks through the first."""
    text = packed(
        entry("d/e", tarfile.DIRTYPE),
        entry("d/e/up", tarfile.SYMTYPE, link=".."),
        entry("x", tarfile.SYMTYPE, link="d/e/up/../.."),
        entry("y", tarfile.SYMTYPE, link="d/e/up"),
    )
    assert [line.partition(":")[0] for line in unpack(io.BytesIO(text), place)] == ["x"]
    assert made(place) == {"d", "d/e", "d/e/up", "y"}


@pytest.mark.parametrize("target", ["/etc/passwd", "../beside", "file"])
def test_hard_links_are_left_out(place: Path, target: str) -> None:
    text = packed(entry("file", data=b"x"), entry("hard", tarfile.LNKTYPE, link=target))
    assert len(unpack(io.BytesIO(text), place)) == 1
    assert made(place) == {"file"}
    assert (place / "file").stat().st_nlink == 1


@pytest.mark.parametrize("kind", [tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE])
def test_devices_and_pipes_are_left_out(place: Path, kind: bytes) -> None:
    assert len(unpack(io.BytesIO(packed(entry("null", kind, mode=0o666), entry("file"))), place)) == 1
    assert made(place) == {"file"}


def test_no_owner_and_no_set_id(place: Path) -> None:
    text = packed(entry("run", mode=0o6755, data=b"x"), entry("d", tarfile.DIRTYPE, mode=0o7000))
    assert unpack(io.BytesIO(text), place) == []
    assert stat.S_IMODE((place / "run").stat().st_mode) == 0o755
    assert stat.S_IMODE((place / "d").stat().st_mode) == 0o700  # ours to enter and to remove
    assert (place / "run").stat().st_uid == os.getuid()


def test_a_file_twice_does_not_replace_the_first(place: Path) -> None:
    with pytest.raises(FileExistsError):
        unpack(io.BytesIO(packed(entry("file", data=b"one"), entry("file", data=b"two"))), place)
    assert (place / "file").read_bytes() == b"one"


def test_a_file_where_a_directory_is_wanted(place: Path) -> None:
    with pytest.raises((FileExistsError, NotADirectoryError)):
        unpack(io.BytesIO(packed(entry("file", data=b"one"), entry("file/x", data=b"two"))), place)


def test_every_truncation_is_noticed(place: Path) -> None:
    text = packed(entry("a", data=b"x" * 2000), entry("b", data=b"y" * 2000))
    whole = text.rindex(b"y") + 1
    for number, size in enumerate((0, 1, 100, 511, 513, 1500, 3000, whole - 1)):
        target = place / str(number)
        target.mkdir()
        with pytest.raises(GuestFailed, match="no archive"):
            unpack(io.BytesIO(text[:size]), target)


def test_a_size_that_the_archive_does_not_have(place: Path) -> None:
    """8 EiB announced, five bytes sent."""
    info = tarfile.TarInfo("huge")
    info.size = (1 << 63) - 1
    with pytest.raises(GuestFailed, match="no archive"):
        unpack(io.BytesIO(info.tobuf(tarfile.GNU_FORMAT) + b"bytes"), place)
    assert sum(each.stat().st_size for each in place.iterdir()) <= 5


def test_a_sparse_file_is_left_out(place: Path) -> None:
    """No bytes, and 4 GiB of zeroes if it were believed."""
    info = tarfile.TarInfo("sparse")
    header = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    header[156:157] = b"S"
    header[483:495] = b"%011o\0" % (1 << 32)
    header[148:156] = b"%06o\0 " % (sum(header[:148]) + sum(header[156:]) + 8 * 32)
    assert unpack(io.BytesIO(bytes(header) + bytes(1024)), place) == ["sparse: a sparse file"]
    assert made(place) == set()


def test_garbage_after_a_file_is_not_the_end(place: Path) -> None:
    text = packed(entry("a", data=b"x" * 512))[:1024]
    with pytest.raises(GuestFailed, match="without its end"):
        unpack(io.BytesIO(text + b"g" * 512 + bytes(1024)), place)


@pytest.mark.parametrize("text", [b"x" * 512, b"\x1f\x8b" + b"x" * 600, bytes(512) + b"y" * 512])
def test_what_is_no_archive(place: Path, text: bytes) -> None:
    with pytest.raises(GuestFailed):
        unpack(io.BytesIO(text), place)
    assert made(place) == set()


@pytest.mark.parametrize("name", ["nul\0name", "\udcff" * 5, "n" * 300])
def test_names_that_no_file_can_have(place: Path, name: str) -> None:
    try:
        unpack(io.BytesIO(packed(entry(name, data=b"x"))), place)
    except (GuestFailed, OSError):
        assert made(place) == set()


@pytest.mark.parametrize(
    ("name", "target", "inside"),
    [
        ("a", "b", True),
        ("d/a", "../b", True),
        ("d/a", "../../b", False),
        ("d/a", "e/../b", False),
        ("a", ".", True),
        ("a", "./b//c", True),
        ("a", "..", False),
        ("a", "/root/b", False),
        ("d/e/a", "../../b", True),
    ],
)
def test_where_a_link_may_lead(name: str, target: str, inside: bool) -> None:
    assert stays_inside(name, target) is inside
