"""Making an image: base system, guest code, kernel, initial RAM file system, volume; then all of it appears at once.

A build works in a directory with a temporary name and ends with one rename, so that an image is whole or not there.
What an interrupted build left is removed by the next one. An unchanged recipe is recognised and nothing is done.
"""

from __future__ import annotations

import fcntl
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from capsem.image import base as bases
from capsem.image import initramfs, kernel, modules, rootfs
from capsem.image import manifest as manifests
from capsem.image.catalog import Image, open_image, pointer
from capsem.image.host import Host
from capsem.image.manifest import ROLES, Manifest
from capsem.image.recipe import Recipe, guest_files
from capsem.image.volume import format_volume
from capsem.model.errors import CapsemError, Corrupt
from capsem.store import durable

Progress = Callable[[str, float | None], None]

_LOCK: Final = ".build.lock"
_INITRAMFS_SCRIPT: Final = "initramfs-init.sh"
_MACHINES: Final = {"amd64": "x86_64", "arm64": "aarch64"}


def build(
    recipe: Recipe,
    images_dir: Path,
    *,
    mirror: str | None = None,
    force: bool = False,
    progress: Progress | None = None,
    host: Host | None = None,
) -> Image:
    """The image of `recipe` in `images_dir`, made if it is not there. Blocks, for minutes when Debian is fetched.

    `force` makes it anew, from a freshly fetched base system. `progress` is told each step and how much of it is done.
    Raises HostNotReady (tools or mirror missing), MachineFailed, OSError (disk full).
    """
    host, progress = host or Host(), progress or (lambda _step, _fraction: None)
    images_dir.mkdir(parents=True, exist_ok=True)
    with _locked(images_dir / _LOCK, progress):
        _sweep(images_dir)
        if not force and (current := _current(recipe, images_dir)) is not None:
            return current
        host.require("mmdebstrap", "mkfs.erofs", "mke2fs", "zstd", "tar")
        base = bases.obtain(recipe, images_dir / "cache", host, mirror=mirror, refresh=force, progress=progress)
        work = Path(tempfile.mkdtemp(prefix=durable.TEMPORARY, dir=images_dir))
        try:
            manifest = _make(recipe, base, work, host, progress)
            return _publish(manifest, recipe, work, images_dir)
        finally:
            _remove(work, host)


@contextmanager
def _locked(path: Path, progress: Progress) -> Iterator[None]:
    """One build at a time in an images directory; a second one waits and then finds the image there."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            progress("waiting for another build", None)
            fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def _sweep(images_dir: Path) -> None:
    for left in images_dir.glob(f"{durable.TEMPORARY}*"):
        _remove(left, Host())


def _remove(path: Path, host: Host) -> None:
    """Remove a work directory; files of a user namespace's other users need the namespace to be removed."""
    try:
        durable.remove_tree(path)
    except PermissionError:
        host.run(["unshare", "--map-auto", "--map-root-user", "--", "rm", "-rf", str(path)])


def _current(recipe: Recipe, images_dir: Path) -> Image | None:
    """The image that the pointer names, if it was made by this very recipe."""
    try:
        note = json.loads(pointer(images_dir, recipe.name).read_bytes())
        image = open_image(images_dir / Path(str(note["directory"])).name)
    except (FileNotFoundError, ValueError, KeyError, TypeError, CapsemError):
        return None
    return image if image.manifest.recipe_digest == recipe.digest() else None


def _make(recipe: Recipe, base: bases.Base, work: Path, host: Host, progress: Progress) -> Manifest:
    """All files of the image in `work`, and their description."""
    tree = work / "tree"
    progress("unpacking the base system", None)
    rootfs.unpack(base, tree, host)
    packages = rootfs.package_versions(tree)
    boot = tree / bases.KERNEL / "tree"
    files = guest_files()

    progress("preparing the kernel", None)
    [image] = boot.glob("boot/vmlinuz-*")
    release = image.name.removeprefix("vmlinuz-")
    (work / ROLES["kernel"]).write_bytes(kernel.unpack(image.read_bytes(), host))
    directory = boot / "usr/lib/modules" / release
    if not directory.is_dir():
        directory = boot / "lib/modules" / release
    tables = modules.read(directory)
    early = modules.load_order(tables, recipe.early_modules)
    late = modules.load_order(tables, recipe.late_modules, loaded=early)
    content = {name: kernel.decompress((directory / tables.files[name]).read_bytes(), host) for name in (*early, *late)}

    progress("making the initial RAM file system", None)
    script = files.pop(_INITRAMFS_SCRIPT)
    busybox = (tree / "usr/bin/busybox").read_bytes()
    (work / ROLES["initrd"]).write_bytes(_initramfs(script, busybox, {name: content[name] for name in early}))

    progress("installing the guest agent", None)
    durable.remove_tree(tree / bases.KERNEL)
    rootfs.prune(tree)
    rootfs.install_guest(tree, files, {name: content[name] for name in late}, host)
    rootfs.settle(tree)
    newest = rootfs.fix_times(tree, base.begun)
    progress("packing the root file system", None)
    rootfs.make_erofs(tree, work / ROLES["root"], host, newest=newest)

    progress("formatting the volume", None)
    format_volume(work / ROLES["volume"], recipe.volume_mb, host=host)
    progress("computing digests", None)
    return Manifest(
        name=recipe.name,
        architecture=_MACHINES[recipe.architecture],
        recipe=recipe.to_dict(),
        recipe_digest=recipe.digest(),
        kernel_version=release,
        kernel_command_line=recipe.kernel_command_line,
        packages=packages,
        files={role: manifests.describe(work / name) for role, name in ROLES.items()},
        created_at=time.time(),
    )


def _initramfs(script: bytes, busybox: bytes, early: dict[str, bytes]) -> bytes:
    """What mounts the real root: busybox, our script, and the modules that it takes."""
    entries = {
        "init": initramfs.file(script, 0o755),
        "bin/busybox": initramfs.file(busybox, 0o755),
        "dev/console": initramfs.character_device(5, 1),
        "modules/order": initramfs.file("".join(f"{name}\n" for name in early).encode()),
        **{f"modules/{name}.ko": initramfs.file(data) for name, data in early.items()},
        **{name: initramfs.directory() for name in ("proc", "dev", "lower", "volume", "new")},
    }
    return initramfs.pack(entries)


def _publish(manifest: Manifest, recipe: Recipe, work: Path, images_dir: Path) -> Image:
    """Make the image appear: its files durable first, the pointer last."""
    if manifest.files.keys() != ROLES.keys():
        raise Corrupt("the build did not make all files of an image")
    staged = work / "image"
    staged.mkdir(mode=0o755)
    for file in manifest.files.values():
        (work / file.name).chmod(0o644)
        durable.sync_file(work / file.name)
        (work / file.name).rename(staged / file.name)
    durable.write(staged / manifests.NAME, manifest.to_json(), mode=0o644)
    target = images_dir / f"{manifest.name}-{manifest.digest[:12]}"
    if target.exists():  # the same content, perhaps damaged since
        durable.rename(target, work / "replaced")
    durable.rename(staged, target)
    note = json.dumps({"directory": target.name, "digest": manifest.digest, "recipe_digest": manifest.recipe_digest})
    durable.write(pointer(images_dir, recipe.name), note.encode() + b"\n", mode=0o644)
    return open_image(target)
