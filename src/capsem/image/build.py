"""Making an image: everything happens in a temporary directory, and appears under its name in one step, or not at all.

<images>/cache/...                      base systems, see base.py
<images>/default-0123456789ab/          an image, named by its digest, never changed once it has that name
<images>/default.json                   which one is current
<images>/users/...                      who may need them, see users.py
<images>/.tmp-build-.../                being made; swept by the next build if nobody is making it any more
<images>/.build.lock                    held by who builds: of two at once, the second finds the work done
"""

from __future__ import annotations

import fcntl
import os
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from capsem.image import base, initramfs, kernel, manifest, modules, rootfs, users
from capsem.image.base import Progress
from capsem.image.catalog import DIGITS, Image, open_image, read_pointer, write_pointer
from capsem.image.host import Host
from capsem.image.manifest import ROLES, Manifest
from capsem.image.recipe import Recipe, guest_files
from capsem.image.volume import format_volume
from capsem.model.errors import CapsemError, Corrupt, MachineFailed, NotFound
from capsem.store import durable

_TEMPORARY: Final = f"{durable.TEMPORARY}build-"
_INITRAMFS_INIT, _INITRAMFS_MOUNTS = "initramfs-init.sh", "mounts"  # of the guest files, those not for its root
_BLOCK: Final = 4096
_TOOLS: Final = ("tar", "zstd", "mkfs.erofs", "mke2fs", "debugfs", "chroot")


def build(
    recipe: Recipe,
    images_dir: Path,
    *,
    mirror: str | None = None,
    force: bool = False,
    progress: Progress | None = None,
    host: Host | None = None,
) -> Image:
    """Make the image that `recipe` describes the current one of its name in `images_dir`, and return it.

    When the current one was made from the same recipe and guest code, it is returned as it is, without any work; `force`
    makes it anew, from packages fetched anew. Blocks for seconds, or for a minute or two when packages are fetched, and
    as long as another build runs. `mirror` is a Debian mirror's address; without it, mmdebstrap finds one.

    Raises HostNotReady when tools are missing or no mirror can be reached, MachineFailed when a step fails, for instance
    for want of space. Whatever happens, what was there before stays as it was.
    """
    progress = progress or (lambda _step, _part: None)
    host = host or Host()
    try:
        images_dir.mkdir(parents=True, exist_ok=True)
        images_dir = images_dir.resolve()
        users.prepare(images_dir)
        files = guest_files()
        with _lock(images_dir, progress):
            current = _current(recipe.name, images_dir)
            if current is not None and current.manifest.recipe_digest == recipe.digest(files) and not force:
                return current
            _sweep(images_dir)
            host.require(*_TOOLS)
            if not host.is_root():
                host.require("unshare")
                host.require_user_namespace()
            system = base.obtain(recipe, images_dir / "cache", host, mirror=mirror, refresh=force, progress=progress)
            with tempfile.TemporaryDirectory(prefix=_TEMPORARY, dir=images_dir) as work:
                finished = _make(recipe, files, system, Path(work), host, progress)
                image = _publish(recipe.name, finished, images_dir)
            progress("done", 1.0)
            return image
    except OSError as exc:
        where = f" ({exc.filename})" if exc.filename else ""
        raise MachineFailed(
            f"the image could not be made: {exc.strerror or exc}{where}",
            hint=f"check that {images_dir} can be written and has 2 GB free",
        ) from exc


