"""Small files that the agent keeps in a guest: what is theirs is rewritten, what is the owner's stays."""

from __future__ import annotations

from pathlib import Path

import pytest

from capsem.guest.system import rewrite, with_own_name

FRESH = b"127.0.0.1 localhost\n127.0.1.1 capsem\n::1 localhost ip6-localhost ip6-loopback\n"


@pytest.mark.parametrize(
    ("hosts", "expected"),
    [
        (FRESH, b"127.0.0.1 localhost\n127.0.1.1 box\n::1 localhost ip6-localhost ip6-loopback\n"),
        (
            FRESH + b"10.0.0.7 db\n",
            b"127.0.0.1 localhost\n127.0.1.1 box\n::1 localhost ip6-localhost ip6-loopback\n10.0.0.7 db\n",
        ),
        (b"127.0.0.1 localhost\n10.0.0.7 db", b"127.0.0.1 localhost\n127.0.1.1 box\n10.0.0.7 db\n"),
        (b"127.0.1.1 capsem", b"127.0.1.1 box\n"),
        (b"", b"127.0.1.1 box\n"),
        (b"# \xff\n\n127.0.1.10 other\n", b"# \xff\n127.0.1.1 box\n\n127.0.1.10 other\n"),
    ],
)
def test_a_machine_finds_itself_by_its_name_and_others_as_before(hosts: bytes, expected: bytes) -> None:
    assert with_own_name(hosts, "box") == expected
    assert with_own_name(expected, "box") == expected


def test_a_file_is_rewritten_where_it_lies(tmp_path: Path) -> None:
    path = tmp_path / "file"
    assert rewrite(str(path), lambda was: was + b"some text\n", 0o444) == {str(path): 10}
    assert path.stat().st_mode & 0o777 == 0o444
    path.chmod(0o644)
    inode = path.stat().st_ino
    assert rewrite(str(path), lambda _was: b"less\n") == {str(path): 5}
    assert path.read_bytes() == b"less\n"
    assert path.stat().st_ino == inode
    assert rewrite(str(path), lambda was: was) == {}
