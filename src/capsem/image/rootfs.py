"""Stage two: from the base system to the guest's read-only root file system.

The same base and guest code give the same bytes: files made by the installation rather than taken from a package get
one fixed time, those with random or dated content are emptied, and the file system gets a fixed identity. Times of
packaged files are kept, because Python compares them with what its compiled modules say of their sources.

No step needs root: who is not root gets a user namespace in which they are (`unshare`), and all files belong to root
in the file system that comes out.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Final

from capsem.image.base import KERNEL, Base
from capsem.image.host import AS_ROOT, Host
from capsem.model.errors import Corrupt
from capsem.store import durable

GUEST_DIRECTORY: Final = "usr/lib/capsem"
UUID: Final = "7f0c5e5a-8d57-4b6e-9d0c-0c4a95e3b101"

# What a guest has no use for, beside what was removed from the base already; what is dated or drawn at random is here as well.
_DROP: Final = (
    "boot/*",
    "dev/*",
    "initrd.img*",
    "run/*",
    "tmp/*",
    "usr/share/bash-completion",
    "var/cache/apt/*.bin",
    "var/cache/debconf/*-old",
    "var/cache/ldconfig/*",
    "var/lib/apt/lists/*",
    "var/lib/dpkg/*-old",
    "var/log/*",
    "vmlinuz*",
    "etc/*-",
    "etc/.pwd.lock",
    "root/*",
    "root/.*",
)

_FILES: Final[Mapping[str, str]] = {
    # Packages installed in the guest come without what the base system came without: fewer files to write.
    "etc/dpkg/dpkg.cfg.d/capsem": "".join(
        (
            "path-exclude=/usr/share/doc/*\n",
            "path-include=/usr/share/doc/*/copyright\n",
            *(f"path-exclude=/usr/share/{each}/*\n" for each in ("info", "lintian", "locale", "man")),
        )
    ),
    "etc/fstab": "",
    "etc/hostname": "capsem\n",  # these two, and machine-id, are set by the agent at boot
    "etc/hosts": "127.0.0.1 localhost\n127.0.1.1 capsem\n::1 localhost ip6-localhost ip6-loopback\n",
    "etc/machine-id": "",
    "etc/resolv.conf": "nameserver 127.0.0.1\n",
    "etc/profile.d/capsem.sh": 'PATH="/opt/ai-clis/bin:/root/.local/bin:$PATH"\n',
}
_LINKS: Final = {f"usr/sbin/{name}": "/run/capsem-sysutil" for name in "shutdown halt poweroff reboot suspend".split()}
_DIRECTORIES: Final = ("dev", "mnt/system", "proc", "root", "run", "sys", "tmp", "usr/local/sbin")
_PROGRAMS: Final = ("init", "init-late")  # among the guest files; the rest is data


def unpack(base: Base, tree: Path, host: Host) -> None:
    """Unpack the archive of the base system into the new directory `tree`. Raises MachineFailed, HostNotReady."""
    tree.mkdir()
    # The agent of an ordinary user could not make device nodes; the guest's /dev is made by its kernel anyway.
    flags = ["--no-same-owner", "--same-permissions", "--exclude=./dev/*"]
    host.run(["tar", "--extract", "--zstd", f"--file={base.archive}", f"--directory={tree}", *flags])


def package_versions(tree: Path) -> dict[str, str]:
    """Name and version of each installed package, and of the kernel's. Raises Corrupt without a package database."""
    try:
        status = (tree / "var/lib/dpkg/status").read_text()
        kernel = (tree / KERNEL / "package").read_text().split()
    except FileNotFoundError as exc:
        raise Corrupt(f"the base system has no {exc.filename}") from exc
    versions: dict[str, str] = dict([kernel[:2]])
    for paragraph in status.split("\n\n"):
        fields = dict(re.findall(r"^(Package|Version|Status): (.*)$", paragraph, re.MULTILINE))
        if fields.get("Status", "").endswith(" installed"):
            versions[fields["Package"]] = fields["Version"]
    return dict(sorted(versions.items()))


def prune(tree: Path) -> None:
    """Remove what the guest has no use for."""
    for pattern in _DROP:
        for path in tree.glob(pattern):
            durable.remove_tree(path)