def _make(
    recipe: Recipe, files: Mapping[str, bytes], system: base.Base, work: Path, host: Host, progress: Progress
) -> Path:
    """Put all files of the image into a new directory below `work`, durably, and return it."""
    tree, image = work / "tree", work / "image"
    image.mkdir()
    image.chmod(0o755)
    progress("unpacking the base system", 0.92)
    rootfs.unpack(system, tree, host)
    packages = rootfs.package_versions(tree)
    version, vmlinuz, tables, module_dir = _kernel_package(tree)

    progress("kernel and initramfs", 0.94)
    early = modules.load_order(tables, recipe.early_modules)
    late = modules.load_order(tables, recipe.late_modules, loaded=early)
    binaries = {name: _module(module_dir / tables.files[name], host) for name in (*early, *late)}
    _write_with_holes(image / ROLES["kernel"], kernel.unpack(vmlinuz.read_bytes(), host))
    archive = initramfs.for_guest(
        init=files[_INITRAMFS_INIT],
        mounts=files[_INITRAMFS_MOUNTS],
        busybox=(tree / "usr/bin/busybox").read_bytes(),
        modules={name: binaries[name] for name in early},
    )
    (image / ROLES["initrd"]).write_bytes(archive)

    progress("root file system", 0.95)
    durable.remove_tree(tree / base.KERNEL)
    rootfs.prune(tree)
    installed = {name: data for name, data in files.items() if name not in (_INITRAMFS_INIT, _INITRAMFS_MOUNTS)}
    rootfs.install_guest(tree, installed, {name: binaries[name] for name in late}, host)
    rootfs.settle(tree)
    newest = rootfs.fix_times(tree, system.begun)
    rootfs.make_erofs(tree, image / ROLES["root"], host, newest=newest)

    progress("volume", 0.98)
    format_volume(image / ROLES["volume"], recipe.volume_mb, host=host)

    progress("digests", 0.99)
    for name in ROLES.values():
        (image / name).chmod(0o644)
        durable.sync_file(image / name)
    record = Manifest(
        name=recipe.name,
        architecture=recipe.architecture,
        recipe=recipe.to_dict(),
        recipe_digest=recipe.digest(files),
        kernel_version=version,
        kernel_command_line=recipe.kernel_command_line,
        packages=packages,
        files={role: manifest.describe(image / name, sparse=role in manifest.SPARSE) for role, name in ROLES.items()},
        created_at=time.time(),
    )
    durable.write(image / manifest.NAME, record.to_json(), mode=0o644)
    return image


def _kernel_package(tree: Path) -> tuple[str, Path, modules.Tables, Path]:
    """Version, compressed kernel, module tables and module directory of the unpacked kernel package. Raises Corrupt."""
    package = tree / base.KERNEL / "tree"
    directories = [*package.glob("usr/lib/modules/*")] or [*package.glob("lib/modules/*")]
    images = [*package.glob("boot/vmlinuz-*")]
    if len(directories) != 1 or len(images) != 1:
        raise Corrupt(
            "the base system does not hold exactly one kernel", hint="fetch it anew: capsem image build --force"
        )
    return directories[0].name, images[0], modules.read(directories[0]), directories[0]


def _module(path: Path, host: Host) -> bytes:
    return modules.strip_signature(kernel.decompress(path.read_bytes(), host))


def _write_with_holes(path: Path, data: bytes) -> None:
    """Write a new file. Blocks of zeroes take no space: of an unpacked kernel they are a third."""
    with path.open("xb") as file:
        for offset in range(0, len(data), _BLOCK):
            block = data[offset : offset + _BLOCK]
            if block.strip(b"\0"):
                file.seek(offset)
                file.write(block)
        file.truncate(len(data))


def _publish(name: str, finished: Path, images_dir: Path) -> Image:
    """Give a finished image its final name and point to it. If the same image has that name already, it stays, and only
    its manifest is replaced: another recipe, or another build of the packages, may have led to the same files."""
    record = manifest.read(finished / manifest.NAME)
    target = images_dir / f"{name}-{record.digest[:DIGITS]}"
    with users.locked(images_dir, alone=True):  # until it is pointed to, it looks like one that may go
        try:
            open_image(target)
            durable.write(target / manifest.NAME, record.to_json(), mode=0o644)
        except (NotFound, Corrupt):
            durable.remove_tree(target)
            durable.rename(finished, target)
        write_pointer(images_dir, name, target)
    return open_image(target)


def _current(name: str, images_dir: Path) -> Image | None:
    try:
        target = read_pointer(images_dir, name)
        return open_image(target) if target else None
    except CapsemError:
        return None  # damaged: made anew


def _sweep(images_dir: Path) -> None:
    """Remove what interrupted builds and removals left; safe under the lock, for nobody else builds."""
    for place in (images_dir, images_dir / "cache"):
        for path in place.glob(f"{durable.TEMPORARY}*"):
            durable.remove_tree(path)


@contextmanager
def _lock(images_dir: Path, progress: Progress) -> Iterator[None]:
    fd = os.open(images_dir / ".build.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            progress("waiting for another build", None)
            fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)
