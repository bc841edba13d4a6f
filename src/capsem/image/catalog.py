"""Where images are, and which one a name means.

An images directory holds one directory for each image, `<name>-<first 12 digits of its digest>/`, and for each name a
pointer, `<name>.json`, to the current one. Older ones stay until they are removed, for VMs made from them need them.
A directory can also be an image itself, or hold one under the name of the machine's architecture: its manifest tells.

Directories are searched in order, and one that is empty or not there counts for nothing. Assets of other programs
(a kernel without a manifest of ours) count for nothing either.
"""

from __future__ import annotations

import builtins
import contextlib
import json
import os
import platform
import pwd
import re
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from capsem.image import manifest as manifests
from capsem.image import users
from capsem.image.manifest import Manifest
from capsem.image.recipe import DEFAULT_PROFILE, PROFILES
from capsem.model.errors import Corrupt, NotFound, WrongState
from capsem.store import durable

DIGITS: Final = 12  # of the digest, in directory names
_IMAGE_DIRECTORY: Final = re.compile(rf"([A-Za-z0-9][A-Za-z0-9_-]*)-[0-9a-f]{{{DIGITS}}}\Z")
_BUILD_HINT: Final = "make it with: capsem image build"


@dataclass(frozen=True, slots=True)
class Image:
    """An image whose files were seen in place; sizes in MiB, `digest` 64 hexadecimal digits. All paths are absolute."""

    name: str
    digest: str
    directory: Path
    kernel: Path
    initrd: Path
    root: Path
    volume: Path
    volume_mb: int
    kernel_command_line: str
    manifest: Manifest


def open_image(directory: Path) -> Image:
    """The image in `directory`. Cheap, as it is done for each start of a VM: format and file sizes are checked, digests
    are not. Raises NotFound when there is no manifest, Corrupt when a file is missing or not of its size."""
    directory = directory.resolve()
    try:
        manifest = manifests.read(directory / manifests.NAME)
    except FileNotFoundError as exc:
        raise NotFound(f"there is no image in {directory}", hint=_BUILD_HINT) from exc
    paths = {role: directory / each.name for role, each in manifest.files.items()}
    for role, each in manifest.files.items():
        try:
            size = paths[role].stat().st_size
        except FileNotFoundError:
            size = -1
        if size != each.size:
            found = "is missing" if size < 0 else f"has {size} bytes instead of {each.size}"
            raise Corrupt(f"{paths[role]} {found}", hint="make the image again: capsem image build --force")
    return Image(
        name=manifest.name,
        digest=manifest.digest,
        directory=directory,
        **paths,
        volume_mb=manifest.files["volume"].size >> 20,
        kernel_command_line=manifest.kernel_command_line,
        manifest=manifest,
    )


