"""What an image says of itself: `manifest.json` in its directory.

`digest` identifies the image: it is computed from the digests of its files and from what else decides how a guest
starts, so that two images with the same digest are the same image, wherever and whenever they were built. When it was
built is recorded, but is no part of it.

The digest of a file is the SHA-256 of its whole content, holes read as the zeroes they stand for; a copy that lost its
holes is therefore still the same file.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from capsem.image.recipe import FORMAT
from capsem.model.errors import Corrupt

NAME: Final = "manifest.json"
ROLES: Final = {"kernel": "vmlinux", "initrd": "initrd.img", "root": "root.erofs", "volume": "volume.raw"}
_BLOCK: Final = 1 << 20


@dataclass(frozen=True, slots=True)
class File:
    """A file of an image: its name in the image's directory, its length in bytes, its SHA-256 in hexadecimal."""

    name: str
    size: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Manifest:
    """The content of `manifest.json`; see the module. `files` is by role: kernel, initrd, root, volume."""

    name: str
    architecture: str
    recipe: Mapping[str, Any]
    recipe_digest: str
    kernel_version: str
    kernel_command_line: str
    packages: Mapping[str, str]
    files: Mapping[str, File]
    created_at: float
    format_version: int = FORMAT

    @property
    def digest(self) -> str:
        """The image's identity, 64 hexadecimal digits."""
        parts = [self.format_version, self.architecture, self.kernel_command_line]
        identity = [*parts, *([role, each.size, each.sha256] for role, each in sorted(self.files.items()))]
        return hashlib.sha256(json.dumps(identity).encode()).hexdigest()

    def to_json(self) -> bytes:
        """The file's bytes."""
        return json.dumps({**asdict(self), "digest": self.digest}, indent=1, sort_keys=True).encode() + b"\n"


def read(path: Path) -> Manifest:
    """The manifest in `path`. Raises FileNotFoundError, Corrupt when it is damaged or of another format version."""
    try:
        body = json.loads(path.read_bytes())
        version = body["format_version"]
        if version != FORMAT:
            raise Corrupt(
                f"the image in {path.parent} has format {version}, this version of Capsem reads {FORMAT}",
                hint="make a new one: capsem image build",
            )
        digest = body.pop("digest")
        body["files"] = {str(role): File(**each) for role, each in body["files"].items()}
        manifest = Manifest(**body)
        whole = manifest.digest == digest and manifest.files.keys() == ROLES.keys()
        # A manifest can come from elsewhere: its names must not lead out of its directory.
        names_are_plain = all(Path(each.name).name == each.name for each in manifest.files.values())
    except (ValueError, KeyError, TypeError, AttributeError) as exc:
        raise Corrupt(f"{path} is no image manifest: {exc!r}", hint="remove the image and make it again") from exc
    if not whole or not names_are_plain:
        raise Corrupt(f"{path} does not agree with itself", hint="remove the image and make it again")
    return manifest


def describe(path: Path) -> File:
    """Measure a file. Reads all of its data, but not its holes, so that a sparse volume costs what it holds."""
    size = path.stat().st_size
    digest = hashlib.sha256()
    zeroes = bytes(_BLOCK)
    with path.open("rb", buffering=0) as file:
        offset = 0
        while offset < size:
            data = _next_data(file.fileno(), offset, size)
            for start in range(offset, data, _BLOCK):
                digest.update(memoryview(zeroes)[: min(_BLOCK, data - start)])
            offset = data
            if offset < size:
                block = os.pread(file.fileno(), _BLOCK, offset)
                if not block:
                    break
                digest.update(block)
                offset += len(block)
    return File(path.name, size, digest.hexdigest())


def _next_data(fd: int, offset: int, size: int) -> int:
    """Where the next data begins at or after `offset`; `size` when only a hole is left."""
    try:
        return os.lseek(fd, offset, os.SEEK_DATA)
    except OSError:  # ENXIO: nothing but a hole up to the end
        return size
