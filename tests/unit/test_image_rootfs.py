"""From the base system to the guest's root, on a tree of a few files."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from capsem.image import rootfs
from capsem.image.host import Host
from capsem.model.errors import Corrupt

STATUS = """\
Package: bash
Status: install ok installed
Architecture: amd64
Version: 5.2.37-2+b10
Description: a shell
 Version: this is text, not a field

Package: gone
Status: deinstall ok config-files
Version: 1.0
"""


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    tree = tmp_path / "tree"
    for name, text in {
        "capsem-kernel/package": "linux-image-6.12-cloud-amd64\t6.12.1-1\n",
        "etc/hostname": "the-build-host\n",
        "etc/passwd-": "old",
        "etc/profile.d/a.sh": "",
        "root/.bashrc": "",
        "usr/bin/busybox": "ELF",
        "usr/lib/os-release": "",
        "usr/bin/su": "ELF",
        "usr/sbin/poweroff": "a real one",
        "var/lib/dpkg/status": STATUS,
        "var/log/dpkg.log": "dated",
    }.items():
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / name).write_text(text)
    return tree


class Recorder(Host):
    def __init__(self, *, root: bool) -> None:
        self.root = root
        self.ran: list[list[str]] = []

    def is_root(self) -> bool:
        return self.root

    def require(self, *tools: str) -> None:
        pass

    def run(self, argv, **_keywords):  # type: ignore[no-untyped-def, override]
        self.ran.append([*argv])
        return b""


def test_versions_are_those_of_installed_packages_and_of_the_kernel(tree: Path) -> None:
    assert rootfs.package_versions(tree) == {"bash": "5.2.37-2+b10", "linux-image-6.12-cloud-amd64": "6.12.1-1"}
    (tree / "capsem-kernel/package").unlink()
    with pytest.raises(Corrupt):
        rootfs.package_versions(tree)


def test_prune_removes_what_is_dated_and_nothing_else(tree: Path) -> None:
    outside = tree.parent / "outside"
    outside.mkdir()
    (outside / "log").write_text("")
    (tree / "var/log/link").symlink_to(outside)
    rootfs.prune(tree)
    assert list((tree / "var/log").iterdir()) == list((tree / "root").iterdir()) == []
    assert not (tree / "etc/passwd-").exists()
    assert (tree / "usr/bin/busybox").exists()
    assert (outside / "log").exists()


def test_settle_writes_the_configuration_and_does_not_follow_links(tree: Path) -> None:
    elsewhere = tree.parent / "elsewhere"
    elsewhere.write_text("the host's")
    (tree / "etc/resolv.conf").symlink_to(elsewhere)
    rootfs.settle(tree)
    assert elsewhere.read_text() == "the host's"
    assert (tree / "etc/resolv.conf").read_text() == "nameserver 127.0.0.1\n"
    assert (tree / "etc/hostname").read_text() == "capsem\n"
    assert (tree / "etc/machine-id").read_bytes() == b""
    for name in ("shutdown", "halt", "poweroff", "reboot", "suspend"):
        assert (tree / "usr/sbin" / name).readlink() == Path("/run/capsem-sysutil")
    assert (tree / "mnt/system").is_dir()
    assert (tree / "root").stat().st_mode & 0o777 == 0o700
    assert (tree / "tmp").stat().st_mode & 0o7777 == 0o1777


def test_nothing_is_left_setuid_or_setgid(tree: Path) -> None:
    (tree / "usr/bin/su").chmod(0o4755)
    (tree / "usr/bin").chmod(0o2755)
    rootfs.settle(tree)
    assert (tree / "usr/bin/su").stat().st_mode & 0o7777 == (tree / "usr/bin").stat().st_mode & 0o7777 == 0o755


def test_times_depend_on_the_packages_alone(tree: Path) -> None:
    for path in (tree, *tree.rglob("*")):
        os.utime(path, (5000, 5000))
    os.utime(tree / "usr/bin/busybox", (1000, 1000))
    os.utime(tree / "usr/bin/su", (2000, 2000))
    (tree / "link").symlink_to("nowhere")
    assert rootfs.fix_times(tree, 3000.5) == 2000
    assert (tree / "usr/bin/busybox").stat().st_mtime == 1000
    assert {path.lstat().st_mtime for path in (tree, tree / "link", tree / "etc/hostname", tree / "usr/bin/su")} == {
        2000
    }


@pytest.mark.parametrize(("root", "prefix"), [(True, []), (False, ["unshare", "--map-root-user", "--"])])
def test_the_agent_is_installed_and_compiled_by_the_guests_python(tree: Path, root: bool, prefix: list[str]) -> None:
    host = Recorder(root=root)
    files = {"init": b"#!", "capsem/guest/agent.py": b"pass"}
    rootfs.install_guest(tree, files, {"nfnetlink": b"1", "nf_tables": b"2"}, host)
    home = tree / "usr/lib/capsem"
    assert (home / "init").stat().st_mode & 0o777 == 0o555
    assert (home / "capsem/guest/agent.py").stat().st_mode & 0o777 == 0o444
    assert (home / "modules/order").read_text() == "nfnetlink\nnf_tables\n"
    assert (home / "busybox").samefile(tree / "usr/bin/busybox")
    [argv] = host.ran
    assert argv[: len(prefix) + 2] == [*prefix, "chroot", str(tree)]
    assert "unchecked-hash" in argv


def test_modes_do_not_depend_on_who_builds(tree: Path) -> None:
    before = os.umask(0o077)
    try:
        rootfs.install_guest(
            tree, {"init": b"#!", "capsem/guest/agent.py": b"pass"}, {"nfnetlink": b"1"}, Recorder(root=True)
        )
        rootfs.settle(tree)
    finally:
        os.umask(before)
    made = [
        tree / rootfs.GUEST_DIRECTORY,
        *(tree / rootfs.GUEST_DIRECTORY).rglob("*/"),
        tree / "mnt",
        tree / "mnt/system",
    ]
    assert {path.stat().st_mode & 0o777 for path in made if path.is_dir()} == {0o755}
    assert (tree / "etc/hosts").stat().st_mode & 0o777 == 0o644


def test_the_file_system_has_a_fixed_identity(tree: Path) -> None:
    host = Recorder(root=True)
    rootfs.make_erofs(tree, tree.parent / "root.erofs", host, newest=1)
    [argv] = host.ran
    assert {"-zlz4hc", "--all-root", f"-U{rootfs.UUID}", "-x-1"} <= {*argv}