class Catalog:
    """The images in `directories`, searched in order; new ones are written to `write_to`."""

    def __init__(self, directories: Sequence[Path], write_to: Path) -> None:
        self.directories = tuple(dict.fromkeys(directories))
        self.write_to = write_to

    @classmethod
    def from_environment(
        cls, environ: Mapping[str, str], assets_dir: Path | None = None, *, prefix: Path | None = None
    ) -> Catalog:
        """The search order of the product: `assets_dir` (--assets-dir), CAPSEM_ASSETS_DIR, <sys.prefix>/share/capsem,
        $CAPSEM_HOME/assets. New images go to `assets_dir` if that is given, else to the third where that can be
        written, else to the fourth.

        `prefix` stands for sys.prefix. Empty variables count as unset.
        """
        shared = (prefix or Path(sys.prefix)) / "share" / "capsem"
        home = environ.get("HOME") or pwd.getpwuid(os.getuid()).pw_dir
        own = Path(environ.get("CAPSEM_HOME") or Path(home) / ".capsem") / "assets"
        named = environ.get("CAPSEM_ASSETS_DIR")
        first = [path for path in (assets_dir, Path(named) if named else None) if path is not None]
        return cls([*first, shared, own], assets_dir or (shared if _writable(shared) else own))

    def find(self, name: str = DEFAULT_PROFILE) -> Image:
        """The current image of that name, or the very one when `name` is that of an image's directory
        (`default-0123456789ab`). Raises NotFound, Corrupt."""
        for directory in self._candidates(name):
            return open_image(directory)
        raise NotFound(f"there is no image {name!r}", hint=_build_hint(name))

    def find_digest(self, digest: str) -> Image:
        """The image with this digest (all 64 digits), current or not. Raises NotFound, Corrupt."""
        for image in self.list():
            if image.digest == digest:
                return image
        raise NotFound(f"the image {digest[:DIGITS]} is not here", hint="it was removed, or built on another host")

    def list(self) -> builtins.list[Image]:
        """All images that can be opened, in search order, those of one directory by name; damaged ones are left out."""
        found: dict[Path, Image] = {}
        for directory in self.directories:
            for place in (*_itself(directory), *_children(directory)):
                for image in _openable(place):
                    found.setdefault(image.directory, image)
        return [*found.values()]

    @contextlib.contextmanager
    def taken(self, name: str, run_dir: Path) -> Iterator[Image]:
        """As `find`, for making a VM in `run_dir`: the image cannot be removed until the VM's record is written, which is
        to happen within the block, nor as long as the VM is there. Blocks for a moment while images are being removed.

        Raises NotFound, Corrupt.
        """
        with contextlib.ExitStack() as locks:
            for directory in self.directories:
                locks.enter_context(users.locked(directory, alone=False))
            image = self.find(name)
            self.declare(run_dir)
            yield image

    def declare(self, run_dir: Path) -> None:
        """Tell all directories that VMs in `run_dir` may need their images."""
        for directory in self.directories:
            users.register(directory, run_dir)

    def remove(self, name: str, run_dir: Path, *, force: bool = False) -> builtins.list[Image]:
        """Remove every image of that name and the pointer to it, or one image named by its directory, from where it is
        found first; damaged ones too. Returns those that were whole.

        `run_dir` is the caller's, whose VMs are asked first; with `force`, nobody is asked. Raises NotFound, WrongState
        when a VM needs one (then nothing was removed).
        """
        for directory in self.directories:
            with users.locked(directory, alone=True):
                pointer = directory / f"{name}.json"
                places = [place for place in _children(directory) if place.name == name or _name_of(place) == name]
                if not places and not pointer.is_file():
                    continue
                if not force:
                    _refuse_if_needed(places, users.needed(directory, run_dir))
                for each in [path for path in directory.glob("*.json") if path.is_file()]:
                    if each == pointer or _target(each) in places:
                        each.unlink()
                return _remove(directory, places)
        raise NotFound(f"there is no image {name!r}", hint="see: capsem image list")

    def prune(self, run_dir: Path, *, name: str | None = None) -> builtins.list[Image]:
        """Remove, from the directory that is written to, all images (of one name) that are not current and that no VM
        needs, in `run_dir` or elsewhere. Returns those that were whole. Raises WrongState when that cannot be found out."""
        directory = self.write_to
        with users.locked(directory, alone=True):
            current = {_target(pointer) for pointer in directory.glob("*.json")}
            old = [place for place in _superseded(directory, current) if name in (None, _name_of(place))]
            if not old:
                return []
            digits = {digest[:DIGITS] for digest in users.needed(directory, run_dir)}
            return _remove(directory, [place for place in old if place.name[-DIGITS:] not in digits])

    def verify(self, image: Image) -> None:
        """Compute the digests of all files again. Reads all of the image. Raises Corrupt, naming the first bad file."""
        for role, expected in image.manifest.files.items():
            path = image.directory / expected.name
            try:
                actual = manifests.describe(path, sparse=expected.digest.startswith(manifests.SPARSE_KIND))
            except FileNotFoundError:
                actual = None
            if actual != expected:
                raise Corrupt(
                    f"{path} is not the {role} the image was made with",
                    hint=f"remove the image and make it again: capsem image rm {image.name}; capsem image build",
                )

    def _candidates(self, name: str) -> Iterator[Path]:
        for directory in self.directories:
            for place in _itself(directory):
                if _name_of(place) == name or _full_name(place) == name:
                    yield place
            target = read_pointer(directory, name)
            if target is not None:
                yield target
            yield from (place for place in _children(directory) if place.name == name)


