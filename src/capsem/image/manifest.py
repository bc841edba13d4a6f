"""What an image says of itself: `manifest.json` in its directory.

`digest` identifies the image: it is computed from the digests of its files and from what else decides how a guest
starts, so that two images with the same digest are the same image, wherever and whenever they were built. When it was
built is recorded, but is no part of it.

The digest of a file is written with its kind. `sha256:` is what `sha256sum` prints. `sparse-sha256:`, for the volume,
is the SHA-256 over the file's length and over each block of 64 KiB that is not all zeroes, preceded by its offset (both
as eight bytes, little-endian): holes cost nothing, and a copy that lost its holes is still the same file.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from capsem.image.recipe import FORMAT
from capsem.model.errors import Corrupt

NAME: Final = "manifest.json"
ROLES: Final = {"kernel": "vmlinux", "initrd": "initrd.img", "root": "root.erofs", "volume": "volume.raw"}
SPARSE: Final = frozenset({"volume"})  # the roles whose digest leaves holes out
SPARSE_KIND: Final = "sparse-sha256:"
_PLAIN_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*\Z")
_BLOCK: Final = 64 * 1024


@dataclass(frozen=True, slots=True)
class File:
    """A file of an image: its name in the image's directory, its length in bytes, its digest (see the module)."""

    name: str
    size: int
    digest: str


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
        identity = [*parts, *([role, each.size, each.digest] for role, each in sorted(self.files.items()))]
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
        names_are_plain = all(_PLAIN_NAME.match(each.name) for each in manifest.files.values())
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as exc:
        raise Corrupt(f"{path} is no image manifest: {exc!r}", hint="remove the image and make it again") from exc
    if not whole or not names_are_plain:
        raise Corrupt(f"{path} does not agree with itself", hint="remove the image and make it again")
    return manifest


def describe(path: Path, *, sparse: bool = False) -> File:
    """Measure a file; with `sparse`, its data but not its holes are read. Raises OSError."""
    with path.open("rb", buffering=0) as file:
        size = os.fstat(file.fileno()).st_size
        if not sparse:
            return File(path.name, size, f"sha256:{hashlib.file_digest(file, 'sha256').hexdigest()}")
        digest = hashlib.sha256(size.to_bytes(8, "little"))
        offset = 0
        while (offset := _next_data(file.fileno(), offset)) < size:
            block = os.pread(file.fileno(), _BLOCK, offset)
            if block.strip(b"\0"):
                digest.update(offset.to_bytes(8, "little") + block)
            offset += _BLOCK
    return File(path.name, size, f"{SPARSE_KIND}{digest.hexdigest()}")


def _next_data(fd: int, offset: int) -> int:
    """Where the first block that may hold data begins, at or after `offset`; the end of the file when none does."""
    try:
        return os.lseek(fd, offset, os.SEEK_DATA) // _BLOCK * _BLOCK
    except OSError:  # ENXIO: nothing but a hole up to the end
        return os.fstat(fd).st_size
