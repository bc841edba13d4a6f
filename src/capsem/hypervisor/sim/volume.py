"""Layers of simulated volumes. A layer is a file of the store that records what was written to it:

    0 .. 4096   who it belongs to: JSON, padded with zeroes; never changes
    then        records: length and CRC-32 of what follows (8 bytes, big-endian), then JSON {path: file, or null: removed}

What a guest reads is what the topmost layer that knows a path says. A record that was cut off by a crash counts for
nothing, and the next one takes its place.
"""

from __future__ import annotations

import base64
import json
import os
import shutil
import struct
import subprocess
import tempfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from capsem.hypervisor.driver import Layer
from capsem.model.errors import Corrupt, HostNotReady
from capsem.store import durable

HEADER: Final = 4096
MAGIC: Final = "capsem simulated layer 1"
LEAST: Final = 8 * 1024 * 1024  # bytes of a file system without files
PER_FILE: Final = 16 * 1024
_RECORD: Final = struct.Struct(">II")
WORKSPACE: Final = "/root/"


@dataclass(frozen=True, slots=True)
class File:
    """A file of the guest; `mtime` in seconds since 1970."""

    data: bytes
    mode: int = 0o644
    mtime: int = 0

    def to_json(self) -> list[Any]:
        """As a record and the guest's memory have it."""
        return [base64.b64encode(self.data).decode("ascii"), self.mode, self.mtime]

    @classmethod
    def from_json(cls, body: list[Any]) -> File:
        """The inverse. Raises ValueError, TypeError."""
        data, mode, mtime = body
        return cls(base64.b64decode(data, validate=True), int(mode), int(mtime))


Files = dict[str, File | None]  # by absolute path; None: removed


def encode(files: Mapping[str, File | None]) -> dict[str, Any]:
    """For JSON."""
    return {path: None if file is None else file.to_json() for path, file in files.items()}


def decode(body: Mapping[str, Any]) -> Files:
    """The inverse. Raises ValueError, TypeError."""
    return {path: None if file is None else File.from_json(file) for path, file in body.items()}


def create(
    path: Path, *, size_mb: int, vm_id: str, layer_id: str, files: Mapping[str, File | None] | None = None
) -> None:
    """Write a new layer, mode 0600; durable on return. Raises OSError, among others FileExistsError; nothing is left."""
    fields = {"magic": MAGIC, "size_mb": size_mb, "vm_id": vm_id, "layer_id": layer_id}
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        try:
            os.write(fd, json.dumps(fields).encode().ljust(HEADER, b"\0"))
            if files:
                os.write(fd, _record(files))
            os.fsync(fd)
        finally:
            os.close(fd)
    except BaseException:
        path.unlink(missing_ok=True)
        raise
    durable.sync_directory(path.parent)


def _record(files: Mapping[str, File | None]) -> bytes:
    data = json.dumps(encode(files), separators=(",", ":")).encode()
    return _RECORD.pack(len(data), zlib.crc32(data)) + data


def size_mb(path: Path) -> int:
    """The size of the disk that a layer is one of, in MiB; `read` has seen the layer. Raises OSError."""
    with path.open("rb") as file:
        return int(json.loads(file.read(HEADER).rstrip(b"\0"))["size_mb"])


def read(path: Path, *, size_mb: int | None = None) -> tuple[Files, int]:
    """What a layer says, and where its last whole record ends. Raises Corrupt, OSError."""
    with path.open("rb") as file:
        start, rest = file.read(HEADER), file.read()
    try:
        fields = json.loads(start.rstrip(b"\0"))
        ours = fields["magic"] == MAGIC and len(start) == HEADER and size_mb in (None, fields["size_mb"])
    except (ValueError, KeyError, TypeError, RecursionError):
        ours = False
    if not ours:
        raise Corrupt(
            f"{path} is not a layer of the simulated hypervisor",
            hint="a VM stays with the hypervisor that it was made with",
        )
    files: Files = {}
    end = 0
    for data, end in _records(rest):  # noqa: B007 - how far it came
        try:
            files.update(decode(json.loads(data)))
        except (ValueError, TypeError, AttributeError, RecursionError) as error:
            raise Corrupt(f"{path}: a record makes no sense: {error}", hint="nothing was done with it") from error
    return files, HEADER + end