def install_guest(tree: Path, files: Mapping[str, bytes], modules: Mapping[str, bytes], host: Host) -> None:
    """Put the agent, PID 1 and the kernel modules it loads into the tree, the agent compiled by the guest's own Python.

    `modules` are the files by name in the order of loading. Raises MachineFailed, HostNotReady.
    """
    home = tree / GUEST_DIRECTORY
    for name, data in files.items():
        _write(home / name, data, 0o555 if name in _PROGRAMS else 0o444)
    for name, data in modules.items():
        _write(home / "modules" / f"{name}.ko", data, 0o444)
    _write(home / "modules" / "order", "".join(f"{name}\n" for name in modules).encode(), 0o444)
    (home / "busybox").hardlink_to(tree / "usr/bin/busybox")
    # unchecked-hash: the agent starts without looking at its sources. A clean environment, for the caller's may hold
    # PYTHON variables; a fixed hash seed, for the order of sets shows in the compiled files.
    compile_all = ["python3", "-m", "compileall", "-q", "--invalidation-mode", "unchecked-hash", f"/{GUEST_DIRECTORY}"]
    environment = ["env", "-i", "PATH=/usr/bin:/bin", "PYTHONHASHSEED=0"]
    host.run([*_as_root(host), "chroot", str(tree), *environment, *compile_all])
    for path, info in _walk(home):
        if stat.S_ISREG(info.st_mode):
            path.chmod(0o555 if info.st_mode & stat.S_IXUSR else 0o444)


def settle(tree: Path) -> None:
    """Write the configuration that differs from Debian's, make links and mount points, strip setuid and setgid bits."""
    for name, text in _FILES.items():
        (tree / name).unlink(missing_ok=True)
        _write(tree / name, text.encode(), 0o644)
    for name, target in _LINKS.items():
        (tree / name).unlink(missing_ok=True)
        (tree / name).symlink_to(target)
    for name in _DIRECTORIES:
        _make_directory(tree / name)
    (tree / "root").chmod(0o700)
    (tree / "tmp").chmod(0o1777)
    for path, info in _walk(tree):
        if not stat.S_ISLNK(info.st_mode) and info.st_mode & (stat.S_ISUID | stat.S_ISGID):
            path.chmod(stat.S_IMODE(info.st_mode) & ~(stat.S_ISUID | stat.S_ISGID))


def fix_times(tree: Path, begun: float) -> int:
    """Give everything younger than `begun` the time of the youngest thing older than it; returns that time.

    The packages alone decide it, so the same versions give the same times whenever the base was fetched.
    """
    entries = [(path, int(info.st_mtime)) for path, info in _walk(tree)]
    newest = max((when for _, when in entries if when < int(begun)), default=0)
    for path, when in entries:
        os.utime(path, (newest, min(when, newest)), follow_symlinks=False)
    return newest


def make_erofs(tree: Path, output: Path, host: Host, *, newest: int) -> None:
    """Write the tree as a compressed erofs file system; all of it belongs to root. Raises MachineFailed, HostNotReady."""
    host.require("mkfs.erofs")
    # Extended attributes (-x-1) are left out: file capabilities would be the only ones. SOURCE_DATE_EPOCH, unlike -T,
    # keeps the times of files.
    flags = ["-zlz4hc", "-x-1", f"-U{UUID}", "--all-root", "--quiet"]
    argv: Sequence[str] = [*_as_root(host), "mkfs.erofs", *flags, str(output), str(tree)]
    host.run(argv, env={"SOURCE_DATE_EPOCH": str(newest)})


def _write(path: Path, data: bytes, mode: int) -> None:
    """Write a new file below the tree; a link at its place would be an error, not followed."""
    _make_directory(path.parent)
    with path.open("xb") as file:
        file.write(data)
    path.chmod(mode)


def _make_directory(path: Path) -> None:
    """Make a directory and those above it, if they are not there, with a mode that the caller's umask does not decide."""
    if not path.is_dir():
        _make_directory(path.parent)
        path.mkdir()
        path.chmod(0o755)


def _as_root(host: Host) -> list[str]:
    return [] if host.is_root() else [*AS_ROOT]


def _walk(tree: Path) -> Iterator[tuple[Path, os.stat_result]]:
    """Everything in the tree and the tree itself; links are not followed."""
    yield tree, tree.lstat()
    for root, directories, files in os.walk(tree):
        for name in (*directories, *files):
            path = Path(root, name)
            yield path, path.lstat()
