"""Which images are on this host, and where.

An images directory holds, for each image, a directory `<name>-<digest12>` with its files, and a pointer `<name>.json`
that says which of them is the current one. Directories are searched in order; the first that has the name wins.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from capsem.image import manifest as manifests
from capsem.image.manifest import Manifest
from capsem.model.errors import Corrupt, NotFound
from capsem.model.ids import check_name
from capsem.store import durable

BUILD_HINT: Final = "make it with: capsem image build"


@dataclass(frozen=True, slots=True)
class Image:
    """An image whose files are there and have the sizes that its manifest gives; their content is not looked at."""

    directory: Path
    manifest: Manifest

    @property
    def name(self) -> str:
        """What it is called; several images may have had the name."""
        return self.manifest.name

    @property
    def digest(self) -> str:
        """Its identity, 64 hexadecimal digits."""
        return self.manifest.digest

    @property
    def kernel(self) -> Path:
        """The kernel, as QEMU starts it directly."""
        return self._file("kernel")

    @property
    def initrd(self) -> Path:
        """The initial RAM file system."""
        return self._file("initrd")

    @property
    def root(self) -> Path:
        """The read-only root file system."""
        return self._file("root")

    @property
    def volume(self) -> Path:
        """The empty, formatted volume that every VM's layers lie on."""
        return self._file("volume")

    @property
    def volume_mb(self) -> int:
        """Size of the volume, in MiB."""
        return self.manifest.files["volume"].size >> 20

    @property
    def kernel_command_line(self) -> str:
        """What the kernel is told at boot."""
        return self.manifest.kernel_command_line

    def _file(self, role: str) -> Path:
        return self.directory / self.manifest.files[role].name


def open_image(directory: Path) -> Image:
    """The image in a directory. Raises NotFound, Corrupt."""
    try:
        manifest = manifests.read(directory / manifests.NAME)
        for file in manifest.files.values():
            size = (directory / file.name).stat().st_size
            if size != file.size:
                raise Corrupt(
                    f"{directory / file.name} has {size} bytes, the image's manifest says {file.size}",
                    hint="make the image again: capsem image build --force",
                )
    except FileNotFoundError as error:
        raise NotFound(
            f"there is no whole image in {directory}: {error.filename} is missing", hint=BUILD_HINT
        ) from error
    return Image(directory, manifest)


def pointer(images: Path, name: str) -> Path:
    """The file that says which image of that name is the current one."""
    return images / f"{name}.json"


class Catalog:
    """The images directories of this host, in the order of search; new images go to `write_to`."""

    def __init__(self, directories: Sequence[Path], write_to: Path) -> None:
        self.directories = tuple(dict.fromkeys(directories))
        self.write_to = write_to

    @classmethod
    def from_environment(cls, environ: Mapping[str, str], assets_dir: Path | None = None) -> Catalog:
        """The order of design.md: --assets-dir, CAPSEM_ASSETS_DIR, `<sys.prefix>/share/capsem`, `$CAPSEM_HOME/assets`."""
        home = Path(environ.get("CAPSEM_HOME") or Path(environ.get("HOME") or "/") / ".capsem")
        named = environ.get("CAPSEM_ASSETS_DIR")
        packaged = Path(sys.prefix) / "share" / "capsem"
        own = home / "assets"
        directories = [*([assets_dir] if assets_dir else []), *([Path(named)] if named else []), packaged, own]
        write_to = directories[0]
        if write_to is packaged and not _writable(packaged):
            write_to = own
        return cls(directories, write_to)

    def find(self, name: str = "default") -> Image:
        """The current image of a name. Raises NotFound, Corrupt."""
        check_name(name)
        for directory in self.directories:
            try:
                current = json.loads(pointer(directory, name).read_bytes())["directory"]
                return open_image(directory / Path(str(current)).name)
            except FileNotFoundError:
                continue
            except (ValueError, KeyError, TypeError) as error:
                raise Corrupt(f"{pointer(directory, name)} does not name an image", hint=BUILD_HINT) from error
        searched = ", ".join(map(str, self.directories))
        raise NotFound(f"there is no image {name!r} (searched {searched})", hint=BUILD_HINT)

    def list(self) -> list[Image]:
        """Every whole image, the newest of each directory first."""
        found = []
        for directory in self.directories:
            try:
                inside = [path.parent for path in directory.glob(f"*/{manifests.NAME}")]
            except OSError:
                continue
            images = []
            for path in inside:
                try:
                    images.append(open_image(path))
                except (NotFound, Corrupt, OSError):
                    continue  # a damaged image is reported where it is asked for by name
            found += sorted(images, key=lambda image: image.manifest.created_at, reverse=True)
        return list({image.digest: image for image in reversed(found)}.values())[::-1]

    def remove(self, name: str) -> Sequence[Image]:
        """Remove every image of a name from the directories that can be written; returns them. Raises NotFound."""
        check_name(name)
        doomed = [image for image in self.list() if image.name == name]
        if not doomed:
            raise NotFound(f"there is no image {name!r}", hint="`capsem image list` shows all")
        for image in doomed:
            pointer(image.directory.parent, name).unlink(missing_ok=True)
            # The manifest goes first: without it a directory is no image.
            (image.directory / manifests.NAME).unlink(missing_ok=True)
            durable.remove_tree(image.directory)
        return doomed

    def verify(self, image: Image) -> None:
        """Read every file of an image. Raises Corrupt naming the first that is not what the manifest says."""
        for file in image.manifest.files.values():
            found = manifests.describe(image.directory / file.name)
            if found != file:
                raise Corrupt(
                    f"{image.directory / file.name} is damaged: its digest is {found.sha256[:12]}, not {file.sha256[:12]}",
                    hint="make the image again: capsem image build --force",
                )


def _writable(directory: Path) -> bool:
    """Whether a directory, or the nearest parent that exists, may be written to."""
    while not directory.exists() and directory != directory.parent:
        directory = directory.parent
    return os.access(directory, os.W_OK | os.X_OK)