def _records(rest: bytes) -> Iterator[tuple[bytes, int]]:
    at = 0
    while at + _RECORD.size <= len(rest):
        length, crc = _RECORD.unpack_from(rest, at)
        data = rest[at + _RECORD.size : at + _RECORD.size + length]
        if len(data) != length or zlib.crc32(data) != crc:
            return
        at += _RECORD.size + length
        yield data, at


class Disk:
    """A volume as its machine has it open: what is below the top is only read."""

    def __init__(self, volume: Sequence[Layer]) -> None:
        """Raises Corrupt, OSError."""
        self.files: Files = {}
        self._cache: Files = {}
        self._fd = -1
        self.layers = [layer.path for layer in volume if layer.format != "raw"]
        for layer in self.layers:
            found, _ = read(layer)
            self.files.update(found)
        self._open(self.layers[-1])

    def _open(self, path: Path) -> None:
        _, end = read(path)
        fd = os.open(path, os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        os.ftruncate(fd, end)
        os.lseek(fd, end, os.SEEK_SET)
        self.close()
        self._fd = fd

    def write(self, files: Mapping[str, File | None], *, lying: bool = False) -> None:
        """One write, whole or not at all; on the host's disk after `flush`. `lying`: it only looks like it, until the
        next that does not. Raises OSError.
        """
        if lying:
            self._cache.update(files)
            self.files.update(files)
            return
        data, at = _record({**self._cache, **files}), os.lseek(self._fd, 0, os.SEEK_CUR)
        try:
            view = memoryview(data)
            while view:
                view = view[os.write(self._fd, view) :]
        except OSError:
            os.ftruncate(self._fd, at)
            os.lseek(self._fd, at, os.SEEK_SET)
            raise
        self.files.update(files)
        self._cache.clear()

    def flush(self) -> None:
        """Raises OSError."""
        if self._cache:
            self.write({})
        os.fsync(self._fd)

    def go_on(self, path: Path) -> None:
        """Write to another layer from here on. Raises Corrupt, OSError; then the top is the one that it was."""
        self.flush()
        self._open(path)
        self.layers.append(path)

    def close(self) -> None:
        """Let go of the top."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


class Ext4Image:
    """A volume that no machine runs on, as the file system that its guest would have made of it."""

    def __init__(self, volume: Sequence[Layer]) -> None:
        """Raises HostNotReady without mke2fs, Corrupt, OSError."""
        program = shutil.which("mke2fs", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")
        if program is None:
            raise HostNotReady("mke2fs is not installed", hint="apt install e2fsprogs")
        files: Files = {}
        for layer in volume:
            if layer.format != "raw":
                files.update(read(layer.path)[0])
        with tempfile.TemporaryDirectory(prefix="capsem-sim-") as text:
            image, tree = Path(text) / "volume", Path(text) / "tree"
            for each in ("upper", "workspace"):
                (tree / each).mkdir(parents=True)
            for path, file in files.items():
                if file is not None:
                    inside = path.startswith(WORKSPACE)
                    place = tree / ("workspace/" + path[len(WORKSPACE) :] if inside else f"upper{path}")
                    place.parent.mkdir(parents=True, exist_ok=True)
                    place.write_bytes(file.data)
                    place.chmod(file.mode)
                    os.utime(place, (file.mtime, file.mtime))
            size = LEAST + sum(PER_FILE + 2 * len(file.data) for file in files.values() if file is not None)
            options = ("-q", "-t", "ext4", "-J", "size=1", "-d", tree)
            subprocess.run([program, *options, image, f"{size // 1024}k"], check=True, capture_output=True)
            self._fd = os.open(image, os.O_RDONLY | os.O_CLOEXEC)

    def read(self, offset: int, size: int) -> bytes:
        """See Volume."""
        return os.pread(self._fd, size, offset).ljust(size, b"\0")

    def close(self) -> None:
        """See Volume."""
        os.close(self._fd)