def _refuse_if_needed(places: Sequence[Path], needed: Mapping[str, Sequence[str]]) -> None:
    for place in places:
        try:
            digest = manifests.read(place / manifests.NAME).digest
        except (FileNotFoundError, Corrupt):
            continue  # nothing can run from it
        if vms := needed.get(digest):
            raise WrongState(
                f"the image {place.name} is in use by {', '.join(sorted(vms))}",
                hint="delete the VMs made from it first",
            )


def _superseded(directory: Path, current: Collection[Path | None]) -> list[Path]:
    return [place for place in _children(directory) if _IMAGE_DIRECTORY.match(place.name) and place not in current]


def _remove(directory: Path, places: Sequence[Path]) -> list[Image]:
    """Remove image directories; returns the images that were whole."""
    whole = [image for place in places for image in _openable(place)]
    durable.sync_directory(directory)
    for place in places:
        # First out of sight, so that an interrupted removal leaves no half image.
        hidden = place.with_name(f"{durable.TEMPORARY}removed-{place.name}")
        durable.remove_tree(hidden)
        durable.rename(place, hidden)
        durable.remove_tree(hidden)
    return whole


def _build_hint(name: str) -> str:
    if name not in PROFILES:
        return "see: capsem image list"
    return _BUILD_HINT if name == DEFAULT_PROFILE else f"{_BUILD_HINT} --profile {name}"


def _openable(place: Path) -> Iterator[Image]:
    with contextlib.suppress(NotFound, Corrupt):
        yield open_image(place)


def write_pointer(directory: Path, name: str, target: Path) -> None:
    """Make `target`, in `directory`, the current image of that name. Durable on return. Raises OSError."""
    durable.write(directory / f"{name}.json", json.dumps({"directory": target.name}).encode() + b"\n", mode=0o644)


def read_pointer(directory: Path, name: str) -> Path | None:
    """The directory of the current image of that name; None without one."""
    return _target(directory / f"{name}.json")


def _target(pointer: Path) -> Path | None:
    try:
        name = json.loads(pointer.read_bytes())["directory"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    return pointer.parent / name if isinstance(name, str) and _IMAGE_DIRECTORY.match(name) else None


def _itself(directory: Path) -> Iterator[Path]:
    """`directory`, or the one below it for this machine's architecture, if it is an image."""
    for place in (directory, directory / platform.machine()):
        if (place / manifests.NAME).is_file():
            yield place


def _children(directory: Path) -> list[Path]:
    """Directories that look like images of an images directory, temporary ones left out."""
    try:
        entries = sorted(directory.iterdir())
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        return []
    return [each for each in entries if _name_of(each) and not each.name.startswith(".") and each.is_dir()]


def _name_of(place: Path) -> str:
    """The image's name, from its directory's name, or from its manifest; "" when it is no image."""
    match = _IMAGE_DIRECTORY.match(place.name)
    if match:
        return match[1]
    try:
        return manifests.read(place / manifests.NAME).name
    except (OSError, Corrupt):
        return ""


def _full_name(place: Path) -> str:
    try:
        manifest = manifests.read(place / manifests.NAME)
    except (OSError, Corrupt):
        return ""
    return f"{manifest.name}-{manifest.digest[:DIGITS]}"


def _writable(directory: Path) -> bool:
    """Whether `directory`, or the first of its parents that exists, can be written."""
    while not directory.exists():
        directory = directory.parent
    return os.access(directory, os.W_OK | os.X_OK)
