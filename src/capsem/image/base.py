"""Stage one: the base system, fetched from a Debian mirror by mmdebstrap and kept as a tar archive.

This is the slow part and the only one that needs a network, so its result is cached, by the digest of what decides it:
with the cache, a change of the guest agent makes a new image within seconds, offline.

The kernel is not installed but unpacked into /capsem-kernel: installing it would pull in an initramfs generator, udev
and systemd, none of which the guest has a use for.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from capsem.image.host import Host
from capsem.image.recipe import Recipe
from capsem.model.errors import HostNotReady, MachineFailed
from capsem.store import durable

Progress = Callable[[str, float | None], None]
"""Called with what is being done, and which part of all the work is then behind us (0 to 1), where that is known."""

KERNEL: Final = "capsem-kernel"  # in the archive: tree/ is the unpacked package, `package` its name and version

# Run by mmdebstrap when all packages are installed, with the new root as $1. First what a guest has no use for is
# removed (copyright files stay: they must go with the programs), then the kernel is fetched; apt checks its signature
# chain as of any package. Removing is three times as fast as having dpkg leave it out.
_HOOK: Final = """\
set -eu
cd "$1/usr/share"
rm -rf info/* lintian locale/* man/*
find doc ! -type d ! -path 'doc/*/copyright' -delete
find doc -mindepth 1 -type d -empty -delete
export APT_CONFIG="$MMDEBSTRAP_APT_CONFIG"
package=$(apt-cache depends KERNEL_PACKAGE | sed -n 's/^ *Depends: \\(linux-image-[^ ]*\\)$/\\1/p' | head -n 1)
mkdir "$1/capsem-kernel"
cd "$1/capsem-kernel"
apt-get -q -o APT::Sandbox::User=root download "$package"
chroot "$1" sh -euc '
    cd /capsem-kernel
    dpkg-deb --show linux-image-*.deb > package
    dpkg-deb --extract linux-image-*.deb tree
    rm linux-image-*.deb
    [ -e tree/lib ] || ln -s usr/lib tree/lib
    rm -r tree/usr/share
    depmod -b /capsem-kernel/tree "$(ls tree/lib/modules)"
'
"""

_KEYRING: Final = "/usr/share/keyrings/debian-archive-keyring.gpg"

# What mmdebstrap says at the start of each of its steps, and about how far that is.
_STEPS: Final = {
    "running apt-get update": 0.05,
    "downloading packages": 0.1,
    "extracting archives": 0.25,
    "installing essential": 0.35,
    "installing remaining": 0.5,
    "running --customize-hook": 0.8,
    "cleaning package lists": 0.9,
    "creating tarball": 0.92,
}


@dataclass(frozen=True, slots=True)
class Base:
    """A base system: its archive, and when it was begun (seconds since 1970).

    Files of the archive that are younger than that were made by the installation, not taken from a package.
    """

    archive: Path
    begun: float


def obtain(recipe: Recipe, cache: Path, host: Host, *, mirror: str | None, refresh: bool, progress: Progress) -> Base:
    """The base system for `recipe`, from `cache` unless `refresh`. Blocks for a minute or more when it is fetched.

    Raises HostNotReady when the mirror cannot be reached or mmdebstrap cannot work here, OSError.
    """
    stem = f"{recipe.name}-{recipe.base_digest(mirror, _HOOK)[:16]}"
    archive, note = cache / f"{stem}.tar.zst", cache / f"{stem}.json"
    if not refresh:
        found = _cached(archive, note)
        if found is not None:
            return found
    base = _fetch(recipe, archive, note, host, mirror, progress)
    for other in cache.glob(f"{recipe.name}-*"):
        if other not in (archive, note):
            durable.remove_tree(other)
    return base


def _cached(archive: Path, note: Path) -> Base | None:
    """The note is written last, so where it is and the size agrees, the archive is whole."""
    try:
        known = json.loads(note.read_bytes())
        if archive.stat().st_size == known["size"]:
            return Base(archive, float(known["begun"]))
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        pass
    return None


def _fetch(recipe: Recipe, archive: Path, note: Path, host: Host, mirror: str | None, progress: Progress) -> Base:
    host.require("mmdebstrap", "zstd", _KEYRING)
    if not host.is_root():
        host.require("newuidmap")
        host.require_user_ids()
    archive.parent.mkdir(parents=True, exist_ok=True)
    temporary = archive.with_name(f"{durable.TEMPORARY}{archive.name}")
    begun = time.time()

    def follow(line: str) -> None:
        text = line.removeprefix("I: ").rstrip(".")
        for words, part in _STEPS.items():
            if text.startswith(words):
                progress(f"base system: {words.removeprefix('running --')}", part)

    # The tree is made beside the cache, where there is space, and the next build sweeps what a killed one left. But only
    # where no mount can be left in it; and an ordinary user's helper cannot enter a private directory.
    scratch = archive.with_name(f"{durable.TEMPORARY}tree")
    environment = {"TMPDIR": str(scratch)} if host.may_contain() else {}
    argv = [
        *("mmdebstrap", f"--variant={recipe.variant}", f"--architectures={recipe.architecture}"),
        f"--include={','.join(recipe.packages)}",
        f"--customize-hook={_HOOK.replace('KERNEL_PACKAGE', recipe.kernel_package)}",
        *(recipe.suite, str(temporary), *([mirror] if mirror else [])),
    ]
    progress("base system: fetching Debian", 0.0)
    try:
        scratch.mkdir()
        host.run(argv, env=environment, on_line=follow)
        durable.sync_file(temporary)
        size = temporary.stat().st_size
        note.unlink(missing_ok=True)
        durable.rename(temporary, archive)
        durable.write(note, json.dumps({"size": size, "begun": begun}).encode(), mode=0o644)
    except MachineFailed as exc:
        raise HostNotReady(
            f"the Debian base system could not be fetched: {exc.message}",
            hint="check that this host reaches a Debian mirror, or name one with --mirror",
        ) from exc
    finally:
        temporary.unlink(missing_ok=True)
        durable.remove_tree(scratch)
    return Base(archive, begun)
